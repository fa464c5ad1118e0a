"""The head's diffusion loop as a CUDA graph, recorded once and replayed.

A hundred steps of a small MLP launch thousands of kernels, and Python takes longer to launch one than it runs.
Letters of shapes: r rows (tokens to draw), s noises a token, d values of a token, f width of z; g is r, or 2r with
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
"""(function of fixed tensors) -> (replay, tensor that each replay writes its result to)."""

_RECORDING = threading.Lock()
"""A process may record one graph at a time."""


def cuda_recorder(device: torch.device) -> Recorder:
    """Return a recorder on a CUDA device.

    Other threads may use the device meanwhile. All graphs share one memory pool: replay them one after the other.
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
    """A head with a CUDA graph of `sample` per setting and bucket.

    A graph is recorded at the second call, since the first loads kernels and allocates. The least recently used graphs
    are dropped. If recording fails, it warns once and uses the head's own `sample`. An instance is for one stream, and
    for weights that stay at their addresses.
    """

    def __init__(self, head: Any, recorder: Recorder, max_graphs: int = 64) -> None:
        self._head = weakref.ref(head)  # graphs are kept by head, and must not keep it alive
        self.token_width: int = head.token_width
        self.recorder: Recorder | None = recorder
        self.max_graphs = max_graphs
        self.called: set[_Key] = set()
        self.graphs: OrderedDict[_Key, _Graph] = OrderedDict()
        self.lock = threading.Lock()

    @property
    def head(self) -> Any:
        """Head of which `sample` is recorded."""
        head = self._head()
        assert head is not None
        return head

    def num_noises(self, steps: int, sampling: SamplingConfig) -> int:
        """Return the number of noises a token needs, as the head does."""
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
        """Draw tokens.

        Args:
            z, noise, scale, steps, sampling: as in `DiffusionHead.sample`.
        """
        key = (bucket_size(noise.shape[1]), scale is not None, steps, sampling)
        with self.lock:
            graph = self._graph(key, z, noise, scale)
            if graph is not None:
                return graph(z, noise, scale)
        tokens: Tensor = self.head.sample(z, noise, scale, steps, sampling)
        return tokens

    def _graph(self, key: _Key, z: Tensor, noise: Tensor, scale: Tensor | None) -> _Graph | None:
        """Return the graph for `key`; None at its first call, or if recording fails."""
        if self.recorder is None or key not in self.called:
            self.called.add(key)
            return None
        if key not in self.graphs:
            try:
                self.graphs[key] = self._record(self.recorder, key, z, noise, scale)
            except RuntimeError as error:
                warnings.warn(f"can't record a CUDA graph of the head, sampling step by step: {error}", stacklevel=3)
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
    """Return the `GraphedHead` of a head on a CUDA device.

    It is cached while the weights stay at their addresses. With MAR_CUDA_GRAPHS=0 in the environment, the head itself
    is returned.
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
    """Round `rows` up to one of four sizes per power of two."""
    step = max(1, 2 ** (rows.bit_length() - 3))
    return -(-rows // step) * step


def _fill(fixed: Tensor, values: Tensor, dim: int = 0) -> None:
    """Copy `values` to the start of `fixed`; the rest stays finite and unused."""
    fixed.narrow(dim, 0, values.shape[dim]).copy_(values)
