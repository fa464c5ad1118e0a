"""Linear layers in float32 by oneDNN, if faster than MKL."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MIN_MULTIPLICATIONS = 2**22
"""Smaller products stay with PyTorch: oneDNN compiles a kernel for each new shape."""


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute x weight^T + bias, by oneDNN if that is faster."""
    large = x.numel() * len(weight) >= MIN_MULTIPLICATIONS
    if not (large and onednn_is_faster()) or x.dtype is not torch.float32 or weight.dtype is not torch.float32:
        return functional.linear(x, weight, bias)
    plain = type(weight) in (nn.Parameter, Tensor) and x.device.type == weight.device.type == "cpu"
    if not plain or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        product: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return product
    return _onednn_linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """oneDNN's product, and its gradients by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, len(weight))
        return (
            _onednn_linear(grad, weight.T) if for_x else None,
            _onednn_linear(rows.T, x.reshape(-1, weight.shape[1]).T) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@cache
def onednn_is_faster() -> bool:
    """Return whether oneDNN multiplies float32 faster than MKL: with AVX-512.

    MKL leaves AVX-512 unused on AMD processors, and oneDNN is twice as fast there. On Intel processors and with AVX2
    both are alike (docs/performance.md).
    """
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_onednn() and torch.backends.mkl.is_available() and avx512


def has_onednn(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether PyTorch has oneDNN's product here, for `dtype`.

    The product is not part of PyTorch's public interface.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
