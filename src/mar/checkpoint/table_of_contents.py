"""The table of contents (`.metadata`) of a `torch.distributed.checkpoint` folder, read without trusting it.

PyTorch keeps it as a pickle, which could run anything when loaded. Here only the classes that such a table is made of
are let through, and tables that list anything but tensors are refused, as dcp would unpickle that freely.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mar.checkpoint.files import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (
            module.split(".")[0] == "pathlib" and name in _PATHS
        ):  # where it was saved: of no use here, and of another system perhaps
            return PurePath
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise CheckpointError(f"it asks for {module}.{name}, which no state of a run needs")


def read_contents(folder: Path) -> Metadata:
    """What a state's folder holds. CheckpointError where that can't be read, or asks for more than tensors."""
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            contents = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
    ) as e:
        raise CheckpointError(f"{path} can't be read ({type(e).__name__}: {e})") from e
    if not isinstance(contents, Metadata) or not isinstance(contents.storage_data, dict):
        raise CheckpointError(f"{path} is not a table of contents of torch.distributed.checkpoint")
    for name, entry in contents.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{path} is refused: {name} is not a tensor")
    return contents


class SafeReader(FileSystemReader):
    """dcp's reader of folders, with `read_contents` in place of an unguarded unpickling."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents, checked."""
        return read_contents(Path(self.path))
