"""eMIGM's and l-DeTok's MAR: every tensor has its place, and a training step gives their figures.

eMIGM's null class and mask token are one vector. Its loss has every token, of which the masked ones count.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from mar.checkpoint.official import from_official, infer_config, to_official
from mar.checkpoint.store import model_shapes, shape_differences
from mar.config import ConfigError, ModelConfig, TrunkConfig
from mar.model.mar import UNCONDITIONAL
from mar.model.masking import exp_mask_probability
from mar.training.loss import DiffusionLoss, StepRandomness, sample_randomness
from tests.parity.support import (
    GOLDEN,
    config_of,
    drawn_state,
    golden,
    meta,
    model_with,
    official_shapes,
    relative,
    under,
)

EMIGM = [f"emigm_{size}_256" for size in ("xsmall", "small", "base", "large", "huge")]
EMIGM += [f"emigm_{size}_512" for size in ("xsmall", "small", "base", "large")]


@cache
def family() -> dict[str, Any]:
    return json.loads((GOLDEN / "family_keys.json").read_text(encoding="utf-8"))["models"]


def shapes_of(model: str) -> dict[str, list[int]]:
    if "same_tensors_as" in family()[model]:
        return official_shapes(family()[model]["same_tensors_as"].split()[0])
    return family()[model]["tensors"]


@pytest.mark.parametrize("model", [*EMIGM, "detok_mar_base", "detok_mar_large"])
def test_every_published_tensor_fits_and_goes_back(model: str) -> None:
    official = {name: torch.empty(shape, device="meta") for name, shape in shapes_of(model).items()}
    config = infer_config(official, {})
    tied = model.startswith("emigm")
    if tied:
        assert config == config_of(family()[model]["config"], tied=True)
    ours = from_official(official)
    assert shape_differences({name: tensor.shape for name, tensor in ours.items()}, model_shapes(config)) == []
    assert sum(tensor.numel() for tensor in ours.values()) == family()[model]["parameters"]
    back = {name: list(tensor.shape) for name, tensor in to_official(ours, tied=tied).items()}
    assert list(back.items()) == list(shapes_of(model).items())


def test_from_official_tied_vectors_that_differ_takes_the_mask_token() -> None:
    official = drawn_state(meta("emigm_tiny")["A"]["keys"])
    assert not torch.equal(official["fake_latent"], official["mask_token"])
    model = model_with(config_of(meta("emigm_tiny")["A"]["config"], tied=True), official)
    assert torch.equal(model.null_embedding, official["mask_token"])
    assert torch.equal(model.mask_token, official["mask_token"][0])
    back = to_official(model.state_dict(), tied=True)
    assert torch.equal(back["fake_latent"], official["mask_token"])
    for name in official.keys() - {"fake_latent"}:
        assert torch.equal(back[name], official[name]), name


# ---- training steps

CASES = {
    "emigm_tiny": ("A/train/", True),
    "emigm_tiny-dropped": ("A/train_drop/", True),
    "emigm_xs": ("train/", True),
    "detok_mar_tiny": ("D/train/", False),
}


class Step:
    """A training step of ours with the recorded draws, and the recorded figures."""

    def __init__(self, case: str) -> None:
        file = case.removesuffix("-dropped")
        prefix, tied = CASES[case]
        about = meta(file)
        shared = under(golden(file), prefix.replace("_drop", ""))
        self.theirs = under(golden(file), prefix)
        about = about if file == "emigm_xs" else about[prefix[0]]
        shapes = shapes_of("emigm_xsmall_256") if file == "emigm_xs" else about["keys"]
        self.config = config_of(about["config"], tied=tied)
        self.model = model_with(self.config, drawn_state(shapes))

        # recorded are draws of all tokens, as (repeat, n, L); ours are of masked ones
        mask = shared["mask"].bool()
        n, length = mask.shape
        order = shared.get("orders", mask.int().argsort(dim=1, descending=True, stable=True))
        masked = int(mask[0].sum())
        hidden = order[:, :masked].sort(1).values
        assert torch.equal(torch.zeros_like(mask).scatter(1, hidden, True), mask)
        index = hidden.expand(self.config.head.batch_mul, -1, -1)
        t = shared["t"].view(-1, n, length).gather(2, index)
        noise = shared["noise"].view(len(t), n, length, -1)
        noise = noise.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, noise.shape[-1]))
        dropped = self.theirs.get("dropped", torch.zeros(n, dtype=torch.bool))
        self.tokens = shared["latents"].flatten(2).transpose(1, 2)
        self.labels = torch.where(dropped, UNCONDITIONAL, shared["labels"])
        self.visible = order[:, masked:].sort(1).values
        loss = DiffusionLoss(self.model)
        draws = StepRandomness(order, masked, dropped, t, noise)
        self.rows = loss.per_token_loss(shared["latents"], shared["labels"], draws)
        self.their_rows = None
        if "loss_rows" in self.theirs:
            self.their_rows = self.theirs["loss_rows"].view(-1, n, length).gather(2, index).flatten()
        self.rows.mean().backward()
        self.gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=CASES)
def step(request: pytest.FixtureRequest) -> Step:
    return Step(request.param)


@torch.no_grad()
def test_family_activations_match(step: Step) -> None:
    encoded = step.model.encode(step.tokens, step.labels, step.visible)
    ours = {"encoder_out": encoded, "z": step.model.decode(encoded, step.visible)}
    for name, value in ours.items():
        if f"{name}_norm" in step.theirs:
            assert relative(value.norm(dim=-1), step.theirs[f"{name}_norm"]) < 1e-5
            value = value[:, :8, :32]
        assert relative(value, step.theirs[name]) < 1e-5


def test_family_loss_matches(step: Step) -> None:
    assert relative(step.rows.mean().detach(), step.theirs["loss"].squeeze()) < 1e-5
    if step.their_rows is not None:
        assert relative(step.rows.detach(), step.their_rows) < 1e-5


def test_family_gradients_match(step: Step) -> None:
    theirs = {name: float(norm) for name, norm in under(step.theirs, "gradnorm/").items() if norm > 0}
    if not theirs:
        pytest.skip("no gradients were recorded")
    gradients = to_official(step.gradients, tied=step.config.tie_null)
    if step.config.tie_null:
        del gradients["mask_token"]  # the same as fake_latent
    ours = {name: float(gradient.norm()) for name, gradient in gradients.items() if gradient.norm() > 0}
    theirs = {name: norm for name, norm in theirs.items() if name != "mask_token" or not step.config.tie_null}
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[name] / norm - 1) for name, norm in theirs.items()) < 1e-4


def test_null_class_of_the_full_model_matches() -> None:
    theirs = golden("emigm_xs")
    step = Step("emigm_xs")
    with torch.no_grad():
        z = step.model(step.tokens, torch.full_like(step.labels, UNCONDITIONAL), step.visible)
    assert relative(z.norm(dim=-1), theirs["null/z_norm"]) < 1e-5
    assert relative(z[:, :8, :32], theirs["null/z"]) < 1e-5


# ---- masks of training


def test_exp_mask_probability_matches() -> None:
    theirs = golden("emigm_tiny")
    draw = under(theirs, "A/mask_draw/")
    probability = exp_mask_probability(draw["t"])
    mask = (draw["u"] < probability)[draw["permutation"]]
    assert torch.equal(mask.float(), theirs["A/train/mask"])
    ours = exp_mask_probability(theirs["schedule/t"])
    late = theirs["schedule/t"] >= 0.2
    assert late.sum() > 10
    assert relative(ours[late], theirs["schedule/exp/mask_probability"][late]) < 1e-6


def test_exp_schedule_masks_as_many_in_every_image_and_as_published_on_average() -> None:
    config = ModelConfig(mask_schedule="exp", tie_null=True)
    counts = [sample_randomness(config, 0, step, [step]).masked / config.tokens for step in range(400)]
    assert min(counts) > 0.5
    assert sum(counts) / len(counts) == pytest.approx(0.855, abs=0.012)
    assert sample_randomness(config, 0, 3, range(2)).masked == sample_randomness(config, 0, 3, range(7, 9)).masked
    tiny = ModelConfig(grid=(2, 1), mask_schedule="exp")
    assert {sample_randomness(tiny, 0, step, [0]).masked for step in range(20)} == {2}


def test_tie_null_of_different_widths_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tie_null shares a vector .* 768 and 64"):
        ModelConfig(tie_null=True, decoder=TrunkConfig(64, 1, 2))
