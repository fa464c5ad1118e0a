"""Nested state, taken apart into JSON and named tensors, and put together again.

{"step": 3, "model": {"w": tensor}, "betas": (0.9, 0.95)}
<-> {"step": 3, "model": {"w": {"$tensor": "model/w"}}, "betas": {"$tuple": [0.9, 0.95]}} and {"model/w": tensor}

The table of contents (`.metadata`) of a `torch.distributed.checkpoint` folder, read without trusting it.

PyTorch keeps it as a pickle, which could run anything when loaded. Here only the classes that such a table is made of
are let through, and tables that list anything but tensors are refused, as dcp would unpickle that freely.

The state of a training run on the disk: folders of `torch.distributed.checkpoint`, and a pointer to the latest.

    folder/state-000000128000/   after 128,000 images: the tensors (.metadata, *.distcp), state.json, config.json
    folder/latest                the name of the one to go on from

A state is written under a temporary name and renamed, so that whatever is called state-* is whole. Only tensors go into
the shards, which are read with `weights_only`; all else is JSON; and of the pickle that `torch.distributed.checkpoint`
keeps as its table of contents only the classes of a table of contents are let through.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mar.checkpoint.files import CheckpointError, cannot_write, flush, require_room, write_text


def flatten(state: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """A state as JSON-able values, and its tensors by path. ValueError for anything that is neither."""
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
    """The inverse of `flatten`. CheckpointError for a tensor that is not among `tensors`."""
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
    """Lines that say which settings of two nested configs differ: `model.encoder.width 64 -> 96`."""
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


def read_dcp_metadata(folder: Path) -> Metadata:
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
        return read_dcp_metadata(Path(self.path))


logger = logging.getLogger(__name__)
_NAME = re.compile(r"state-(\d{12,})")
_TEMPORARY = ".saving-"
_OVERHEAD = 4096
"""Bytes that a stored tensor costs beside its values, rounded up."""
Result = TypeVar("Result")


class RunState:
    """The states of one run in `folder`; `config` (JSON-able) is stored beside each and compared when one doesn't fit.

    With a process group every rank makes the same calls, with states of the same names; plain tensors and all that is
    not a tensor are taken from rank 0, sharded ones (DTensor) from all. One run at a time may use a folder.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.config = dict(config or {})

    def save(self, images_seen: int, state: dict[str, Any], keep: int = 3) -> Path:
        """Stores nested dicts, lists and tuples of tensors, numbers, strings and None; keeps the newest `keep` states.

        CheckpointError where the disk refuses; then, and when interrupted, the states there were are untouched.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}, but at least 1 state has to be kept")
        tree, tensors = flatten(state)
        needed = sum(tensor.numel() * tensor.itemsize + _OVERHEAD for tensor in tensors.values())
        final = self.folder / f"state-{images_seen:012d}"
        temporary = self.folder / f"{_TEMPORARY}{final.name}"
        try:
            _on_first(lambda: self._prepare(temporary, needed))
            with _one_exception(), _quiet():
                state_dict_saver.save(dict(tensors), storage_writer=FileSystemWriter(temporary))
            _on_first(lambda: self._finish(temporary, final, tree, keep))
        except OSError as error:
            raise cannot_write(final, needed, error) from error
        finally:
            if _first():
                shutil.rmtree(temporary, ignore_errors=True)
        return final

    def load(self, state: dict[str, Any]) -> bool:
        """Fills `state`, built as for `save`, from the latest state: tensors in place, all else replaced.

        Returns False, and does nothing, where no state has been saved. CheckpointError where its tensors are not those
        that were saved (nothing is changed then), or where the files are damaged.
        """
        path = self.latest()
        if path is None:
            return False
        contents = read_dcp_metadata(path)
        tensors = flatten(state)[1]
        if different := _differences(contents, tensors):
            raise CheckpointError(self._does_not_fit(path, different))
        try:
            with _one_exception(), _quiet():
                state_dict_loader.load(dict(tensors), storage_reader=SafeReader(path))
        except (OSError, EOFError, UnpicklingError, AssertionError, LookupError, ValueError, TypeError) as error:
            why = str(error).split("\n")[0]
            raise CheckpointError(f"{path} is damaged ({why}); remove it to go on from an older state") from error
        loaded = unflatten(_read_json(path / "state.json"), tensors)
        state.clear()
        state.update(loaded)
        return True

    def latest(self) -> Path | None:
        """The state to go on from: the one that `latest` names; if that is not whole, the newest that is, or None."""
        return _on_first(self._latest)

    def states(self) -> list[Path]:
        """All states, oldest first."""
        if not self.folder.is_dir():
            return []
        numbered = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]

    def _prepare(self, temporary: Path, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(f"{_TEMPORARY}*"):  # of a process that was killed
            shutil.rmtree(stale)
        require_room(self.folder, needed)
        temporary.mkdir()

    def _finish(self, temporary: Path, final: Path, tree: Any, keep: int) -> None:
        for name, values in (("state.json", tree), ("config.json", self.config)):
            write_text(temporary / name, json.dumps(values, indent=1))
        flush(temporary)
        _move(temporary, final)
        flush(self.folder)
        write_text(self.folder / "latest", final.name + "\n")
        older = [path for path in self.states() if path != final]
        for path in older[: max(0, len(older) - (keep - 1))]:
            # renamed first, so that a half removed state is never taken for a whole one
            shutil.rmtree(path.rename(self.folder / f"{_TEMPORARY}old-{path.name}"))

    def _latest(self) -> Path | None:
        states = self.states()
        try:
            name = (self.folder / "latest").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            name = ""
        chosen = next((path for path in states if path.name == name), None)
        if chosen is not None and (why := _damage(chosen)):
            logger.warning("%s: %s; looking for an older state", chosen, why)
        elif chosen is not None:
            return chosen
        elif states:
            logger.warning("%s names no state; looking for the newest", self.folder / "latest")
        found = next((path for path in reversed(states) if path != chosen and not _damage(path)), None)
        if states and found is None:
            raise CheckpointError(f"no state in {self.folder} is whole; remove state-* there to begin anew")
        if found is not None:
            logger.warning("going on from %s", found)
        return found

    def _does_not_fit(self, path: Path, different: list[str]) -> str:
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


def _differences(contents: Metadata, tensors: Mapping[str, Tensor]) -> list[str]:
    stored = contents.state_dict_metadata
    lines = [f"{name} was not saved" for name in sorted(set(tensors) - set(stored))]
    lines += [f"{name} was saved, but is not there now" for name in sorted(set(stored) - set(tensors))]
    for name in sorted(set(tensors) & set(stored)):
        now = (tuple(tensors[name].shape), tensors[name].dtype)
        then = (tuple(stored[name].size), stored[name].properties.dtype)  # type: ignore[union-attr]
        if now != then:
            lines.append(f"{name} was saved as {then[0]} {then[1]}, now {now[0]} {now[1]}")
    return lines


def _damage(path: Path) -> str | None:
    """What is wrong with a state's files, found without reading the tensors; None if nothing is."""
    try:
        contents = read_dcp_metadata(path)
        _read_json(path / "state.json")
        for place in contents.storage_data.values():
            shard = path / place.relative_path
            if not shard.is_file() or shard.stat().st_size < place.offset + place.length:
                return f"{shard.name} is truncated or missing"
    except CheckpointError as error:
        return str(error)
    return None


