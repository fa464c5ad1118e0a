"""Checksums of what mar writes, compared when it is read; `MAR_CHECKSUMS=off` skips that.

A file is compared once a process: as it is first used, and again only after it has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from mar.checkpoint.files import CheckpointError, parse_json

CHECKSUMS = "checksums.json"
"""Name of the file with the checksums of a folder's files."""
_SETTLED_S = 2.0
"""A file that changed less than so many seconds ago is compared again: clocks of disks are coarse."""
_compared: set[tuple[str, int, int, int]] = set()
"""Files that this process has compared: path, size, times of change."""


def enabled() -> bool:
    """Return whether checksums are compared; `MAR_CHECKSUMS=off` in the environment: no."""
    return os.environ.get("MAR_CHECKSUMS", "").lower() not in ("off", "0", "no", "false")


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(paths: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 of files by their names, several at a time."""
    files = list(paths)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return {path.name: digest for path, digest in zip(files, threads.map(file_digest, files), strict=True)}


def json_digest(content: Any) -> str:
    """Return the sha256 of JSON-able values, whatever their order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> str:
    """Return the sha256 of names, types, shapes and values of tensors."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(_tensor_digest, (tensors[name] for name in names)))
    return json_digest(list(zip(names, digests, strict=True)))


def _tensor_digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def was_compared(path: Path) -> bool:
    """Return whether this process has compared a file since it last changed."""
    return _identity(path) in _compared


def note_compared(path: Path) -> None:
    """Record that a file has been compared."""
    if time.time() - path.stat().st_mtime > _SETTLED_S:
        _compared.add(_identity(path))


def _identity(path: Path) -> tuple[str, int, int, int]:
    facts = path.stat()
    return str(path.absolute()), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def write_folder(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the checksums of a folder's files into it."""
    text = json.dumps({"files": dict(sorted(digests.items())), "sha256": json_digest(digests)}, indent=1)
    (folder / CHECKSUMS).write_text(text + "\n", encoding="utf-8")


def check_folder(folder: Path, *, always: bool = False) -> bool:
    """Compare a folder's files with its checksums.

    Returns False for a folder without checksums. Raises CheckpointError that names the damaged file.

    Args:
        folder: whose `checksums.json` is read.
        always: also where this process has done it before, or checksums are off.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return False
    if not (always or enabled()):
        return True
    try:
        content = parse_json(path.read_bytes())
        digests = {str(name): str(digest) for name, digest in content["files"].items()}
        intact = json_digest(digests) == content["sha256"] and set(content) == {"files", "sha256"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is damaged")
    if unsafe := [name for name in digests if Path(name).name != name]:
        raise CheckpointError(f"{path} names {unsafe[0]!r}, expected files of its folder")
    files = [folder / name for name in digests]
    if missing := [file for file in files if not file.is_file()]:
        raise CheckpointError(f"{missing[0]} is missing")
    unread = [file for file in files if always or not was_compared(file)]
    for name, digest in file_digests(unread).items():
        if digest != digests[name]:
            raise CheckpointError(f"{folder / name} is damaged: its bytes are not those that were written")
    for file in unread:
        note_compared(file)
    return True
