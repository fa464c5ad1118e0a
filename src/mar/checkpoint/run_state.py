"""The state of a training run: folders of `torch.distributed.checkpoint` (DCP).

    folder/state-000000128000/   after 128,000 images: the tensors (.metadata, *.distcp), state.json, config.json,
                                 and the sha256 of each in checksums.json
    folder/latest                the name of the state to resume from

A state is written in a temporary folder and renamed, so any folder called state-* is complete. Nothing in it is
trusted: tensors are read with `weights_only`, everything else is JSON, and the pickle `.metadata` is restricted to the
classes of DCP's metadata.
"""

from __future__ import annotations

import io
import json
import logging
import math
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from mar import distributed
from mar.checkpoint import checksums
from mar.checkpoint.files import (
    CheckpointError,
    check_pickle,
    check_regular,
    flush,
    parse_json,
    require_room,
    write_error,
    write_text,
)
from mar.checkpoint.owners import clear_leftovers, temporary_folder

logger = logging.getLogger(__name__)
_NAME = re.compile(r"state-(\d{12,})")
_OLD_TEMPORARY = re.compile(r"\.saving-(old-)?state-\d{12,}")
"""Folder that earlier versions left when they were killed."""
_OVERHEAD = 4096
"""Bytes of a stored tensor beside its values, rounded up."""
Result = TypeVar("Result")


