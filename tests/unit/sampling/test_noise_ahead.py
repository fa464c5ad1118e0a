"""An asynchronous device: noise drawn ahead, indices uploaded once, broken latents read a step late."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import noise, tiny_model
from torch import Tensor

from mar.backends import Backend
from mar.config import SamplingConfig
from mar.sampling import reveal_plan
from mar.sampling.decode import all_masked, init_state, plan_steps
from mar.sampling.generate import BrokenLatents, LatentStep, generate
from mar.sampling.noise import SeededNoise

GUIDED = SamplingConfig(steps=8, diffusion_steps=5, guidance_scale=2.5, x0_bound=1.0)
CONDITIONS = [0, 1, -1, 2, 0]
MASK = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.1, 0.4, 0.6, 0.9, 1.1]).view(
    -1, 1, 1
)


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the sampler treat the CPU as a device that works by itself."""
    for module in ("decode", "generate"):
        monkeypatch.setattr(f"mar.sampling.{module}.backend_for", lambda device: Backend(asynchronous=True))


def run(channels: int, sampling: SamplingConfig, **options: Any) -> Tensor:
    model = tiny_model(channels=channels)
    *_, last = generate(model, CONDITIONS, range(5), sampling, allow_broken=True, **options)
    return last.latents


@pytest.mark.parametrize("channels", [2, 16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [0, 3000, 2**25])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"uncond_interval": 2, "guidance_interval": (0.3, 0.9), "diffusion_steps_end": 2},
        {"solver": "dpm++2m-sde", "diffusion_steps_end": 3},
        {"solver": "ddim", "guidance_scale": 1.0},
        {"steps": 2},
        {"reveal": "binomial", "mask_schedule": "exponential", "order": "random"},
    ],
)
def test_generate_noise_ahead_draws_the_same_numbers(
    channels: int, masked: bool, window: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images differ in steps, and tokens of 2 values need one draw a step, of 16 one a window."""
    options = {"known": noise(5, channels, 4, 4), "mask": MASK} if masked else {}
    sampling = replace(GUIDED, **changes)
    with monkeypatch.context() as plain:
        plain.setattr("mar.sampling.decode.backend_for", lambda device: Backend())
        plain.setattr("mar.sampling.generate.backend_for", lambda device: Backend())
        expected = run(channels, sampling, **options)
    for module in ("decode", "generate"):
        monkeypatch.setattr(f"mar.sampling.{module}.backend_for", lambda device: Backend(asynchronous=True))
    monkeypatch.setattr(reveal_plan, "WINDOW_BYTES", window)
    assert torch.equal(run(channels, sampling, **options), expected)


@pytest.mark.parametrize("width", [1, 2, 15, 16, 48])
def test_fill_draws_the_numbers_of_noise(width: int) -> None:
    chunks = [(5, 3), (0, 0), (4, 1), (1, 7)]
    together, apart = SeededNoise([7]), SeededNoise([7])
    out = torch.full((27, width), torch.nan)
    together.fill(0, chunks, width, out[:26])
    expected = torch.cat([apart.noise(0, noises, count, width).view(-1, width) for noises, count in chunks])
    assert torch.equal(out[:26], expected)
    assert torch.equal(together.noise(0, 1, 2, width), apart.noise(0, 1, 2, width))  # the streams are at one place


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_plan_of_a_batch_has_each_image_as_alone(steps: int) -> None:
    """Images with the same schedule may have different numbers of tokens to generate."""
    source = SeededNoise(range(5))
    state = init_state(noise(5, 16, 2), MASK.flatten(1), steps, source, grid=(4, 4))
    assert len(set(map(len, state.orders))) == 5
    model, condition = tiny_model(), torch.tensor(CONDITIONS)
    plan = plan_steps(model.head, condition, state, GUIDED)
    for k in range(state.steps):
        step, at = plan[k], replace(state, step=k)
        known = MASK.flatten(1).logical_not() | ((state.revealed_at() > 0) & (state.revealed_at() <= k))
        assert step.images.tolist() == [i for i, own in enumerate(state.schedules) if k < len(own)]
        for row, image in enumerate(step.images.tolist()):
            expected = at.revealed(image).tolist()
            assert [p for p in step.query_idx[row].tolist() if p < 16] == expected
            assert [p for p in step.visible[row].tolist() if p < 16] == known[image].nonzero().flatten().tolist()
            groups = [(i, p) for g in step.groups for i, p in zip(g.image.tolist(), g.position.tolist(), strict=True)]
            assert [p for i, p in groups if i == image] == expected
        alone = plan_steps(model.head, condition, at, GUIDED, count=1)[k]
        assert all(torch.equal(a, b) for a, b in zip(step.groups[0][3:8], alone.groups[0][3:8], strict=True))


def test_windows_of_noise_have_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reveal_plan, "WINDOW_BYTES", 4096)
    model, source = tiny_model(channels=16), SeededNoise(range(3))
    state = init_state(torch.zeros(3, 16, 16), all_masked(3, 16), 8, source)
    plan = plan_steps(model.head, torch.tensor([0, 1, 2]), state, GUIDED)
    assert [step for window in plan.windows for step in window.steps] == list(range(8))
    assert len(plan.windows) > 1
    for window in plan.windows:
        assert len(window.steps) == 1 or 3 * window.length * 16 * 4 <= 4096


@pytest.mark.usefixtures("asynchronous")
def test_generate_abandoned_ends_the_noise_thread() -> None:
    steps = generate(tiny_model(), CONDITIONS, range(5), GUIDED, allow_broken=True)
    next(steps)
    assert any(thread.name.startswith("mar-noise") for thread in threading.enumerate())
    assert isinstance(steps, Iterator)
    steps.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("mar-noise") for thread in threading.enumerate())


def broken_steps(step: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[LatentStep], str]:
    """Sample until it fails because the tokens of a step are not finite; return the states before, and the message."""
    model = tiny_model()
    seen: list[LatentStep] = []
    calls: list[int] = []
    sample = model.head.sample

    def breaking(z: Tensor, *rest: Any) -> Tensor:
        calls.append(1)
        drawn: Tensor = sample(z, *rest)
        return drawn * torch.nan if len(calls) == step else drawn

    monkeypatch.setattr(model.head, "sample", breaking)
    try:
        for each in generate(model, CONDITIONS, range(5), GUIDED):
            seen.append(each)
    except BrokenLatents as error:
        return seen, str(error)
    raise AssertionError("nothing was broken")


@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize("step", [3, 7, 8])
def test_generate_broken_latents_are_reported_a_step_late(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, message = broken_steps(step, monkeypatch)
    assert [each.step for each in seen] == list(range(1, min(step, 7) + 1))  # of the last step at once
    assert message.startswith(f"image 0 is broken at reveal step {step} of 8: its latents are not finite")
