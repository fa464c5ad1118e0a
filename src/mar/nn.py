"""What the machine and the numbers are: devices, the dtype policy, seeds, and the process group.

bf16 here means: the matrices of `Linear` and their inputs in bfloat16; norms, residual streams, softmax, noise, the
diffusion state and its coefficients in float32. Never float16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mar.backends.cpu.linear import linear


class Linear(nn.Linear):
    """A linear layer that takes its input to its own dtype, so that only matrix products run in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dtype is torch.bfloat16:
            input = input.bfloat16()
        return linear(input, self.weight, self.bias)


def to_float32(x: Tensor) -> Tensor:
    """bfloat16 -> float32, in which all but matrix products is computed; other dtypes stay."""
    return x.float() if x.dtype is torch.bfloat16 else x


def set_matrix_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Turns the matrices of every `Linear` of a model to `dtype`, in place, for sampling."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: got {dtype}, expected float32 or bfloat16 (float16 overflows in this model)")
    for module in model.modules():
        if isinstance(module, Linear):
            module.to(dtype)


class _SkipInit(TorchFunctionMode):
    """Lets initialisers of tensors do nothing."""

    fillers = frozenset(function for name, function in vars(nn.init).items() if name.endswith("_") and name[0] != "_")
    fillers |= {Tensor.normal_, Tensor.uniform_}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.fillers:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def init_empty_weights() -> Iterator[None]:
    """Modules made within have tensors without memory, on the meta device, for weights that are there already.

    Nothing is initialised: on that device, drawing from a normal distribution takes PyTorch's compiler and sympy, whose
    import alone is a third of what it takes to load a small model.
    """
    with torch.device("meta"), _SkipInit():
        yield
