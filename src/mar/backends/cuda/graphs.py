"""The head's diffusion loop as a CUDA graph, recorded once and replayed.

A hundred steps through a small MLP are some thousand kernels, each shorter than the time that Python needs to launch
it. Letters of shapes: r rows (tokens to draw), s noises a token, d values of a token, f width of z; g is r, or 2r with
guidance.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mar.config import SamplingConfig

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Takes a function of fixed tensors; returns a replay of it and the tensor that will hold its results."""

_RECORDING = threading.Lock()
"""A process may record one graph at a time."""


def cuda_recorder(device: torch.device) -> Recorder:
    """Return a recorder on a CUDA device that other threads may use meanwhile.

    All its recordings share one memory pool, so they have to be replayed one after the other.
    """
    with torch.cuda.device(device):
        pool, side_stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with _RECORDING, torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=side_stream, capture_error_mode="thread_local"):
                    result = work()
            finally:
                torch.cuda.set_stream(stream)  # a failed recording may leave the other one
        return graph.replay, result

    return record


@dataclass(frozen=True)
class _Graph:
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


_Key = tuple[int, bool, int, SamplingConfig]


class GraphedHead:
    """A head whose `sample` is recorded for every setting and bucket of rows that comes a second time.

    For one head, whose weights stay where they are, and one stream. The graphs used last are kept. Where recording
    fails, one warning says so and the head's own `sample` is used.
    """

    def __init__(self, head: Any, recorder: Recorder, max_graphs: int = 64) -> None:
        self._head = weakref.ref(head)  # graphs are kept by head, and must not keep it alive
        self.token_width: int = head.token_width
        self.recorder: Recorder | None = recorder
        self.max_graphs = max_graphs
        self.seen: set[_Key] = set()
        self.graphs: OrderedDict[_Key, _Graph] = OrderedDict()
        self.lock = threading.Lock()

    @property
    def head(self) -> Any:
        """The head itself."""
        head = self._head()
        assert head is not None
        return head

    def num_noises(self, steps: int, sampling: SamplingConfig) -> int:
        """Return how many noises a token takes, as the head does."""
        count: int = self.head.num_noises(steps, sampling)
        return count

    def sample(
        self,
        z: Float[Tensor, "g f"],
        noise: Float[Tensor, "s r d"],
        scale: Float[Tensor, "r 1"] | None,
        steps: int,
        sampling: SamplingConfig,
    ) -> Float[Tensor, "r d"]:
        """Draw tokens; arguments and result as `DiffusionHead.sample`."""
        key = (bucket_size(noise.shape[1]), scale is not None, steps, sampling)
        with self.lock:
            graph = self._graph(key, z, noise, scale)
            if graph is not None:
                return graph(z, noise, scale)
        tokens: Tensor = self.head.sample(z, noise, scale, steps, sampling)
        return tokens

    def _graph(self, key: _Key, z: Tensor, noise: Tensor, scale: Tensor | None) -> _Graph | None:
        """Return the graph for `key`, recorded when it comes again: a first run loads kernels and allocates."""
        if self.recorder is None or key not in self.seen:
            self.seen.add(key)
            return None
        if key not in self.graphs:
            try:
                self.graphs[key] = self._record(self.recorder, key, z, noise, scale)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph of the head, which samples step by step instead: {error}", stacklevel=3)
                self.recorder = None
                self.graphs.clear()
                return None
            if len(self.graphs) > self.max_graphs:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def _record(self, recorder: Recorder, key: _Key, z: Tensor, noise: Tensor, scale: Tensor | None) -> _Graph:
        rows, _, steps, sampling = key
        fixed_z = z.new_zeros(rows if scale is None else 2 * rows, z.shape[1])
        fixed_noise = noise.new_zeros(noise.shape[0], rows, noise.shape[2])
        fixed_scale = None if scale is None else scale.new_zeros(rows, 1)
        # outside of the graph first: what the head caches is then on the device, and a graph copies nothing to it
        self.head.sample(fixed_z, fixed_noise, fixed_scale, steps, sampling)
        replay, result = recorder(lambda: self.head.sample(fixed_z, fixed_noise, fixed_scale, steps, sampling))
        return _Graph(fixed_z, fixed_noise, fixed_scale, replay, result)


_HEADS: weakref.WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], GraphedHead]] = weakref.WeakKeyDictionary()


def graph_head(head: Any) -> Any:
    """Return the `GraphedHead` of a head on a CUDA device, kept while its weights stay where they are.

    Returns the head itself where the environment has MAR_CUDA_GRAPHS=0.
    """
    if os.environ.get("MAR_CUDA_GRAPHS") == "0":
        return head
    weights = tuple(parameter.data_ptr() for parameter in head.parameters())
    device = next(head.parameters()).device
    key = (torch.cuda.current_stream(device).cuda_stream, weights)
    graphed = _HEADS.setdefault(head, {})
    for stale in [other for other in graphed if other[1] != weights]:
        del graphed[stale]
    if key not in graphed:
        graphed[key] = GraphedHead(head, cuda_recorder(device))
    return graphed[key]


def bucket_size(rows: int) -> int:
    """Round `rows` up, by at most a quarter, to one of four sizes between two powers of two."""
    step = max(1, 2 ** (rows.bit_length() - 3))
    return -(-rows // step) * step


def _fill(fixed: Tensor, values: Tensor, dim: int = 0) -> None:
    """Copy `values` to the beginning of `fixed`; the rest stays finite and is not used."""
    fixed.narrow(dim, 0, values.shape[dim]).copy_(values)
