"""A training step with the reference's draws gives the reference's activations, loss and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mar.checkpoint.official import to_official
from mar.config import ModelConfig
from mar.model.masking import split_by_mask
from mar.model.tokens import patchify
from mar.training.loss import DiffusionLoss, StepRandomness
from tests.parity.support import (
    config_of,
    drawn_state,
    golden,
    meta,
    model_with,
    official_shapes,
    relative,
    under,
)

CASES = [("A", "cpu"), ("B", "cpu"), ("mar_base", "cpu")]
ON_GPU = [pytest.param((name, "cuda"), marks=pytest.mark.gpu) for name, _ in CASES]


@dataclass(frozen=True)
class Step:
    """What came out of one step of ours, and the reference's figures."""

    tokens: Tensor
    encoder_out: Tensor
    z: Tensor
    loss: Tensor
    gradients: dict[str, float]
    theirs: dict[str, Tensor]


def recorded_draws(config: ModelConfig, theirs: dict[str, Tensor]) -> StepRandomness:
    """The reference's draws for the masked tokens alone; it has them for all tokens, as (repeat, n, L)."""
    n, length = theirs["orders"].shape
    repeat, masked = config.head.batch_mul, int(theirs["mask"][0].sum())
    hidden, _ = split_by_mask(theirs["orders"], masked)
    index = hidden.expand(repeat, -1, -1)
    t = theirs["t"].view(repeat, n, length).gather(2, index)
    noise = theirs["noise"].view(repeat, n, length, -1)
    noise = noise.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, noise.shape[-1]))
    return StepRandomness(theirs["orders"], masked, torch.zeros(n, dtype=torch.bool), t, noise)


def run(config: ModelConfig, shapes: dict[str, list[int]], theirs: dict[str, Tensor], device: str) -> Step:
    model = model_with(config, drawn_state(shapes)).to(device)
    latents, labels = theirs["latents"].to(device), theirs["labels"].to(device)
    tokens = patchify(latents, config.patch_size)
    draws = recorded_draws(config, theirs).to(torch.device(device))
    _, visible = split_by_mask(draws.order, draws.masked)
    with torch.no_grad():
        encoded = model.encode(tokens, labels, visible)
        z = model.decode(encoded, visible)
    loss = DiffusionLoss(model)(latents, labels, draws)
    loss.backward()
    official = to_official({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    gradients = {name: float(gradient.norm()) for name, gradient in official.items()}
    return Step(tokens.cpu(), encoded.cpu(), z.cpu(), loss.detach().cpu(), gradients, theirs)


@pytest.fixture(scope="module", params=[*CASES, *ON_GPU], ids="-".join)
def step(request: pytest.FixtureRequest) -> Step:
    name, device = request.param
    if name == "mar_base":
        return run(ModelConfig(), official_shapes("mar_base"), golden("mar_base"), device)
    case = meta("mar_tiny")[name]
    return run(config_of(case["config"]), case["keys"], under(golden("mar_tiny"), f"{name}/train/"), device)


def test_training_step_tokens_match(step: Step) -> None:
    assert torch.equal(step.tokens, step.theirs["tokens"])


@pytest.mark.parametrize("name", ["encoder_out", "z"])
def test_training_step_activations_match(step: Step, name: str) -> None:
    ours = getattr(step, name)
    norms = step.theirs.get(f"{name}_norm")
    if norms is not None:  # of the full-size model only a corner is kept, and the norm of every token
        assert relative(ours.norm(dim=-1), norms) < 1e-5
        ours = ours[:, :8, :32]
    assert relative(ours, step.theirs[name]) < 1e-5


def test_training_step_loss_matches(step: Step) -> None:
    assert relative(step.loss, step.theirs["loss"].squeeze()) < 1e-5


def test_training_step_gradients_match(step: Step) -> None:
    theirs = {name: float(norm) for name, norm in under(step.theirs, "gradnorm/").items()}
    # a tensor without gradient (the null class of labelled images) may be left out on either side
    assert {n for n, norm in theirs.items() if norm > 0} == {n for n, norm in step.gradients.items() if norm > 0}
    off = {n: step.gradients[n] / norm - 1 for n, norm in theirs.items() if norm > 0}
    assert max(map(abs, off.values())) < 1e-4, max(off.items(), key=lambda item: abs(item[1]))
