"""Open a source of images by its name.

Bundled images, folders, shards, tables, data sets of the Hub, latent caches and streams are opened here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mar.assets import FASHION_CLASSES, asset
from mar.checkpoint.files import check_regular
from mar.data.accounts import OTHER_PARTS, Account
from mar.data.captions import CaptionError
from mar.data.folder import FolderSource
from mar.data.images import Example, Source
from mar.data.latent_cache import LatentSource, is_cache, read_manifest
from mar.data.paths import (
    SHARD_SUFFIXES,
    SPLIT_NAMES,
    SPLITS,
    NoSplit,
    common_suffix,
    expand_pattern,
    find_shard_suffix,
    find_split_files,
    hub_name,
    is_pattern,
    is_saved_dataset,
    natural_key,
)
from mar.data.stream import StreamSource
from mar.data.walk import FolderWalk, is_image_name, reason_of, split_images
from mar.data.webdataset import TarSource


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
        self.account = Account(f"fashion ({split})")
        self.account.take(self.labels, self.classes)
        self.account.log()

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

    Raises NoSplit for data without this split. Raises ValueError if nothing is there, for data without images, and for
    stream: (`open_data` opens streams, for training only). CaptionError for captions that can't be read.

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
    check_regular(path)
    if is_cache(path):
        raise ValueError(f"data: {path} holds cached latents, not pictures; those were in {read_manifest(path).data}")
    if path.is_dir():
        return _open_folder(path, split, caption_column)
    if path.is_file() and path.suffix.lower() in SHARD_SUFFIXES:
        return _open_shards([path], path.suffix.lower(), str(path), caption_column)
    if not path.exists() and (hub := hub_name(str(spec))) is not None:
        from mar.data.hub import open_hub  # imports `datasets`, which takes seconds

        return open_hub(*hub, split, caption_column)
    if not path.exists() and is_pattern(str(spec)):
        if split != "train":
            raise NoSplit(f"data: {spec} names its files, among which none are told to be for {split!r}")
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
    if not is_cache(folder):
        return open_source(spec, caption_column=caption_column)
    latents = LatentSource(folder)
    account = Account(f"{folder}, latents of {latents.manifest.data}")
    skipped = latents.index.skipped
    account.leave_out("pictures that could not be read", next(iter(skipped.values()), ""), len(skipped))
    account.take(
        np.zeros(len(latents) - len(skipped)), latents.classes
    )  # its shards have the labels; they are not read yet
    account.log()
    latents.account = account
    return latents


def is_stream(spec: str | Path) -> bool:
    """Tell if `spec` asks for a stream."""
    return str(spec).startswith("stream:")


def _open_shards(
    files: list[Path], suffix: str, name: str, caption_column: str | None, account: Account | None = None
) -> Source:
    if suffix == ".tar":
        return TarSource(files, name, caption_column, account)
    from mar.data.parquet import open_parquet

    return open_parquet(files, name, caption_column, account)


def _open_folder(folder: Path, split: str, caption_column: str | None) -> Source:
    if is_saved_dataset(folder):
        from mar.data.parquet import open_saved

        return open_saved(folder, split, caption_column)
    account = Account(str(folder))
    walk = FolderWalk(folder, account)
    top = walk.entries()
    folders = sorted(top.folders + top.links, key=natural_key)
    suffix = find_shard_suffix(folder)
    if suffix == ".tar":
        classes = (name for name in folders if name.casefold() not in SPLIT_NAMES)
        suffix = None if any(_image_names(folder, name) for name in classes) else suffix
    if suffix is not None:
        account = Account(str(folder))
        names = FolderWalk(folder, account).walk()
        files = find_split_files(folder, names, suffix, split)
        chosen = set(files)
        for name in names:
            if folder / name not in chosen:
                account.leave_out(_reason_beside_shards(name, suffix), name)
        return _open_shards(files, suffix, str(folder), caption_column, account)
    parts = [name for name in folders if name.casefold() in SPLIT_NAMES]
    with_images = [name for name in folders if _image_names(folder, name)] if parts else []
    if not parts or not _are_parts(parts, with_images):
        return FolderSource(folder, caption_column)
    of_split = [name for word in SPLITS[split] for name in parts if name.casefold() == word]
    if not of_split:
        raise NoSplit(f"data: {folder} has no folder for {split!r}; it has {', '.join(folders)}")
    part = next((name for name in of_split if name in with_images), of_split[0])
    word = part.casefold()
    twins = [name for name in of_split if name in with_images and (split == "train" or name.casefold() == word)]
    if len(twins) > 1:
        raise ValueError(
            f"data: {folder} has several folders for {split!r}: {', '.join(twins)}; put their pictures into one, or "
            f"give --data {folder / part}"
        )
    account.name = str(folder / part)
    for name in folders:
        if name != part:
            reason = OTHER_PARTS if name in parts else "pictures in folders beside the parts"
            images = split_images(walk.walk(name), account)
            account.leave_out(reason, images[0] if images else "", len(images))
    beside = split_images(top.files, account)
    account.leave_out("pictures beside the parts", beside[0] if beside else "", len(beside))
    return FolderSource(folder / part, caption_column, above=folder, account=account)


def _image_names(folder: Path, name: str) -> list[str]:
    """Return the images below a subfolder; nothing is counted."""
    files = FolderWalk(folder, Account("")).walk(name)
    return [file for file in files if is_image_name(file)]


def _are_parts(parts: list[str], with_images: list[str]) -> bool:
    """Tell if folders called like splits are parts of the data, not classes.

    They are if no other folder has images, or if there are both train and test images.
    """
    splits = {split for split, words in SPLITS.items() for name in parts if name.casefold() in words
              if name in with_images}  # fmt: skip
    return len(splits) == len(SPLITS) or set(with_images) <= set(parts)


def _reason_beside_shards(name: str, suffix: str) -> str:
    if is_image_name(name):
        return "pictures beside the shards"
    if name.lower().endswith(suffix):
        return "shards of other parts"
    return f"shards that are no {suffix} files" if name.lower().endswith(SHARD_SUFFIXES) else reason_of(name)
