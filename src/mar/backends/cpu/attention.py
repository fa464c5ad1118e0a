"""Attention with dropout on a CPU, for training. PyTorch has no kernel for that, and keeps the weights three times.

Here only queries, keys and values are kept, and a byte for each weight. The weights are computed again in the backward
pass; and as few images are worked on at a time, they stay in the processor's cache.
Letters of shapes: n images, s tokens, e width, h heads, d = e/h.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mar.backends.cpu.dropout import dropout_mask, keep_prob

_AT_ONCE = 2**18
"""So many weights at a time; those of one image, where it has more."""


def attention_with_dropout(qkv: Float[Tensor, "n s three_e"], heads: int, rate: float) -> Float[Tensor, "n s e"]:
    """Multi-head attention of all tokens to all: dropout(softmax(q k^T / sqrt(d))) v, heads side by side.

    `qkv` are queries, keys and values, one after the other. Source: Vaswani et al. (arXiv 1706.03762), equation 1.
    """
    n, s, _ = qkv.shape
    mixed: Tensor = _Attend.apply(qkv, dropout_mask((n, heads, s, s), rate), 1 / keep_prob(rate))  # type: ignore[no-untyped-call]
    return mixed


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, kept: Bool[Tensor, "n h s s"], factor: float) -> Tensor:
        ctx.save_for_backward(qkv, kept)
        ctx.factor = factor
        n, s, width = qkv.shape
        mixed = qkv.new_empty(n, s, width // 3)
        with torch.autocast("cpu", enabled=False):
            for some, stay, out in zip(*_groups(kept, qkv, kept, mixed), strict=True):
                q, k, v = _heads(some, 3 * stay.shape[1]).chunk(3, dim=1)
                _heads(out, stay.shape[1]).copy_((_weights(q, k).mul_(stay) @ v).mul_(factor))
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        qkv, kept = ctx.saved_tensors
        result = torch.empty_like(qkv)
        for some, stay, out, filled in zip(*_groups(kept, qkv, kept, gradient, result), strict=True):
            q, k, v = _heads(some, 3 * stay.shape[1]).chunk(3, dim=1)
            dq, dk, dv = _heads(filled, 3 * stay.shape[1]).chunk(3, dim=1)
            dmixed = _heads(out, stay.shape[1]) * ctx.factor
            weights = _weights(q, k)
            dv.copy_((weights * stay).mT @ dmixed)
            dscores = torch._softmax_backward_data((dmixed @ v.mT).mul_(stay), weights, -1, weights.dtype)
            scale = q.shape[-1] ** -0.5
            dq.copy_((dscores @ k).mul_(scale))
            dk.copy_((dscores.mT @ q).mul_(scale))
        return result, None, None


def _groups(kept: Bool[Tensor, "n h s s"], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each tensor cut into groups of images."""
    images = max(1, _AT_ONCE // kept[0].numel())
    return [tensor.split(images) for tensor in tensors]


def _heads(x: Float[Tensor, "n s e"], heads: int) -> Float[Tensor, "n h s d"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _weights(q: Float[Tensor, "n h s d"], k: Float[Tensor, "n h s d"]) -> Float[Tensor, "n h s s"]:
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
