"""Compare sampling runs with the reference's, reveal step by reveal step.

Whole samples of the trained tiny model can't be compared. The noisiest diffusion steps multiply the head's output by up
to 20,000: one rounding of a condition becomes 10% of a standard deviation, in the authors' code too. But tokens never
change once revealed. So the head of these runs returns the recorded tokens, and each step starts from the reference's
state. Its conditions are compared with the recorded ones, and tokens are drawn from the recorded noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from mar.backends.cpu.packed_head import PackedHead, pack_head
from mar.config import SamplingConfig
from mar.diffusion.head import TokenSampler
from mar.model.mar import MAR
from mar.model.tokens import patchify
from mar.sampling.decode import all_masked, decode_step, init_state
from tests.parity.support import config_of, drawn_state, golden, meta, model_with, relative, trained_tiny, under

MAR_RUNS = [("mar_tiny_trained_samples", case) for case in ("plain", "linear", "constant")]
DETOK_RUNS = [("detok_mar_tiny", case) for case in ("plain", "guided")]
"""With the same weights; their conditions are recorded too."""


@dataclass
class Recording:
    """A run of the reference: settings, orders, draws and results."""

    file: str
    case: str

    def __post_init__(self) -> None:
        self.tensors, self.settings = under(golden(self.file), f"{self.case}/"), meta(self.file)[self.case]
        self.diffusion_steps = self.settings.get("sampling_steps", 25)
        self.labels, self.tokens = self.tensors["labels"], patchify(self.tensors["latents"], 1)

    @property
    def sampling(self) -> SamplingConfig:
        return sampling_config(self.settings, self.diffusion_steps)

    def noise_of_steps(self) -> list[Tensor]:
        """The noise of each reveal step, (diffusion steps, rows, d): start noise, then a draw a diffusion step.

        Under guidance one file holds rows of both halves, of which the conditional one counts. The draw for timestep 0
        is not used.
        """
        draws, width, noises = self.tensors["draws"], self.tokens.shape[-1], []
        halves = 2 if self.settings["cfg"] != 1 and "draw_shapes" in self.settings else 1
        for rows in self.rows_of_steps():
            start, draws = draws.split([rows * width, len(draws) - rows * width])
            size = halves * rows * width
            later, draws = draws.split([self.diffusion_steps * size, len(draws) - self.diffusion_steps * size])
            later = later.view(self.diffusion_steps, halves * rows, width)[:-1, :rows]
            noises.append(torch.cat([start.view(1, rows, width), later]))
        assert len(draws) == 0
        return noises

    def rows_of_steps(self) -> list[int]:
        """How many tokens each reveal step reveals, in all images together."""
        halves = 2 if self.settings["cfg"] != 1 else 1
        return [rows // halves for rows in self.tensors["head_batch"].tolist()]


@dataclass
class RecordedNoise:
    """The reference's orders and draws, as a noise source; any noise where `steps` is None."""

    orders: Tensor
    steps: list[Tensor] | None = None
    step: int = -1
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def order(self, image: int, length: int) -> Tensor:
        return self.orders[image]

    def noise(self, image: int, steps: int, count: int, width: int) -> Tensor:
        if self.steps is None:
            return torch.randn(steps, count, width, generator=self.generator)
        self.step += image == 0
        return self.steps[self.step][:, image * count : (image + 1) * count]


@dataclass
class WatchedHead:
    """A head that keeps what it was called with, and may return recorded tokens."""

    head: TokenSampler
    tokens: Tensor | None = None
    """What to return for the next reveal step: (rows, d). None: what the head draws."""
    calls: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    """(z, noise, scale) of each reveal step."""

    @property
    def token_width(self) -> int:
        return self.head.token_width

    def num_noises(self, steps: int, sampling: SamplingConfig) -> int:
        return self.head.num_noises(steps, sampling)

    def sample(self, z: Tensor, noise: Tensor, scale: Tensor | None, steps: int, sampling: SamplingConfig) -> Tensor:
        self.calls.append((z.cpu(), noise.cpu(), None if scale is None else scale.cpu()))
        return self.head.sample(z, noise, scale, steps, sampling) if self.tokens is None else self.tokens.to(z.device)


@dataclass(frozen=True)
class Run:
    """A recording, and the calls of the head in our run along its tokens."""

    recording: Recording
    calls: list[tuple[Tensor, Tensor, Tensor | None]]
    expected: Tensor
    """The recorded tokens, in the order in which they are revealed."""


def replay(model: MAR, file: str, case: str) -> Run:
    """Run our sampler along the recorded tokens, on the model's device."""
    recording, device = Recording(file, case), model.mask_token.device
    noise = RecordedNoise(recording.tensors["orders"], recording.noise_of_steps())
    n, length, width = recording.tokens.shape
    state = init_state(
        torch.zeros(n, length, width, device=device), all_masked(n, length), recording.sampling.steps, noise
    )
    labels = recording.labels.to(device)
    head, expected = WatchedHead(model.head), []
    while state.step < state.steps:
        head.tokens = torch.cat([recording.tokens[image, state.revealed(image)] for image in range(n)])
        expected.append(head.tokens)
        state = decode_step(model, labels, state, recording.sampling, noise, head)
    assert torch.equal(state.tokens.cpu(), recording.tokens)
    return Run(recording, head.calls, torch.cat(expected))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For speed: the products are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> MAR:
    return trained_tiny()


