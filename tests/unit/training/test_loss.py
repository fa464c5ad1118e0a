"""The training loss and its random numbers."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from tiny import HEAD, noise, tiny_config, tiny_model
from torch import Tensor

from mar.config import NoiseSchedule, Prediction
from mar.model.mar import MAR
from mar.model.tokens import gather_tokens, patchify
from mar.training.loss import DiffusionLoss, StepRandomness, sample_randomness

CONFIG = tiny_config(head=replace(HEAD, batch_mul=3))


def test_step_randomness_is_independent_of_shares() -> None:
    whole = sample_randomness(CONFIG, 7, 3, range(10, 16))
    parts = [sample_randomness(CONFIG, 7, 3, list(positions)) for positions in ([10], [11, 12, 13], [14, 15])]
    assert {part.masked for part in parts} == {whole.masked}
    for field, dim in (("order", 0), ("drop_label", 0), ("timestep", 1), ("noise", 1)):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts], dim), getattr(whole, field))


def test_step_randomness_shapes_follow_the_mask() -> None:
    draws = sample_randomness(CONFIG, 0, 0, [4, 5])
    m = draws.masked
    assert 0.7 * 16 <= m <= 16
    assert draws.order.sort(1).values.tolist() == [list(range(16))] * 2
    assert (draws.timestep.shape, draws.noise.shape) == ((3, 2, m), (3, 2, m, 2))
    assert draws.drop_label.dtype == torch.bool


def test_step_randomness_is_keyed_by_seed_step_and_position() -> None:
    base = sample_randomness(CONFIG, 0, 0, [4])
    for seed, position in ((1, 4), (0, 5)):
        other = sample_randomness(CONFIG, seed, 0, [position])
        count = min(base.masked, other.masked)
        assert not torch.equal(base.noise[0, 0, :count], other.noise[0, 0, :count])
        assert not torch.equal(base.order, other.order)
    assert len({sample_randomness(CONFIG, 0, step, [4]).masked for step in range(20)}) > 1  # the ratio is the step's


def test_step_randomness_follows_its_distributions() -> None:
    draws = sample_randomness(tiny_config(grid=(8, 8), label_drop=0.25), 0, 1, range(300))
    assert abs(float(draws.drop_label.float().mean()) - 0.25) < 0.1  # four standard errors
    assert (int(draws.timestep.min()), int(draws.timestep.max())) == (0, 999)
    assert abs(float(draws.timestep.float().mean()) - 499.5) < 6
    assert abs(float(draws.noise.std()) - 1) < 0.01
    assert not sample_randomness(tiny_config(label_drop=0.0), 0, 1, range(300)).drop_label.any()


@pytest.mark.parametrize("path", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", ["noise", "v", "x0", "flow"])
def test_loss_of_every_objective_has_all_gradients(path: NoiseSchedule, prediction: Prediction) -> None:
    of = tiny_model(head=replace(HEAD, path=path, prediction=prediction))
    loss = losses(of, noise(2, 2, 4, 4), torch.tensor([0, -1]), sample_randomness(of.config, 0, 0, [0, 1]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in of.parameters())


def losses(of: MAR, latents: Tensor, labels: Tensor, draws: StepRandomness) -> Tensor:
    return DiffusionLoss(of)(latents, labels, draws)


def test_loss_reads_visible_and_scores_masked_tokens() -> None:
    of, latents, labels = tiny_model(), noise(2, 2, 4, 4), torch.tensor([0, 1])
    draws = replace(sample_randomness(of.config, 0, 0, [0, 1]), drop_label=torch.zeros(2, dtype=torch.bool))
    hidden = draws.order[:, : draws.masked].sort(1).values
    visible = draws.order[:, draws.masked :]
    z = of(patchify(latents, 1), labels, visible)
    scored = of.head.loss(
        gather_tokens(patchify(latents, 1), hidden), gather_tokens(z, hidden), draws.timestep, draws.noise
    )
    assert scored.shape == (draws.timestep.numel(),)
    torch.testing.assert_close(scored.mean(), losses(of, latents, labels, draws))


def test_loss_dropped_label_is_unconditional() -> None:
    of, latents, draws = tiny_model(), noise(2, 2, 4, 4), sample_randomness(CONFIG, 0, 0, [0, 1])
    dropped = replace(draws, drop_label=torch.tensor([True, True]))
    kept = replace(draws, drop_label=torch.tensor([False, False]))
    one, other, none = torch.tensor([0, 1]), torch.tensor([2, 0]), torch.tensor([-1, -1])
    assert torch.equal(losses(of, latents, one, dropped), losses(of, latents, other, dropped))
    assert torch.equal(losses(of, latents, one, dropped), losses(of, latents, none, kept))
    assert not torch.equal(losses(of, latents, one, kept), losses(of, latents, other, kept))


def test_loss_of_an_untrained_model_is_one() -> None:
    torch.manual_seed(0)
    of = MAR(tiny_config(grid=(8, 8), head=replace(HEAD, prediction="noise", batch_mul=4)))
    latents, labels = noise(32, 2, 8, 8), torch.zeros(32, dtype=torch.long)
    loss = float(losses(of, latents, labels, sample_randomness(of.config, 0, 0, range(32))).detach())
    assert 1.0 < loss < 2.0  # the noise's variance, and the bits of not knowing it at the first timesteps


def test_loss_gradients_reach_every_parameter() -> None:
    of = tiny_model()
    draws = replace(sample_randomness(of.config, 0, 0, [0, 1, 2]), drop_label=torch.tensor([False, True, False]))
    losses(of, noise(3, 2, 4, 4), torch.tensor([0, 1, 2]), draws).backward()
    assert {name for name, p in of.named_parameters() if p.grad is None or not p.grad.any()} == set()


@pytest.mark.parametrize(
    "changes", [{"classes": 0}, {"grid": (2, 6)}, {"patch_size": 2}, {"channels": 3, "patch_size": 4}]
)
def test_loss_is_finite_for_any_model(changes: dict[str, object]) -> None:
    of = tiny_model(**changes)
    latents = noise(2, of.config.channels, *of.config.grid)
    loss = losses(of, latents, torch.tensor([1, 0]), sample_randomness(of.config, 0, 0, [0, 1]))
    assert loss.shape == ()
    assert loss.isfinite()


def test_loss_module_adds_no_state() -> None:
    of = tiny_model()
    assert {name.removeprefix("model.") for name in DiffusionLoss(of).state_dict()} == set(of.state_dict())


def test_step_randomness_moves_to_a_device() -> None:
    moved = sample_randomness(CONFIG, 0, 0, [0]).to(torch.device("meta"))
    for field in fields(moved):
        value = getattr(moved, field.name)
        assert value.is_meta if isinstance(value, Tensor) else isinstance(value, int)
