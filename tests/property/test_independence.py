"""A picture depends on its own label, seed, known part and the settings, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.support import trained_tiny
from sampling_options import sampling_options
from tiny import noise, tiny_model
from torch import Tensor

from mar.config import SamplingConfig
from mar.model.mar import MAR
from mar.sampling.generate import generate

BOUND = 1e-4
"""Of the pictures' standard deviation: matrix products of other shapes round otherwise."""
TINY = tiny_model(seed=3)


def draw(
    of: MAR, labels: Sequence[int], seeds: Sequence[int], sampling: SamplingConfig, *known_and_mask: Tensor
) -> Tensor:
    kept = dict(zip(("known", "mask"), known_and_mask, strict=False))
    *_, end = generate(of, labels, seeds, sampling, allow_broken=True, **kept)
    return end.latents


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.std())


@settings(max_examples=24)
@given(
    labels=st.lists(st.integers(-1, 2), min_size=2, max_size=4),
    way=st.sampled_from([1.0, 2.5]).map(lambda guidance: {"guidance_scale": guidance}) | sampling_options(),
    steps=st.integers(1, 20),
    masked=st.booleans(),
    data=st.data(),
)
def test_image_is_independent_of_its_batch(
    labels: list[int], way: dict[str, Any], steps: int, masked: bool, data: st.DataObject
) -> None:
    n = len(labels)
    seeds = data.draw(st.lists(st.integers(0, 2**40), min_size=n, max_size=n))
    sampling = SamplingConfig(steps=steps, diffusion_steps=3, x0_bound=3.0, **way)
    rows = st.lists(st.booleans(), min_size=16, max_size=16)
    mask = torch.tensor([data.draw(rows) for _ in labels]).view(n, 4, 4)
    parts = (noise(n, 2, 4, 4), mask) if masked else ()
    together = draw(TINY, labels, seeds, sampling, *parts)
    order = data.draw(st.permutations(range(n)))
    shuffled = draw(TINY, [labels[i] for i in order], [seeds[i] for i in order], sampling, *(p[order] for p in parts))
    assert difference(shuffled, together[order]) < BOUND
    i = data.draw(st.integers(0, n - 1))
    alone = draw(TINY, labels[i : i + 1], seeds[i : i + 1], sampling, *(p[i : i + 1] for p in parts))
    assert float((alone[0] - together[i]).abs().max()) < BOUND * float(together.std())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_trained_image_is_independent_of_batch_size(guidance: float) -> None:
    trained = trained_tiny()
    sampling = SamplingConfig(steps=8, diffusion_steps=10, guidance_scale=guidance, x0_bound=3.0)
    labels, seeds = [i % trained.config.classes for i in range(5)], [10, 11, 12, 13, 14]
    whole = draw(trained, labels, seeds, sampling)
    assert 0.2 < float(whole.std()) < 3
    for size in (1, 2, 3):
        cut = [draw(trained, labels[i : i + size], seeds[i : i + size], sampling) for i in range(0, 5, size)]
        error = (torch.cat(cut) - whole).abs() / whole.std()
        # It predicts the noise, whose first step makes of a rounding up to 20,000: up to a tenth of the values show it.
        assert (error < BOUND).float().mean() > 0.8
        assert error.median() < BOUND / 10
        assert error.max() < 100 * BOUND


def test_image_depends_on_seed_label_and_known_tokens() -> None:
    sampling = SamplingConfig(steps=4, diffusion_steps=3)
    base = draw(TINY, [0], [0], sampling)
    assert torch.equal(draw(TINY, [0], [0], sampling), base)
    assert difference(draw(TINY, [1], [0], sampling), base) > 10 * BOUND
    assert difference(draw(TINY, [-1], [0], sampling), base) > 10 * BOUND
    assert difference(draw(TINY, [0], [1], sampling), base) > 10 * BOUND
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = False
    one, other = (
        draw(TINY, [0], [0], sampling, known, mask) for known in (noise(1, 2, 4, 4), noise(1, 2, 4, 4, seed=1))
    )
    assert difference(one[:, :, 1:], other[:, :, 1:]) > 10 * BOUND  # the rest follows from what is kept


class Counted:
    """A model that notes how many rows of sequences it was given."""

    def __init__(self, of: MAR, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        encode = of.encode

        def watched(tokens: Tensor, *rest: Tensor, padded: bool = False) -> Tensor:
            self.rows.append(len(tokens))
            return encode(tokens, *rest, padded=padded)

        monkeypatch.setattr(of, "encode", watched)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), steps=st.integers(1, 16), schedule=st.sampled_from(["linear", "constant"]))
def test_guidance_scale_1_costs_nothing(seed: int, steps: int, schedule: str) -> None:
    sampling = SamplingConfig(steps=steps, diffusion_steps=3, guidance_scale=1.0, guidance_schedule=schedule)
    unguidable = tiny_model(seed=3, label_drop=0.0)  # the same weights
    with pytest.MonkeyPatch.context() as monkeypatch:
        counted = Counted(TINY, monkeypatch)
        plain = draw(TINY, [0, 2], [seed, seed + 1], sampling)
    assert set(counted.rows) == {2}
    assert torch.equal(plain, draw(unguidable, [0, 2], [seed, seed + 1], sampling))
    nearly = SamplingConfig(steps=steps, diffusion_steps=3, guidance_scale=1 + 1e-7, guidance_schedule=schedule)
    assert difference(draw(TINY, [0, 2], [seed, seed + 1], nearly), plain) < BOUND  # and there is no jump beside it


@pytest.mark.parametrize(("labels", "rows"), [([0, 1], 4), ([0, -1], 4), ([-1, -1], 2)])
def test_guidance_runs_the_unconditional_rows(labels: list[int], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(TINY, monkeypatch)
    guided = draw(TINY, labels, [0, 1], SamplingConfig(steps=4, diffusion_steps=3, guidance_scale=3.0))
    assert set(counted.rows) == {rows}
    plain = draw(TINY, labels, [0, 1], SamplingConfig(steps=4, diffusion_steps=3))
    for i, label in enumerate(labels):  # where there is no class, guidance has nowhere to go
        assert (difference(guided[i], plain[i]) < BOUND) == (label == -1)
