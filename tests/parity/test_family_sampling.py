"""Whole sampling runs of eMIGM: reveal rule, guidance in time, solver.

Orders are made of the recorded reveals, and numbers of tokens of the recorded uniforms.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mar.backends.cpu.packed_head import pack_head
from mar.config import SamplingConfig
from mar.model.mar import MAR
from mar.model.masking import reveal_probabilities, step_times
from mar.model.tokens import patchify
from mar.sampling.decode import all_masked, decode_step, init_state, plan_steps
from mar.sampling.guidance import step_settings
from mar.sampling.noise import SharedUniforms
from tests.parity.support import config_of, golden, meta, model_with, relative, under
from tests.parity.test_sampling import WatchedHead

RUNS = ["guided", "plain", "many_steps", "linear"]


@pytest.fixture(scope="module")
def model() -> MAR:
    trained = {name: tensor.float() for name, tensor in golden("emigm_tiny_trained_weights").items()}
    return model_with(config_of(meta("emigm_tiny")["A"]["config"], tied=True), trained)


@dataclass
class RecordedDraws:
    """The draws of a recorded run, as a noise source."""

    theirs: dict[str, Tensor]
    rows: list[Tensor]
    """Start noise of each step, (rows, d)."""
    step: int = -1
    asked: dict[int, int] = field(default_factory=dict)

    def order(self, image: int, length: int) -> Tensor:
        """Tokens of later steps first: orders are revealed from their ends."""
        return torch.cat([step.nonzero().flatten() for step in self.theirs["reveal"][:, image].flip(0)])

    def uniforms(self, image: int, count: int) -> Tensor:
        step = self.asked[image] = self.asked.get(image, -1) + 1
        masked = ~self.theirs["reveal"][:step, image].any(0)
        assert int(masked.sum()) == count
        return self.theirs["u"][step, image][masked]

    def noise(self, image: int, noises: int, count: int, width: int) -> Tensor:
        self.step += image == 0
        return self.rows[self.step].view(-1, count, width)[image].unsqueeze(0)


def sampling_of(settings: dict[str, float]) -> SamplingConfig:
    return SamplingConfig(
        settings["num_iter"],
        settings["num_sampling_steps"],
        settings["cfg"],
        settings["cfg_schedule"],
        solver="dpm++3s",
        mask_schedule="exponential",
        reveal="binomial",
        guidance_time=(settings["cfg_t_min"], settings["cfg_t_max"]),
    )


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("case", RUNS)
def test_family_run_matches(model: MAR, case: str, packed: bool) -> None:
    theirs, settings = under(golden("emigm_tiny"), f"{case}/"), meta("emigm_tiny")[case]
    sampling = sampling_of(settings)
    counts = (theirs["reveal"].sum((1, 2))).tolist()
    noise = RecordedDraws(theirs, list(theirs["start_noise"].split(counts)))
    n, length = theirs["reveal"].shape[1:]
    state = init_state(
        torch.zeros(n, length, 16), all_masked(n, length), sampling.steps, noise,
        schedule=sampling.mask_schedule, rule=sampling.reveal,
    )  # fmt: skip
    assert state.steps == settings["steps_run"]
    head = WatchedHead(pack_head(model.head) if packed else model.head)
    uncond, drawn = [], []
    for step in range(state.steps):
        assert [len(state.revealed(image)) for image in range(n)] == n * [settings["revealed"][step]]
        for image in range(n):
            assert torch.equal(state.revealed(image), theirs["reveal"][step, image].nonzero().flatten())
        assert relative(state.tokens, theirs["tokens_before"][step]) < 1e-4 if step else not state.tokens.any()
        groups = plan_steps(model.head, theirs["labels"], state, sampling, count=1)[step].groups
        [scale] = torch.cat([group.scale for group in groups]).unique().tolist()
        assert scale == pytest.approx(float(theirs["scale"][step]), rel=1e-6)
        state = decode_step(model, theirs["labels"], state, sampling, noise, head)
        drawn.append(state.tokens[theirs["reveal"][step]])
    rows = [len(z) for z, _, _ in head.calls]
    assert rows == theirs["head_batch"].tolist()
    z_cond = torch.cat([z[: noise.shape[1]] for z, noise, _ in head.calls])
    assert relative(z_cond, theirs["z_cond"]) < 1e-4
    uncond = [z[noise.shape[1] :] for z, noise, scale in head.calls if scale is not None]
    if uncond:
        assert relative(torch.cat(uncond), theirs["z_uncond"]) < 1e-4
    std = float(theirs["latents"].std())
    assert float((torch.cat(drawn) - theirs["head_out"]).abs().max()) / std < 1e-4
    assert float((state.tokens - patchify(theirs["latents"], 1)).abs().max()) / std < 1e-4


@pytest.mark.parametrize("steps", [16, 64, 128])
def test_reveal_probabilities_and_guided_steps_match(steps: int) -> None:
    theirs = under(golden("emigm_tiny"), f"schedule/K{steps}/")
    torch.testing.assert_close(torch.tensor(step_times(steps)), theirs["times"], rtol=0, atol=0)
    ours = torch.tensor(reveal_probabilities(steps, "exponential"))
    torch.testing.assert_close(ours, theirs["reveal_probability"], rtol=1e-5, atol=1e-6)
    windows = [name for name in theirs if name.startswith("guided_")]
    assert windows
    schedule = tuple(range(steps - 1, -1, -1))
    for name in windows:
        start, end = map(float, name.split("_")[1:])
        sampling = SamplingConfig(steps, guidance_scale=4.0, guidance_schedule="constant", guidance_time=(start, end))
        assert [each.guided for each in step_settings(sampling, schedule, steps)] == theirs[name].tolist()


def test_shared_uniforms_reveal_as_many_tokens_in_every_image() -> None:
    source = SharedUniforms([5, 6, 7])
    state = init_state(
        torch.zeros(3, 64, 2), all_masked(3, 64), 16, source, schedule="exponential", rule="binomial"
    )  # fmt: skip
    assert len(set(state.schedules)) == 1
    assert not torch.equal(state.orders[0], state.orders[1])
