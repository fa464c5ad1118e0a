"""Faster operations for each kind of device, equal up to rounding.

Model, head and sampler are plain PyTorch, and get faster operations of their device from `backend_for`. A device
without one has None there, or a function that returns its argument.
"""

from __future__ import annotations

import torch

from mar.backends.base import PLAIN, Backend
from mar.backends.cpu import CPU
from mar.backends.cuda import CUDA

__all__ = ["PLAIN", "Backend", "backend_for"]

_BACKENDS = {"cpu": CPU, "cuda": CUDA}


def backend_for(device: torch.device) -> Backend:
    """Return a device's backend; plain PyTorch for others and in `torch.compile`."""
    if torch.compiler.is_compiling():
        return PLAIN
    return _BACKENDS.get(device.type, PLAIN)
