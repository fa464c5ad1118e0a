"""A head that is not the diffusion head: one class and one line of `HEADS` are all that it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny import FAST, open_tiny_run, tiny_config, tiny_pipeline, tiny_train_config, write_images
from torch import Tensor, nn

import mar
from mar.backends import backend_for
from mar.backends.cuda.graphs import GraphedHead
from mar.config import ConfigError, HeadConfig, ModelConfig, SamplingConfig, from_dict, to_dict
from mar.diffusion.head import HEADS, DiffusionHead, Head
from mar.model.mar import MAR
from mar.nn import Linear
from mar.training.callbacks import Validation, take_snapshot
from mar.training.log import Log
from mar.training.trainer import train


@dataclass(frozen=True)
class NormalConfig(HeadConfig):
    """A normal distribution of each value of a token."""

    kind: ClassVar[str] = "normal"
    max_log_std: float = 1.0


class NormalHead(nn.Module):
    """z -> mean and log standard deviation of a token."""

    weight_decay = True

    def __init__(self, token_width: int, z_width: int, config: NormalConfig) -> None:
        super().__init__()
        self.config, self.token_width = config, token_width
        self.blocks = nn.ModuleList([Linear(z_width, config.width)])
        self.output = Linear(config.width, 2 * token_width)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the output small."""
        nn.init.normal_(self.output.weight, std=0.02)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation."""
        mean, log_std = self.output(torch.tanh(self.blocks[0](z))).chunk(2, -1)
        return mean, log_std.clamp(-4, self.config.max_log_std)

    def loss(self, x0: Tensor, z: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Return the negative log-likelihood of every token, the same for each of its k timesteps."""
        mean, log_std = self(z)
        loss = (0.5 * ((x0 - mean) / log_std.exp()).square() + log_std).mean(-1)
        return loss.expand(timestep.shape).flatten()

    def num_noises(self, steps: int, sampling: SamplingConfig) -> int:
        """Return 1: a normal is drawn from one noise."""
        return 1

    def sample(self, z: Tensor, noise: Tensor, scale: Tensor | None, steps: int, sampling: SamplingConfig) -> Tensor:
        """Draw tokens; guidance moves the mean."""
        mean, log_std = self(z)
        if scale is not None:
            (mean, uncond), log_std = mean.chunk(2), log_std.chunk(2)[0]
            mean = uncond + scale * (mean - uncond)
        return mean + sampling.temperature * log_std.exp() * noise[0]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    HEADS[NormalConfig] = NormalHead
    yield
    del HEADS[NormalConfig]


NORMAL = NormalConfig(width=16, depth=1, batch_mul=2, max_log_std=0.5)


def test_another_head_fulfills_the_protocol() -> None:
    assert isinstance(NormalHead(2, 16, NORMAL), Head)
    assert isinstance(DiffusionHead(2, 16, HeadConfig(width=16, depth=1)), Head)


def test_another_head_config_survives_json() -> None:
    model = tiny_config(head=NORMAL)
    saved = to_dict(model)
    assert saved["head"]["kind"] == "normal"
    assert "kind" not in to_dict(tiny_config())["head"]
    assert from_dict(ModelConfig, saved) == model
    with pytest.raises(ConfigError, match="HeadConfig: got kind 'gmm', expected diffusion or normal"):
        from_dict(ModelConfig, {**saved, "head": {**saved["head"], "kind": "gmm"}})


def test_another_head_is_saved_loaded_and_sampled(tmp_path: Path) -> None:
    model = tiny_pipeline(head=NORMAL)
    model.save(tmp_path / "model.safetensors")
    again = mar.load(tmp_path / "model.safetensors", device="cpu")
    assert isinstance(again.model.head, NormalHead)
    assert again.fingerprint() == model.fingerprint()
    for settings in ({}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "uncond_interval": 2}):
        options: dict[str, Any] = {"output": "tensor", "allow_broken": True, **settings}
        ours, theirs = (each.sample([0, 1], [3, 4], **options) for each in (model, again))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_another_head_trains_and_resumes(optimizer: Any, tmp_path: Path) -> None:
    small = tiny_train_config(write_images(tmp_path / "data"), optimizer=optimizer, lr=0.02, images=16)
    settings = replace(small, model=replace(small.model, head=NORMAL), sampling=FAST)
    run = open_tiny_run(settings, tmp_path / "run")
    before = [p.clone() for p in run.model.head.parameters()]
    assert train(run, Log())
    assert all(not torch.equal(a, b) for a, b in zip(before, run.model.head.parameters(), strict=True))
    again = open_tiny_run(settings, tmp_path / "run")
    assert again.progress.images == 16
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True))


def test_another_head_is_validated(tmp_path: Path) -> None:
    small = tiny_train_config(write_images(tmp_path / "data", 24), hold_out=3)
    run = open_tiny_run(replace(small, model=replace(small.model, head=NORMAL)), tmp_path / "run")
    found = Validation(run, Log())(take_snapshot(run))
    assert math.isfinite(found["val_loss"])
    # the loss does not depend on the timestep
    assert found["val_loss_00"] == pytest.approx(found["val_loss"], rel=0.5)


@torch.no_grad()
def test_another_head_is_left_to_itself_by_backends_or_recorded_as_it_is() -> None:
    head = MAR(tiny_config(head=NORMAL)).eval().head
    assert backend_for(torch.device("cpu")).sampling_head(head) is head
    z, noise, sampling = torch.randn(4, 16), torch.randn(1, 4, 2), SamplingConfig()

    def record(work: Any) -> tuple[Any, Tensor]:
        result = work()
        return lambda: result.copy_(work()), result

    graphed = GraphedHead(head, record)
    for _ in range(3):
        torch.testing.assert_close(
            graphed.sample(z, noise, None, 5, sampling), head.sample(z, noise, None, 5, sampling)
        )
    assert len(graphed.graphs) == 1
