"""8-bit weights for sampling on a CPU.

They replace the matrices inside the blocks of trunk and head, nearly all weights. A weight is an integer times a scale
of its output feature. Inputs are rounded to 7 bits, by the range of the whole input tensor, and products are of
integers: a quarter of the memory to read, and more arithmetic per instruction. Through that range an image depends
slightly on the other images of its batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mar.config import ConfigError


class Int8Linear(nn.Module):
    """Linear layer with 8-bit weights, by PyTorch's own product (FBGEMM on x86)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        self.register_buffer("scale", weight.abs().amax(1).clamp(min=1e-12) / 127)
        self.register_buffer("bias", linear.bias.detach().float())
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            # deprecated in PyTorch, but nothing else packs for few rows; `require_int8` checks that it exists
            warnings.simplefilter("ignore", UserWarning)
            integers = torch.quantize_per_channel(weight, self.get_buffer("scale").double(), zeros, 0, torch.qint8)
        self.packed: Any = torch.ops.quantized.linear_prepack(integers, self.get_buffer("bias"))

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        product: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self.packed, True)
        return product


def require_int8(device: torch.device) -> None:
    """Raise ConfigError if a model on `device` can't have 8-bit weights."""
    if device.type != "cpu":
        raise ConfigError(f"int8 weights: got a model on {device}, expected one on the CPU")
    available = hasattr(torch, "quantize_per_channel") and hasattr(torch.ops.quantized, "linear_dynamic")
    if not available or torch.backends.quantized.engine == "none":
        raise ConfigError(f"int8 weights: PyTorch {torch.__version__} has no 8-bit matrix product on this machine")


def quantize_(blocks: Iterable[nn.Module]) -> None:
    """Replace every linear layer inside `blocks` (`MAR.blocks()`) by an `Int8Linear`, in place.

    Raises ConfigError if this device or PyTorch can't.
    """
    for block in blocks:
        require_int8(next(block.parameters()).device)
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))


def is_quantized(model: nn.Module) -> bool:
    """Return whether `quantize_` has replaced layers of a model."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
