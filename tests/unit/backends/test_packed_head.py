"""The packed head says what the head says."""

from __future__ import annotations

import pytest
import torch
from tiny import noise, tiny_config, tiny_model

from mar.backends.cpu.linear import has_onednn
from mar.backends.cpu.packed_head import PackedHead, pack_head
from mar.config import HeadConfig, SamplingConfig
from mar.diffusion.head import CFGDenoiser, DiffusionHead
from mar.diffusion.schedule import respace, training_schedule
from mar.nn import set_matrix_dtype
from mar.random import make_generator
from mar.sampling.decode import all_masked, decode_step, init_state, sample_tokens
from mar.sampling.noise import SeededNoise

STEPS = 7


@pytest.mark.parametrize("rows", [1, 2, 8, 70])
@pytest.mark.parametrize("guided", [False, True])
def test_packed_head_matches_the_head(rows: int, guided: bool) -> None:
    head = tiny_model(head=HeadConfig(width=48, depth=3)).head
    ready = pack_head(head)
    assert isinstance(ready, PackedHead)
    z, x = noise((1 + guided) * rows, 16, seed=1), noise(rows, 2, seed=2)
    scale = 1 + torch.rand(rows, 1) if guided else None
    timesteps = respace(training_schedule(head.config), STEPS).timesteps
    with torch.no_grad():
        both = [CFGDenoiser(each, z, timesteps, scale, budget=50_000) for each in (head, ready)]
        for index in reversed(range(STEPS)):  # over several chunks of modulations
            plain, fast = (each(x, index) for each in both)
            torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
            assert float((fast - plain).abs().max()) < 1e-5 * float(plain.std())


@pytest.mark.parametrize("rows", [1, 8, 70])
def test_packed_head_in_bfloat16_matches_within_rounding(rows: int) -> None:
    of = tiny_model(head=HeadConfig(width=48, depth=3))
    z, x = noise(2 * rows, 16, seed=1), noise(rows, 2, seed=2)
    timesteps = respace(training_schedule(of.head.config), STEPS).timesteps
    scale = 1 + torch.rand(rows, 1, generator=make_generator(3))
    with torch.no_grad():
        exact = CFGDenoiser(of.head, z, timesteps, scale, budget=50_000)(x, 3)
        set_matrix_dtype(of, torch.bfloat16)
        heads = of.head, pack_head(of.head)
        plain, fast = (CFGDenoiser(each, z, timesteps, scale, budget=50_000)(x, 3) for each in heads)
    assert fast.dtype is torch.float32
    assert 0 < float((fast - exact).std()) < 1.2 * float((plain - exact).std())


def test_packed_head_draws_the_same_images() -> None:
    of, sampling = tiny_model(), SamplingConfig(steps=5, diffusion_steps=6, guidance_scale=2.0)
    draws, labels = (SeededNoise([0, 1, 2]) for _ in range(2)), torch.tensor([0, 1, 2])
    first, second = draws
    state = init_state(torch.zeros(3, 16, 2), all_masked(3, 16), sampling.steps, first)
    *_, fast = sample_tokens(of, labels, state, sampling, first)
    state = init_state(torch.zeros(3, 16, 2), all_masked(3, 16), sampling.steps, second)
    while state.step < state.steps:
        state = decode_step(of, labels, state, sampling, second)
    torch.testing.assert_close(fast.tokens, state.tokens, rtol=1e-4, atol=1e-4)


def test_pack_head_leaves_other_weights_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    of = tiny_model().double()
    assert pack_head(of.head) is of.head
    of = tiny_model()
    set_matrix_dtype(of, torch.bfloat16)
    assert isinstance(pack_head(of.head), PackedHead) == has_onednn(torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert pack_head(of.head) is of.head
    with torch.device("meta"):
        head = DiffusionHead(2, 16, tiny_config().head)
    assert pack_head(head) is head
