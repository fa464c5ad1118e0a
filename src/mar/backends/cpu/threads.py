"""What the machine and the numbers are: devices, the dtype policy, seeds, and the process group.

bf16 here means: the matrices of `Linear` and their inputs in bfloat16; norms, residual streams, softmax, noise, the
diffusion state and its coefficients in float32. Never float16.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def trim_heap() -> None:
    """Hands what is free in the middle of the heap back to the system, where its C library can (glibc: on Linux).

    Where tensors grow from step to step, none fits into the hole that the last one left, if anything was kept behind
    it: such as the programs that oneDNN writes for each new shape."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def single_threaded_pool() -> Iterator[ThreadPoolExecutor]:
    """As many threads of Python as torch would take, in each of which torch takes one.

    Torch shares some products and convolutions out among its threads, and how many there are then shows in the last
    bits. What is computed here does not depend on it.
    """
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            yield threads
    finally:
        torch.set_num_threads(count)
