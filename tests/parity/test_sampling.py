"""Whole sampling runs against the reference's, with its draws: rows of the head, guidance scales, latents.

How exact can latents be? The noisiest steps multiply the head's output by 1/sqrt(alpha-bar), up to 20,000, and later
tokens are conditioned on earlier ones: a rounding of one condition grows to 1e-3 - 1e-1 of a standard deviation at the
end, in the reference as here. So latents are compared twice: on the kernels of the machine that recorded them, where
every rounding agrees, end to end and to 1e-4; and on this machine's kernels, reveal step by reveal step on the golden
tokens before it, where what roundings do is measured and allowed for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mar.backends.cpu.packed_head import PackedHead, pack_head
from mar.config import SamplingConfig
from mar.diffusion.head import CFGDenoiser, DiffusionHead
from mar.diffusion.schedule import cosine, respace
from mar.model.mar import MAR
from mar.model.tokens import patchify, unpatchify
from mar.sampling.decode import DecodeState, all_masked, decode_step, init_state, run_trunk, sample_tokens
from tests.parity import recorded_machine
from tests.parity.support import config_of, drawn_state, golden, meta, model_with, trained_tiny, under

TRAINED = "mar_tiny_trained_samples"
CASES = ["plain", "linear", "constant"]
DIFFUSION_STEPS = 25
SCHEDULE = respace(cosine(1000), DIFFUSION_STEPS)
BOUND = 1e-4
"""Of the latents' standard deviation: the golden files' own bound for float32."""
ROUNDING = 3e-7
"""Relative error of a float32 condition: what golden and our conditions are away from float64's, root mean square."""


class RecordedDraws:
    """The reference's draws of a case: per reveal step one for the start and one for each diffusion step."""

    def __init__(self, case: str) -> None:
        tensors, self.step = under(golden(TRAINED), f"{case}/"), -1
        self.orders, shapes = tensors["orders"], meta(TRAINED)[case]["draw_shapes"]
        sizes = [rows * width for rows, width in shapes]
        draws = [d.view(shape) for d, shape in zip(tensors["draws"].split(sizes), shapes, strict=True)]
        every = DIFFUSION_STEPS + 1  # under guidance the conditional half counts; the last draw is not used
        self.steps = [
            torch.stack([draw[: len(draws[at])] for draw in draws[at : at + every - 1]])
            for at in range(0, len(draws), every)
        ]

    def order(self, image: int, length: int) -> Tensor:
        return self.orders[image]

    def noise(self, image: int, steps: int, count: int, width: int) -> Tensor:
        self.step += image == 0
        return self.steps[self.step][:, image * count : (image + 1) * count]


class OrdersOnly:
    """Recorded orders, any noise."""

    def __init__(self, orders: Tensor) -> None:
        self.orders, self.generator = orders, torch.Generator().manual_seed(0)

    def order(self, image: int, length: int) -> Tensor:
        return self.orders[image]

    def noise(self, image: int, steps: int, count: int, width: int) -> Tensor:
        return torch.randn(steps, count, width, generator=self.generator)


class Spy(CFGDenoiser):
    """Writes down the rows of every call of the head, and the scale of every reveal step."""

    rows: list[int]
    scales: list[float]

    def __init__(self, head: Any, z: Tensor, timesteps: Tensor, scale: Tensor | None = None) -> None:
        super().__init__(head, z, timesteps, scale)
        assert scale is None or len(scale.unique()) == 1
        type(self).scales.append(1.0 if scale is None else float(scale[0]))

    def __call__(self, x: Tensor, index: int) -> Tensor:
        real = self.head.denoise_embedded
        self.head.denoise_embedded = lambda h, modulations: (type(self).rows.append(len(h)), real(h, modulations))[1]
        try:
            return super().__call__(x, index)
        finally:
            del self.head.denoise_embedded


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> type[Spy]:
    Spy.rows, Spy.scales = [], []
    monkeypatch.setattr("mar.diffusion.head.CFGDenoiser", Spy)
    return Spy


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For speed, and because threads split small products in orders of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> MAR:
    return trained_tiny()


