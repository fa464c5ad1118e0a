"""eMIGM's solver of the head, DPM-Solver++ of order 3 in single steps, update by update."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mar.config import HeadConfig, SamplingConfig
from mar.diffusion.head import CFGDenoiser, DiffusionHead
from mar.diffusion.schedule import training_schedule
from mar.diffusion.single_step import LogAlphaTable, SingleStepSchedule, SolverStep, orders, single_step_schedule
from mar.diffusion.solvers import single_step
from tests.parity.support import config_of, golden, meta, model_with, relative, under
from tests.parity.test_family_models import Step

SAMPLING = SamplingConfig(solver="dpm++3s")
EVALUATIONS = [7, 8, 9, 14]


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    return under(golden("emigm_tiny"), "solver/")


@pytest.fixture(scope="module")
def head() -> DiffusionHead:
    trained = {name: tensor.float() for name, tensor in golden("emigm_tiny_trained_weights").items()}
    head = model_with(config_of(meta("emigm_tiny")["A"]["config"], tied=True), trained).head
    return head.requires_grad_(False)


def test_log_alpha_table_matches(theirs: dict[str, Tensor]) -> None:
    table = LogAlphaTable(training_schedule(HeadConfig()))
    assert len(table) == meta("emigm_tiny")["solver"]["kept_timesteps"]
    assert torch.equal(table.times, theirs["times"])
    assert relative(table.log_alpha, theirs["log_alpha"]) < 1e-6
    probe = under(theirs, "probe/")
    assert relative(table.log_alpha_at(probe["t"]), probe["log_alpha"]) < 1e-6
    assert relative(table.log_snr_at(probe["t"]), probe["lambda"]) < 1e-5
    assert relative(table.time_at(probe["lambda_in"]), probe["t_of_lambda"]) < 1e-6


@pytest.mark.parametrize("evaluations", EVALUATIONS)
def test_times_and_orders_match(theirs: dict[str, Tensor], evaluations: int) -> None:
    recorded = under(theirs, f"steps{evaluations}/")
    schedule = single_step_schedule(HeadConfig(), evaluations, SAMPLING)
    assert orders(evaluations) == recorded["orders"].tolist()
    assert [step.order for step in schedule.steps] == orders(evaluations)
    torch.testing.assert_close(schedule.timesteps.flip(0)[:-1], recorded["head_timesteps"], rtol=0, atol=0)
    ends = torch.tensor([0, *orders(evaluations)]).cumsum(0)
    torch.testing.assert_close(schedule.times.flip(0)[ends], recorded["outer_times"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("evaluations", EVALUATIONS)
def test_x_after_each_step_matches(
    theirs: dict[str, Tensor], head: DiffusionHead, evaluations: int, guided: bool
) -> None:
    recorded = theirs.get(f"steps{evaluations}/{'guided' if guided else 'plain'}/after_outer_steps")
    if recorded is None:
        pytest.skip("not recorded")
    schedule = single_step_schedule(head.config, evaluations, SAMPLING)
    x, index = theirs["x_start"], len(schedule) - 1
    for step, expected in zip(schedule.steps, recorded, strict=True):
        x = single_step(denoiser(head, theirs, schedule, guided), x, index, step, schedule)
        assert relative(x, expected) < 1e-4
        index -= step.order
    z = torch.cat([theirs["z_cond"], theirs["z_uncond"]]) if guided else theirs["z_cond"]
    drawn = head.sample(z, theirs["x_start"][None], scale(theirs) if guided else None, evaluations, SAMPLING)
    assert torch.allclose(drawn, x, atol=1e-6)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_one_update_matches(theirs: dict[str, Tensor], head: DiffusionHead, order: int, index: int) -> None:
    recorded = under(theirs, f"one_update/order{order}_{index}/")
    schedule = schedule_of(recorded["times"], recorded["inner_lambda"])
    denoise = denoiser(head, theirs, schedule, guided=True)
    x_next = single_step(denoise, recorded["x"], order, schedule.steps[0], schedule)
    assert relative(x_next, recorded["x_next"]) < 2e-5


def test_updates_of_the_full_model_match() -> None:
    theirs = under(golden("emigm_xs"), "solver/")
    step = Step("emigm_xs")
    with torch.no_grad():
        z = step.model(step.tokens, step.labels, step.visible)[0, theirs["positions"]]
        null = step.model(step.tokens, torch.full_like(step.labels, -1), step.visible)[0, theirs["positions"]]
    head = step.model.head.requires_grad_(False)
    schedule = single_step_schedule(head.config, 8, SAMPLING)
    denoise = CFGDenoiser(head, torch.cat([z, null]), schedule.timesteps, torch.full((len(z), 1), 4.0))
    index = len(schedule) - 1
    for number, each in enumerate(schedule.steps):
        recorded = under(theirs, f"update{number}/")
        x_next = single_step(denoise, recorded["x"], index, each, schedule)
        assert relative(x_next, recorded["x_next"]) < 1e-4
        index -= each.order


def schedule_of(times: Tensor, inner_lambda: Tensor) -> SingleStepSchedule:
    """The schedule of one recorded update."""
    table = LogAlphaTable(training_schedule(HeadConfig()))
    start, end = table.log_snr_at(times)
    shares = ((inner_lambda - inner_lambda[0]) / (inner_lambda[-1] - inner_lambda[0]))[1:-1]
    every = torch.cat([times[:1], table.time_at(start + shares * (end - start)), times[1:]]).flip(0)
    step = SolverStep(len(shares) + 1, *[*shares.tolist(), 0.0, 0.0][:2])
    return SingleStepSchedule((every - 1 / len(table)) * 1000, every, table.log_alpha_at(every), (step,))


def denoiser(head: DiffusionHead, theirs: dict[str, Tensor], schedule: SingleStepSchedule, guided: bool) -> CFGDenoiser:
    if not guided:
        return CFGDenoiser(head, theirs["z_cond"], schedule.timesteps)
    z = torch.cat([theirs["z_cond"], theirs["z_uncond"]])
    return CFGDenoiser(head, z, schedule.timesteps, scale(theirs))


def scale(theirs: dict[str, Tensor]) -> Tensor:
    return torch.full((len(theirs["z_cond"]), 1), meta("emigm_tiny")["solver"]["guided_scale"])
