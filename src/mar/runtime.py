"""What the machine and the numbers are: devices, the dtype policy, seeds, and the process group.

bf16 here means: the matrices of `Linear` and their inputs in bfloat16; norms, residual streams, softmax, noise, the
diffusion state and its coefficients in float32. Never float16.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional

from mar.config import ConfigError


class Linear(nn.Linear):
    """A linear layer that takes its input to its own dtype, so that only matrix products run in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dtype is torch.bfloat16:
            input = input.bfloat16()
        return functional.linear(input, self.weight, self.bias)


def set_matrix_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Turns the matrices of every `Linear` of a model to `dtype`, in place, for sampling."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: got {dtype}, expected float32 or bfloat16 (float16 overflows in this model)")
    for module in model.modules():
        if isinstance(module, Linear):
            module.to(dtype)


def choose_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the best there is: CUDA, MPS, CPU. ConfigError where it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name is None or name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: got {name!r}, expected auto, cpu, cuda, cuda:N or mps") from None
    if (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise ConfigError(f"device {name!r} is not on this machine; leave it out to take the best there is")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on all the numbers of `key`, and on nothing else."""
    state = 0x9E3779B97F4A7C15
    for number in key:  # splitmix64 over the key, so that (1, 2) and (2, 1), or 12 and (1, 2), differ
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 31)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(state)


def rank() -> int:
    """This process's number under torchrun; 0 without."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun started; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))
