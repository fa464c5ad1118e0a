"""Devices by name, and what they can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from mar.config import ConfigError


def choose_device(name: str | None = None) -> torch.device:
    """Return a device by name; "auto" and None choose one.

    The choice is the first that exists of CUDA, MPS and CPU. Raises ConfigError if the device does not exist.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name is None or name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        supported = device.type in ("cpu", "cuda", "mps")
    except RuntimeError:
        supported = False
    if not supported:  # PyTorch has more: meta, xpu, ...
        raise ConfigError(f"device: got {name!r}, expected auto, cpu, cuda, cuda:N or mps")
    if (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise ConfigError(f"device: got {name!r}, which this machine lacks; leave it out for the best available")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device: got {name!r}, expected cuda:0 to cuda:{count - 1}, as this machine has {count}")
    return device


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a precision: fp32, bf16 or int8. Raises ConfigError for another."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    if name not in dtypes:
        raise ConfigError(f"dtype: got {name!r}, expected {', '.join(dtypes)}")
    return dtypes[name]


def multiplies_bf16() -> bool:
    """Return whether this processor has bfloat16 products; others emulate them, slowly."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every PyTorch
    return any(getattr(torch.cpu, name, bool)() for name in names)


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device; to CUDA from pinned memory, without waiting."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def read_later(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Copy values to the CPU without waiting.

    Calling the result waits for the copy, and returns it.
    """
    if values.device.type != "cuda":
        return values.cpu
    copied = host_buffer(values.shape, values.dtype, values.device)
    copied.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))

    def read() -> torch.Tensor:
        event.synchronize()
        return copied

    return read


def host_buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Make memory on the CPU to exchange with a device; pinned for CUDA."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def default_precision(device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision of matrix products by default.

    That is bf16 on NVIDIA's GPUs from Ampere on and on AMD's, else fp32.
    """
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
