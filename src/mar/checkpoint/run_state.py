"""The state of a training run on the disk: folders of `torch.distributed.checkpoint`, and a pointer to the latest.

    folder/state-000000128000/   after 128,000 images: the tensors (.metadata, *.distcp), state.json, config.json
    folder/latest                the name of the one to go on from

A state is written under a temporary name and renamed, so that whatever is called state-* is whole. Only tensors go into
the shards, which are read with `weights_only`; all else is JSON; and of the pickle that `torch.distributed.checkpoint`
keeps as its table of contents only the classes of a table of contents are let through.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from mar.checkpoint import state_tree
from mar.checkpoint.files import CheckpointError, cannot_write, flush, require_room, write_text
from mar.checkpoint.table_of_contents import SafeReader, read_contents

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
        tree, tensors = state_tree.flatten(state)
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
        contents = read_contents(path)
        tensors = state_tree.flatten(state)[1]
        if different := _differences(contents, tensors):
            raise CheckpointError(self._does_not_fit(path, different))
        try:
            with _one_exception(), _quiet():
                state_dict_loader.load(dict(tensors), storage_reader=SafeReader(path))
        except (OSError, EOFError, UnpicklingError, AssertionError, LookupError, ValueError, TypeError) as error:
            why = str(error).split("\n")[0]
            raise CheckpointError(f"{path} is damaged ({why}); remove it to go on from an older state") from error
        loaded = state_tree.unflatten(_read_json(path / "state.json"), tensors)
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
        settings = state_tree.changed_settings(stored, self.config)
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
        contents = read_contents(path)
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