@pytest.fixture(scope="module", params=[*MAR_RUNS, *DETOK_RUNS], ids="-".join)
def run(model: MAR, request: pytest.FixtureRequest) -> Run:
    return replay(model, *request.param)


@pytest.fixture(scope="module", params=DETOK_RUNS, ids="-".join)
def detok_run(model: MAR, request: pytest.FixtureRequest) -> Run:
    return replay(model, *request.param)


def sampling_config(settings: dict[str, Any], diffusion_steps: int) -> SamplingConfig:
    return SamplingConfig(
        settings["num_iter"], diffusion_steps, settings["cfg"], settings["cfg_schedule"], settings["temperature"]
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("file", "case"), DETOK_RUNS)
def test_conditions_of_each_step_match_on_a_gpu(file: str, case: str) -> None:
    test_conditions_of_each_step_match(replay(trained_tiny().cuda(), file, case))


def test_conditions_of_each_step_match(detok_run: Run) -> None:
    recorded = detok_run.recording.tensors["z_cond"].split(detok_run.recording.rows_of_steps())
    for (z, noise, _), expected in zip(detok_run.calls, recorded, strict=True):
        assert relative(z[: noise.shape[1]], expected) < 1e-5


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@torch.no_grad()
def test_tokens_of_each_step_match(model: MAR, run: Run, packed: bool) -> None:
    head = pack_head(model.head) if packed else model.head
    assert packed == isinstance(head, PackedHead)
    recording = run.recording
    drawn, moved = zip(*(sample_step(head, recording, *call) for call in run.calls), strict=True)
    std = recording.tokens.std()
    error = (torch.cat(drawn) - run.expected).abs().amax(-1) / std
    assert (error < 1e-4).float().mean() > 0.85
    assert error.median() < 1e-5
    assert error.max() < 2e-2
    # where it is more, a rounding of the condition does as much
    assert (error < 1e-4 + 8 * torch.cat(moved) / std).all()


def sample_step(
    head: TokenSampler, recording: Recording, z: Tensor, noise: Tensor, scale: Tensor | None, copies: int = 16
) -> tuple[Tensor, Tensor]:
    """Draw the tokens of a step (rows, d), and measure how far roundings of z move each (rows): 3e-7, as in float32."""
    halves = 1 if scale is None else 2
    z = z.view(halves, -1, z.shape[-1]).repeat(1, 1 + copies, 1)
    rounding = 3e-7 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    rounding[:, : noise.shape[1]] = 0
    z, scale = (z * (1 + rounding)).flatten(0, 1), None if scale is None else scale.repeat(1 + copies, 1)
    drawn = head.sample(z, noise.repeat(1, 1 + copies, 1), scale, recording.diffusion_steps, recording.sampling)
    drawn = drawn.view(1 + copies, noise.shape[1], -1)
    return drawn[0], (drawn[1:] - drawn[0]).abs().amax((0, -1))


def test_rows_and_guidance_of_each_step_match(run: Run) -> None:
    theirs = run.recording.tensors
    assert [len(z) for z, _, _ in run.calls] == theirs["head_batch"].tolist()
    scales = [one_scale(scale) for _, _, scale in run.calls]
    assert scales == pytest.approx(theirs["guidance"].tolist(), rel=1.2e-7)  # to the last bit of float32


@pytest.mark.parametrize("case", ["plain", "linear", "constant"])
@pytest.mark.parametrize("name", ["A", "B"])
def test_rows_and_guidance_of_untrained_models_match(name: str, case: str) -> None:
    about, theirs = meta("mar_tiny")[name], under(golden("mar_tiny"), f"{name}/sample_{case}/")
    config, sampling = config_of(about["config"]), sampling_config(about[case], about[case]["sampling_steps"])
    model, noise = model_with(config, drawn_state(about["keys"])), RecordedNoise(theirs["orders"])
    rows: list[int] = []
    model.head.output.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    tokens = torch.zeros(2, config.tokens, config.token_width)
    state, head = init_state(tokens, all_masked(2, config.tokens), sampling.steps, noise), WatchedHead(model.head)
    while state.step < state.steps:
        state = decode_step(model, theirs["labels"], state, sampling, noise, head)
    assert not state.unknown.any()
    assert rows == theirs["head_batch"].repeat_interleave(sampling.diffusion_steps).tolist()
    assert [one_scale(scale) for _, _, scale in head.calls] == theirs["guidance"].tolist()


def one_scale(scale: Tensor | None) -> float:
    """Return the guidance scale of a step, which is the same for all rows."""
    assert scale is None or len(scale.unique()) == 1
    return 1.0 if scale is None else float(scale[0])
