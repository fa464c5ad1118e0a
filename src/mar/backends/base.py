"""Interface of a backend: operations that may be faster on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def _identity(module: Any) -> Any:
    return module


def _do_nothing(model: Any) -> None:
    pass


@dataclass(frozen=True)
class Backend:
    """Faster ways to compute on one kind of device. None: plain PyTorch is used.

    Letters of shapes: n images, s tokens, e width, i and o features in and out.
    """

    linear: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(x (..., i), weight (o, i), bias (o)) -> x weight^T + bias."""
    dropout: Callable[[Tensor, float], Tensor] | None = None
    """(x, rate) -> x with a share `rate` of its values zeroed, the others divided by 1 - rate."""
    attention_with_dropout: Callable[[Tensor, int, float], Tensor] | None = None
    """(qkv (n, s, 3e), heads, rate) -> full self-attention (n, s, e), with dropout of its weights."""
    trunk: Callable[[Any], Callable[..., Tensor]] = _identity
    """MAR -> a callable with the arguments and the result of `MAR.forward`, for sampling."""
    sampling_head: Callable[[Any], Any] = _identity
    """Head -> a head with a faster `sample`. Later changes of the weights have no effect on it."""
    asynchronous: bool = False
    """The device works while the host goes on: noise is drawn ahead, flags are read a step late."""
    free_memory: Callable[[Any], None] = _do_nothing
    """(model) -> None: returns unused memory to the system. Called after every reveal step."""


PLAIN = Backend()
"""Plain PyTorch for everything."""
