"""What the machine and the numbers are: devices, the dtype policy, seeds, and the process group.

bf16 here means: the matrices of `Linear` and their inputs in bfloat16; norms, residual streams, softmax, noise, the
diffusion state and its coefficients in float32. Never float16.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MIN_MULTIPLICATIONS = 2**22
"""Multiplications from which on a product may be oneDNN's: it prepares for each new shape."""


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias: PyTorch's, or oneDNN's where that is twice as fast."""
    large = x.numel() * len(weight) >= MIN_MULTIPLICATIONS
    if not (large and onednn_is_faster()) or x.dtype is not torch.float32 or weight.dtype is not torch.float32:
        return functional.linear(x, weight, bias)
    plain = type(weight) in (nn.Parameter, Tensor) and x.device.type == weight.device.type == "cpu"
    if not plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        learned: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return learned
    return _onednn_linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """oneDNN's product with its gradients, which are products, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, len(weight))
        return (
            _onednn_linear(gradient, weight.T) if for_x else None,
            _onednn_linear(rows.T, x.reshape(-1, weight.shape[1]).T) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's products in float32 are taken for PyTorch's own, which are MKL's: on processors with AVX-512.

    They are twice as fast where MKL leaves that unused, as on AMD's. On Intel's, where both take it, and with AVX2 the
    two are alike (measured)."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_onednn() and torch.backends.mkl.is_available() and wide


def has_onednn(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this PyTorch has oneDNN's product, which has no public name, and the processor such numbers."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
