"""Heap memory and threads of a process on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def trim_heap() -> None:
    """Return freed heap to the operating system, where the C library can (glibc, on Linux).

    Kernels that oneDNN caches between growing activations fragment the heap.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def single_threaded_pool() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of as many threads as PyTorch uses, in each of which PyTorch uses one.

    PyTorch splits some products and convolutions among its threads, and their number then shows in the last bits.
    Results of this pool do not depend on it.
    """
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)
