"""Starts processes: groups of ranks, and the command line, which may be killed at a given moment."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import signal as signals
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from mar.cli import main

Moment = tuple[int | str, int]
"""When a process gets a signal, and which (`start`)."""

_CONTEXT = multiprocessing.get_context("forkserver")
# Imported once by the server that forks processes, and not by every process again.
_MODULES = [
    "tiny",
    "extractors",
    "mar.zoo",
    "mar.cli.generate",
    "mar.cli.train_folder",
    "mar.cli.evaluate",
    "mar.sampling.sinks",
]
_MODULES += ["mar.sampling.progress", "mar.training.tokenizer", "torch.utils.tensorboard.writer", "pytest"]
_MODULES += ["torch.distributed", "torch._dynamo", "torch._refs"]
_missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
assert not _missing, f"the server would skip {_missing}, and every process import the rest anew"
_CONTEXT.set_forkserver_preload(_MODULES)


def spawn_ranks(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs `work(rank, *arguments)` in `count` processes, and raises what one of them raises."""
    torch.multiprocessing.start_processes(_work_as_rank, (work, *arguments), count, start_method="forkserver")


def _work_as_rank(rank: int, work: Callable[..., None], *arguments: Any) -> None:
    _unblock_signals()
    work(rank, *arguments)


def _unblock_signals() -> None:
    """Let signals through: the server blocks them if workers of a loader were the first that it started."""
    signals.pthread_sigmask(signals.SIG_UNBLOCK, {signals.SIGINT, signals.SIGTERM})


def start_process(
    arguments: Sequence[str],
    said: Path,
    *,
    die: tuple[int | str, int] | None = None,
    world: tuple[int, int, int] = (0, 1, 0),
) -> BaseProcess:
    """A process that runs `mar ARGUMENTS`, its stdout and stderr going to the file `said`.

    Args:
        arguments: of the command.
        said: file for stdout and stderr.
        die: (n, signal): the process gets the signal at its n-th fsync, of a file or a folder. An odd n is before a
            file gets its name, an even one after. A text for n is a pattern in the path of that fsync.
        world: rank, processes, port.
    """
    process = _CONTEXT.Process(target=_run, args=(list(arguments), said, die, world))
    process.start()
    return process


def start_work(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that runs `work(*arguments)`."""
    process = _CONTEXT.Process(target=_work, args=(work, *arguments))
    process.start()
    return process


def _work(work: Callable[..., None], *arguments: Any) -> None:
    _unblock_signals()
    work(*arguments)


def run_to_end(arguments: Sequence[str], said: Path, **options: Moment) -> int:
    """The exit code of `start`, once it has ended: 9 below zero for a process that was killed."""
    process = start_process(arguments, said, **options)  # type: ignore[arg-type]
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def run_group(processes: int, arguments: Sequence[str], said: Path) -> list[int]:
    """The exit codes of as many processes as torchrun would start; what each says goes to `said`.RANK."""
    port = free_port()
    started = [
        start_process(arguments, said.with_suffix(f".{rank}"), world=(rank, processes, port))
        for rank in range(processes)
    ]
    for process in started:
        process.join(120)
    return [process.exitcode if process.exitcode is not None else 1 for process in started]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(arguments: list[str], said: Path, die: Moment | None, world: tuple[int, int, int]) -> None:
    _unblock_signals()
    sys.stdout = sys.stderr = said.open("w", buffering=1)
    rank, processes, port = world
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)  # several processes share the cores
    pytest.MonkeyPatch().setattr("mar.cli.ERROR_GRACE_S", 0.5)  # nobody ends the other ranks of a group that failed
    if die is not None:
        _die(*die)
    code = main(arguments)
    sys.stdout.flush()
    sys.exit(code)


def _die(moment: int | str, signal: int) -> None:
    from mar.checkpoint import files

    flush, seen = files.flush, 0

    def counted(path: Path) -> None:
        nonlocal seen
        seen += 1
        flush(path)
        if re.search(moment, str(path)) if isinstance(moment, str) else (seen == moment):
            os.kill(os.getpid(), signal)

    files.flush = counted


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
