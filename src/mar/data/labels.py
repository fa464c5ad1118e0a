"""Class numbers of labels in data, and of those that users type.

Data has numbers or names. Users may type numbers, names, parts of names, and for ImageNet's classes WordNet numbers
and synonyms.
"""

from __future__ import annotations

import codecs
import difflib
import logging
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from mar.assets import imagenet
from mar.data.accounts import log_once, shown
from mar.data.paths import natural_key

Label = int | str | None
"""A label in data: a class number (below 0: none), or a class name."""

MAX_CLASSES = 100_000
"""Numbers of classes up to here are taken; larger ones only where at least half of them occur."""

_WHOLE = re.compile(r"[+-]?[0-9]+(?:\.0*)?(?:[eE]\+?0+)?")
_FRACTION = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


class LabelError(ValueError):
    """A label fits no class; says where, and the label expected."""


def as_label(value: Any, where: str) -> Label:
    """Return a label of any source: a number, text, or None. Raises LabelError for anything else.

    Whole floats are numbers; bytes are text; null, NaN and empty text are no label.
    """
    if isinstance(value, bytes | bytearray):
        value = decode_text(bytes(value), where).strip() or None
    if value is None or isinstance(value, str):
        if value is None or not value.strip():
            return None
        # JSON may hold halves of characters, which no file can
        return value if value.isascii() else value.encode(errors="replace").decode()
    if isinstance(value, bool | np.bool_ | int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        if math.isnan(value):
            return None
        if math.isfinite(value) and value == int(value):
            return int(value)
    kind = type(value).__name__
    raise LabelError(
        f"data: {where} has the label {shown(repr(value), 60)} ({kind}), expected a whole number or a name; correct it"
    )


def parse_label(data: bytes, where: str) -> Label:
    """Return the label in a file: a number if it is one, such as 1 or 1.0, else text."""
    text = decode_text(data, where).strip().strip("\0").strip()
    if _WHOLE.fullmatch(text) and len(text) < 400:
        return int(re.split(r"[.eE]", text)[0])
    if _FRACTION.fullmatch(text):
        return as_label(float(text), where)
    if len(lines := text.splitlines()) > 1:
        raise LabelError(
            f"data: {where} has {len(lines)} lines, such as {shown(lines[0], 60)}, expected one whole number or name; "
            "correct it"
        )
    return text or None


def decode_text(data: bytes, where: str) -> str:
    """Decode UTF-8, or UTF-16 by its mark. Raises LabelError for other encodings."""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise LabelError(
            f"data: {where} is not in UTF-8 ({error.reason} at byte {error.start}); save its label in that encoding"
        ) from None


def class_names(labels: Iterable[Label], name: str = "the data") -> tuple[str, ...]:
    """Return the classes of labels: all numbers, or sorted names.

    LabelError for numbers far beyond those that occur. `name` is that of the source.
    """
    values = {label for label in labels if label is not None and not (isinstance(label, int) and label < 0)}
    numbers = [int(value) for value in values if isinstance(value, int)]
    if len(numbers) == len(values):
        last = max(numbers, default=-1)
        if last >= max(MAX_CLASSES, 2 * len(numbers)):
            text = str(last) if last < 10**30 else f"{str(last)[:10]}... of {len(str(last))} digits"
            raise LabelError(
                f"data: {name} has the label {text}, but only {len(numbers):,} different ones: a model has a class for "
                "each number from 0 on; number them so, or give names"
            )
        return tuple(str(number) for number in range(last + 1))
    return tuple(sorted(set(map(_as_name, values)), key=natural_key))


def check_twins(classes: Sequence[str], name: str) -> None:
    """Log a warning of classes with names that look alike."""
    by_form: dict[str, str] = {}
    for each in classes:
        form = " ".join(unicodedata.normalize("NFC", each).casefold().split())
        twin = by_form.setdefault(form, each)
        if twin != each:
            log_once(
                logging.WARNING,
                f"data: {shown(name, 200)} has classes whose names differ only in case, spaces or the form of accents: "
                f"{twin!a} and {each!a}; are they one?",
            )
            return


def class_number(label: Label, numbers: Mapping[str, int]) -> int:
    """Return the class number of a label, by the numbers of `class_names`. -1: none."""
    return -1 if label is None or (isinstance(label, int) and label < 0) else numbers[_as_name(label)]


def _as_name(label: int | str) -> str:
    return str(int(label) if isinstance(label, bool) else label)


def check_label(name: str, label: int, classes: int) -> None:
    """Raise ValueError if image `name` has a class number out of range."""
    if not -1 <= label < max(classes, 1):
        raise ValueError(f"{name} has the label {label}, but there are {classes} classes")


def resolve_labels(labels: Iterable[SupportsIndex | str | None], classes: Sequence[str], count: int) -> list[int]:
    """Return the class numbers of labels that a user typed; None gives -1.

    A name may be in any case, or any part of one class's name. If all classes are ImageNet's, by name or WordNet
    number, synonyms count as names. Raises ValueError for a number out of range, a name of no class or of several, and
    anything else.

    Args:
        labels: numbers, names or None.
        classes: names of the model's classes; may be empty.
        count: number of the model's classes.
    """
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise ValueError(f"labels: got {labels!r}, expected a list of them, as [{labels!r}]")
    names = all_names(classes)
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
    name = " ".join(label.casefold().split())
    matches = _matching_classes(name, names) if name else []
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = ", ".join(f"{i} ({classes[i]})" for i in matches[:8]) + (", ..." if len(matches) > 8 else "")
        raise ValueError(f"label {label!r} may be any of {len(matches)} classes: {shown}; give one of these numbers")
    raise ValueError(f"label {label!r} is not a class{_suggestion(name, names, classes)}")


def _matching_classes(name: str, names: list[tuple[str, ...]]) -> list[int]:
    """Return the classes that match a name by the strictest rule with any match."""
    rules: tuple[Callable[[tuple[str, ...]], bool], ...] = (
        lambda known: name == known[0],
        lambda known: name in known,
        lambda known: any(f" {name} " in f" {each} " for each in known),
        lambda known: any(name in each for each in known),
    )
    matches = ([i for i, known in enumerate(names) if rule(known)] for rule in rules)
    return next(filter(None, matches), [])


def _suggestion(name: str, names: list[tuple[str, ...]], classes: Sequence[str]) -> str:
    owner = {each: i for i, known in reversed(list(enumerate(names))) for each in known}
    close = dict.fromkeys(owner[each] for each in difflib.get_close_matches(name, list(owner), n=3))
    if close:
        return "; close to it: " + ", ".join(f"{i} ({classes[i]})" for i in close)
    return f"; the {len(classes)} classes are {', '.join(classes[:10])}" + (", ..." if len(classes) > 10 else "")


def all_names(classes: Sequence[str]) -> list[tuple[str, ...]]:
    """Return all names of every class, its own first, in lower case."""
    known = {key: entry for entry in imagenet() for key in (entry.name, entry.wnid)}
    others: dict[str, tuple[str, ...]] = {}
    if all(name in known for name in classes):
        others = {name: (known[name].name, known[name].wnid, *known[name].synonyms) for name in classes}
    return [tuple(each.casefold() for each in (name, *others.get(name, ()))) for name in classes]
