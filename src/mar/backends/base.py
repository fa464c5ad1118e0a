"""The questions that model and sampler ask a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def _same(module: Any) -> Any:
    return module


def _nothing(model: Any) -> None:
    pass


@dataclass(frozen=True)
class Backend:
    """Faster ways to compute on one kind of device. None: plain PyTorch is used.

    Letters of shapes: n images, s tokens, e width, i and o features in and out.
    """

    linear: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(x (..., i), weight (o, i), bias (o)) -> x weight^T + bias."""
    dropout: Callable[[Tensor, float], Tensor] | None = None
    """(x, rate) -> x with values zeroed at `rate`, the others divided by 1 - rate."""
    attention_with_dropout: Callable[[Tensor, int, float], Tensor] | None = None
    """(qkv (n, s, 3e), heads, rate) -> attention of all tokens to all (n, s, e), with dropout of its weights."""
    trunk: Callable[[Any], Callable[..., Tensor]] = _same
    """MAR -> a callable with the arguments of `MAR.forward`, for sampling."""
    sampling_head: Callable[[Any], Any] = _same
    """Head -> a head whose `sample` is faster. It follows no later change of the weights."""
    free_memory: Callable[[Any], None] = _nothing
    """Is called with the model after every reveal step; returns unused memory to the system."""


PLAIN = Backend()
"""Plain PyTorch for everything."""
