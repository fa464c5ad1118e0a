"""What is trained, as the loop sees it: a model, what learns it, and how far it has come.

The training loop: everything about step k follows from (seed, k), so that a run stopped and resumed is the same run.

A run is a folder: state-* (to go on from), model.safetensors (EMA) and model-raw.safetensors (to use), run.json (the
config), log.jsonl, tensorboard/, samples/.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from mar import distributed
from mar.checkpoint.files import write_text
from mar.checkpoint.run_state import RunState
from mar.config import ConfigError, TrainConfig, to_dict
from mar.data.images import Source, Transform
from mar.data.latent_cache import LatentSource
from mar.data.loader import Batch, ImageBatch, LatentBatch, batches, data_state, resume_data
from mar.data.splits import HELD_OUT
from mar.data.stream import StreamSource
from mar.model.mar import MAR
from mar.random import make_generator
from mar.tokenizer import Tokenizer
from mar.tokenizer.base import fingerprint, to_posterior
from mar.training import parallelize
from mar.training.ema import EMA
from mar.training.log import Log
from mar.training.loss import DiffusionLoss, sample_randomness
from mar.training.optim import LRScheduleConfig, learning_rate, make_optimizers

CALLBACKS_DONE_FILE = "watched"
"""A file in a run's folder that says after how many images its hooks last came to their end."""


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    images: int = 0
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Time spent in steps, over all sessions of the run."""
    watched: int = 0
    """Images up to which all hooks that were due have come to their end."""

    @classmethod
    def resumed(cls, folder: Path, saved: dict[str, Any]) -> Progress:
        """That of a saved state, and what was done after it was saved: hooks of the step that came with it."""
        progress, note = cls(**saved), folder / CALLBACKS_DONE_FILE
        watched = int(note.read_text(encoding="utf-8")) if note.is_file() else 0
        progress.watched = max(progress.watched, min(watched, progress.images))
        return progress


@dataclass(frozen=True)
class Callback:
    """What a run does now and then beside learning; it must not change the run."""

    every: int
    """Images between calls; 0 never calls."""
    call: Callable[[Any], object]
    """Gets the run."""


@runtime_checkable
class TrainLoopConfig(LRScheduleConfig, Protocol):
    """The settings of a run that `train` follows (`TrainConfig` tells what they are)."""

    @property
    def clip(self) -> float: ...
    @property
    def log_every(self) -> int: ...
    @property
    def save_every(self) -> int: ...


@runtime_checkable
class Trainer(Protocol):
    """What `train` brings to its end, step by step."""

    folder: Path
    progress: Progress
    hooks: list[Callback]
    parts: dict[str, float]
    """What else the last step has to tell the log."""
    ema: EMA
    optimizers: tuple[torch.optim.Optimizer, ...]

    @property
    def config(self) -> TrainLoopConfig: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def finished(self) -> bool:
        """Whether it has come to its end."""
        ...

    def batches(self) -> Iterator[Batch]:
        """From where the run has come to, without end."""
        ...

    def step(self, batch: Batch) -> tuple[float, float]:
        """Learns from a batch by `descend`; this process's loss, and the gradient's norm."""
        ...

    def save(self) -> None:
        """Stores the state."""
        ...


__all__ = ["Callback", "Progress", "Run", "Trainer", "TrainingError", "optimizer_step", "posterior_noise", "train"]

MAX_NONFINITE_STEPS = 50
"""Non-finite steps in a row after which a run stops."""

_POSTERIOR = 2  # key of the posterior's noise, beside those of the loss's draws


class TrainingError(ValueError):
    """A run that can't go on: one line that says why and what to do."""


