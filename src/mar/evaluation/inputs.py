"""What people name on the command line -> sets of pictures and reference statistics."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

from mar.data.files import SHARDS
from mar.data.sources import open_source
from mar.evaluation.evaluate import Advance, Wanted, collect
from mar.evaluation.features import Extractor
from mar.evaluation.statistics import About, Statistics, check_comparable
from mar.evaluation.streams import NpzPictures, PictureSet, SourcePictures
from mar.pipeline import WEIGHTS_FILE
from mar.zoo import BUNDLED

RUN_FILE = "run.json"
"""What tells the folder of a run (`mar.training.run`, which this room does not know)."""


def is_statistics(spec: str) -> bool:
    """Whether `spec` is an `.npz` that holds statistics rather than pictures."""
    path = Path(spec)
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except zipfile.BadZipFile:
        return False  # what is wrong with it is said by who opens it


def is_pictures(spec: str) -> bool:
    """Whether `spec` is an `.npz`, a Parquet or .tar file, or a folder without a model in it.

    The name of a bundled model is not, whatever folder there is: to `zoo.load` it means the model.
    """
    if spec in BUNDLED:
        return False
    path = Path(spec)
    return path.suffix in (".npz", *SHARDS) or (path.is_dir() and not (path / WEIGHTS_FILE).exists())


def open_pictures(
    spec: str, *, split: str = "train", size: tuple[int, int] | None = None, limit: int | None = None
) -> PictureSet:
    """The pictures of an `.npz`, or of a data source as `open_source` knows them. ValueError where there are none.

    The folder of a run is refused: what pictures it has were drawn, or looked at, on the way.

    `size` (height, width) is what those of a source are brought to; an `.npz` has to have it already.
    """
    path = Path(spec)
    if (path / RUN_FILE).is_file():
        raise ValueError(
            f"{path} is the folder of a run, whose pictures are samples of its training; expected a folder of "
            f"pictures, or the model of a run that has saved its {WEIGHTS_FILE}"
        )
    if path.suffix != ".npz":
        return SourcePictures(open_source(spec, split), f"{spec} ({split})", size=size, limit=limit)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    found = NpzPictures(path, limit=limit)
    if size is not None and found.shape[1:3] != size:
        have, want = ("x".join(map(str, pair)) for pair in (found.shape[1:3], size))
        raise ValueError(f"{path} has pictures of {have} pixels, expected {want}; make it again at that size")
    return found


def open_statistics(
    path: Path, extractor: Extractor, wanted: Wanted, *, size: tuple[int, int] | None = None
) -> Statistics:
    """The file's statistics. ValueError where they lack what is `wanted`, or are of another extractor.

    `size` (height, width) is that of the pictures they will be held against, where it is known: so that nothing is
    drawn that can't be compared.
    """
    found = Statistics.load(path, features=wanted.features)
    if len(found.mean) != extractor.width:
        raise ValueError(
            f"{path} has statistics of {len(found.mean)} features, but {extractor.name} has {extractor.width}; "
            "choose the --features they were made with"
        )
    if found.about is not None:
        own = About(extractor.name, extractor.fingerprint, size or found.about.size, "what it is held against")
        check_comparable(replace(found.about, source=str(path)), own)
    if wanted.features and found.features is None:
        raise ValueError(
            f"KID, precision, recall and neighbours need the features of all pictures, and {path} has only their mean "
            "and covariance: give the pictures, or statistics that `mar stats --keep-features` made"
        )
    return found


def open_either(
    spec: str, extractor: Extractor, wanted: Wanted, *, split: str = "train", size: tuple[int, int] | None = None,
    limit: int | None = None,
) -> Statistics | PictureSet:  # fmt: skip
    """The statistics in a file (`open_statistics`), or the pictures that `spec` names (`open_pictures`)."""
    if is_statistics(spec):
        return open_statistics(Path(spec), extractor, wanted, size=size)
    return open_pictures(spec, split=split, size=size, limit=limit)


def open_reference(
    spec: str, extractor: Extractor, wanted: Wanted, *, split: str = "train", size: tuple[int, int] | None = None,
    batch: int = 64, advance: Advance | None = None,
) -> Statistics:  # fmt: skip
    """Statistics from a file, or measured now from the pictures that `spec` names, of which features are `wanted`."""
    found = open_either(spec, extractor, wanted, split=split, size=size)
    if isinstance(found, Statistics):
        return found
    return collect(found, extractor, wanted=wanted, batch=batch, advance=advance).statistics
