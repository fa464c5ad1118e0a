"""Linear layers and dropout with this project's precision policy.

bf16 here means: the matrices of `Linear` and their inputs in bfloat16; norms, residual streams, softmax, noise, the
diffusion state and its coefficients in float32. Never float16. Products and dropout are the backend's, if it has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mar.backends import backend_for


class Linear(nn.Linear):
    """Linear layer that casts its input to bfloat16 if its weight is.

    Args:
        in_features, out_features: as in PyTorch.
        splits: number of matrices, one above the other, in a fused weight: 3 for queries, keys and values.
    """

    def __init__(self, in_features: int, out_features: int, *, splits: int = 1) -> None:
        super().__init__(in_features, out_features)
        self.splits = splits

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dtype is torch.bfloat16:
            input = input.bfloat16()
        linear = backend_for(input.device).linear or functional.linear
        return linear(input, self.weight, self.bias)


class Dropout(nn.Module):
    """Dropout by the backend: zeroes a share `rate` in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if not self.training or self.rate == 0:
            return x
        dropout = backend_for(x.device).dropout or functional.dropout
        return dropout(x, self.rate)


def to_float32(x: Tensor) -> Tensor:
    """Cast bfloat16 to float32; other dtypes stay."""
    return x.float() if x.dtype is torch.bfloat16 else x


def set_matrix_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of every `Linear` in place, for sampling."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: got {dtype}, expected float32 or bfloat16 (float16 overflows in this model)")
    for module in model.modules():
        if isinstance(module, Linear):
            module.to(dtype)


class _SkipInit(TorchFunctionMode):
    """Makes the initializers of tensors do nothing."""

    initializers = frozenset(f for name, f in vars(nn.init).items() if name.endswith("_") and name[0] != "_")
    initializers |= {Tensor.normal_, Tensor.uniform_}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.initializers:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def init_empty_weights() -> Iterator[None]:
    """Create modules on the meta device, without memory, before loading their weights.

    Initializers do nothing: `normal_` on the meta device imports PyTorch's compiler and sympy, a third of the time to
    load a small model.
    """
    with torch.device("meta"), _SkipInit():
        yield
