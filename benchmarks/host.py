"""Host time of a reveal step: everything but trunk and head, which are stubs.

    python benchmarks/host.py [--model mar-base] [--batch 1 64 256] [--preset exact fast] [--repeats 3]

On a GPU this is what Python and the CPU do while trunk and head should run. So that no device's work is counted, tokens
have one value (their noise has 16), and the noise that was uploaded is not gathered. Two ways are measured in turns.
"each step" computes indices, draws noise and reads the check of the latents within the step, as version 0.1 did on
every device. "planned" is today's way on an asynchronous device: indices are made at the batch's start, noise is
drawn ahead in a thread, and the check is read a step late. The start counts in equal parts with the steps. Times are of
the main thread, with one thread for PyTorch. "CPU" is by its own clock; "wall" has its waits too, so late noise shows.
The stubs take no time in which it could be drawn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mar.backends import Backend
from mar.config import ModelConfig, SamplingConfig
from mar.presets import SAMPLING_PRESETS, apply_preset
from mar.published import MODELS, SAMPLING
from mar.sampling import decode, generate
from mar.sampling.decode import DecodeState, all_masked, init_state, sample_tokens
from mar.sampling.guidance import StepSettings, step_settings
from mar.sampling.noise import NoiseAhead, SeededNoise
from mar.sampling.reveal_plan import GroupPlan

ASYNCHRONOUS = Backend(asynchronous=True)


class StubHead:
    """Returns the first value of the first noise."""

    token_width = 16

    def num_noises(self, steps: int, sampling: SamplingConfig) -> int:
        return steps if sampling.solver in ("ancestral", "dpm++2m-sde") else 1

    def sample(self, z: Tensor, noise: Tensor, scale: Tensor | None, steps: int, sampling: SamplingConfig) -> Tensor:
        return noise[0, :, :1]


class StubModel:
    """Returns zeros of one feature."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.head = config, StubHead()

    def __call__(
        self, tokens: Tensor, condition: Tensor, visible: Tensor, *, padded: bool, query_idx: Tensor
    ) -> Tensor:
        return torch.zeros(len(tokens), query_idx.shape[1], 1)