@dataclass
class Run:
    """One training run: its parts, and its state as one dict."""

    config: TrainConfig
    folder: Path
    source: Source | LatentSource | StreamSource
    tokenizer: Tokenizer
    model: MAR
    device: torch.device
    held_out: Source | LatentSource | None = None
    """What it is validated on."""
    progress: Progress = field(default_factory=Progress)
    hooks: list[Callback] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    told: str | None = None
    """What the data has to say of being gone on with."""
    enough: bool = False
    """Whether it ends before its length is reached (`mar.training.early_stopping`)."""

    def __post_init__(self) -> None:
        self.tokenizer.to(self.device).eval()
        self.loss = DiffusionLoss(self.model.to(self.device).train())
        self.ema = EMA(self.model, self.config.ema, self.config.ema_others, warm_up=self.config.ema_warmup)
        self.forward = parallelize.parallelize(self.loss, self.ema.models.values(), self.config, self.device)
        self.optimizers = make_optimizers(self.model, self.config)
        self.store = RunState(self.folder, to_dict(self.config))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the run needs to go on."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            **{name: model.state_dict() for name, model in self.ema.others.items()},
            "optimizer": get_optimizer_state_dict(self.model, self.optimizers),
            "tokenizer": self.tokenizer.fitted_state(),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "progress": vars(self.progress).copy(),
            "data": data_state(self.source),
        }

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Of all of its tokenizer that is not taken from the pictures, and does not change."""
        return fingerprint(self.tokenizer, without=self.tokenizer.fitted_state())

    def resume(self) -> bool:
        """Goes on from the folder's latest state; False where there is none.

        ConfigError where its latents were another tokenizer's.
        """
        state = self.state_dict()
        if not self.store.load(state):
            return False
        self._check_tokenizer(state.get("tokenizer_fingerprint"))
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        for name, model in self.ema.others.items():
            model.load_state_dict(state[name])
        set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"])
        self.tokenizer.load_fitted_state(state["tokenizer"])
        self.progress = Progress.resumed(self.folder, state["progress"])
        by_position = self.config.hold_out > 0 and not (self.folder / HELD_OUT).is_file()
        self.told = resume_data(self.source, state.get("data"), self.progress.images, split_by_position=by_position)
        return True

    def _check_tokenizer(self, saved: str | None) -> None:
        """`saved`: the fingerprint in a state; None where an older version saved none."""
        own = self.tokenizer_fingerprint
        if saved is not None and saved != own:
            raise ConfigError(
                f"{self.folder} holds a run of another tokenizer's latents ({saved[:12]}) than {self.config.tokenizer} "
                f"is now ({own[:12]}); put that one back to go on, or begin another run in another folder"
            )

    def save(self) -> None:
        """Stores the state."""
        self.store.save(self.progress.images, self.state_dict(), self.config.keep)

    @property
    def transform(self) -> Transform:
        """What is done to pictures first."""
        return Transform(self.tokenizer.image_size(self.config.model.grid), self.tokenizer.image_channels)

    @property
    def weights(self) -> dict[str, nn.Module]:
        """What can be drawn with: `ema`, the `raw` weights, and averages of other decays, as `ema-0.9999`."""
        return {"ema": self.ema.model, "raw": self.model, **self.ema.others}

    @property
    def finished(self) -> bool:
        """Whether it has come to its end."""
        return self.enough or self.progress.images >= self.config.images

    def batches(self) -> Iterator[Batch]:
        """This process's batches, from where the run has come to."""
        return _batches(self)

    def step(self, batch: Batch) -> tuple[float, float]:
        """Learns from a batch. Returns this process's loss, and the gradient's norm."""
        return step(self, batch)


def train(run: Trainer, log: Log) -> bool:
    """Trains to the end of the run. Returns False where Ctrl-C or SIGTERM stopped it: the state is saved then."""
    config, progress = run.config, run.progress
    loader = run.batches()
    window: list[float] = []
    steps, skipped = progress.step, progress.skipped_steps
    with _stop_signals() as stopped:
        _run_callbacks(run)  # which a killed session may have left undone
        since, begun = progress.images, time.monotonic()
        while not run.finished and not distributed.any_rank(bool(stopped)):
            tick = time.monotonic()
            before = progress.images
            batch = next(loader)
            log.skipped_pictures.update(batch.skipped)
            loss, norm = run.step(batch)
            progress.seconds += time.monotonic() - tick
            if math.isfinite(loss):
                window.append(loss)
            log.advance(progress.images, loss)
            if progress.step % config.log_every == 0 or progress.images >= config.images:
                seconds = time.monotonic() - begun
                log.write(
                    progress.images,
                    step=progress.step,
                    loss=_mean_over_ranks(window),
                    gradient_norm=norm,
                    lr=learning_rate(config, before),
                    images_per_second=(progress.images - since) / seconds,
                    skipped_steps=progress.skipped_steps,
                    skipped_share=(progress.skipped_steps - skipped) / (progress.step - steps),
                    seconds=round(progress.seconds, 1),
                    **run.parts,
                )
                window, since, begun = [], progress.images, time.monotonic()
                steps, skipped = progress.step, progress.skipped_steps
            if _due(before, progress.images, config.save_every):
                run.save()
            if _run_callbacks(run):
                begun, since = time.monotonic(), progress.images
    run.save()
    return run.finished


def _run_callbacks(run: Trainer) -> bool:
    """Calls the hooks that have become due since this was last done; whether any had."""
    progress = run.progress
    due = [hook for hook in run.hooks if _due(progress.watched, progress.images, hook.every)]
    for hook in due:
        hook.call(run)
    progress.watched = progress.images
    if due and distributed.rank() == 0:
        write_text(run.folder / CALLBACKS_DONE_FILE, f"{progress.watched}\n")
    return bool(due)