@pytest.fixture
def recorded_kernels(model: MAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trunk on the recording machine's kernels; skips where the others differ too."""
    theirs = under(golden(TRAINED), "one_step/step12/")
    with torch.no_grad():
        output = model.head(theirs["x"], theirs["timestep"].expand(16), golden(TRAINED)["one_step/z_cond"])
    if not torch.equal(output[:, :4], theirs["plain/eps"]):
        pytest.skip("this machine's matrix products round otherwise than those of the machine that recorded")
    kernels = SimpleNamespace(gelu=recorded_machine.gelu, scaled_dot_product_attention=recorded_machine.attention)
    monkeypatch.setattr("mar.model.blocks.functional", kernels)
    monkeypatch.setattr("mar.sampling.decode.backend_for", lambda head: head)
    monkeypatch.setattr("mar.backends.cpu.linear.onednn_is_faster", lambda: False)


def sampling_of(settings: dict[str, Any], diffusion_steps: int) -> SamplingConfig:
    return SamplingConfig(
        settings["num_iter"], diffusion_steps, settings["cfg"], settings["cfg_schedule"], settings["temperature"]
    )


def begin(case: str) -> tuple[DecodeState, SamplingConfig, RecordedDraws]:
    sampling, draws = sampling_of(meta(TRAINED)[case], DIFFUSION_STEPS), RecordedDraws(case)
    return init_state(torch.zeros(2, 64, 4), all_masked(2, 64), sampling.steps, draws), sampling, draws


def on_golden_tokens(state: DecodeState, case: str) -> DecodeState:
    """`state` with the reference's values of the tokens it knows (a token never changes once it is revealed)."""
    theirs = patchify(golden(TRAINED)[f"{case}/latents"], 1)
    return replace(state, tokens=theirs.masked_fill(state.unknown.unsqueeze(-1), 0.0))


def step_by_step(model: MAR, case: str, head: DiffusionHead | PackedHead | None = None) -> Tensor:
    """All tokens (n, L, d), each drawn by us after the reference's tokens of the earlier steps."""
    state, sampling, draws = begin(case)
    tokens = state.tokens
    while state.step < state.steps:
        after = decode_step(model, golden(TRAINED)[f"{case}/labels"], state, sampling, SCHEDULE, draws, head)
        new = (state.unknown & ~after.unknown).unsqueeze(-1)
        tokens, state = torch.where(new, after.tokens, tokens), on_golden_tokens(after, case)
    return tokens


def run(model: MAR, case: str, golden_steps: int) -> Tensor:
    """Latents of a run whose first `golden_steps` steps end with the reference's tokens."""
    state, sampling, draws = begin(case)
    labels = golden(TRAINED)[f"{case}/labels"]
    while state.step < golden_steps:
        state = on_golden_tokens(decode_step(model, labels, state, sampling, SCHEDULE, draws), case)
    *_, end = sample_tokens(model, labels, state, sampling, draws)
    return unpatchify(end.tokens, 1, (8, 8))


@pytest.mark.usefixtures("recorded_kernels")
@pytest.mark.parametrize(
    ("case", "golden_steps"),
    [("plain", 2), ("linear", 0), ("constant", 0)],
)
def test_latents_on_the_kernels_of_the_recording(model: MAR, case: str, golden_steps: int) -> None:
    # `plain` starts behind its second step: the recording's two threads split its six rows in an order of their own.
    theirs = golden(TRAINED)[f"{case}/latents"]
    assert (run(model, case, golden_steps) - theirs).abs().max() < BOUND * theirs.std()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fast", [False, True])
def test_latents_step_by_step(model: MAR, case: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = patchify(golden(TRAINED)[f"{case}/latents"], 1)
    head = pack_head(model.head) if fast else None
    assert fast == isinstance(head, PackedHead)
    ours = step_by_step(model, case, head)
    error = (ours - theirs).abs().amax(-1) / theirs.std()
    assert (error < BOUND).float().mean() > 0.9
    assert error.median() < BOUND / 10
    assert error.max() < 1e-2

    generator = torch.Generator().manual_seed(0)

    def rounded(*args: Any) -> Tensor:
        z = run_trunk(*args)
        return z * (1 + ROUNDING * torch.randn(z.shape, generator=generator))

    monkeypatch.setattr("mar.sampling.decode.run_trunk", rounded)
    moved = torch.stack([step_by_step(model, case, head) - ours for _ in range(6)])
    by_rounding = moved.abs().amax((0, -1)) / theirs.std()
    assert (error < BOUND + 4 * by_rounding).all()


@pytest.mark.parametrize("case", CASES)
def test_rows_and_guidance_of_the_trained_model(model: MAR, case: str, spy: type[Spy]) -> None:
    state, sampling, draws = begin(case)
    *_, end = sample_tokens(model, golden(TRAINED)[f"{case}/labels"], state, sampling, draws)
    assert not end.unknown.any()
    assert draws.step == end.steps - 1
    check_rows_and_guidance(spy, under(golden(TRAINED), f"{case}/"), DIFFUSION_STEPS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["A", "B"])
def test_rows_and_guidance_of_untrained_models(name: str, case: str, spy: type[Spy]) -> None:
    about = meta("mar_tiny")[name]
    config, theirs = config_of(about["config"]), under(golden("mar_tiny"), f"{name}/sample_{case}/")
    untrained = model_with(config, drawn_state(about["keys"]))
    draws = OrdersOnly(theirs["orders"])
    sampling = sampling_of(about[case], about[case]["sampling_steps"])
    state = init_state(
        torch.zeros(2, config.tokens, config.token_width), all_masked(2, config.tokens), sampling.steps, draws
    )
    *_, end = sample_tokens(untrained, theirs["labels"], state, sampling, draws)
    assert not end.unknown.any()
    check_rows_and_guidance(spy, theirs, sampling.diffusion_steps)


def check_rows_and_guidance(spy: type[Spy], theirs: dict[str, Tensor], diffusion_steps: int) -> None:
    rows = theirs["head_batch"].repeat_interleave(diffusion_steps)
    assert spy.rows == rows.tolist()
    assert spy.scales == theirs["guidance"].tolist()
