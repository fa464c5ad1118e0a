"""Attention with dropout on a CPU, for which PyTorch has no kernel.

The backward pass computes the attention weights again, from queries, keys, values and a mask of one byte per weight. A
few images are processed at a time, so that their weights stay in the processor's cache.
Letters of shapes: n images, s tokens, e width, h heads, d = e/h.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mar.backends.cpu.dropout import dropout_mask, keep_prob

_MAX_WEIGHTS = 2**18
"""Attention weights to compute at a time, or those of one image, if more."""


def attention_with_dropout(qkv: Float[Tensor, "n s three_e"], num_heads: int, rate: float) -> Float[Tensor, "n s e"]:
    """Compute dropout(softmax(q k^T / sqrt(d))) v of all tokens, heads concatenated.

    `qkv` holds queries, keys and values, one after the other. Source: Vaswani et al. (arXiv 1706.03762), equation 1.
    """
    n, s, _ = qkv.shape
    mask = dropout_mask((n, num_heads, s, s), rate)
    attended: Tensor = _Attention.apply(qkv, mask, 1 / keep_prob(rate))  # type: ignore[no-untyped-call]
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, mask: Bool[Tensor, "n h s s"], scale: float) -> Tensor:
        ctx.save_for_backward(qkv, mask)
        ctx.scale = scale
        n, s, width = qkv.shape
        attended = qkv.new_empty(n, s, width // 3)
        with torch.autocast("cpu", enabled=False):
            for qkv_, mask_, out in zip(*_groups(mask, qkv, mask, attended), strict=True):
                q, k, v = _heads(qkv_, 3 * mask_.shape[1]).chunk(3, dim=1)
                _heads(out, mask_.shape[1]).copy_((_weights(q, k).mul_(mask_) @ v).mul_(scale))
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        qkv, mask = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        for qkv_, mask_, grad_, out in zip(*_groups(mask, qkv, mask, grad, grad_qkv), strict=True):
            q, k, v = _heads(qkv_, 3 * mask_.shape[1]).chunk(3, dim=1)
            dq, dk, dv = _heads(out, 3 * mask_.shape[1]).chunk(3, dim=1)
            dattended = _heads(grad_, mask_.shape[1]) * ctx.scale
            weights = _weights(q, k)
            dv.copy_((weights * mask_).mT @ dattended)
            dscores = torch._softmax_backward_data((dattended @ v.mT).mul_(mask_), weights, -1, weights.dtype)
            factor = q.shape[-1] ** -0.5
            dq.copy_((dscores @ k).mul_(factor))
            dk.copy_((dscores.mT @ q).mul_(factor))
        return grad_qkv, None, None


def _groups(mask: Bool[Tensor, "n h s s"], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split each tensor into groups of images."""
    images = max(1, _MAX_WEIGHTS // mask[0].numel())
    return [tensor.split(images) for tensor in tensors]


def _heads(x: Float[Tensor, "n s e"], num_heads: int) -> Float[Tensor, "n h s d"]:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _weights(q: Float[Tensor, "n h s d"], k: Float[Tensor, "n h s d"]) -> Float[Tensor, "n h s s"]:
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
