"""What the machine and the numbers are: devices, the dtype policy, seeds, and the process group.

bf16 here means: the matrices of `Linear` and their inputs in bfloat16; norms, residual streams, softmax, noise, the
diffusion state and its coefficients in float32. Never float16.
"""

from __future__ import annotations

import torch

from mar.config import ConfigError


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products in bfloat16; others imitate them, which is slow."""
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every PyTorch
    return any(getattr(torch.cpu, name, bool)() for name in known)


def choose_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the best there is: CUDA, MPS, CPU. ConfigError where it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name is None or name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda", "mps")
    except RuntimeError:
        known = False
    if not known:  # torch has more: meta, xpu, ...
        raise ConfigError(f"device: got {name!r}, expected auto, cpu, cuda, cuda:N or mps")
    if (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise ConfigError(f"device {name!r} is not on this machine; leave it out to take the best there is")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def allow_tf32() -> None:
    """Lets GPUs round the inputs of float32 products to TF32's 10 bits of mantissa; CPUs compute as before."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
