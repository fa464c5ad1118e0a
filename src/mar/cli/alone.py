"""Work that one process does while the others of torchrun's wait for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TypeVar

from mar import distributed
from mar.cli import told

Argument = TypeVar("Argument")
STOPPED = 130
"""The exit code of what Ctrl-C or SIGTERM ended."""


def run_on_rank0(work: Callable[[Argument], int], argument: Argument) -> int:
    """The exit code of `work(argument)`, done once, for all processes.

    Where there are several, a process that the first one starts does it, knowing of no others: what the first one has
    joined can't be left for a while. `work` is then a function of a module, and `argument` can be pickled. A signal is
    passed on; the work ends as it does when it gets that signal itself.
    """
    if distributed.world_size() == 1:
        return work(argument)
    code = _in_a_process(work, argument) if distributed.rank() == 0 else 0
    if code == STOPPED:  # the others were stopped too, and may be gone
        raise SystemExit(code)
    return int(distributed.all_gather_object(code)[0])


def _in_a_process(work: Callable[[Argument], int], argument: Argument) -> int:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(work, argument))
    stopped: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        if process.pid is not None:
            process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process.start()
        if stopped:
            process.terminate()
        process.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return _code(process)


def _code(process: BaseProcess) -> int:
    """As a shell tells it: 128 and the number of the signal that ended it."""
    code = process.exitcode
    assert code is not None
    return code if code >= 0 else 128 - code


def _work(work: Callable[[Argument], int], argument: Argument) -> None:
    """What the process does: it belongs to no group, and ends with the one that started it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    raise SystemExit(told(lambda: work(argument)))


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
