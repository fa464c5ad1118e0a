"""The recorded diffusion loop: what is recorded, and that it draws what the plain one draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import model, noise
from torch import Tensor

from mar.backends.cuda import CUDAGraphSampler, bucket_size, cuda_graph, sample_rows, sampler_for
from mar.config import SamplingConfig, Solver
from mar.diffusion.schedule import respace, training_schedule
from mar.diffusion.solvers import num_noises
from mar.sampling.decode import SeededNoise, all_masked, decode_step, init_state, sample_tokens

OF = model()
HEAD = OF.head
SCHEDULE = respace(training_schedule(HEAD.config), 5)


class Recorder:
    """Stands in for a graph where there is none: does the work again, on the tensors that it was recorded with."""

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
    return z, noise(num_noises(solver, 5), rows, 2, seed=seed + 2), scale


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("solver", ["ancestral", "dpm++2m"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_it_draws_what_the_plain_loop_draws(guided: bool, solver: Solver, device: str) -> None:
    """On a GPU this is the test of the graphs: of more rows and of fewer, with other numbers each time."""
    head = model().head.to(device)
    sampling = SamplingConfig(diffusion_steps=5, solver=solver, x0_bound=2.0)
    recorder = cuda_graph(torch.device(device)) if device == "cuda" else Recorder()
    loop = CUDAGraphSampler(recorder)
    for seed, rows in enumerate((15, 16, 14, 15, 3, 3, 16)):
        z, num_noises, scale = (
            each if each is None else each.to(device) for each in inputs(rows, guided, seed, solver)
        )
        expected = sample_rows(head, z, num_noises, scale, SCHEDULE, sampling)
        torch.testing.assert_close(loop(head, z, num_noises, scale, SCHEDULE, sampling), expected, rtol=1e-5, atol=1e-5)
    assert {key[0] for key in loop.recordings} == {3, 16}  # 15 rows are filled up to 16; 14 came once


@pytest.mark.gpu
@torch.no_grad()
def test_a_replay_waits_for_nothing() -> None:
    head, sampling = model().head.cuda(), SamplingConfig(diffusion_steps=5)
    z, num_noises, scale = (each if each is None else each.cuda() for each in inputs(8, True, 0))
    loop = CUDAGraphSampler(cuda_graph(torch.device("cuda")))
    for _ in range(2):
        loop(head, z, num_noises, scale, SCHEDULE, sampling)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop(head, z, num_noises, scale, SCHEDULE, sampling)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_what_comes_once_is_not_recorded() -> None:
    recorder, sampling = Recorder(), SamplingConfig(diffusion_steps=5)
    loop = CUDAGraphSampler(recorder)
    for rows in (1, 2, 4, 8):
        loop(HEAD, *inputs(rows, False, rows), SCHEDULE, sampling)
    assert recorder.recorded == 0
    for rows in (1, 2, 2):
        loop(HEAD, *inputs(rows, False, rows), SCHEDULE, sampling)
    loop(HEAD, *inputs(2, True, 0), SCHEDULE, sampling)
    assert (recorder.recorded, recorder.replayed) == (2, 3)


@torch.no_grad()
def test_the_recordings_last_used_are_kept() -> None:
    recorder, sampling = Recorder(), SamplingConfig(diffusion_steps=5)
    loop = CUDAGraphSampler(recorder, most=2)
    for rows in (1, 1, 2, 2, 1, 3, 3, 1):  # 2 was used longest ago when 3 came again
        loop(HEAD, *inputs(rows, False, rows), SCHEDULE, sampling)
    assert recorder.recorded == 3
    assert [key[0] for key in loop.recordings] == [3, 1]


@torch.no_grad()
def test_another_way_of_drawing_is_another_recording() -> None:
    loop, first, plain = CUDAGraphSampler(Recorder()), inputs(4, False, 0), SamplingConfig(diffusion_steps=5)
    ways = (plain, replace(plain, temperature=0.5), replace(plain, solver="dpm++2m-sde"), replace(plain, x0_bound=0.5))
    for sampling in ways:
        expected = sample_rows(HEAD, *first, SCHEDULE, sampling)
        for _ in range(3):
            torch.testing.assert_close(loop(HEAD, *first, SCHEDULE, sampling), expected, rtol=1e-5, atol=1e-5)
    assert len(loop.recordings) == len(ways)


@pytest.mark.gpu
def test_a_loop_is_kept_while_weights_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    head, device = model().head.cuda(), torch.device("cuda")
    kept = sampler_for(head, device)
    assert isinstance(kept, CUDAGraphSampler)
    assert sampler_for(head, device) is kept
    head.cpu().cuda()
    moved = sampler_for(head, device)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert sampler_for(head, device) is not moved
    monkeypatch.setenv("MAR_CUDA_GRAPHS", "0")
    assert sampler_for(head, device) is sample_rows


def test_a_cpu_runs_it_plainly() -> None:
    assert sampler_for(HEAD, torch.device("cpu")) is sample_rows


@torch.no_grad()
def test_results_are_not_written_over() -> None:
    loop, sampling = CUDAGraphSampler(Recorder()), SamplingConfig(diffusion_steps=5)
    first, second, third = (loop(HEAD, *inputs(4, True, seed), SCHEDULE, sampling) for seed in (0, 10, 20))
    kept = second.clone()
    loop(HEAD, *inputs(4, True, 30), SCHEDULE, sampling)
    assert torch.equal(second, kept)
    assert not torch.equal(second, third)
    assert not torch.equal(first, second)


@torch.no_grad()
def test_where_recording_fails_all_goes_on_and_says_so_once() -> None:
    def refuse(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    loop, sampling = CUDAGraphSampler(refuse), SamplingConfig(diffusion_steps=5)
    expected = sample_rows(HEAD, *inputs(4, True, 0), SCHEDULE, sampling)
    loop(HEAD, *inputs(4, True, 0), SCHEDULE, sampling)
    with pytest.warns(UserWarning, match="no CUDA graph of the head.*not permitted"):
        assert torch.equal(loop(HEAD, *inputs(4, True, 0), SCHEDULE, sampling), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(loop(HEAD, *inputs(4, True, 0), SCHEDULE, sampling), expected)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_pictures_are_those_of_the_plain_loop(guidance: float) -> None:
    sampling = SamplingConfig(steps=16, diffusion_steps=6, guidance=guidance, diffusion_steps_end=5)
    first, second = (SeededNoise([0, 1, 2]) for _ in range(2))
    labels, recorder = torch.tensor([0, 1, 2]), Recorder()
    loop = CUDAGraphSampler(recorder)
    state = init_state(torch.zeros(3, 16, 2), all_masked(3, 16), sampling.steps, first)
    while state.step < state.steps:
        state = decode_step(OF, labels, state, sampling, training_schedule(OF.config.head), first, loop=loop)
    other = init_state(torch.zeros(3, 16, 2), all_masked(3, 16), sampling.steps, second)
    *_, plain = sample_tokens(OF, labels, other, sampling, second)
    torch.testing.assert_close(state.tokens, plain.tokens, rtol=1e-4, atol=1e-4)
    assert recorder.replayed >= 10


def test_rows_are_filled_up_to_few_numbers() -> None:
    numbers = {bucket_size(rows) for rows in range(1, 1025)}
    assert all(rows <= bucket_size(rows) <= 1.25 * rows for rows in range(1, 1025))
    assert {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 1024} <= numbers
    assert len(numbers) < 40
