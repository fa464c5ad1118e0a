"""Exponential moving averages of a model's weights, to sample with."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mar.training.parallelize import to_local


class EMA:
    """Copies of a model, one a decay d, updated by ema <- d ema + (1 - d) weights.

    Args:
        model: is copied.
        decay: of the average to sample with.
        others: further decays.
        warm_up: use d = min(decay, (1 + steps) / (10 + steps)), so that a young average forgets its random start. With
            a constant 0.9999, 37% of the average is still that start after 10,000 steps.
    """

    def __init__(self, model: nn.Module, decay: float, others: Sequence[float] = (), *, warm_up: bool = True) -> None:
        self.models = {d: copy.deepcopy(model).eval().requires_grad_(False) for d in (decay, *others)}
        self.decay, self.warm_up = decay, warm_up

    @property
    def model(self) -> nn.Module:
        """The average to sample with."""
        return self.models[self.decay]

    @property
    def others(self) -> dict[str, nn.Module]:
        """The averages of further decays, by names such as `ema-0.9999`."""
        return {f"ema-{decay!r}": model for decay, model in self.models.items() if decay != self.decay}

    @torch.no_grad()
    def update(self, model: nn.Module, steps: int) -> None:
        """Update the averages with the weights after step `steps`."""
        weights: list[Tensor] = [to_local(p.detach()) for p in model.parameters()]
        for decay, average in self.models.items():
            d = min(decay, (1 + steps) / (10 + steps)) if self.warm_up else decay
            torch._foreach_lerp_([to_local(p) for p in average.parameters()], weights, 1 - d)
