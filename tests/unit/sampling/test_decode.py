"""One reveal step: unconditional runs of the trunk, reused residuals, groups of the head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import noise, tiny_model
from torch import Tensor

from mar.config import SamplingConfig
from mar.diffusion.head import CFGDenoiser
from mar.model.mar import UNCONDITIONAL
from mar.model.masking import masked_fraction
from mar.sampling.decode import (
    DecodeState,
    all_masked,
    compute_conditions,
    decode_step,
    init_state,
    plan_steps,
    sample_tokens,
)
from mar.sampling.noise import SeededNoise

TINY = tiny_model(seed=3)
LABELS = torch.tensor([0, 2])
GUIDED = SamplingConfig(steps=8, diffusion_steps=3, guidance_scale=3.0)


def states(sampling: SamplingConfig, unknown: Tensor | None = None) -> Iterator[DecodeState]:
    unknown = all_masked(2, 16) if unknown is None else unknown
    draws = SeededNoise([5, 6])
    first = init_state(noise(*unknown.shape, 2), unknown, sampling.steps, draws, grid=(4, 4))
    yield first
    yield from sample_tokens(TINY, LABELS, first, sampling, draws)


class Rows:
    """Notes for each reveal step how many sequences the encoder saw, and (rows, steps, guided) of each diffusion."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trunk: list[int] = []
        self.heads: list[tuple[int, int, bool]] = []
        encode, notes = TINY.encode, self

        def watched(tokens: Tensor, *rest: Tensor, padded: bool = False) -> Tensor:
            notes.trunk.append(len(tokens))
            return encode(tokens, *rest, padded=padded)

        class Watched(CFGDenoiser):
            def __init__(self, head: Any, z: Tensor, timesteps: Tensor, scale: Tensor | None = None) -> None:
                super().__init__(head, z, timesteps, scale)
                notes.heads.append((len(z), len(timesteps), scale is not None))

        monkeypatch.setattr(TINY, "encode", watched)
        monkeypatch.setattr("mar.diffusion.head.CFGDenoiser", Watched)


def ends(sampling: SamplingConfig, unknown: Tensor | None = None) -> DecodeState:
    *_, end = states(sampling, unknown)
    return end


