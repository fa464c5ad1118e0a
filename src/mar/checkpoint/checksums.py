"""Checksums of what mar writes, compared when it is read; `MAR_CHECKSUMS=off` skips that.

A file is compared once a process: as it is first used, and again only after it has changed. Large data have CRC-32s,
which cost a third of a SHA-256 and are crc32_of in many threads (decision 0073); small JSON has its SHA-256 inside.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from mar.checkpoint.files import CheckpointError, check_regular, parse_json, write_text

CHECKSUMS = "checksums.json"
"""Name of the file with the checksums of a folder's files."""
_SEAL = "checksum"
"""Key of the checksum in a JSON file."""
_PIECE, _PART = 32 * 2**20, 2**20
"""Bytes of a file that have one checksum, and that are read at once."""
_SETTLED_S = 2.0
"""A file that changed less than so many seconds ago is compared again: clocks of disks are coarse."""
_compared: set[tuple[str, int, int, int]] = set()
"""Files that this process has compared: path, size, times of change."""
_all = False
"""`compare_all` is in force."""
Item = TypeVar("Item")
"""Argument of a thread's function."""
Result = TypeVar("Result")
"""Value of a thread's function."""


@contextmanager
def compare_all() -> Iterator[None]:
    """Compare everything meanwhile, again and even if checksums are off."""
    global _all
    _all = True
    try:
        yield
    finally:
        _all = False


def enabled() -> bool:
    """Return whether checksums are compared; `MAR_CHECKSUMS=off` in the environment: no."""
    return _all or os.environ.get("MAR_CHECKSUMS", "").lower() not in ("off", "0", "no", "false")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Map a function over items in a thread a core, at most 8."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(function, items))


def file_digests(paths: Iterable[Path]) -> dict[str, str]:
    """Return checksums by file name: the size, and the CRC-32 of each 32 MiB."""
    files = {path: path.stat().st_size for path in paths}
    pieces = [(path, start) for path, size in files.items() for start in range(0, size, _PIECE)]
    crc32_of: dict[Path, list[str]] = {path: [] for path in files}
    for (path, _), crc32 in zip(pieces, in_threads(_piece_crc32, pieces), strict=True):
        crc32_of[path].append(f"{crc32:08x}")
    return {path.name: f"crc32:{size}:{''.join(crc32_of[path])}" for path, size in files.items()}


def _piece_crc32(piece: tuple[Path, int]) -> int:
    """Return the CRC-32 of a piece of a file, read in parts that fit into the processor's cache."""
    path, start = piece
    crc32, left, part = 0, _PIECE, memoryview(bytearray(_PART))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(part[:left])):
            crc32 = zlib.crc32(part[:count], crc32)
            left -= count
    return crc32


def changed_files(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """Return the names of a folder's files that differ from their checksums."""
    older = [name for name, digest in digests.items() if not digest.startswith("crc32:")]
    crc32_of = file_digests(folder / name for name in digests if name not in older)
    crc32_of |= dict(zip(older, in_threads(lambda name: _sha256(folder / name), older), strict=True))
    return [name for name, digest in digests.items() if crc32_of[name] != digest]


def _sha256(path: Path) -> str:
    """Return the sha256 of a file, as earlier versions wrote it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(content: Any) -> str:
    """Return the sha256 of JSON-able values, whatever their order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON-able values with their sha256 among them, for `unseal`."""
    plain = json.loads(json.dumps(values))
    return {**plain, _SEAL: json_digest(plain)}


def is_sealed(path: Path) -> bool:
    """Return whether a file holds JSON with its sha256."""
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and _SEAL in values


def unseal(values: Any) -> Any:
    """Compare JSON values with their sha256, and return them without it.

    Values without one are returned as they are: an earlier version or a person wrote them. Raises ValueError.
    """
    if not isinstance(values, dict) or _SEAL not in values:
        return values
    kept = {name: value for name, value in values.items() if name != _SEAL}
    try:
        is_whole = not enabled() or json_digest(kept) == values[_SEAL]
    except RecursionError:
        is_whole = False
    if not is_whole:
        raise ValueError(f"it is not as it was written; if you changed it yourself, remove its {_SEAL}")
    return kept


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON-able values with their sha256.

    Raises CheckpointError if the disk refuses.
    """
    write_text(path, json.dumps(seal(values), indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote, or JSON without a sha256.

    Raises OSError, or ValueError for a damaged file.
    """
    check_regular(path)
    return unseal(parse_json(path.read_text(encoding="utf-8")))


def tensor_checksums(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> list[int]:
    """Return each tensor's `tensor_crc32`, in the order of their names."""
    return in_threads(tensor_crc32, (tensors[name] for name in sorted(tensors)))


def tensor_crc32(tensor: Shaped[Tensor, "..."]) -> int:
    """Return the CRC-32 of type, shape and values of a tensor."""
    return zlib.crc32(_bytes_of(tensor), zlib.crc32(_kind_of(tensor)))


def tensors_digest(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> str:
    """Return the sha256 of names, types, shapes and values of tensors."""
    names = sorted(tensors)
    return json_digest(list(zip(names, in_threads(_tensor_sha256, (tensors[name] for name in names)), strict=True)))


def _tensor_sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256(_kind_of(tensor))
    digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _kind_of(tensor: Tensor) -> bytes:
    return f"{tensor.dtype} {tuple(tensor.shape)}".encode()


def _bytes_of(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def was_compared(path: Path) -> bool:
    """Return whether this process has compared a file since it last changed."""
    return not _all and _identity(path) in _compared


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
    write_text(folder / CHECKSUMS, text + "\n")


def check_folder(folder: Path) -> bool:
    """Compare a folder's files with its checksums.

    Returns False for a folder without checksums. Raises CheckpointError that names the damaged files.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return False
    if not enabled():
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
    unread = [file for file in files if not was_compared(file)]
    if changed := changed_files(folder, {file.name: digests[file.name] for file in unread}):
        more = f" ({', '.join(changed[1:])} as well)" if len(changed) > 1 else ""
        raise CheckpointError(f"{folder / changed[0]} is damaged{more}: its bytes are not those that were written")
    for file in unread:
        note_compared(file)
    return True
