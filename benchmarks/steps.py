"""Training steps of ours and of the reference, as a whole and by parts, for `training.py`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from reference_step import ReferenceStep
from torch import Tensor, nn

from mar.config import ModelConfig, TrainConfig
from mar.data.loader import LatentBatch
from mar.model.mar import MAR, UNCONDITIONAL
from mar.model.masking import draw_mask_ratio, masked_count, split_by_mask
from mar.model.tokens import gather_tokens, patchify
from mar.random import make_generator
from mar.tokenizer import Posterior, Tokenizer
from mar.tokenizer.base import LatentMoments
from mar.training import trainer
from mar.training.loss import sample_randomness
from mar.training.trainer import Run

Clock = dict[str, float]
"""Seconds: `wall`, and `cpu` of all of the process's threads."""


class Ours:
    """Our step, as in `mar train`."""

    def __init__(self, config: TrainConfig, latents: Tensor, labels: Tensor) -> None:
        self.config, self.latents, self.labels = config, latents, labels
        folder = Path(tempfile.gettempdir(), "never-saved")
        self.model = MAR(config.model)
        self.run = Run(config, folder, None, NoTokenizer(), self.model, torch.device("cpu"))  # type: ignore[arg-type]
        moments = LatentMoments(latents, torch.zeros_like(latents))
        self.batch = LatentBatch(labels, torch.arange(len(labels)), (), moments)

    def step(self, number: int) -> None:
        self.run.progress.step = number  # the key of the mask ratio
        self.run.step(self.batch)

    def parts(self, number: int) -> dict[str, Clock]:
        """Measure the parts of a step; the head gets a detached copy of z."""
        run, config, times = self.run, self.config, Times()
        run.model.zero_grad()
        randomness = times("draws", lambda: sample_randomness(config.model, 0, number, range(config.batch)))
        masked, visible = split_by_mask(randomness.order, randomness.masked)
        tokens = patchify(self.latents, config.model.patch_size)
        labels = torch.where(randomness.drop_label, UNCONDITIONAL, self.labels)
        with trainer.autocast(run.device, config.precision):
            z = times("trunk", lambda: gather_tokens(run.model(tokens, labels, visible), masked))
        copy = z.detach().requires_grad_()

        def head() -> None:
            with trainer.autocast(run.device, config.precision):
                x0 = gather_tokens(tokens, masked)
                loss = run.model.head.loss(x0, copy, randomness.timestep, randomness.noise).mean()
            loss.backward()

        times("head", head)
        times("trunk", lambda: z.backward(copy.grad))
        times("clipping", lambda: nn.utils.clip_grad_norm_(run.model.parameters(), config.clip))
        times("optimizer", lambda: [optimizer.step() for optimizer in run.optimizers])
        times("average", lambda: run.ema.update(run.model, number))
        return times


class Theirs:
    """The reference's step."""

    def __init__(self, config: TrainConfig, latents: Tensor, labels: Tensor) -> None:
        self.config, self.latents, self.labels = config, latents, labels
        self.reference = ReferenceStep(config)
        self.model = self.reference.model

    def step(self, number: int) -> None:
        self.reference(self.latents, self.labels, number)

    def parts(self, number: int) -> dict[str, Clock]:
        """Measure the parts of a step, as `Ours.parts` does."""
        model, times, masked = self.model, Times(), masked_count_of_step(self.config.model, number)
        model.zero_grad()
        tokens = patchify(self.latents, self.config.model.patch_size)
        mask = times("draws", lambda: model.draw_mask(len(tokens), masked))
        z = times("trunk", lambda: model.trunk(tokens, model.embed_labels(self.labels), mask))
        copy = z.detach().requires_grad_()
        times("head", lambda: model.head_loss(tokens, copy, mask).backward())
        times("trunk", lambda: z.backward(copy.grad))
        times("clipping", lambda: nn.utils.clip_grad_norm_(model.parameters(), self.config.clip))
        times("optimizer", self.reference.optimizer.step)
        times("average", self.reference.update_average)
        return times


class NoTokenizer(Tokenizer):
    """Tokenizer of KL-16's sizes that only cached latents need."""

    def __init__(self) -> None:
        super().__init__(3, 16, 16, 0.0, 1.0)

    def encode(self, images: Tensor) -> Posterior:
        raise AssertionError("latents are cached")

    def decode(self, latents: Tensor) -> Tensor:
        raise AssertionError("no image is decoded")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoTokenizer:
        raise AssertionError("it is not saved")


class Times(dict[str, Clock]):
    """Seconds by part, summed over the calls of one name."""

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        result: list[Any] = []
        seconds = clocked(lambda: result.append(call()))
        before = self.get(name, {"wall": 0.0, "cpu": 0.0})
        self[name] = {kind: before[kind] + seconds[kind] for kind in seconds}
        return result[0]


def clocked(call: Callable[[], Any]) -> Clock:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def mean_steps(model: ModelConfig, count: int) -> list[int]:
    """Return numbers of steps whose mask ratio is the mean one, up to a token."""
    mean = model.tokens * (1 + model.mask_ratio_min) / 2 + 0.5
    return [k for k in range(100 * count) if abs(masked_count_of_step(model, k) - mean) <= 1.5][:count]


def masked_count_of_step(model: ModelConfig, number: int) -> int:
    return masked_count(model.tokens, draw_mask_ratio(model.mask_ratio_min, make_generator(0, number)))
