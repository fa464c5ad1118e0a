"""Weights of 8 bits for drawing on a CPU: the matrices inside the blocks of trunk and head, which are nearly all.

A weight is a whole number times a scale of its output feature. What comes in is rounded to 7 bits as it comes, by the
range of the whole input, and products are of whole numbers: a quarter of the memory to read, and more arithmetic at a
time. A picture then depends on those that are drawn beside it, by as much as the 8 bits change it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mar.config import ConfigError
from mar.model.mar import MAR
from mar.nn import Linear


class Int8Linear(nn.Module):
    """What a `Linear` does, by PyTorch's own product of 8-bit weights (FBGEMM on x86)."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        self.register_buffer("scale", weight.abs().amax(1).clamp(min=1e-12) / 127)
        self.register_buffer("bias", linear.bias.detach().float())
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            # That a later PyTorch will have no such call; `quantise` tells then. Nothing else packs for few rows.
            warnings.simplefilter("ignore", UserWarning)
            whole = torch.quantize_per_channel(weight, self.get_buffer("scale").double(), zeros, 0, torch.qint8)
        self.packed: Any = torch.ops.quantized.linear_prepack(whole, self.get_buffer("bias"))

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        product: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self.packed, True)
        return product


def require_int8(device: torch.device) -> None:
    """Raises ConfigError where a model on `device` can't have weights of 8 bits."""
    if device.type != "cpu":
        raise ConfigError(f"int8 weights: got a model on {device}, expected one on the CPU")
    there = hasattr(torch, "quantize_per_channel") and hasattr(torch.ops.quantized, "linear_dynamic")
    if not there or torch.backends.quantized.engine == "none":
        raise ConfigError(f"int8 weights: PyTorch {torch.__version__} has no products of 8 bits on this machine")


def quantize_(model: MAR) -> None:
    """Turns the matrices of the blocks of a model on a CPU to 8 bits, in place. ConfigError where that can't be."""
    require_int8(model.mask_token.device)
    for block in (*model.encoder, *model.decoder, *model.head.blocks):
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear):
                    setattr(parent, name, Int8Linear(child))


def is_quantized(model: MAR) -> bool:
    """Whether `quantise` has turned a model's weights."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
