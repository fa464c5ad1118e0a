"""Faster operations for each kind of device, equal up to rounding.

Model, head and sampler are plain PyTorch, and get faster operations of their device from `backend_for`. A device
without one has None there, or a function that returns its argument.
"""

from __future__ import annotations

import torch

from mar.backends.base import PLAIN, Backend
from mar.backends.cpu import CPU
from mar.backends.cuda import CUDA
from mar.backends.cuda.settings import choose_attention, set_tf32

__all__ = ["PLAIN", "Backend", "backend_for", "configure", "configure_once"]

_configured: set[str] = set()
"""Kinds of devices that this process has been configured for."""
_BACKENDS = {"cpu": CPU, "cuda": CUDA}


def backend_for(device: torch.device) -> Backend:
    """Return a device's backend; plain PyTorch for others and in `torch.compile`."""
    if torch.compiler.is_compiling():
        return PLAIN
    return _BACKENDS.get(device.type, PLAIN)


def configure(device: torch.device, *, tf32: bool = False) -> None:
    """Set what a process computes by on CUDA; other devices have no such settings.

    They are PyTorch's own and hold for all models of the process.

    Args:
        device: computes.
        tf32: round inputs of float32 products to TF32.
    """
    _configured.add(device.type)
    if device.type == "cuda":
        set_tf32(tf32)
        choose_attention()


def configure_once(device: torch.device) -> None:
    """Set what a process computes by, unless `configure` has; products in float32."""
    if device.type not in _configured:
        configure(device)
