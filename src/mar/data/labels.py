"""Classes from what data says of its pictures: numbers or names.

Class numbers from what people type: numbers, names, WordNet's numbers and synonyms for ImageNet's classes.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import SupportsIndex

from mar.assets import imagenet
from mar.data.folder import natural_key

Label = int | str | None
"""What a table or a shard says of a picture's class: its number (below 0: none), or its name."""


def class_names(labels: Iterable[Label]) -> tuple[str, ...]:
    """The classes that labels are of: numbers count from 0 up to the largest; names are sorted as people do."""
    plain = map(_plain, labels)
    values = {label for label in plain if label is not None and not (isinstance(label, int) and label < 0)}
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) == len(values):
        return tuple(str(number) for number in range(max(numbers, default=-1) + 1))
    return tuple(sorted(map(str, values), key=natural_key))


def class_number(label: Label, numbers: Mapping[str, int]) -> int:
    """The number of a label's class, given those of `class_names`; -1 where it has none."""
    label = _plain(label)
    return -1 if label is None or (isinstance(label, int) and label < 0) else numbers[str(label)]


def _plain(label: Label) -> Label:
    """No and yes, which Python counts as numbers but writes as words, as the numbers 0 and 1."""
    return int(label) if isinstance(label, bool) else label


def check_label(name: str, label: int, classes: int) -> None:
    """Raises ValueError where the picture `name` has a class number that there is not."""
    if not -1 <= label < max(classes, 1):
        raise ValueError(f"{name} has the label {label}, but there are {classes} classes")


def resolve_labels(labels: Iterable[SupportsIndex | str | None], classes: Sequence[str], count: int) -> list[int]:
    """The class numbers of `labels` for a model with `count` classes called `classes` (may be empty); None gives -1.

    A name may be in any case, or any part of one that only one class has. Where all classes are ImageNet's, by name or
    WordNet number, so may their synonyms. Raises ValueError for a number out of range, for a name that no class or
    more than one has, and for what is neither.
    """
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise ValueError(f"labels: got {labels!r}, expected a list of them, as [{labels!r}]")
    names = _all_names(classes)
    return [_resolve(label, names, classes, count) for label in labels]


def _resolve(
    label: SupportsIndex | str | None, names: list[tuple[str, ...]], classes: Sequence[str], count: int
) -> int:
    if label is None:
        return -1
    exact = [i for i, name in enumerate(classes) if name == label] if isinstance(label, str) else []
    if len(exact) == 1:  # first, since a class may be called "7"
        return exact[0]
    try:
        number = int(label) if isinstance(label, str) else operator.index(label)
    except ValueError:
        return _by_name(str(label), names, classes)
    except TypeError:
        raise ValueError(f"label {label!r}: expected a whole number, a name, or None") from None
    if count == 0:
        raise ValueError(f"label {number}: this model has no classes; leave the labels out")
    if not 0 <= number < count:
        raise ValueError(f"label {number} is out of range: this model has classes 0 to {count - 1}")
    return number


def _by_name(label: str, names: list[tuple[str, ...]], classes: Sequence[str]) -> int:
    if not names:
        raise ValueError(f"label {label!r}: this model has no class names; give a number")
    wanted = " ".join(label.casefold().split())
    fitting = _fitting(wanted, names) if wanted else []
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        shown = ", ".join(f"{i} ({classes[i]})" for i in fitting[:8]) + (", ..." if len(fitting) > 8 else "")
        raise ValueError(f"label {label!r} may be any of {len(fitting)} classes: {shown}; give one of these numbers")
    raise ValueError(f"label {label!r} is not a class{_suggestion(wanted, names, classes)}")


def _fitting(wanted: str, names: list[tuple[str, ...]]) -> list[int]:
    """The classes that fit a name by the strictest reading that fits any."""
    readings: tuple[Callable[[tuple[str, ...]], bool], ...] = (
        lambda known: wanted == known[0],
        lambda known: wanted in known,
        lambda known: any(f" {wanted} " in f" {name} " for name in known),
        lambda known: any(wanted in name for name in known),
    )
    every = ([i for i, known in enumerate(names) if fits(known)] for fits in readings)
    return next(filter(None, every), [])


def _suggestion(wanted: str, names: list[tuple[str, ...]], classes: Sequence[str]) -> str:
    owner = {name: i for i, known in reversed(list(enumerate(names))) for name in known}
    close = dict.fromkeys(owner[name] for name in difflib.get_close_matches(wanted, list(owner), n=3))
    if close:
        return "; close to it: " + ", ".join(f"{i} ({classes[i]})" for i in close)
    return f"; the {len(classes)} classes are {', '.join(classes[:10])}" + (", ..." if len(classes) > 10 else "")


def _all_names(classes: Sequence[str]) -> list[tuple[str, ...]]:
    """Every name of every class, its own first, in lower case."""
    known = {key: entry for entry in imagenet() for key in (entry.name, entry.wnid)}
    others: dict[str, tuple[str, ...]] = {}
    if all(name in known for name in classes):
        others = {name: (known[name].name, known[name].wnid, *known[name].synonyms) for name in classes}
    return [tuple(each.casefold() for each in (name, *others.get(name, ()))) for name in classes]
