"""Heap memory and threads of a process on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def trim_heap() -> None:
    """Return freed heap to the operating system (glibc on Linux; else nothing).

    oneDNN's cached kernels fragment the heap between growing activations.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def single_threaded_pool() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of PyTorch's number of threads, one thread per operation.

    PyTorch splits some operations among its threads, and the last bits of their results depend on the number of
    threads.
    Results of this pool do not.
    """
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)