class RunState:
    """The states of one run in `folder`.

    `config`, JSON-able, is stored beside each and explains a state that does not fit. In a process group every rank
    makes the same calls, with states of the same names. Sharded tensors (DTensor) are taken from all ranks, everything
    else from rank 0. One run at a time may use a folder.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.config = dict(config or {})

    def save(self, images_seen: int, state: dict[str, Any], keep: int = 3) -> Path:
        """Save a state and keep the newest `keep` states.

        A state is nested dicts, lists and tuples of tensors, numbers, strings and None. Raises CheckpointError if the
        disk refuses; then, and when interrupted, earlier states are untouched.
        """
        if keep < 1:
            raise ValueError(f"keep: got {keep}, expected at least 1 state")
        tree, tensors = flatten(state)
        needed = sum(tensor.numel() * tensor.itemsize + _OVERHEAD for tensor in tensors.values())
        final = self.folder / f"state-{images_seen:012d}"
        with ExitStack() as stack:  # whose end removes what is left
            try:
                temporary = _run_on_rank0(lambda: self._prepare(stack, needed)) / final.name
                with _unwrap_dcp_errors(), _ignore_single_process_warning():
                    state_dict_saver.save(dict(tensors), storage_writer=FileSystemWriter(temporary))
                digests = _digests(temporary)
                _run_on_rank0(lambda: self._finish(temporary, final, tree, digests, keep))
            except OSError as error:
                raise write_error(final, needed, error) from error
        return final

    def load(self, state: dict[str, Any]) -> bool:
        """Load the latest state into `state`, built as for `save`.

        Tensors are filled in place, all else is replaced. A state that can't be read is passed over for an older one,
        with a warning. Returns False, and changes nothing, if no state has been saved. Raises CheckpointError if its
        tensors are not the saved ones (nothing is changed), or no state can be read.
        """
        unreadable: dict[str, str] = {}
        while True:
            path = _run_on_rank0(lambda: self._latest(unreadable))
            if path is None:
                return False
            error = self._load_from(path, state)
            if not distributed.any_rank(error is not None):
                return True
            unreadable[path.name] = _damage_text(path, error or "another rank could not read it")
            logger.warning("%s; looking for an older state", unreadable[path.name])

    def _load_from(self, path: Path, state: dict[str, Any]) -> Exception | None:
        """Load one state; returns the error if it can't be read. Raises CheckpointError if it is another run's."""
        tensors = flatten(state)[1]
        metadata, error = None, None
        try:
            metadata = read_dcp_metadata(path)
        except CheckpointError as refusal:
            error = refusal
        if distributed.any_rank(error is not None) or metadata is None:
            return error
        if different := _differences(metadata, tensors):
            raise CheckpointError(self._mismatch_message(path, different))
        try:
            with _unwrap_dcp_errors(), _ignore_single_process_warning():
                state_dict_loader.load(dict(tensors), storage_reader=SafeReader(path))
            loaded = unflatten(_read_json(path / "state.json"), tensors)
            if not isinstance(loaded, dict):
                raise CheckpointError(f"{path / 'state.json'} holds no state")
        except pickle.UnpicklingError:  # PyTorch's message is advice to load it unsafely
            return CheckpointError("its tensors can't be read")
        except Exception as failure:  # noqa: BLE001 (a damaged file may lead to anything)
            return failure
        state.clear()
        state.update(loaded)
        return None

    def latest(self) -> Path | None:
        """Return the state to resume from, or None.

        It is the one that the file `latest` names, else the newest complete one.
        """
        return _run_on_rank0(lambda: self._latest({}))

    def states(self) -> list[Path]:
        """List all states, oldest first."""
        if not self.folder.is_dir():
            return []
        numbered = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]

    def _prepare(self, stack: ExitStack, needed: int) -> Path:
        """Make a temporary folder for a state, which ends with `stack`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if _OLD_TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path)
        clear_leftovers(self.folder)
        require_room(self.folder, needed)
        return stack.enter_context(temporary_folder(self.folder))

    def _finish(self, temporary: Path, final: Path, tree: Any, digests: dict[str, str], keep: int) -> None:
        texts = {"state.json": tree, "config.json": self.config}
        for name, values in texts.items():
            write_text(temporary / name, json.dumps(values, indent=1))
        digests = digests | checksums.file_digests(temporary / name for name in (*texts, ".metadata"))
        checksums.write_folder(temporary, digests)
        flush(temporary)
        _move(temporary, final)
        flush(self.folder)
        write_text(self.folder / "latest", final.name + "\n")
        older = [path for path in self.states() if path != final]
        for path in older[: max(0, len(older) - (keep - 1))]:
            # renamed first, so that a half removed state is never taken for a whole one
            shutil.rmtree(path.rename(temporary.with_name(f"old-{path.name}")))

    def _latest(self, unreadable: Mapping[str, str]) -> Path | None:
        states = [path for path in self.states() if path.name not in unreadable]
        try:
            check_regular(self.folder / "latest")
            name = (self.folder / "latest").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            name = ""
        chosen = next((path for path in states if path.name == name), None)
        if chosen is None and states and name not in unreadable:
            logger.warning("%s names no state; looking for the newest", self.folder / "latest")
        order = ([chosen] if chosen else []) + [path for path in reversed(states) if path != chosen]
        why = list(unreadable.values())[-1] if unreadable else None
        for path in order:
            damaged = damage(path)
            if damaged is None:
                if path != chosen:
                    logger.warning("going on from %s", path)
                return path
            logger.warning("%s; looking for an older state", damaged)
            why = why or damaged
        if why is not None:
            raise CheckpointError(f"no state in {self.folder} is whole ({why}); remove state-* there to begin anew")
        return None

    def _mismatch_message(self, path: Path, different: list[str]) -> str:
        try:
            stored = _read_json(path / "config.json")
        except CheckpointError:
            stored = {}
        settings = changed_settings(stored, self.config)
        why = "; ".join([*settings[:5], *different[:3]])
        more = "" if len(different) <= 3 else f"; {len(different)} tensors in all"
        return (
            f"{path} is of another model or training recipe: {why}{more}. "
            "Use the settings it was saved with, or another folder for the new run"
        )


