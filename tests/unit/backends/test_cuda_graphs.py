"""CUDA graphs of the head: a replay samples the head's tokens."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import noise, tiny_model
from torch import Tensor

from mar.backends import backend_for
from mar.backends.cuda.graphs import GraphedHead, bucket_size, cuda_recorder, graph_head
from mar.config import SamplingConfig, Solver
from mar.diffusion.solvers import num_noises
from mar.sampling.decode import all_masked, decode_step, init_state, sample_tokens
from mar.sampling.noise import SeededNoise

OF = tiny_model()
HEAD = OF.head
STEPS = 5


class Recorder:
    """Stands in for a CUDA graph: repeats the work on the recorded tensors."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        result = torch.empty_like(work())
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            result.copy_(work())

        return replay, result


def inputs(rows: int, guided: bool, seed: int, solver: Solver = "ancestral") -> tuple[Tensor, Tensor, Tensor | None]:
    z = noise((1 + guided) * rows, 16, seed=seed)
    scale = 1 + noise(rows, 1, seed=seed + 1).abs() if guided else None
    return z, noise(num_noises(solver, STEPS), rows, 2, seed=seed + 2), scale


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("solver", ["ancestral", "dpm++2m"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_graphed_head_draws_what_the_plain_head_draws(guided: bool, solver: Solver, device: str) -> None:
    """On a GPU this is the test of the graphs: of more rows and of fewer, with other numbers each time."""
    head = tiny_model().head.to(device)
    sampling = SamplingConfig(diffusion_steps=5, solver=solver, x0_bound=2.0)
    recorder = cuda_recorder(torch.device(device)) if device == "cuda" else Recorder()
    graphed = GraphedHead(head, recorder)
    most = 1e-4 if device == "cuda" else 1e-5  # cuBLAS chooses kernels by the number of rows
    for seed, rows in enumerate((15, 16, 14, 15, 3, 3, 16)):
        z, noises, scale = (each if each is None else each.to(device) for each in inputs(rows, guided, seed, solver))
        expected, drawn = (each.sample(z, noises, scale, STEPS, sampling) for each in (head, graphed))
        torch.testing.assert_close(drawn, expected, rtol=most, atol=most)
    assert {key[0] for key in graphed.graphs} == {3, 16}  # 15 rows are filled up to 16; 14 came once


@pytest.mark.gpu
@torch.no_grad()
def test_graph_replay_does_not_synchronize() -> None:
    head, sampling = tiny_model().head.cuda(), SamplingConfig(diffusion_steps=5)
    z, noises, scale = (each if each is None else each.cuda() for each in inputs(8, True, 0))
    graphed = GraphedHead(head, cuda_recorder(torch.device("cuda")))
    for _ in range(2):
        graphed.sample(z, noises, scale, STEPS, sampling)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype feature
        torch.cuda.set_sync_debug_mode("error")
        try:
            graphed.sample(z, noises, scale, STEPS, sampling)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_shape_seen_once_is_not_recorded() -> None:
    recorder, sampling = Recorder(), SamplingConfig(diffusion_steps=5)
    graphed = GraphedHead(HEAD, recorder)
    for rows in (1, 2, 4, 8):
        graphed.sample(*inputs(rows, False, rows), STEPS, sampling)
    assert recorder.recorded == 0
    for rows in (1, 2, 2):
        graphed.sample(*inputs(rows, False, rows), STEPS, sampling)
    graphed.sample(*inputs(2, True, 0), STEPS, sampling)
    assert (recorder.recorded, recorder.replayed) == (2, 3)


@torch.no_grad()
def test_least_recently_used_graph_is_dropped() -> None:
    recorder, sampling = Recorder(), SamplingConfig(diffusion_steps=5)
    graphed = GraphedHead(HEAD, recorder, max_graphs=2)
    for rows in (1, 1, 2, 2, 1, 3, 3, 1):  # 2 was used longest ago when 3 came again
        graphed.sample(*inputs(rows, False, rows), STEPS, sampling)
    assert recorder.recorded == 3
    assert [key[0] for key in graphed.graphs] == [3, 1]


@torch.no_grad()
def test_other_sampling_settings_record_another_graph() -> None:
    graphed, first, plain = GraphedHead(HEAD, Recorder()), inputs(4, False, 0), SamplingConfig(diffusion_steps=5)
    ways = (plain, replace(plain, temperature=0.5), replace(plain, solver="dpm++2m-sde"), replace(plain, x0_bound=0.5))
    for sampling in ways:
        expected = HEAD.sample(*first, STEPS, sampling)
        for _ in range(3):
            torch.testing.assert_close(graphed.sample(*first, STEPS, sampling), expected, rtol=1e-5, atol=1e-5)
    assert len(graphed.graphs) == len(ways)


@pytest.mark.gpu
def test_graphed_head_is_kept_until_weights_move(monkeypatch: pytest.MonkeyPatch) -> None:
    head = tiny_model().head.cuda()
    kept = graph_head(head)
    assert isinstance(kept, GraphedHead)
    assert graph_head(head) is kept
    head.cpu().cuda()
    moved = graph_head(head)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert graph_head(head) is not moved
    monkeypatch.setenv("MAR_CUDA_GRAPHS", "0")
    assert graph_head(head) is head


def test_cpu_backend_has_no_cuda_graphs() -> None:
    assert backend_for(torch.device("cuda")).sampling_head is graph_head
    assert not isinstance(backend_for(torch.device("cpu")).sampling_head(HEAD), GraphedHead)


def test_a_graphed_head_does_not_keep_its_head_alive() -> None:
    head = tiny_model().head
    graphed, gone = GraphedHead(head, Recorder()), weakref.ref(head)
    del head
    gc.collect()
    assert gone() is None
    assert graphed.token_width == 2


@torch.no_grad()
def test_graph_results_are_not_overwritten() -> None:
    graphed, sampling = GraphedHead(HEAD, Recorder()), SamplingConfig(diffusion_steps=5)
    first, second, third = (graphed.sample(*inputs(4, True, seed), STEPS, sampling) for seed in (0, 10, 20))
    kept = second.clone()
    graphed.sample(*inputs(4, True, 30), STEPS, sampling)
    assert torch.equal(second, kept)
    assert not torch.equal(second, third)
    assert not torch.equal(first, second)


@torch.no_grad()
def test_failed_recording_falls_back_and_warns_once() -> None:
    def refuse(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed, sampling = GraphedHead(HEAD, refuse), SamplingConfig(diffusion_steps=5)
    expected = HEAD.sample(*inputs(4, True, 0), STEPS, sampling)
    graphed.sample(*inputs(4, True, 0), STEPS, sampling)
    with pytest.warns(UserWarning, match="can't record a CUDA graph of the head.*not permitted"):
        assert torch.equal(graphed.sample(*inputs(4, True, 0), STEPS, sampling), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(graphed.sample(*inputs(4, True, 0), STEPS, sampling), expected)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_pipeline_with_graphs_draws_the_same_images(guidance: float) -> None:
    sampling = SamplingConfig(steps=16, diffusion_steps=6, guidance_scale=guidance, diffusion_steps_end=5)
    first, second = (SeededNoise([0, 1, 2]) for _ in range(2))
    labels, recorder = torch.tensor([0, 1, 2]), Recorder()
    graphed = GraphedHead(HEAD, recorder)
    state = init_state(torch.zeros(3, 16, 2), all_masked(3, 16), sampling.steps, first)
    while state.step < state.steps:
        state = decode_step(OF, labels, state, sampling, first, graphed)
    other = init_state(torch.zeros(3, 16, 2), all_masked(3, 16), sampling.steps, second)
    *_, plain = sample_tokens(OF, labels, other, sampling, second)
    torch.testing.assert_close(state.tokens, plain.tokens, rtol=1e-4, atol=1e-4)
    assert recorder.replayed >= 10


def test_bucket_size_has_few_values() -> None:
    numbers = {bucket_size(rows) for rows in range(1, 1025)}
    assert all(rows <= bucket_size(rows) <= 1.25 * rows for rows in range(1, 1025))
    assert {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 1024} <= numbers
    assert len(numbers) < 40
