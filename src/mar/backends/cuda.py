"""The diffusion loop of a reveal step: conditions and noise go in, tokens come out.

Plain, and on GPUs as a CUDA graph: a hundred steps through a small MLP are some thousand kernels, each shorter than it
takes Python to launch it, so that they are recorded once and launched together. Letters of shapes: r rows (tokens to
draw), s noises a token, d values of a token, f width of z; g is r, or 2r with guidance.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from mar.backends.cpu.packed_head import PackedHead
from mar.config import SamplingConfig
from mar.diffusion.head import DiffusionHead
from mar.diffusion.schedule import Schedule
from mar.diffusion.solvers import SOLVERS
from mar.sampling.guidance import CFGDenoiser

RowSampler = Callable[[DiffusionHead | PackedHead, Tensor, Tensor, Tensor | None, Schedule, SamplingConfig], Tensor]
"""Draws the tokens of a reveal step, with the arguments of `run`."""


def sample_rows(
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
        CFGDenoiser(head, z, schedule.timesteps, scale),
        noise,
        schedule,
        head.config.prediction,
        temperature=sampling.temperature,
        x0_bound=sampling.x0_bound,
    )


Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Runs a function of fixed tensors, and gives what does the same once more and the tensor where results will be."""


_ONE_AT_A_TIME = threading.Lock()
"""A process may record one graph at a time."""


def cuda_graph(device: torch.device) -> Record:
    """What records on a CUDA device; other threads may use it meanwhile. All that it records shares the memory of what
    lies between, so that its recordings are to be replayed one after the other."""
    with torch.cuda.device(device):
        pool, aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with _ONE_AT_A_TIME, torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                    result = work()
            finally:
                torch.cuda.set_stream(stream)  # where a recording fails, it may be left on the other one
        return graph.replay, result

    return record


@dataclass(frozen=True)
class _Recording:
    """A recorded loop, and the tensors that it reads and writes."""

    z: Tensor
    noise: Tensor
    scale: Tensor | None
    replay: Callable[[], object]
    result: Tensor

    def __call__(self, z: Tensor, noise: Tensor, scale: Tensor | None) -> Tensor:
        _fill(self.noise, noise, dim=1)
        if scale is None or self.scale is None:
            _fill(self.z, z)
        else:
            for halves in zip(self.z.chunk(2), z.chunk(2), strict=True):
                _fill(*halves)
            _fill(self.scale, scale)
        self.replay()
        return self.result[: noise.shape[1]].clone()


_Key = tuple[Any, ...]


class CUDAGraphSampler:
    """`run`, recorded for every number of rows that comes a second time; rows are filled up to one of few numbers.

    For one head, whose weights stay where they are, and one stream of work. The recordings last used are kept. Where
    recording fails, which is said once, all goes on plainly.
    """

    def __init__(self, record: Record, most: int = 64) -> None:
        self.record: Record | None = record
        self.most = most
        self.seen: set[_Key] = set()
        self.recordings: OrderedDict[_Key, _Recording] = OrderedDict()
        self.lock = threading.Lock()

    def __call__(
        self,
        head: DiffusionHead | PackedHead,
        z: Float[Tensor, "g f"],
        noise: Float[Tensor, "s r d"],
        scale: Float[Tensor, "r 1"] | None,
        schedule: Schedule,
        sampling: SamplingConfig,
    ) -> Float[Tensor, "r d"]:
        key = (
            bucket_size(noise.shape[1]), scale is not None, tuple(schedule.timesteps.tolist()),
            sampling.solver, sampling.temperature, sampling.x0_bound,
        )  # fmt: skip
        with self.lock:
            recording = self._found(key, head, z, noise, scale, schedule, sampling)
            if recording is not None:
                return recording(z, noise, scale)
        return sample_rows(head, z, noise, scale, schedule, sampling)

    def _found(
        self, key: _Key, head: DiffusionHead | PackedHead, z: Tensor, noise: Tensor, scale: Tensor | None,
        schedule: Schedule, sampling: SamplingConfig,
    ) -> _Recording | None:  # fmt: skip
        """The recording for `key`, made where it comes again. Not at once: a first run loads kernels and makes room."""
        if self.record is None or key not in self.seen:
            self.seen.add(key)
            return None
        if key not in self.recordings:
            try:
                self.recordings[key] = self._recorded(self.record, head, z, noise, scale, schedule, sampling)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph of the head, which draws step by step instead: {error}", stacklevel=3)
                self.record = None
                self.recordings.clear()
                return None
            if len(self.recordings) > self.most:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        return self.recordings[key]

    @staticmethod
    def _recorded(
        record: Record, head: DiffusionHead | PackedHead, z: Tensor, noise: Tensor, scale: Tensor | None,
        schedule: Schedule, sampling: SamplingConfig,
    ) -> _Recording:  # fmt: skip
        rows = bucket_size(noise.shape[1])
        fixed_z = z.new_zeros(rows if scale is None else 2 * rows, z.shape[1])
        fixed_noise = noise.new_zeros(noise.shape[0], rows, noise.shape[2])
        fixed_scale = None if scale is None else scale.new_zeros(rows, 1)
        there = replace(schedule, timesteps=schedule.timesteps.to(z.device))  # a graph copies nothing from the host
        replay, result = record(lambda: sample_rows(head, fixed_z, fixed_noise, fixed_scale, there, sampling))
        return _Recording(fixed_z, fixed_noise, fixed_scale, replay, result)


_LOOPS: WeakKeyDictionary[DiffusionHead, dict[_Key, CUDAGraphSampler]] = WeakKeyDictionary()


def sampler_for(head: DiffusionHead, device: torch.device) -> RowSampler:
    """What draws with a head there: on CUDA devices a `RecordedLoop`, kept for as long as the head's weights stay where
    they are, unless the environment says MAR_CUDA_GRAPHS=0; else `run`."""
    if device.type != "cuda" or os.environ.get("MAR_CUDA_GRAPHS") == "0":
        return sample_rows
    weights = tuple(parameter.data_ptr() for parameter in head.parameters())
    key = (torch.cuda.current_stream(device).cuda_stream, weights)
    loops = _LOOPS.setdefault(head, {})
    for stale in [other for other in loops if other[1] != weights]:
        del loops[stale]
    if key not in loops:
        loops[key] = CUDAGraphSampler(cuda_graph(device))
    return loops[key]


def bucket_size(rows: int) -> int:
    """The number of rows to which `rows` are filled up: at most a quarter more, four numbers from each power of two to
    the next."""
    step = max(1, 2 ** (rows.bit_length() - 3))
    return -(-rows // step) * step


def _fill(fixed: Tensor, values: Tensor, dim: int = 0) -> None:
    """Copies `values` to the beginning of `fixed`; what is behind stays what it was, finite, and is not looked at."""
    fixed.narrow(dim, 0, values.shape[dim]).copy_(values)