def _differences(metadata: Metadata, tensors: Mapping[str, Tensor]) -> list[str]:
    stored = metadata.state_dict_metadata
    lines = [f"{name} was not saved" for name in sorted(set(tensors) - set(stored))]
    lines += [f"{name} was saved, but is not there now" for name in sorted(set(stored) - set(tensors))]
    for name in sorted(set(tensors) & set(stored)):
        now = (tuple(tensors[name].shape), tensors[name].dtype)
        then = (tuple(stored[name].size), stored[name].properties.dtype)  # type: ignore[union-attr]
        if now != then:
            lines.append(f"{name} was saved as {then[0]} {then[1]}, now {now[0]} {now[1]}")
    return lines


def damage(path: Path) -> str | None:
    """Describe damage of a state's files in a line that names them; None: no damage.

    Files are compared with their checksums; those of earlier versions have none, and their tensors are not looked at.
    """
    try:
        checksums.check_folder(path)
        metadata = read_dcp_metadata(path)
        _read_json(path / "state.json")
        for place in metadata.storage_data.values():
            shard = path / place.relative_path
            if not shard.is_file() or shard.stat().st_size < place.offset + place.length:
                return _damage_text(path, f"{shard.name} is truncated or missing")
    except (CheckpointError, OSError) as error:
        return _damage_text(path, error)
    return None


def _damage_text(path: Path, why: Exception | str) -> str:
    """Return a line on a damaged state: it names the file, if that is known."""
    reason = str(why).strip().split("\n")[0] or type(why).__name__
    return reason if str(path) in reason else f"{path} is damaged: {reason}"


def _digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of a state's shards; each rank reads a part of them."""
    shards = sorted(folder.glob("*.distcp"))
    if not distributed.in_group():
        return checksums.file_digests(shards)
    parts = distributed.all_gather_object(checksums.file_digests(shards[dist.get_rank() :: dist.get_world_size()]))
    return {name: digest for part in parts for name, digest in part.items()}


def _move(temporary: Path, final: Path) -> None:
    """Rename a state into place; an old one of the same number is removed last."""
    if not final.exists():
        temporary.rename(final)
        return
    aside = final.rename(temporary.with_name(f"old-{final.name}"))
    try:
        temporary.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    shutil.rmtree(aside)


def _read_json(path: Path) -> Any:
    try:
        check_regular(path)
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({error})") from error


def _is_rank0() -> bool:
    return not distributed.in_group() or dist.get_rank() == 0