class Spent(NamedTuple):
    """Milliseconds of a reveal step."""

    cpu: float
    wall: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="mar-base")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--preset", choices=sorted(SAMPLING_PRESETS), nargs="+", default=["exact", "fast"])
    parser.add_argument("--steps", type=int, default=64, help="reveal steps of the preset exact")
    parser.add_argument("--diffusion-steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = StubModel(MODELS[options.model])
    print(f"torch {torch.__version__}, one thread; ms of a reveal step, medians of {options.repeats}\n")
    print("| preset | batch | each step: CPU | wall | planned: CPU | wall | CPU, times less |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for preset in options.preset:
        scale = SAMPLING[options.model].guidance_scale
        sampling = SamplingConfig(options.steps, options.diffusion_steps, scale)
        sampling = apply_preset(sampling, model.config.tokens, preset)
        for batch in options.batch:
            rounds = [(measure(each_step, model, batch, sampling), measure(planned, model, batch, sampling))
                      for _ in range(options.repeats)]  # fmt: skip
            before, after = (median([pair[i] for pair in rounds]) for i in (0, 1))
            cells = (f"{value:.2f}" for value in (*before, *after, before.cpu / after.cpu))
            print(f"| {preset} | {batch} | {' | '.join(cells)} |", flush=True)


def median(spent: Sequence[Spent]) -> Spent:
    return Spent(statistics.median(s.cpu for s in spent), statistics.median(s.wall for s in spent))


def measure(way: Callable[[Any, int, SamplingConfig], int], model: StubModel, batch: int, s: SamplingConfig) -> Spent:
    """Return the time of the main thread, per reveal step."""
    cpu, wall = time.thread_time(), time.perf_counter()
    steps = way(model, batch, s)
    return Spent(1e3 * (time.thread_time() - cpu) / steps, 1e3 * (time.perf_counter() - wall) / steps)


def start(model: StubModel, batch: int, sampling: SamplingConfig, source: SeededNoise) -> DecodeState:
    tokens = torch.zeros(batch, model.config.tokens, 1)
    return init_state(tokens, all_masked(*tokens.shape[:2]), sampling.steps, source)


def planned(model: Any, batch: int, sampling: SamplingConfig) -> int:
    """Sample as on an asynchronous device."""
    source = SeededNoise(range(batch))
    state = start(model, batch, sampling, source)

    def no_gather(ahead: NoiseAhead, group: GroupPlan) -> Tensor:
        return torch.zeros(1, len(group.row), StubHead.token_width)

    with (
        mock.patch.object(decode, "backend_for", return_value=ASYNCHRONOUS),
        mock.patch.object(generate, "backend_for", return_value=ASYNCHRONOUS),
        mock.patch.object(NoiseAhead, "_gather", no_gather),
    ):
        check = generate.LatentCheck(model, sampling, state.revealed_at())
        for after in sample_tokens(model, torch.arange(batch), state, sampling, source):
            check(after)
    return state.steps


# ---- the way of versions until 0.1


class ImageStep(NamedTuple):
    row: int
    image: int
    positions: Tensor
    settings: StepSettings


def each_step(model: Any, batch: int, sampling: SamplingConfig) -> int:
    """Sample with all indices and noise made within each step."""
    source, labels = SeededNoise(range(batch)), torch.arange(batch)
    state = start(model, batch, sampling, source)
    unknown = state.unknown
    while state.step < state.steps:
        state = old_step(model, labels, state, sampling, source)
        old_check(state, unknown)
    return state.steps


@torch.no_grad()
def old_step(model: Any, labels: Tensor, state: DecodeState, sampling: SamplingConfig, s: SeededNoise) -> DecodeState:
    guidable, length = bool((labels >= 0).any()), state.unknown.shape[1]
    steps: list[ImageStep] = []
    for image, schedule in enumerate(state.schedules):
        if state.step < len(schedule):
            settings = step_settings(sampling, schedule, length)[state.step]
            assert guidable
            steps.append(ImageStep(len(steps), image, state.revealed(image), settings))

    # trunk
    images = torch.tensor([step.image for step in steps])
    query_idx = pad_sequence([step.positions for step in steps], batch_first=True, padding_value=length)
    uncond_rows = torch.tensor([step.row for step in steps if step.settings.run_uncond], dtype=torch.long)
    guided = [step.row for step in steps if step.settings.guided]
    uncond_of = {row: len(steps) + index for index, row in enumerate(guided)}
    keep = sampling.uncond_interval > 1 and len(uncond_rows) > 0
    only = torch.arange(length).expand(len(steps), -1) if keep else query_idx
    tokens, condition, unknown = state.tokens[images], labels[images], state.unknown[[step.image for step in steps]]
    counts = (~unknown).sum(1)
    visible = torch.where(unknown, length, torch.arange(length)).sort(dim=1).values[:, : int(counts.max())]
    if len(uncond_rows):
        condition = torch.cat([condition, torch.full_like(condition[uncond_rows], -1)])
        tokens, visible, only = (torch.cat([each, each[uncond_rows]]) for each in (tokens, visible, only))
    z = model(tokens, condition, visible, padded=bool((counts != counts.max()).any()), query_idx=only)
    residual = state.residual
    if sampling.uncond_interval > 1:
        cond = z[: len(steps)]
        residual = z.new_zeros(len(state.orders), length, z.shape[-1]) if residual is None else residual
        if keep:
            residual = residual.index_copy(0, images[uncond_rows], z[len(steps) :] - cond[uncond_rows])
            cond = decode.gather_tokens(cond, query_idx)
        rows = torch.tensor(guided, dtype=torch.long)
        other = cond[rows] + decode.gather_tokens(residual[images[rows]], query_idx[rows])
        z = torch.cat([cond, other])

    # head
    def key(step: ImageStep) -> tuple[int, bool]:
        return step.settings.diffusion_steps, step.settings.guided

    drawn_tokens, still = state.tokens, state.unknown
    for (diffusion_steps, is_guided), group in groupby(sorted(steps, key=key), key=key):
        own = list(group)
        columns = torch.cat([torch.arange(len(step.positions)) for step in own])
        rows = torch.tensor([step.row for step in own for _ in step.positions])
        each, scale = z[rows, columns], None
        if is_guided:
            others = torch.tensor([uncond_of[step.row] for step in own for _ in step.positions])
            each = torch.cat([each, z[others, columns]])
            scale = torch.tensor([[step.settings.scale] for step in own for _ in step.positions])
        noises = model.head.num_noises(diffusion_steps, sampling)
        noise = torch.cat([s.noise(step.image, noises, len(step.positions), 16) for step in own], dim=1)
        drawn = model.head.sample(each, noise, scale, diffusion_steps, sampling)
        place = torch.tensor([step.image for step in own for _ in step.positions])
        positions = torch.cat([step.positions for step in own])
        drawn_tokens = drawn_tokens.index_put((place, positions), drawn)
        still = still.index_put((place, positions), torch.tensor(False))
    return replace(state, tokens=drawn_tokens, unknown=still, step=state.step + 1, residual=residual)


def old_check(state: DecodeState, generated: Tensor) -> None:
    done = generated & ~state.unknown
    count = done.sum(1) * state.tokens.shape[-1]
    values = torch.where(done.unsqueeze(-1), state.tokens, 0.0)
    finite = values.isfinite().flatten(1).all(1)
    mean = values.sum((1, 2)) / count.clamp(min=1)
    std = ((values.square().sum((1, 2)) / count.clamp(min=1)) - mean.square()).clamp(min=0).sqrt()
    assert not bool((~finite | ((4 * done.sum(1) >= generated.sum(1)) & (std > generate.MAX_STD))).any())


if __name__ == "__main__":
    main()
