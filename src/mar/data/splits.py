"""Pictures that are kept from learning, to judge by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from mar.checkpoint.files import write_text
from mar.config import ConfigError
from mar.data.fingerprint import picture_names, source_digest
from mar.data.folder import FolderSource
from mar.data.images import Example, Source
from mar.data.latent_cache import LatentSource
from mar.data.sources import open_data, open_source
from mar.data.stream import StreamSource
from mar.random import make_generator

EVERY = 20
"""A tokenizer's data without a test part gives one of so many pictures."""

HELD_OUT = "held-out.json"
"""A file in a run's folder that says which pictures are held out: they are so for good, whatever else is added."""

_CHOICE = 0x4E1D


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


def stratified_indices(length: int, count: int) -> np.ndarray:
    """The numbers of at most `count` of `length` pictures, ascending, always the same: one of each of as many stretches
    of equal length, since a source may be sorted by class; which one is drawn, since classes may come in turns."""
    count = min(count, length)
    edges = np.arange(count + 1) * length // max(count, 1)
    places = torch.rand(count, dtype=torch.float64, generator=make_generator(_CHOICE)).numpy()
    return edges[:-1] + np.floor(places * np.diff(edges)).astype(np.int64)


def subset(source: Source, count: int) -> Part:
    """At most `count` pictures of a source, as `choose` does it."""
    return Part(source, stratified_indices(len(source), count))


@overload
def train_val_split(
    source: LatentSource, every: int, noted: Mapping[str, Any] | None = None
) -> tuple[LatentSource, LatentSource]: ...
@overload
def train_val_split(source: Source, every: int, noted: Mapping[str, Any] | None = None) -> tuple[Source, Source]: ...
def train_val_split(source: Any, every: int, noted: Mapping[str, Any] | None = None) -> Any:
    """The pictures to learn from, and one of `every`, chosen by `choose`, to judge by. The same pictures of a latent
    cache as of what was cached. ValueError for a single picture.

    `noted`: those that were chosen before (`read_note`), of which the ones still there are held out, and no others.
    ConfigError where that can't be told.
    """
    if len(source) < 2:
        raise ValueError(f"data: got {len(source)} picture, but one to learn from and one to judge by are needed")
    kept = np.zeros(len(source), dtype=bool)
    kept[stratified_indices(len(source), max(1, len(source) // every)) if noted is None else _noted(source, noted)] = (
        True
    )
    learned, others = np.flatnonzero(~kept), np.flatnonzero(kept)
    if isinstance(source, LatentSource):
        return source.part(learned), source.part(others)
    return Part(source, learned), Part(source, others)


def _noted(source: Source | LatentSource, noted: Mapping[str, Any]) -> np.ndarray:
    """The numbers of the pictures that were noted."""
    if "rows" in noted:
        if noted["digest"] == _digest(source):
            return np.array(noted["rows"], dtype=np.int64)
        found = None
    else:
        names, wanted = None if isinstance(source, LatentSource) else picture_names(source), {*noted["names"]}
        found = None if names is None else [number for number, name in enumerate(names) if name in wanted]
    if not found:
        raise ConfigError(
            "the data is not what it was when the run began, and which of its pictures were held out can't be told; "
            "put it back, or begin another run in another folder"
        )
    return np.array(found, dtype=np.int64)


def _digest(source: Source | LatentSource) -> str:
    return source.about.source if isinstance(source, LatentSource) else source_digest(source)


def read_note(folder: Path) -> dict[str, Any] | None:
    """Which pictures the run in `folder` holds out; None where that was not noted. ConfigError for a damaged file."""
    path = folder / HELD_OUT
    if not path.is_file():
        return None
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return {"names": noted["names"]} if "names" in noted else {name: noted[name] for name in ("digest", "rows")}
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} can't be read ({error}); put it back, or begin another run") from error


def keep_note(folder: Path, learned: object) -> None:
    """Notes in `folder` which pictures a run that learns from `learned`, the one part that `divide` made, holds out:
    the first time, since those that are missing later may come back."""
    if (folder / HELD_OUT).is_file() or not isinstance(learned, Part | LatentSource):
        return
    if isinstance(learned, LatentSource):
        whole: Source | LatentSource = learned
        names, count, rows = None, learned.about.pictures, learned.rows
    else:
        whole = learned.source
        names, count, rows = picture_names(whole), len(whole), learned.indices
    others = np.setdiff1d(np.arange(count), rows).tolist()
    note = {"digest": _digest(whole), "rows": others} if names is None else {"names": [names[row] for row in others]}
    write_text(folder / HELD_OUT, json.dumps(note))


def hold_out(spec: str | Path, noted: Mapping[str, Any] | None = None) -> tuple[Source, Source]:
    """The pictures to learn a tokenizer from, and others to judge it by: the data's test part; where it has none, one
    of twenty pictures (one of fewer), or those of `noted`. ValueError for a single picture."""
    source = open_source(spec)
    if (test := test_split(spec)) is not None:
        return source, test
    return train_val_split(source, EVERY, noted)


def open_parts(
    spec: str | Path,
    *,
    classes: int = 0,
    every: int = 0,
    others: str | Path | None = None,
    noted: Mapping[str, Any] | None = None,
) -> tuple[Source | LatentSource | StreamSource, Source | LatentSource | None]:
    """What a run learns from (see `open_data`), and what it is validated on, which it never learns from.

    `others`: other pictures, their test part if they have one. Else, if `every` is not 0, one picture of so many, which
    is kept from learning in any case; those of `noted`, where it was divided before. Else the test part of the data,
    which for a latent cache is that of the pictures that were cached, where they still are, unless it is what was
    cached; None without. ValueError for a stream that is to be divided: it can't be counted.
    """
    learned = open_data(spec, classes)
    kept: Source | LatentSource | None = None
    if every:
        if isinstance(learned, StreamSource):
            raise ValueError(f"data: {spec} is read in passing, and none of it can be held out; give --validate-on")
        learned, kept = train_val_split(learned, every, noted)
    if others is not None:
        test = test_split(others)
        kept = open_source(others) if test is None else test
    elif not every:
        kept = test_split(learned.about.data if isinstance(learned, LatentSource) else spec)
        if kept is not None and isinstance(learned, LatentSource) and source_digest(kept) == learned.about.source:
            kept = None
    return learned, kept


def test_split(spec: str | Path) -> Source | None:
    """The pictures for testing that come with those of `spec` (see `open_source`); None where none do."""
    path = Path(spec).expanduser()
    if path.is_file() or (path / "state.json").is_file():  # one table
        return None
    try:
        found = open_source(spec, "test")
    except ValueError:  # it says that there is no such part
        return None
    return None if isinstance(found, FolderSource) and found.folder == path else found
