"""The running average of a model's weights, which is what pictures are drawn with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mar.training.engine import own


class EMA:
    """A copy of a model that follows it: ema <- d ema + (1 - d) weights.

    d = min(decay, (1 + steps) / (10 + steps)), so that a young average does not hold its random start: with a constant
    0.9999 that is still 37% of it after 10,000 steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, steps: int) -> None:
        """Takes in the weights after `steps` steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        averages: list[Tensor] = [own(p) for p in self.model.parameters()]
        torch._foreach_lerp_(averages, [own(p.detach()) for p in model.parameters()], 1 - decay)
