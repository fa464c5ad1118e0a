"""What people name on the command line -> sets of pictures and reference statistics."""

from __future__ import annotations

import zipfile
from pathlib import Path

from mar.data.sources import open_source
from mar.evaluation.evaluate import Advance, Wanted, collect
from mar.evaluation.features import Extractor
from mar.evaluation.statistics import Statistics
from mar.evaluation.streams import NpzPictures, PictureSet, SourcePictures
from mar.pipeline import WEIGHTS_FILE


def is_statistics(spec: str) -> bool:
    """Whether `spec` is an `.npz` that holds statistics rather than pictures."""
    path = Path(spec)
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "mu.npy" in archive.namelist()


def is_pictures(spec: str) -> bool:
    """Whether `spec` is an `.npz`, a Parquet file, or a folder without a model in it."""
    path = Path(spec)
    return path.suffix in (".npz", ".parquet") or (path.is_dir() and not (path / WEIGHTS_FILE).exists())


def open_pictures(
    spec: str, *, split: str = "train", size: tuple[int, int] | None = None, limit: int | None = None
) -> PictureSet:
    """The pictures of an `.npz`, or of a data source as `open_source` knows them. ValueError where there are none.

    `size` (height, width) is what those of a source are brought to; an `.npz` has to have it already.
    """
    path = Path(spec)
    if path.suffix != ".npz":
        return SourcePictures(open_source(spec, split), f"{spec} ({split})", size=size, limit=limit)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    found = NpzPictures(path, limit=limit)
    if size is not None and found.shape[1:3] != size:
        have, want = ("x".join(map(str, pair)) for pair in (found.shape[1:3], size))
        raise ValueError(f"{path} has pictures of {have} pixels, expected {want}; make it again at that size")
    return found


def open_reference(
    spec: str, extractor: Extractor, wanted: Wanted, *, split: str = "train", size: tuple[int, int] | None = None,
    batch: int = 64, advance: Advance | None = None,
) -> Statistics:  # fmt: skip
    """Statistics from a file, or measured now from the pictures that `spec` names, of which features are `wanted`."""
    if is_statistics(spec):
        found = Statistics.load(Path(spec), features=wanted.features)
        if len(found.mean) != extractor.width:
            raise ValueError(
                f"{spec} has statistics of {len(found.mean)} features, but {extractor.name} has {extractor.width}; "
                "choose the --features they were made with"
            )
        return found
    pictures = open_pictures(spec, split=split, size=size)
    return collect(pictures, extractor, wanted=wanted, batch=batch, advance=advance).statistics