def _run_on_rank0(action: Callable[[], Result]) -> Result:
    """Run an action on rank 0; all ranks get its result, or its error."""
    if not distributed.in_group():
        return action()
    outcome: list[Any] = [None, None]
    if _is_rank0():
        try:
            outcome[0] = action()
        except (OSError, ValueError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def _unwrap_dcp_errors() -> Iterator[None]:
    """Raise the cause of DCP's own BaseException, which wraps an error of each rank."""
    try:
        yield
    except CheckpointException as gathered:
        causes = [_cause(failure) for failure, _ in gathered.failures.values()]
        cause = next((cause for cause in causes if not isinstance(cause, Exception)), causes[0])
        # errors of other ranks come without context: a RuntimeError is all that is left of a full disk
        raise OSError(str(cause)) if isinstance(cause, RuntimeError) else cause from None


def _cause(error: BaseException) -> BaseException:
    """Return the signal or disk error behind an error: PyTorch's writer fails once more on its half-written file."""
    context: BaseException | None = error
    while context is not None:
        if isinstance(context, OSError) or not isinstance(context, Exception):
            return context
        context = context.__context__
    return error


@contextmanager
def _ignore_single_process_warning() -> Iterator[None]:
    """Ignore DCP's warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


# ---- nested state <-> JSON and named tensors
#
# {"step": 3, "model": {"w": tensor}, "betas": (0.9, 0.95)}
# <-> {"step": 3, "model": {"w": {"$tensor": "model/w"}}, "betas": {"$tuple": [0.9, 0.95]}} and {"model/w": tensor}


def flatten(state: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Split a state into JSON-able values and tensors by path. Raises ValueError for anything else."""
    tensors: dict[str, Tensor] = {}
    return _flatten(state, "", tensors), tensors


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if path in tensors:
            raise ValueError(f"state: two tensors are called {path}; give them different names")
        tensors[path] = value.detach()
        return {"$tensor": path}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        items = [(key, _flatten(item, _join(path, key), tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$pairs": [[key, item] for key, item in items]}
    if isinstance(value, list | tuple):
        items = [_flatten(item, _join(path, i), tensors) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    raise ValueError(
        f"state: {path} is a {type(value).__name__}, but only tensors, numbers, strings, None, "
        "and dicts, lists and tuples of these can be stored"
    )


def _join(path: str, key: Any) -> str:
    if type(key) not in (str, int):
        raise ValueError(f"state: {path} has the key {key!r}, but keys have to be strings or whole numbers")
    return f"{path}/{key}" if path else str(key)


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Invert `flatten`. Raises CheckpointError for a missing tensor."""
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        if tree["$tensor"] not in tensors:
            raise CheckpointError(f"the tensor {tree['$tensor']} of a saved state is missing")
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(unflatten(tree["$tuple"], tensors))
    if "$pairs" in tree:
        return {key: unflatten(item, tensors) for key, item in tree["$pairs"]}
    return {key: unflatten(item, tensors) for key, item in tree.items()}


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the settings of two nested configs that differ: `model.encoder.width 64 -> 96`."""
    before, after = _leaves(saved), _leaves(now)
    names = [name for name in before if name in after and before[name] != after[name]]
    return [f"{name} {before[name]} -> {after[name]}" for name in names]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = list(value) if isinstance(value, tuple) else value
    return leaves


# ---- DCP's metadata, a pickle, restricted

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
        if module.split(".")[0] == "pathlib" and name in _PATHS:  # where it was saved: not used
            return PurePath
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise CheckpointError(f"it asks for {module}.{name}, which no state of a run needs")


def read_dcp_metadata(folder: Path) -> Metadata:
    """Read DCP's metadata of a state. Raises CheckpointError if it is damaged or asks for more than tensors."""
    path = folder / ".metadata"
    try:
        check_regular(path)
        data = path.read_bytes()
        check_pickle(data)
        metadata = _Unpickler(io.BytesIO(data)).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError("it is not metadata of torch.distributed.checkpoint")
        _check_metadata(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except Exception as error:  # a pickle of flipped bits may raise anything, MemoryError and RecursionError too
        raise CheckpointError(f"{path} can't be read ({type(error).__name__}: {error})") from error
    return metadata


def _check_metadata(metadata: Metadata) -> None:
    """Raise CheckpointError unless every tensor is there as a whole, in files of the folder."""
    stored: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        name = place.relative_path
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"it names the file {name!r}, expected one of its folder")
        if min(place.offset, place.length) < 0:
            raise CheckpointError(f"it places {index.fqn} at {place.offset}, {place.length} bytes long")
        stored[index.fqn] = stored.get(index.fqn, 0) + 1
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{name} is not a tensor")
        if not isinstance(entry.properties.dtype, torch.dtype) or not isinstance(entry.size, torch.Size):
            raise CheckpointError(f"{name} has no type or no shape")
        chunks = [chunk for chunk in entry.chunks if isinstance(chunk, ChunkStorageMetadata)]
        values = sum(math.prod(chunk.sizes) for chunk in chunks)
        inside = all(
            len(chunk.sizes) == len(chunk.offsets) == len(entry.size)
            and all(
                o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            )
            for chunk in chunks
        )
        if not chunks or len(chunks) != len(entry.chunks) or not inside or values != math.prod(entry.size):
            raise CheckpointError(f"{name} of shape {tuple(entry.size)} is there in part: {values:,} values")
        if stored.get(name, 0) < len(chunks):
            raise CheckpointError(f"{name} has {len(chunks)} parts, but {stored.get(name, 0)} are stored")


class SafeReader(FileSystemReader):
    """DCP's reader of folders, without its unrestricted unpickling."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the metadata by `read_dcp_metadata`."""
        return read_dcp_metadata(Path(self.path))
