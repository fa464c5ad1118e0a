"""Classes from what data says of its pictures: numbers or names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
