"""Open a source of images by its name.

Bundled images, folders, shards, tables, data sets of the Hub, latent caches and streams are opened here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mar.assets import FASHION_CLASSES, asset
from mar.data.captions import CaptionError
from mar.data.folder import FolderSource, list_images
from mar.data.images import Example, Source
from mar.data.latent_cache import LatentSource, is_cache, read_manifest
from mar.data.paths import (
    SHARD_SUFFIXES,
    SPLIT_NAMES,
    SPLITS,
    common_suffix,
    expand_pattern,
    find_shard_suffix,
    find_split_files,
    hub_name,
    is_image_file,
    is_pattern,
    is_saved_dataset,
)
from mar.data.stream import StreamSource
from mar.data.webdataset import TarSource

logger = logging.getLogger("mar.data")


class FashionSource:
    """The bundled subset of Fashion-MNIST: 10,000 ("train") or 2,000 ("test") gray images of 28x28.

    Example i is of class i % 10: every ten in a row have every class. All shoes face left: no flips.
    """

    classes = FASHION_CLASSES
    flips = False
    side = 28

    def __init__(self, split: str = "train") -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split: got {split!r}, but the bundled pictures have only train and test")
        self.split = split
        with Image.open(asset(f"fashion-mnist/{split}.png")) as sheet:
            pixels = np.asarray(sheet)
        rows, columns = pixels.shape[0] // self.side, pixels.shape[1] // self.side
        cells = pixels.reshape(rows, self.side, columns, self.side).transpose(0, 2, 1, 3)
        self.images = np.ascontiguousarray(cells.reshape(-1, self.side, self.side))
        self.labels = np.arange(len(self.images)) % len(self.classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        name = f"fashion/{self.split}/{index}"
        return Example(Image.fromarray(self.images[index]), int(self.labels[index]), name)

    def listing(self) -> Iterator[bytes]:
        """Yield the split: its images never change."""
        yield self.split.encode()


def open_source(spec: str | Path, split: str = "train", caption_column: str | None = None) -> Source:
    """Open the source that `spec` names:

    - fashion: the bundled images;
    - a folder of class folders, a flat folder of images (no classes), or a folder of such folders called train, val,
      test, the one of `split`;
    - a Parquet file, a folder of them (`split` in their names), or a folder written by `save_to_disk` of `datasets`;
    - WebDataset shards: a .tar file, or a folder of them (`split` in their names);
    - Parquet or .tar files by a pattern such as "shards/{000..127}.tar" or "shards/*.tar";
    - a data set of the Hub, downloaded into the cache of `datasets`: OWNER/NAME if there is no such path,
      hub:OWNER/NAME always, followed by @CONFIG if it has several.

    Raises ValueError if nothing is there, for data without images, and for stream: (`open_data` opens streams, for
    training only). CaptionError for captions that can't be read.

    Args:
        spec: path or name.
        split: "train" or "test".
        caption_column: column of captions in metadata files and tables, or key in .json files of shards; None: text,
            caption or prompt, if there is one.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected train or test")
    if str(spec) == "fashion":
        if caption_column is not None:
            raise CaptionError(f"captions: fashion has no column {caption_column!r}; leave --caption-column out")
        return FashionSource(split)
    if is_stream(spec):
        raise ValueError(f"data: {spec} is a stream, from which only `mar train` reads; leave stream: out for this")
    path = Path(spec).expanduser()
    if is_cache(path):
        raise ValueError(f"data: {path} holds cached latents, not pictures; those were in {read_manifest(path).data}")
    if path.is_dir():
        return _open_folder(path, split, caption_column)
    if path.is_file() and path.suffix in SHARD_SUFFIXES:
        return _open_shards([path], path.suffix, str(path), caption_column)
    if not path.exists() and (hub := hub_name(str(spec))) is not None:
        from mar.data.hub import open_hub  # imports `datasets`, which takes seconds

        return open_hub(*hub, split, caption_column)
    if not path.exists() and is_pattern(str(spec)):
        if split != "train":
            raise ValueError(f"data: {spec} names its files, among which none are told to be for {split!r}")
        files = expand_pattern(str(spec))
        return _open_shards(files, common_suffix(files, str(spec)), str(spec), caption_column)
    state = "is neither a folder nor a .parquet or .tar file" if path.exists() else "does not exist"
    raise ValueError(
        f"data: {path} {state}; expected fashion, a folder of pictures, .parquet or .tar files, or a Hub's OWNER/NAME"
    )


def open_data(
    spec: str | Path, classes: int = 0, caption_column: str | None = None
) -> Source | LatentSource | StreamSource:
    """Open training data: a stream, a latent cache, or a train split.

    Labels of a stream are checked against `classes`, the number of classes, if the stream does not tell them. Captions
    are in `caption_column` as for `open_source`; a cache has those that it was made with.
    """
    if is_stream(spec):
        from mar.data.hub import open_stream

        return open_stream(str(spec), classes, caption_column)
    folder = Path(spec).expanduser()
    return LatentSource(folder) if is_cache(folder) else open_source(spec, caption_column=caption_column)


def is_stream(spec: str | Path) -> bool:
    """Tell if `spec` asks for a stream."""
    return str(spec).startswith("stream:")


def _open_shards(files: list[Path], suffix: str, name: str, caption_column: str | None) -> Source:
    if suffix == ".tar":
        return TarSource(files, name, caption_column)
    from mar.data.parquet import open_parquet

    return open_parquet(files, name, caption_column)


def _open_folder(folder: Path, split: str, caption_column: str | None) -> Source:
    subfolders = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if is_saved_dataset(folder):
        from mar.data.parquet import open_saved

        return open_saved(folder, split, caption_column)
    suffix = find_shard_suffix(folder)
    if suffix is not None and not (suffix == ".tar" and _has_class_folders(folder, subfolders)):
        return _open_shards(find_split_files(folder, suffix, split), suffix, str(folder), caption_column)
    if subfolders and set(subfolders) <= SPLIT_NAMES:
        of_split = [name for name in SPLITS[split] if name in subfolders]
        if not of_split:
            raise ValueError(f"data: {folder} has no folder for {split!r}; it has {', '.join(sorted(subfolders))}")
        return FolderSource(folder / of_split[0], caption_column, above=folder)
    return FolderSource(folder, caption_column)


def _has_class_folders(folder: Path, subfolders: list[str]) -> bool:
    """Tell if a folder with .tar files has class folders too, which go first; warns about unused images."""
    classes = any(next(list_images(folder / name), None) for name in subfolders if name not in SPLIT_NAMES)
    if classes:
        logger.warning(".tar files beside the class folders of %s are not used", folder)
    elif any(is_image_file(entry) for entry in folder.iterdir()):
        logger.warning("pictures beside the .tar files of %s are not used", folder)
    return classes
