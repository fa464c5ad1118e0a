"""The guided head computes ahead, in chunks, what the head would say step by step."""

from __future__ import annotations

import pytest
import torch
from tiny import noise, tiny_model
from torch import Tensor

from mar.config import SamplingConfig
from mar.diffusion.head import CFGDenoiser
from mar.diffusion.schedule import cosine, respace
from mar.model.masking import mask_schedule
from mar.sampling.guidance import guidance_scale

SCHEDULE = respace(cosine(1000), 9)
HEAD = tiny_model().head


def outputs(of: CFGDenoiser, x: Tensor) -> Tensor:
    return torch.stack([of(x, index) for index in reversed(range(9))])


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("steps_a_chunk", [0, 1, 2, 4, 8])
@torch.no_grad()
def test_cfg_denoiser_chunk_size_changes_nothing(guided: bool, steps_a_chunk: int) -> None:
    z, x = noise(10, 16), noise(5 if guided else 10, 2, seed=1)
    scale = torch.linspace(0, 3, 5).unsqueeze(1) if guided else None
    step_bytes = 10 * 16 * 5 * 4  # rows, width, three parts of one block and two of the last layer, float32
    whole = CFGDenoiser(HEAD, z, SCHEDULE.timesteps, scale)
    cut = CFGDenoiser(HEAD, z, SCHEDULE.timesteps, scale, budget=steps_a_chunk * step_bytes)
    assert (whole.chunk_steps >= 9, cut.chunk_steps) == (True, max(1, steps_a_chunk))
    torch.testing.assert_close(outputs(cut, x), outputs(whole, x), rtol=1e-5, atol=1e-6)
    assert len(cut.cached[0]) <= max(1, steps_a_chunk)


@torch.no_grad()
def test_cfg_denoiser_matches_the_head_at_trained_timesteps() -> None:
    z, x = noise(4, 16), noise(4, 2, seed=1)
    expected = torch.stack([HEAD(x, SCHEDULE.timesteps[[i]].expand(4), z) for i in reversed(range(9))])
    torch.testing.assert_close(outputs(CFGDenoiser(HEAD, z, SCHEDULE.timesteps), x), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_cfg_denoiser_moves_away_from_the_unconditional() -> None:
    z, x = noise(6, 16), noise(3, 2, seed=1)
    conditional, unconditional = (outputs(CFGDenoiser(HEAD, half, SCHEDULE.timesteps), x) for half in z.chunk(2))
    scale = torch.tensor([[0.0], [1.0], [2.5]])
    guided = outputs(CFGDenoiser(HEAD, z, SCHEDULE.timesteps, scale), x)
    expected = unconditional[..., :2] + scale * (conditional - unconditional)[..., :2]
    torch.testing.assert_close(guided[..., :2], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guided[..., 2:], conditional[..., 2:], rtol=1e-5, atol=1e-6)  # variance: conditional
    assert (conditional - unconditional).abs().min() > 1e-5


def test_linear_guidance_rises_from_one_to_just_below_the_scale() -> None:
    sampling = SamplingConfig(guidance_scale=3.0)
    scales = [guidance_scale(sampling, hidden, 256) for hidden in mask_schedule(256, 64)]
    assert scales == sorted(scales)
    assert scales[0] == pytest.approx(1 + 2 * 1 / 256)
    assert scales[-1] == guidance_scale(sampling, 1, 256) == pytest.approx(1 + 2 * 255 / 256)  # just short of it
    constant = SamplingConfig(guidance_scale=3.0, guidance_schedule="constant")
    assert {guidance_scale(constant, hidden, 256) for hidden in (0, 1, 255)} == {3.0}
    assert guidance_scale(SamplingConfig(guidance_scale=0.0), 128, 256) == pytest.approx(
        0.5
    )  # and falls below 1 as well
