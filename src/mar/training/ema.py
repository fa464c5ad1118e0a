"""The running average of a model's weights, which is what pictures are drawn with."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mar.training.parallelize import to_local


class EMA:
    """A copy of a model that follows it: ema <- d ema + (1 - d) weights.

    d = min(decay, (1 + steps) / (10 + steps)), so that a young average does not hold its random start: with a constant
    decay of 0.9999 (`warm_up` false), 37% of the average is still that start after 10,000 steps. Further decays have a
    copy each.
    """

    def __init__(self, model: nn.Module, decay: float, others: Sequence[float] = (), *, warm_up: bool = True) -> None:
        self.models = {d: copy.deepcopy(model).eval().requires_grad_(False) for d in (decay, *others)}
        self.decay, self.warm_up = decay, warm_up

    @property
    def model(self) -> nn.Module:
        """The one that is drawn with."""
        return self.models[self.decay]

    @property
    def others(self) -> dict[str, nn.Module]:
        """Those of the further decays, by the name of their weights, as `ema-0.9999`."""
        return {f"ema-{decay!r}": model for decay, model in self.models.items() if decay != self.decay}

    @torch.no_grad()
    def update(self, model: nn.Module, steps: int) -> None:
        """Takes in the weights after `steps` steps."""
        weights: list[Tensor] = [to_local(p.detach()) for p in model.parameters()]
        for decay, average in self.models.items():
            taken_in = 1 - (min(decay, (1 + steps) / (10 + steps)) if self.warm_up else decay)
            torch._foreach_lerp_([to_local(p) for p in average.parameters()], weights, taken_in)
