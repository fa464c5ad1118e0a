"""The diffusion loop of a reveal step: conditions and noise go in, tokens come out.

Plain, and on GPUs as a CUDA graph: a hundred steps through a small MLP are some thousand kernels, each shorter than it
takes Python to launch it, so that they are recorded once and launched together. Letters of shapes: r rows (tokens to
draw), s noises a token, d values of a token, f width of z; g is r, or 2r with guidance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mar.config import SamplingConfig
from mar.diffusion.head import DiffusionHead
from mar.diffusion.packed import PackedHead
from mar.diffusion.schedule import Schedule
from mar.diffusion.solvers import SOLVERS
from mar.sampling.guidance import GuidedHead

Loop = Callable[[DiffusionHead | PackedHead, Tensor, Tensor, Tensor | None, Schedule, SamplingConfig], Tensor]
"""Draws the tokens of a reveal step, with the arguments of `run`."""


def run(
    head: DiffusionHead | PackedHead,
    z: Float[Tensor, "g f"],
    noise: Float[Tensor, "s r d"],
    scale: Float[Tensor, "r 1"] | None,
    schedule: Schedule,
    sampling: SamplingConfig,
) -> Float[Tensor, "r d"]:
    """The tokens that `noise` becomes at the timesteps of `schedule`, given z: with a `scale`, of each row and then
    once more without its class."""
    return SOLVERS[sampling.solver](
        GuidedHead(head, z, schedule.timesteps, scale),
        noise,
        schedule,
        head.config.prediction,
        temperature=sampling.temperature,
        x0_bound=sampling.x0_bound,
    )


Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Runs a function of fixed tensors, and gives what does the same once more and the tensor where results will be."""


def cuda_graph(device: torch.device) -> Record:
    """What records on a CUDA device, and lets other threads use it meanwhile. All that it records shares the memory of
    what lies between."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result

    return record


@dataclass(frozen=True)
class _Recording:
    z: Tensor
    noise: Tensor
    scale: Tensor | None
    replay: Callable[[], object]
    result: Tensor


class RecordedLoop:
    """`run`, recorded for every number of rows that comes a second time; rows are filled up to one of few numbers.

    For one head whose weights stay where they are, and one way of drawing. Where recording fails, which is said once,
    all goes on plainly.
    """

    def __init__(self, record: Record) -> None:
        self.record: Record | None = record
        self.seen: set[tuple[int, int, bool]] = set()
        self.recordings: dict[tuple[int, int, bool], _Recording] = {}

    def __call__(
        self,
        head: DiffusionHead | PackedHead,
        z: Float[Tensor, "g f"],
        noise: Float[Tensor, "s r d"],
        scale: Float[Tensor, "r 1"] | None,
        schedule: Schedule,
        sampling: SamplingConfig,
    ) -> Float[Tensor, "r d"]:
        rows = noise.shape[1]
        key = (len(schedule), filled(rows), scale is not None)
        if self.record is None or key not in self.seen:
            self.seen.add(key)  # and kernels are loaded, workspaces made: nothing that a recording may hold
            return run(head, z, noise, scale, schedule, sampling)
        if key not in self.recordings:
            try:
                self.recordings[key] = self._recorded(self.record, head, z, noise, scale, schedule, sampling)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph of the head, which draws step by step instead: {error}", stacklevel=2)
                self.record = None
                return run(head, z, noise, scale, schedule, sampling)
        recording = self.recordings[key]
        _fill(recording.noise, noise, dim=1)
        if scale is None or recording.scale is None:
            _fill(recording.z, z)
        else:
            for halves in zip(recording.z.chunk(2), z.chunk(2), strict=True):
                _fill(*halves)
            _fill(recording.scale, scale)
        recording.replay()
        return recording.result[:rows].clone()

    @staticmethod
    def _recorded(
        record: Record, head: DiffusionHead | PackedHead, z: Tensor, noise: Tensor, scale: Tensor | None,
        schedule: Schedule, sampling: SamplingConfig,
    ) -> _Recording:  # fmt: skip
        rows = filled(noise.shape[1])
        fixed_z = z.new_zeros(rows if scale is None else 2 * rows, z.shape[1])
        fixed_noise = noise.new_zeros(noise.shape[0], rows, noise.shape[2])
        fixed_scale = None if scale is None else scale.new_zeros(rows, 1)
        there = replace(schedule, timesteps=schedule.timesteps.to(z.device))  # a graph copies nothing from the host
        replay, result = record(lambda: run(head, fixed_z, fixed_noise, fixed_scale, there, sampling))
        return _Recording(fixed_z, fixed_noise, fixed_scale, replay, result)


def filled(rows: int) -> int:
    """The number of rows to which `rows` are filled up: at most a quarter more, four numbers from each power of two to
    the next."""
    step = max(1, 2 ** (rows.bit_length() - 3))
    return -(-rows // step) * step


def _fill(fixed: Tensor, values: Tensor, dim: int = 0) -> None:
    """Copies `values` to the beginning of `fixed`; what is behind stays what it was, finite, and is not looked at."""
    fixed.narrow(dim, 0, values.shape[dim]).copy_(values)
