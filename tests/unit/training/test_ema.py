"""EMA: its warm-up, its decays, and that it is a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_model
from torch import nn

from mar.config import ConfigError, TrainConfig
from mar.training.ema import EMA


class One(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))


def test_ema_with_warmup_forgets_its_start() -> None:
    weights = One(1.0)
    average = EMA(weights, 0.9999)
    with torch.no_grad():
        weights.weight.fill_(0.0)
    left = 1.0
    for step in range(1, 1001):
        average.update(weights, step)
        left *= min(0.9999, (1 + step) / (10 + step))
    assert float(average.model.weight.detach()) == pytest.approx(left)
    assert left < 1e-12


def test_ema_without_warmup_keeps_its_start() -> None:
    weights = One(1.0)
    average = EMA(weights, 0.9999, warm_up=False)
    with torch.no_grad():
        weights.weight.fill_(0.0)
    for step in range(1, 1001):
        average.update(weights, step)
    assert float(average.model.weight.detach()) == pytest.approx(0.9999**1000)  # 90%


def test_ema_warmup_reaches_the_decay() -> None:
    weights, steps = One(0.0), 10**6
    average = EMA(weights, 0.9)
    with torch.no_grad():
        weights.weight.fill_(1.0)
    average.update(weights, steps)
    assert float(average.model.weight.detach()) == pytest.approx(0.1)


def test_ema_of_several_lengths_are_independent() -> None:
    weights = One(0.0)
    average, alone = EMA(weights, 0.9, (0.5, 0.99)), EMA(weights, 0.99)
    with torch.no_grad():
        weights.weight.fill_(1.0)
    for each in (average, alone):
        each.update(weights, 10**6)
        each.update(weights, 10**6)
    assert list(average.others) == ["ema-0.5", "ema-0.99"]
    ends = [float(each.weight) for each in (average.model, *average.others.values())]
    assert ends == pytest.approx([0.19, 0.75, 0.0199])
    assert torch.equal(average.others["ema-0.99"].weight, alone.model.weight)
    assert average.model is average.models[0.9]


@pytest.mark.parametrize("others", [(0.5, 0.5), (0.9999,), (1.0,), (-0.1,)])
def test_ema_invalid_decay_is_refused(others: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="ema_others has"):
        TrainConfig(ema=0.9999, ema_others=others)


def test_ema_shares_no_memory_with_the_model() -> None:
    of = tiny_model().train()
    average = EMA(of, 0.5)
    before = copy.deepcopy(average.model.state_dict())
    with torch.no_grad():
        for p in of.parameters():
            p.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in average.model.state_dict().items())
    assert not average.model.training
    assert of.training
    assert not any(p.requires_grad for p in average.model.parameters())
    average.update(of, 100)
    assert set(average.model.state_dict()) == set(of.state_dict())
    assert not any(torch.equal(value, before[name]) for name, value in average.model.state_dict().items())
