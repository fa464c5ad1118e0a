"""Pictures that are kept from learning, to judge by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mar.data.examples import Example, Source
from mar.data.folder import FolderSource
from mar.data.sources import open_source

EVERY = 20
"""Data without a test part gives every so manieth of its pictures."""


@dataclass(frozen=True)
class Part:
    """Some of a source's pictures, by their numbers there."""

    source: Source
    indices: np.ndarray

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of the whole source."""
        return self.source.classes

    @property
    def flips(self) -> bool:
        """As the whole source says."""
        return self.source.flips

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]


def spread(source: Source, count: int) -> Part:
    """At most `count` pictures, evenly over the source, which may be sorted by class."""
    count = min(count, len(source))
    return Part(source, np.arange(count) * len(source) // max(count, 1))


def hold_out(spec: str | Path) -> tuple[Source, Source]:
    """The pictures to learn from, and others to judge by: the data's test part.

    Where it has none, every 20th picture is kept from the first (the last of fewer): a source may be sorted by class,
    so that its end would be one class. ValueError for a single picture.
    """
    source = open_source(spec)
    if (test := _test_part(spec)) is not None:
        return source, test
    if len(source) < 2:
        raise ValueError(f"data: {spec} holds one picture, but one to learn from and one to judge by are needed")
    every = min(EVERY, len(source))
    kept = np.arange(len(source)) % every == every - 1
    return Part(source, np.flatnonzero(~kept)), Part(source, np.flatnonzero(kept))


def _test_part(spec: str | Path) -> Source | None:
    path = Path(spec).expanduser()
    if path.is_file() or (path / "state.json").is_file():  # one table
        return None
    try:
        found = open_source(spec, "test")
    except ValueError:  # it says that there is no such part
        return None
    return None if isinstance(found, FolderSource) and found.folder == path else found
