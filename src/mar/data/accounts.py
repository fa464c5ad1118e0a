"""Accounts of sources: a line for each opening, with all that was taken and all that was left out."""

from __future__ import annotations

import logging
import os
from collections import Counter

import numpy as np

from mar.terminal import printable

logger = logging.getLogger("mar.data")

OTHER_PARTS = "pictures of other parts"
"""A reason to leave out pictures: they are read when their part is."""
SHOWN_NAME = 100
"""Characters of a name that a line shows."""

_logged: set[str] = set()
"""Lines of this process: data is opened several times."""


class Account:
    """Counts what a source leaves out, by reason, with an example each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.pictures = self.without_label = 0
        self.classes: tuple[str, ...] = ()

    def leave_out(self, reason: str, example: str, count: int = 1) -> None:
        """Count items that are left out.

        Args:
            reason: a plural noun, as in "12 hidden files".
            example: name of the first of them.
            count: how many they are.
        """
        if count:
            self.counts[reason] += count
            self.examples.setdefault(reason, example)

    def take(self, labels: np.ndarray, classes: tuple[str, ...]) -> None:
        """Count the labels of all pictures; -1: none."""
        self.pictures, self.classes = len(labels), classes
        self.without_label = int((labels < 0).sum())

    @property
    def line(self) -> str:
        """The whole account, in one line."""
        noun = "picture" if self.pictures == 1 else "pictures"
        parts = [f"data: {shown(self.name, 2 * SHOWN_NAME)}: {self.pictures:,} {noun}, {self._labels()}"]
        if self.counts:
            parts.append(self.left_out)
        return "; ".join(parts)

    @property
    def left_out(self) -> str:
        """The items left out."""
        return f"left out: {', '.join(map(self._item, self.counts))}"

    def _item(self, reason: str) -> str:
        count = self.counts[reason]
        return f"{reason}: {count:,} ({'such as ' if count > 1 else ''}{shown(self.examples[reason])})"

    def _labels(self) -> str:
        if not self.classes:
            return "no labels"
        labeled = self.pictures - self.without_label
        noun = "class" if len(self.classes) == 1 else "classes"
        text = f"labels of {len(self.classes):,} {noun}"
        return text if not self.without_label else f"{labeled:,} of them with {text}"

    @property
    def level(self) -> int:
        """WARNING if anything is left out or has no label, else INFO."""
        left_out = bool(self.counts.keys() - {OTHER_PARTS} or (self.classes and self.without_label))
        return logging.WARNING if left_out else logging.INFO

    def log(self) -> None:
        """Log the line."""
        log_once(self.level, self.line)


class StreamAccount(Account):
    """An account of shards that are read in passing. Their images are not counted."""

    text = ""
    """Shards and labels, in words."""

    @property
    def line(self) -> str:
        """The account, in one line."""
        return f"data: {shown(self.name, 2 * SHOWN_NAME)}: {self.text}"

    def leave_out(self, reason: str, example: str, count: int = 1) -> None:
        """Count items, and log the first one of each reason: a stream has no end at which all could be counted."""
        if count and reason not in self.counts:
            name = shown(self.name, 2 * SHOWN_NAME)
            log_once(logging.WARNING, f"data: {name}: left out: {reason}, the first of them {shown(example)}")
        super().leave_out(reason, example, count)


def is_shown(level: int) -> bool:
    """Tell if accounts of a level reach people."""
    return logger.isEnabledFor(level)


def log_once(level: int, line: str) -> None:
    """Log a line, once a process, on the first rank."""
    if line not in _logged and os.environ.get("RANK", "0") == "0":
        _logged.add(line)
        logger.log(level, "%s", line)


def shown(text: str, most: int = SHOWN_NAME) -> str:
    """Return text for a message, escaped and shortened."""
    plain = printable(text)
    return plain if len(plain) <= most else f"{plain[: most // 2]}...{plain[-most // 2 + 3 :]}"
