"""Faster ways to compute the same on one kind of device. Nothing here changes what is computed, but for rounding.

Model, head and sampler are plain PyTorch. Where a device has a faster way they ask `backend_for`; a field that is None,
or returns its argument, means that there is none.
"""

from __future__ import annotations

import torch

from mar.backends.base import PLAIN, Backend
from mar.backends.cpu import CPU
from mar.backends.cuda import CUDA

__all__ = ["PLAIN", "Backend", "backend_for"]

_BACKENDS = {"cpu": CPU, "cuda": CUDA}


def backend_for(device: torch.device) -> Backend:
    """Return the backend of a device: plain PyTorch for unknown ones, and inside `torch.compile`."""
    if torch.compiler.is_compiling():
        return PLAIN
    return _BACKENDS.get(device.type, PLAIN)