def _move(temporary: Path, final: Path) -> None:
    """Renames a state into place; one of the same number is only given up once the new one is there."""
    if not final.exists():
        temporary.rename(final)
        return
    aside = final.rename(final.with_name(f"{_TEMPORARY}old-{final.name}"))
    try:
        temporary.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    shutil.rmtree(aside)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({error})") from error


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _first() -> bool:
    return not _distributed() or dist.get_rank() == 0


def _on_first(action: Callable[[], Result]) -> Result:
    """Does something on rank 0 while the others wait; all get its result, or its error."""
    if not _distributed():
        return action()
    outcome: list[Any] = [None, None]
    if _first():
        try:
            outcome[0] = action()
        except (OSError, ValueError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def _one_exception() -> Iterator[None]:
    """Raises what went wrong, where dcp raises a BaseException of its own around what went wrong on each rank."""
    try:
        yield
    except CheckpointException as gathered:
        causes = [_cause(failure) for failure, _ in gathered.failures.values()]
        cause = next((cause for cause in causes if not isinstance(cause, Exception)), causes[0])
        # what other ranks send has lost its context: a RuntimeError is all that is left of their full disk
        raise OSError(str(cause)) if isinstance(cause, RuntimeError) else cause from None


def _cause(error: BaseException) -> BaseException:
    """The signal or refusal of the disk behind an error: PyTorch's writer stumbles over its own half-written file."""
    context: BaseException | None = error
    while context is not None:
        if isinstance(context, OSError) or not isinstance(context, Exception):
            return context
        context = context.__context__
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without dcp's remark that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
