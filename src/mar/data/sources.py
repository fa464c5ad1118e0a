"""Where pictures come from, by name."""

from __future__ import annotations

from pathlib import Path

from mar.data.bundled import FashionSource
from mar.data.examples import Example, Source, UnreadableImage
from mar.data.folder import FolderSource
from mar.data.latents import LatentSource
from mar.data.shards import is_cache, read_about

__all__ = ["Example", "FashionSource", "FolderSource", "Source", "UnreadableImage", "open_data", "open_source"]

_SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid")}


def open_source(spec: str | Path, split: str = "train") -> Source:
    """The source that `spec` names:

    - fashion: the bundled pictures;
    - a folder of class folders, a flat folder of pictures (no classes), or a folder of such folders called train,
      val, test, of which `split` is taken;
    - a Parquet file, a folder of them (`split` in their names), or a folder written by `datasets`' `save_to_disk`.

    `split` is "train" or "test". Raises ValueError where nothing is there, or no pictures are.
    """
    if split not in _SPLIT_FOLDERS:
        raise ValueError(f"split: got {split!r}, expected train or test")
    if str(spec) == "fashion":
        return FashionSource(split)
    path = Path(spec).expanduser()
    if is_cache(path):
        raise ValueError(f"data: {path} holds cached latents, not pictures; those were in {read_about(path).data}")
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file() and path.suffix == ".parquet":
        from mar.data.tables import open_parquet

        return open_parquet([path], str(path))
    state = "is neither a folder nor a .parquet file" if path.exists() else "does not exist"
    raise ValueError(f"data: {path} {state}; expected fashion, a folder of pictures, or a Parquet file")


def open_data(spec: str | Path) -> Source | LatentSource:
    """What a run learns from: a latent cache where `spec` is the folder of one, else the source's train split."""
    folder = Path(spec).expanduser()
    return LatentSource(folder) if is_cache(folder) else open_source(spec)


def _open_folder(folder: Path, split: str) -> Source:
    inside = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    tables = any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet"))
    if tables or (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        from mar.data.tables import is_saved, open_parquet, open_saved, parquet_files

        return (
            open_saved(folder, split) if is_saved(folder) else open_parquet(parquet_files(folder, split), str(folder))
        )
    if inside and set(inside) <= {name for names in _SPLIT_FOLDERS.values() for name in names}:
        wanted = [name for name in _SPLIT_FOLDERS[split] if name in inside]
        if not wanted:
            raise ValueError(f"data: {folder} has no folder for {split!r}; it has {', '.join(sorted(inside))}")
        folder = folder / wanted[0]
    return FolderSource(folder)
