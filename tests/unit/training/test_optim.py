"""Which tensors decay, how the learning rate rises and falls, and what the average of the weights forgets."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from mar.config import ConfigError, TrainConfig
from mar.training.ema import EMA
from mar.training.optim import decays, learning_rate, make_optimizers

CONFIG = TrainConfig(images=10_000, batch=64, lr=1e-3, warmup=1000, decay=2000)


def test_groups_are_the_references() -> None:
    of = model()
    (optimizer,) = make_optimizers(of, CONFIG)
    names = {id(p): name for name, p in of.named_parameters()}
    still, decaying = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.02]
    assert still | decaying == set(names.values())
    assert not still & decaying
    assert not any(name.startswith("head.") or name.endswith(".bias") or "norm" in name for name in decaying)
    # In the reference the learned embeddings are parameters of two and more dimensions, the mask token among them.
    assert {"mask_token", "null_class", "class_embed.weight", "encoder_position", "decoder_position"} <= decaying
    assert {"diffusion_position", "token_embed.weight", "decoder_embed.weight", "encoder.0.fc1.weight"} <= decaying
    assert all(decays(of, name, p) == (name in decaying) for name, p in of.named_parameters())
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def test_asking_for_its_state_is_no_step() -> None:
    one, other = model(), model()
    (asked,), plain = make_optimizers(one, CONFIG), torch.optim.AdamW(other.parameters(), weight_decay=0.0)
    state = get_optimizer_state_dict(one, asked)["state"]
    assert {float(moments["step"]) for moments in state.values()} == {0.0}
    for group in (*asked.param_groups, *plain.param_groups):
        group.update(lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for of, optimizer in ((one, asked), (other, plain)):
        for p in of.parameters():
            p.grad = torch.full_like(p, 0.3)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(asked.state[a]["step"], plain.state[b]["step"])
               for a, b in zip(one.parameters(), other.parameters(), strict=True))  # fmt: skip


def test_the_rate_rises_stays_and_falls() -> None:
    full = 1e-3 * 64 / 256
    assert CONFIG.scaled_lr == full
    assert learning_rate(CONFIG, 0) == pytest.approx(full * 64 / 1000)  # the first step is not lost
    assert learning_rate(CONFIG, 436) == pytest.approx(full / 2)
    assert learning_rate(CONFIG, 936) == learning_rate(CONFIG, 5000) == learning_rate(CONFIG, 8000) == full
    assert learning_rate(CONFIG, 9000) == pytest.approx(full / 2)
    assert 0 < learning_rate(CONFIG, 9999) < full / 1000
    assert learning_rate(CONFIG, 10_000) == learning_rate(CONFIG, 10_640) == 0.0


def test_without_warm_up_and_decay_it_is_constant() -> None:
    config = TrainConfig(images=100, batch=256, lr=3e-4)
    assert {learning_rate(config, images) for images in (0, 50, 99)} == {3e-4}


class One(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))


def test_a_young_average_forgets_its_start() -> None:
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


def test_without_a_warm_up_it_holds_its_start() -> None:
    weights = One(1.0)
    average = EMA(weights, 0.9999, warm_up=False)
    with torch.no_grad():
        weights.weight.fill_(0.0)
    for step in range(1, 1001):
        average.update(weights, step)
    assert float(average.model.weight.detach()) == pytest.approx(0.9999**1000)  # 90%


def test_the_decay_is_reached() -> None:
    weights, steps = One(0.0), 10**6
    average = EMA(weights, 0.9)
    with torch.no_grad():
        weights.weight.fill_(1.0)
    average.update(weights, steps)
    assert float(average.model.weight.detach()) == pytest.approx(0.1)


def test_averages_of_several_lengths_go_side_by_side() -> None:
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
def test_decays_that_can_not_be(others: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="ema_others has"):
        TrainConfig(ema=0.9999, ema_others=others)


def test_the_average_is_apart_from_the_model() -> None:
    of = model().train()
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