def _mean_over_ranks(losses: list[float]) -> float:
    """Over all processes, of which each has the losses of its own pictures."""
    shares = distributed.all_gather_object((math.fsum(losses), len(losses)))
    total, count = (math.fsum(values) for values in zip(*shares, strict=True))
    return total / count if count else math.nan


def _due(before: int, now: int, every: int) -> bool:
    return every > 0 and before // every < now // every


def step(run: Run, batch: Batch) -> tuple[float, float]:
    """One step of the optimizers. Returns this process's loss, and the norm."""
    seed = make_generator(run.config.seed, 3, run.progress.step, distributed.rank()).initial_seed()
    torch.manual_seed(seed)  # dropout
    return forward_backward(run, batch), optimizer_step(run)


def optimizer_step(run: Trainer) -> float:
    """One step of the optimizers, or none where the gradient is not finite. Returns its norm.

    All processes have the same gradient, and so take the same steps.
    """
    config, progress = run.config, run.progress
    rate = learning_rate(config, progress.images)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    norm = parallelize.full_tensor(nn.utils.clip_grad_norm_(run.model.parameters(), config.clip)).item()
    finite = math.isfinite(norm)
    if finite:
        for optimizer in run.optimizers:
            optimizer.step()
    progress.step += 1
    progress.images += config.batch
    if finite:
        run.ema.update(run.model, progress.step - progress.skipped_steps)
    _count(progress, finite)
    return norm


def forward_backward(run: Run, batch: Batch) -> float:
    """Leaves the gradient of the mean loss over the whole batch in the parameters; returns that of this share of it."""
    config, count = run.config, run.config.accumulate
    run.model.zero_grad(set_to_none=True)
    latents, labels = encode(run, batch), batch.labels.to(run.device)
    parts = zip(latents.chunk(count), labels.chunk(count), batch.positions.chunk(count), strict=True)
    total = latents.new_zeros(())
    for number, (part, classes, positions) in enumerate(parts, 1):
        draws = sample_randomness(run.model.config, config.seed, run.progress.step, positions.tolist()).to(run.device)
        with parallelize.grad_sync(run.forward, last=number == count):
            with autocast(run.device, config.precision):
                loss: Tensor = run.forward(part, classes, draws) / count
            loss.backward()
        total += loss.detach()
    return total.item()


def _count(progress: Progress, finite: bool) -> None:
    progress.skipped_steps += not finite
    progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
    if progress.skipped_in_a_row >= MAX_NONFINITE_STEPS:
        raise TrainingError(
            f"the loss was not finite for {MAX_NONFINITE_STEPS} steps in a row, up to image {progress.images:,}: the "
            "learning rate is too high for this batch, or the latents are not normalised. Take a lower --lr and "
            "another --out, with --init and this folder to start from the weights it last wrote; the saved states are "
            "untouched"
        )


def encode(run: Run, batch: Batch) -> Tensor:
    """images or their cached moments -> latents, drawn from the tokenizer's posterior with noise keyed by position."""
    return to_latents(run.tokenizer, batch, run.config.seed, run.device)


@torch.no_grad()
def to_latents(tokenizer: Tokenizer, batch: Batch, seed: int, device: torch.device) -> Tensor:
    """images or their cached moments -> latents on `device`, as for `encode`."""
    if isinstance(batch, LatentBatch):
        posterior = to_posterior(tokenizer, batch.moments.to(device))
    else:
        assert isinstance(batch, ImageBatch)
        posterior = tokenizer.encode(batch.images.to(device))
    if tokenizer.deterministic:
        return posterior.mean
    return posterior.sample(posterior_noise(posterior.mean, seed, batch.positions))


def posterior_noise(like: Tensor, seed: int, positions: Tensor) -> Tensor:
    """Standard normal noise for latents (n, c, h, w) such as `like`, each keyed by its place in the order."""
    generators = (make_generator(seed, _POSTERIOR, position) for position in positions.tolist())
    return torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in generators]).to(like.device)


def autocast(device: torch.device, precision: str) -> Any:
    """bf16: matrix products in bfloat16 with float32 weights; fp32: nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _batches(run: Run) -> Iterator[Batch]:
    config = run.config
    return batches(
        run.source, run.transform,
        batch=config.batch, seed=config.seed, start=run.progress.images, rank=distributed.rank(),
        world=distributed.world_size(), workers=config.workers, flip=config.flip, shift=config.shift,
    )  # fmt: skip


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM arrive: the step is finished first. A second Ctrl-C stops at once."""
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
