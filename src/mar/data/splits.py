"""Splits: images held out from training, and the note of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from mar.checkpoint import checksums
from mar.config import ConfigError
from mar.data.accounts import Account
from mar.data.captions import CaptionError, Captions, captions_of, chosen_captions
from mar.data.folder import FolderSource
from mar.data.images import Example, Source, UnreadableImage, source_digest
from mar.data.latent_cache import LatentSource
from mar.data.order import labels_of
from mar.data.paths import NoSplit
from mar.data.sources import is_stream, open_data, open_source
from mar.data.stream import StreamSource
from mar.data.webdataset import TarSource
from mar.random import make_generator

TOKENIZER_HOLD_OUT = 20
"""Without a test split, one of so many images is held out from a tokenizer."""

HELD_OUT = "held-out.json"
"""A file in a run's folder with the names or indices of its held-out images: they stay held out, whatever is added."""

MAX_LOOKED_AT = 1000
"""Held-out images, at most, that are looked at for a readable one."""

_CHOICE = 0x4E1D


@dataclass(frozen=True)
class Subset:
    """The images of a source at `indices`."""

    source: Source
    indices: np.ndarray

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the whole source."""
        return self.source.classes

    @property
    def flips(self) -> bool:
        """True if images of the source may be mirrored."""
        return self.source.flips

    @cached_property
    def captions(self) -> Captions:
        """Captions of these images; empty if the source has none."""
        return chosen_captions(captions_of(self.source), self.indices)

    @property
    def labels(self) -> np.ndarray | None:
        """Class numbers of these images; None if the source does not know them without reading images."""
        labels = labels_of(self.source)
        return None if labels is None else labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]


def account_of(source: object) -> Account | None:
    """Return the account of a source, or of its whole."""
    account = getattr(source.source if isinstance(source, Subset) else source, "account", None)
    return account if isinstance(account, Account) else None


# ---- choosing


def stratified_indices(length: int, count: int) -> np.ndarray:
    """Choose at most `count` of `length` indices, ascending, always the same ones.

    One is drawn from each of `count` stretches of equal length: a source may be sorted by class, or its classes may
    come in turns.
    """
    count = min(count, length)
    edges = np.arange(count + 1) * length // max(count, 1)
    offsets = torch.rand(count, dtype=torch.float64, generator=make_generator(_CHOICE)).numpy()
    return edges[:-1] + np.floor(offsets * np.diff(edges)).astype(np.int64)


def subset(source: Source, count: int) -> Subset:
    """Choose at most `count` images of a source by `stratified_indices`."""
    return Subset(source, stratified_indices(len(source), count))


@overload
def train_val_split(
    source: LatentSource, every: int, held_out: Mapping[str, Any] | None = None
) -> tuple[LatentSource, LatentSource]: ...
@overload
def train_val_split(source: Source, every: int, held_out: Mapping[str, Any] | None = None) -> tuple[Source, Source]: ...
def train_val_split(source: Any, every: int, held_out: Mapping[str, Any] | None = None) -> Any:
    """Split a source into training images and one of `every` for validation.

    A latent cache is split like the images that were cached. `held_out`, a note of `load_held_out`, holds out those of
    its images that are still there, and no others. Raises ValueError for a single image, ConfigError for a note that
    does not fit.
    """
    if len(source) < 2:
        raise ValueError(f"data: got {len(source)} picture, but one to learn from and one to judge by are needed")
    if held_out is None:
        chosen = stratified_indices(len(source), max(1, len(source) // every))
    else:
        chosen = _noted_indices(source, held_out)
    is_val = np.zeros(len(source), dtype=bool)
    is_val[chosen] = True
    train, val = np.flatnonzero(~is_val), np.flatnonzero(is_val)
    if isinstance(source, LatentSource):
        return source.subset(train), source.subset(val)
    return Subset(source, train), Subset(source, val)


# ---- the note of a run


def load_held_out(folder: Path) -> dict[str, Any] | None:
    """Load the note of the run in `folder`; None: no note. Raises ConfigError if it is damaged."""
    path = folder / HELD_OUT
    if not path.is_file():
        return None
    try:
        note = checksums.read_json(path)
        return {"names": note["names"]} if "names" in note else {name: note[name] for name in ("digest", "rows")}
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} can't be read ({error}); put it back, or begin another run") from error


def save_held_out(folder: Path, train: object) -> None:
    """Save a note of the images held out from `train` in `folder`.

    `train` is a part that `train_val_split` made; anything else is not noted. An earlier note stays: images that are
    missing now may come back.
    """
    if (folder / HELD_OUT).is_file() or not isinstance(train, Subset | LatentSource):
        return
    if isinstance(train, LatentSource):
        whole: Source | LatentSource = train
        names, count = None, train.manifest.pictures
    else:
        whole = train.source
        names, count = _image_names(whole), len(whole)
    val = np.setdiff1d(np.arange(count), train.indices).tolist()
    note = {"digest": _digest(whole), "rows": val} if names is None else {"names": [names[index] for index in val]}
    checksums.write_json(folder / HELD_OUT, note)


def _noted_indices(source: Source | LatentSource, held_out: Mapping[str, Any]) -> np.ndarray:
    """Return the indices of the held-out images that are still there."""
    indices: list[int] = []
    if "rows" in held_out:
        if held_out["digest"] == _digest(source):
            return np.array(held_out["rows"], dtype=np.int64)
    elif not isinstance(source, LatentSource) and (names := _image_names(source)) is not None:
        noted = {*held_out["names"]}
        indices = [index for index, name in enumerate(names) if name in noted]
    if not indices:
        raise ConfigError(
            "the data is not what it was when the run began: its held-out pictures can't be told from the others; "
            "put it back, or begin another run in another folder"
        )
    return np.array(indices, dtype=np.int64)


def _image_names(source: Source) -> list[str] | None:
    """Return names that stay when images are added; None for a source without unique ones."""
    names = source.image_names() if isinstance(source, FolderSource | TarSource) else []
    return names if names and len({*names}) == len(names) else None


def _digest(source: Source | LatentSource) -> str:
    return source.manifest.source if isinstance(source, LatentSource) else source_digest(source)


# ---- opening data with its split


def hold_out(spec: str | Path, held_out: Mapping[str, Any] | None = None) -> tuple[Source, Source]:
    """Open images to train a tokenizer on, and validation images.

    The latter are the data's test split; if it has none, one of twenty images, or those of the note `held_out`. Raises
    ValueError for a single image.
    """
    source = open_source(spec)
    train, val = source, open_test_split(spec)
    if val is None:
        train, val = train_val_split(source, TOKENIZER_HOLD_OUT, held_out)
    _check_readable(val, str(spec))
    return train, val


def _check_readable(val: Source, name: str) -> None:
    """Raise ValueError if no image of a held-out set can be read: nothing could be measured."""
    error: UnreadableImage | None = None
    for index in range(min(len(val), MAX_LOOKED_AT)):
        try:
            _ = val[index]
        except UnreadableImage as broken:
            error = error or broken
        else:
            return
    if error is not None:
        raise ValueError(
            f"data: none of {min(len(val), MAX_LOOKED_AT):,} held-out pictures of {name} can be read, such as "
            f"{error.name} ({error.why}); replace them, or take them out of the data"
        )


def open_train_val(
    spec: str | Path,
    *,
    classes: int = 0,
    every: int = 0,
    validate_on: str | Path | None = None,
    held_out: Mapping[str, Any] | None = None,
    caption_column: str | None = None,
) -> tuple[Source | LatentSource | StreamSource, Source | LatentSource | None]:
    """Open training and validation data of a run. None: no validation data.

    Validation data is, in this order: `validate_on`; the held-out images; the test split of the data. For a latent
    cache, this is the test split of its images, if they are still there and were not cached themselves.

    Args:
        spec: the training data, as `open_data` takes it.
        classes: number of classes, to check labels of streams.
        every: hold out one of so many images; 0: none. ValueError for a stream.
        validate_on: other data, its test split if it has one.
        held_out: the note of `load_held_out`, if the run has held out images before.
        caption_column: column of captions in all of it, as for `open_source`.
    """
    train = open_data(spec, classes, caption_column)
    val: Source | LatentSource | None = None
    if every:
        if isinstance(train, StreamSource):
            raise ValueError(f"data: {spec} is read in passing, and none of it can be held out; give --validate-on")
        train, val = train_val_split(train, every, held_out)
    if validate_on is not None:
        test = open_test_split(validate_on, caption_column)
        val = open_source(validate_on, caption_column=caption_column) if test is None else test
    elif not every:
        if isinstance(train, LatentSource):
            val = _test_split_of(train, caption_column)
        else:
            val = open_test_split(spec, caption_column)
    return train, val


def _test_split_of(latents: LatentSource, caption_column: str | None) -> Source | None:
    """Open the test split of a cache's images; None: they were cached themselves, or can't be opened here any more."""
    try:
        val = open_test_split(latents.manifest.data, caption_column)
    except CaptionError:
        raise
    except (ValueError, OSError):
        return None
    return None if val is None or source_digest(val) == latents.manifest.source else val


def open_test_split(spec: str | Path, caption_column: str | None = None) -> Source | None:
    """Open the test split of data; None: it has none. ValueError for one that can't be read."""
    path = Path(spec).expanduser()
    if is_stream(spec) or path.is_file() or (path / "state.json").is_file():  # read in passing, or one table
        return None
    try:
        source = open_source(spec, "test", caption_column)
    except NoSplit:
        return None
    return None if isinstance(source, FolderSource) and source.folder == path else source
