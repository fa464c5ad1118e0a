"""The pictures that come with the package.

Where pictures come from, by name.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from PIL import Image

from mar.assets import FASHION_CLASSES, asset
from mar.data.folder import (
    SHARDS,
    SPLIT_WORDS,
    SPLITS,
    FolderSource,
    hub_name,
    is_pattern,
    is_picture,
    is_saved_dataset,
    kind_of,
    list_images,
    matching,
    shards_kind,
    split_files,
)
from mar.data.images import Example, Source, UnreadableImage
from mar.data.latent_cache import LatentSource, is_cache, read_manifest
from mar.data.stream import StreamSource
from mar.data.webdataset import TarSource


class FashionSource:
    """The bundled subset of Fashion-MNIST: 10,000 ("train") or 2,000 ("test") grey pictures of 28x28.

    Example i is of class i % 10, so that every run of ten holds every class. All shoes face left: no flips.
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


__all__ = [
    "Example",
    "FashionSource",
    "FolderSource",
    "Source",
    "StreamSource",
    "TarSource",
    "UnreadableImage",
    "is_stream",
    "open_data",
    "open_source",
]

logger = logging.getLogger("mar.data")


def open_source(spec: str | Path, split: str = "train") -> Source:
    """The source that `spec` names:

    - fashion: the bundled pictures;
    - a folder of class folders, a flat folder of pictures (no classes), or a folder of such folders called train,
      val, test, of which `split` is taken;
    - a Parquet file, a folder of them (`split` in their names), or a folder written by `datasets`' `save_to_disk`;
    - WebDataset shards: a .tar file, a folder of them (`split` in their names); Parquet files and these also by a
      pattern such as "shards/{000..127}.tar" or "shards/*.tar";
    - a data set of the Hub, which is downloaded into `datasets`' cache: OWNER/NAME where there is no such path,
      hub:OWNER/NAME always, followed by @CONFIG where it has several.

    `split` is "train" or "test". Raises ValueError where nothing is there, or no pictures are; and for stream:, of
    which only training knows (`open_data`).
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected train or test")
    if str(spec) == "fashion":
        return FashionSource(split)
    if is_stream(spec):
        raise ValueError(f"data: {spec} is a stream, from which only `mar train` reads; leave stream: out for this")
    path = Path(spec).expanduser()
    if is_cache(path):
        raise ValueError(f"data: {path} holds cached latents, not pictures; those were in {read_manifest(path).data}")
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file() and path.suffix in SHARDS:
        return _open_shards([path], path.suffix, str(path))
    if not path.exists() and (hub := hub_name(str(spec))) is not None:
        from mar.data.hub import open_hub

        return open_hub(*hub, split)
    if not path.exists() and is_pattern(str(spec)):
        if split != "train":
            raise ValueError(f"data: {spec} names its files, among which none are told to be for {split!r}")
        files = matching(str(spec))
        return _open_shards(files, kind_of(files, str(spec)), str(spec))
    state = "is neither a folder nor a .parquet or .tar file" if path.exists() else "does not exist"
    raise ValueError(
        f"data: {path} {state}; expected fashion, a folder of pictures, .parquet or .tar files, or a Hub's OWNER/NAME"
    )


def is_stream(spec: str | Path) -> bool:
    """Whether `spec` asks for pictures in passing, not by number."""
    return str(spec).startswith("stream:")


def open_data(spec: str | Path, classes: int = 0) -> Source | LatentSource | StreamSource:
    """What a run learns from: the stream that `spec` asks for, a latent cache where it is the folder of one, else the
    source's train split. `classes` is what labels of a stream are held against where it does not tell them."""
    if is_stream(spec):
        from mar.data.hub import open_stream

        return open_stream(str(spec), classes)
    folder = Path(spec).expanduser()
    return LatentSource(folder) if is_cache(folder) else open_source(spec)


def _open_shards(files: list[Path], kind: str, name: str) -> Source:
    if kind == ".tar":
        return TarSource(files, name)
    from mar.data.parquet import open_parquet

    return open_parquet(files, name)


def _open_folder(folder: Path, split: str) -> Source:
    inside = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if is_saved_dataset(folder):
        from mar.data.parquet import open_saved

        return open_saved(folder, split)
    if (kind := shards_kind(folder)) is not None and not (kind == ".tar" and _class_folders(folder, inside)):
        return _open_shards(split_files(folder, kind, split), kind, str(folder))
    if inside and set(inside) <= SPLIT_WORDS:
        wanted = [name for name in SPLITS[split] if name in inside]
        if not wanted:
            raise ValueError(f"data: {folder} has no folder for {split!r}; it has {', '.join(sorted(inside))}")
        folder = folder / wanted[0]
    return FolderSource(folder)


def _class_folders(folder: Path, inside: list[str]) -> bool:
    """Whether a folder with .tar files has class folders too, which count more; what is not used is warned of."""
    classes = any(next(list_images(folder / name), None) for name in inside if name not in SPLIT_WORDS)
    if classes:
        logger.warning(".tar files beside the class folders of %s are not used", folder)
    elif any(is_picture(entry) for entry in folder.iterdir()):
        logger.warning("pictures beside the .tar files of %s are not used", folder)
    return classes