def test_decode_outside_guidance_interval_runs_no_uncond(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(monkeypatch)
    ends(SamplingConfig(steps=8, diffusion_steps=3, guidance_scale=3.0, guidance_interval=(0.3, 0.8)))
    # after each step 15, 14, 13, 11, 8, 6, 3, 1 of 16 are hidden: 0.31, 0.5 and 0.63 known lie within
    assert rows.trunk == [2, 2, 2, 4, 4, 4, 2, 2]
    guided = [guided for _, _, guided in rows.heads]
    assert guided == [count == 4 for count in rows.trunk]


@pytest.mark.parametrize("refresh", [1, 2, 3, 9])
def test_decode_between_uncond_runs_trunk_runs_once(refresh: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(monkeypatch)
    ends(SamplingConfig(steps=8, diffusion_steps=3, guidance_scale=3.0, uncond_interval=refresh))
    assert rows.trunk == [2 if step % refresh else 4 for step in range(8)]
    assert all(guided for _, _, guided in rows.heads)  # the head is guided all the same


def test_decode_residual_is_from_the_last_uncond_run() -> None:
    sampling = SamplingConfig(steps=8, diffusion_steps=3, guidance_scale=3.0, uncond_interval=2)
    first, after_first, after_second, *_ = states(sampling)
    assert first.residual is None
    assert after_first.residual is not None
    assert after_second.residual is not None
    nothing = torch.empty(2, 0, dtype=torch.long)
    with torch.no_grad():
        z, without = (
            TINY(first.tokens, labels, nothing) for labels in (LABELS, torch.full_like(LABELS, UNCONDITIONAL))
        )
        torch.testing.assert_close(after_first.residual, without - z)
        step = plan_steps(TINY.head, LABELS, after_first, sampling, count=1)[1]
        assert not len(step.uncond_rows)
        kept = compute_conditions(TINY, LABELS, after_first, step, 2)
    drawn = torch.stack([residual[own] for residual, own in zip(after_first.residual, step.query_idx, strict=True)])
    torch.testing.assert_close(kept.z[2:] - kept.z[:2], drawn)
    assert torch.equal(after_second.residual, after_first.residual)


def test_decode_uncond_at_every_step_keeps_no_residual() -> None:
    assert all(state.residual is None for state in states(GUIDED))


def test_decode_images_with_other_settings_are_sampled_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve tokens of the first image are known: it has four steps, the other eight; guidance begins at 0.6."""
    unknown = all_masked(2, 16)
    unknown[0, 4:] = False
    rows = Rows(monkeypatch)
    sampling = SamplingConfig(
        steps=8,
        diffusion_steps=9,
        diffusion_steps_end=2,
        guidance_scale=3.0,
        guidance_interval=(0.6, 1.0),
        solver="ddim",
    )
    ends(sampling, unknown)
    assert rows.trunk[:4] == [3, 3, 3, 3]  # the first image with and without its class, the other with it
    assert [steps for _, steps, _ in rows.heads[:8]] == [9, 9, 7, 8, 4, 7, 2, 6]
    assert [guided for _, _, guided in rows.heads[:8]] == [False, True, True, False, True, False, True, False]


def test_decode_without_class_is_unguided(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(monkeypatch)
    draws = SeededNoise([5])
    state = init_state(noise(1, 16, 2), all_masked(1, 16), 4, draws)
    after = decode_step(TINY, torch.tensor([UNCONDITIONAL]), state, GUIDED, draws)
    assert rows.trunk == [1]
    assert after.step == 1


def test_decode_noiseless_solver_draws_one_noise_a_token() -> None:
    class Counted(SeededNoise):
        asked: list[int] = []  # noqa: RUF012

        def noise(self, image: int, steps: int, count: int, width: int) -> Tensor:
            self.asked.append(steps)
            return super().noise(image, steps, count, width)

    for solver, expected in (("ancestral", {3}), ("dpm++2m", {1})):
        draws, sampling = Counted([5]), SamplingConfig(steps=4, diffusion_steps=3, solver=solver)  # type: ignore[arg-type]
        draws.asked.clear()
        list(sample_tokens(TINY, LABELS[:1], init_state(noise(1, 16, 2), all_masked(1, 16), 4, draws), sampling, draws))
        assert set(draws.asked) == expected


@pytest.mark.parametrize("wide", [True, False])
def test_decode_wide_model_trims_the_heap_every_step(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr("mar.backends.cpu.trunk.trim_heap", lambda: given.append(1))
    monkeypatch.setattr("mar.backends.cpu.trunk.WIDE_MODEL", TINY.config.encoder.width + (not wide))
    ends(GUIDED)
    assert len(given) == (GUIDED.steps if wide else 0)


def test_decode_wide_model_pads_to_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is filled up is not looked at, also where the difference of the classes is kept for some steps."""
    unknown = all_masked(2, 16)
    unknown[0, 12:] = False
    sampling = [GUIDED, replace(GUIDED, uncond_interval=3), replace(GUIDED, steps=3)]
    expected = [ends(each, unknown).tokens for each in sampling]
    shapes: list[tuple[int, int]] = []
    encode, decoded = TINY.encode, TINY.decode

    def shown(tokens: Tensor, labels: Tensor, visible: Tensor, *, padded: bool = False) -> Tensor:
        shapes.append((visible.shape[1], 0))
        return encode(tokens, labels, visible, padded=padded)

    def asked(encoded: Tensor, visible: Tensor, query_idx: Tensor | None = None) -> Tensor:
        assert query_idx is not None
        shapes.append((0, query_idx.shape[1]))
        return decoded(encoded, visible, query_idx)

    monkeypatch.setattr(TINY, "encode", shown)
    monkeypatch.setattr(TINY, "decode", asked)
    for name, value in {"WIDE_MODEL": TINY.config.encoder.width, "INPUT_MULTIPLE": 8, "OUTPUT_MULTIPLE": 4}.items():
        monkeypatch.setattr(f"mar.backends.cpu.trunk.{name}", value)
    for each, plain in zip(sampling, expected, strict=True):
        torch.testing.assert_close(ends(each, unknown).tokens, plain, atol=1e-4, rtol=1e-4)
    assert {visible for visible, only in shapes if not only} == {8, 16}
    assert {only for visible, only in shapes if not visible} <= {1, 2, 3, 4, 8, 12, 16}


# ---- the binomial rule


def binomial(seeds: list[int], steps: int, length: int = 64, source: type[SeededNoise] = SeededNoise) -> DecodeState:
    unknown = all_masked(len(seeds), length)
    tokens = torch.zeros(len(seeds), length, 1)
    return init_state(tokens, unknown, steps, source(seeds), schedule="exponential", rule="binomial")


def test_binomial_reveal_of_an_image_does_not_depend_on_the_batch() -> None:
    together, alone = binomial([3, 4, 5], 8), binomial([4], 8)
    assert together.schedules[1] == alone.schedules[0]
    assert torch.equal(together.orders[1], alone.orders[0])
    assert len(set(together.schedules)) == 3


def test_binomial_reveal_is_as_expected_on_average_and_ends() -> None:
    schedules = torch.tensor(binomial(list(range(400)), 8).schedules)
    assert (schedules[:, -1] == 0).all()
    assert (schedules.diff(dim=1) < 0).all()
    expected = torch.tensor([64 * masked_fraction(done, 8, "exponential") for done in range(2, 8)])
    assert float((schedules[:, 1:-1].float().mean(0) - expected).abs().max()) < 1.5


def test_binomial_reveal_of_more_steps_than_tokens_ends_sooner() -> None:
    state = binomial([0, 1], 40, length=16)
    assert state.steps <= 16
    assert all(schedule[-1] == 0 for schedule in state.schedules)


def test_binomial_reveal_needs_uniforms() -> None:
    class Orders:
        def order(self, image: int, length: int) -> torch.Tensor:
            return torch.arange(length)

        def noise(self, image: int, noises: int, count: int, width: int) -> torch.Tensor:
            return torch.zeros(noises, count, width)

    with pytest.raises(TypeError, match="reveal binomial: got Orders as noise, expected one with `uniforms`"):
        init_state(torch.zeros(1, 4, 1), all_masked(1, 4), 2, Orders(), rule="binomial")
