"""Generation from labels and seeds: what it refuses, and what it says when a model draws no picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import FAST, HEAD, noise, tiny_config, tiny_model

from mar.config import ConfigError, HeadConfig, SamplingConfig
from mar.model.mar import MAR
from mar.sampling.generate import BrokenLatents, LatentStep, generate

TINY = tiny_model()
ONE = torch.ones(1, 4, 4, dtype=torch.bool)


def last(*arguments: Any, **options: Any) -> LatentStep:
    *_, end = generate(*arguments, **options)
    return end


def untrained(**changes: Any) -> MAR:
    """As training begins: noise prediction of zero, whose x0 is x / sqrt(alpha-bar)."""
    torch.manual_seed(0)
    return MAR(tiny_config(head=HeadConfig(width=16, depth=1), **changes)).eval()


def test_generate_broken_image_stops_with_cause_and_remedy() -> None:
    with pytest.raises(BrokenLatents, match=r"reveal step \d of 4.* deviation of [\d,.]+, expected 1") as info:
        last(untrained(), [0], [0], FAST)
    for words in ("image 0", "trained too little", "train it longer", "--x0-bound 3", "--allow-broken"):
        assert words in str(info.value)


def test_generate_x0_bound_prevents_broken_images() -> None:
    end = last(untrained(), [0], [0], replace(FAST, x0_bound=1.5))
    assert 0.3 < float(end.latents.std()) < 1.6
    with pytest.raises(BrokenLatents) as info:
        last(untrained(), [0], [0], replace(FAST, x0_bound=1e4))
    assert "x0-bound" not in str(info.value)  # it is there already


def test_generate_allow_broken_returns_broken_images() -> None:
    end = last(untrained(), [0], [0], FAST, allow_broken=True)
    assert float(end.latents.std()) > 3
    assert end.known.all()


def test_generate_nan_latents_are_reported() -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.head.output.weight[0, 0] = torch.nan
    with pytest.raises(BrokenLatents, match=r"step 1 of 4.*are not finite.*Some weights are not finite"):
        last(broken, [0], [0], FAST)
    assert not last(broken, [0], [0], FAST, allow_broken=True).latents.isfinite().all()


def test_generate_broken_image_of_a_batch_is_named() -> None:
    young = untrained()
    known = noise(2, 2, 4, 4)
    mask = torch.stack([~ONE[0], ONE[0]])  # nothing is drawn of the first
    known[0] *= 1000  # what is kept is not judged
    with pytest.raises(BrokenLatents, match="image 1 is broken"):
        last(young, [0, 0], [0, 1], FAST, known=known, mask=mask)
    assert torch.equal(last(young, [0], [0], FAST, known=known[:1], mask=mask[:1]).latents, known[:1])


def test_generate_yields_growing_states() -> None:
    states = list(generate(TINY, [0, 1], [0, 1], FAST, allow_broken=True))
    assert [state.step for state in states] == [1, 2, 3, 4]
    assert {state.steps for state in states} == {4}
    counts = [int(state.known[0].sum()) for state in states]
    assert counts == sorted(set(counts))
    assert counts[-1] == 16


def test_generate_full_mask_equals_no_mask() -> None:
    plain = last(TINY, [1], [7], FAST)
    masked = last(TINY, [1], [7], FAST, known=noise(1, 2, 4, 4), mask=ONE)
    assert torch.equal(plain.latents, masked.latents)


@pytest.mark.parametrize("changes", [{"classes": 0}, {"grid": (2, 6)}, {"patch": 2}, {"grid": (8, 4), "patch": 4}])
def test_generate_works_for_any_model(changes: dict[str, Any]) -> None:
    of = tiny_model(**changes)
    label = -1 if of.config.classes == 0 else 2
    end = last(of, [label, -1], [0, 1], FAST, allow_broken=True)
    assert end.latents.shape == (2, 2, *of.config.grid)
    assert end.latents.isfinite().all()
    assert not torch.equal(end.latents[0], end.latents[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": [0, 1]}, "got 2 and 1, expected one of each"),
        ({"labels": [], "seeds": []}, "got 0 and 0"),
        ({"known": noise(1, 2, 4, 4)}, "only one of them"),
        ({"mask": ONE}, "only one of them"),
        ({"known": noise(1, 2, 4, 5), "mask": ONE}, r"shape \(1, 2, 4, 5\), expected \(1, 2, 4, 4\)"),
        ({"known": noise(1, 2, 4, 4) / 0, "mask": ONE}, "known latents: got values that are not finite"),
        ({"known": noise(1, 2, 4, 4), "mask": ONE[:, :2]}, r"mask: got \(1, 2, 4\).*expected \(1, 4, 4\)"),
    ],
)
def test_generate_invalid_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    given = {"labels": [0], "seeds": [0], **options}
    with pytest.raises(ValueError, match=words):
        last(TINY, given.pop("labels"), given.pop("seeds"), FAST, **given)


def test_generate_guidance_without_label_drop_is_refused() -> None:
    for changes in ({"classes": 0}, {"label_drop": 0.0}):
        with pytest.raises(
            ConfigError, match=r"guidance_scale 2\.0 needs a model that was trained to do without classes"
        ):
            last(tiny_model(**changes), [-1], [0], replace(FAST, guidance_scale=2.0))


def test_generate_too_many_diffusion_steps_is_refused() -> None:
    few = tiny_model(head=replace(HEAD, diffusion_steps=10))
    with pytest.raises(ConfigError, match="diffusion_steps is 11, but the model's schedule has 10"):
        last(few, [0], [0], SamplingConfig(diffusion_steps=11))
    assert last(few, [0], [0], SamplingConfig(4, 10), allow_broken=True).known.all()
