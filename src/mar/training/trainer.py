"""Train a model: the loop, one step, the state of a run.

Everything random in step k follows from (seed, k), so a resumed run equals one that was never stopped.
A step: `train` calls `Run.step`, that is `Run.forward_backward` and `TrainingRun.optimizer_step`. The loss is
`mar.training.loss.DiffusionLoss`, which calls the model, then `head.loss`.

A run is a folder:

- state-*: saved states to resume from (`mar.checkpoint.run_state`);
- model.safetensors: the EMA weights, and model-raw.safetensors: the weights of the last step;
- run.json: the configuration;
- log.jsonl and tensorboard/: the log (`mar.training.log`);
- index.html: a page to watch the run (`mar.training.page`);
- samples/: sample grids.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from mar import distributed
from mar.backends import configure
from mar.checkpoint import checksums
from mar.checkpoint.run_state import RunState
from mar.config import ConfigError, ModelConfig, TrainConfig, to_dict
from mar.config.tokenizer import TokenizerTrainConfig
from mar.data.captions import captions_of
from mar.data.conditions import CaptionReader, ClassReader, ConditionReader
from mar.data.images import Source, Transform
from mar.data.latent_cache import LatentSource
from mar.data.loader import Batch, ImageBatch, LatentBatch, batches, data_digest, data_state, resume_data
from mar.data.splits import HELD_OUT, stratified_indices
from mar.data.stream import StreamSource
from mar.data.workers import WaitEnded, end_wait
from mar.model.mar import MAR
from mar.random import make_generator
from mar.tokenizer import Tokenizer
from mar.tokenizer.base import fingerprint, to_posterior
from mar.training import parallelize
from mar.training.ema import EMA
from mar.training.log import Log
from mar.training.loss import DiffusionLoss, StepRandomness, sample_randomness
from mar.training.optim import learning_rate, make_optimizers
from mar.training.page_html import Command, StageKind, draw_commands

WAIT_AFTER_SIGNAL_S = 5.0
"""Seconds that a run told to end waits for its next batch."""
MAX_NONFINITE_STEPS = 50
"""Stop a run after so many non-finite steps in a row."""
GRID_CLASSES = 10
"""A sample grid has a column for each of at most so many classes."""
GRID_ROWS, GRID_UNCONDITIONAL = 4, 16
"""A grid has so many images of each class; so many images if there are no classes."""
logger = logging.getLogger(__name__)
CALLBACKS_DONE_FILE = "watched"
"""File in a run's folder: images up to which all due callbacks have finished."""
POSTERIOR_NOISE = "posterior_noise"
"""Name of the posterior's noise among the draws of a batch."""
# Keys of random streams, beside those of the loss (`sample_randomness`).
_POSTERIOR_STREAM, _DROPOUT_STREAM, _LEVEL_STREAM = 2, 3, 5


class TrainingError(ValueError):
    """A run can't go on. The message is one line: the reason, and a remedy."""


@dataclass
class Progress:
    """Steps, images and seconds that a run has trained for."""

    step: int = 0
    images: int = 0
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Time spent in steps, over all sessions of the run."""
    callbacks_done: int = 0
    """Images up to which all due callbacks have finished."""

    def count_step(self, images: int, finite: bool) -> None:
        """Count a step over `images` images, skipped if it was not finite."""
        self.step += 1
        self.images += images
        self.skipped_steps += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1

    def state_dict(self) -> dict[str, Any]:
        """Return the counts by their names on disk."""
        counts = vars(self).copy()
        counts["watched"] = counts.pop("callbacks_done")  # the name in files, since version 0.1
        return counts

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """Read what `state_dict` returned."""
        counts = dict(state)
        counts["callbacks_done"] = counts.pop("watched", 0)
        return cls(**counts)


@dataclass(frozen=True)
class Callback:
    """A function called every `every` images, which must not change the run."""

    every: int
    """Images between calls; 0 never calls."""
    call: Callable[[Any], object]
    """Gets the run."""


class StepResult(NamedTuple):
    """Result of one training step."""

    loss: float
    """Mean loss of this rank's images."""
    gradient_norm: float
    """Norm of the global gradient before clipping."""


class TrainingRun(ABC):
    """Base of all runs: model, optimizers, EMA, and their state on disk.

    Subclasses set `model`, `ema` and `optimizers`, and say how to read batches and take a step.
    """

    config: TrainConfig | TokenizerTrainConfig
    model: nn.Module
    ema: EMA
    optimizers: tuple[torch.optim.Optimizer, ...]
    stage: StageKind
    """The run's name on its page."""
    source: Source | LatentSource | StreamSource
    data_note: str | None = None
    """Message for people about how the data was resumed."""
    moved_from: str | None = None
    """Place of the data when the run was saved, if it is gone from there."""
    grid_classes: tuple[str, ...] = ()
    """Names of the columns of sample grids."""

    def __init__(self, config: TrainConfig | TokenizerTrainConfig, folder: Path, device: torch.device) -> None:
        configure(device, tf32=isinstance(config, TrainConfig) and config.tf32)
        self.config, self.folder, self.device = config, folder, device
        self.progress = Progress()
        self.callbacks: list[Callback] = []
        self.extra_metrics: dict[str, float] = {}
        """Further metrics of the last step, for the log."""
        self.should_stop = False
        """Set to end the run before its length is reached (`mar.training.early_stopping`)."""
        self.store = RunState(folder, to_dict(config))

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """Yield this rank's batches without end, from the current position."""

    @abstractmethod
    def step(self, batch: Batch) -> StepResult:
        """Take one training step, by `optimizer_step`."""

    @abstractmethod
    def next_commands(self) -> tuple[Command, ...]:
        """Return commands that use the run's result."""

    @property
    def finished(self) -> bool:
        """True if the run has reached its length, or should stop."""
        return self.should_stop or self.progress.images >= self.config.images

    def optimizer_step(self) -> float:
        """Update weights and EMA, unless the gradient is not finite.

        All ranks have the same gradient, so all take or skip the same steps. Returns the gradient's norm.
        """
        config, progress = self.config, self.progress
        lr = learning_rate(config, progress.images)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

        # weights
        norm = parallelize.full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)).item()
        finite = math.isfinite(norm)
        if finite:
            for optimizer in self.optimizers:
                optimizer.step()
        progress.count_step(config.batch, finite)

        # EMA
        if finite:
            self.ema.update(self.model, progress.step - progress.skipped_steps)
        elif progress.skipped_in_a_row >= MAX_NONFINITE_STEPS:
            raise TrainingError(
                f"the loss was not finite for {MAX_NONFINITE_STEPS} steps in a row, up to image {progress.images:,}: "
                "the learning rate is too high for this batch, or the latents are not normalized. Take a lower --lr "
                "and another --out, with --init and this folder to start from the weights it last wrote; the saved "
                "states are untouched"
            )
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return all that the run needs to resume."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizers),
            "progress": self.progress.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"])
        self.progress = Progress.from_state(state["progress"])

    @cached_property
    def data_digest(self) -> str | None:
        """Hash of the images' names and sizes."""
        return data_digest(self.source)

    def save(self) -> None:
        """Save the state to the run's folder."""
        self.store.save(self.progress.images, self.state_dict(), self.config.keep)

    def resume(self) -> bool:
        """Load the folder's latest state. Returns False if there is none."""
        state = self.state_dict()
        if not self.store.load(state):
            return False
        self.load_state_dict(state)
        # callbacks run after a state is saved, so the file may be ahead of it
        progress = self.progress
        progress.callbacks_done = max(progress.callbacks_done, min(self._read_callbacks_done(), progress.images))
        return True

    def _read_callbacks_done(self) -> int:
        """Read the images seen when callbacks ran last; 0 without a file that can be read."""
        path = self.folder / CALLBACKS_DONE_FILE
        try:
            saved = checksums.read_json(path)
            return int(saved["images"] if isinstance(saved, dict) else saved)  # earlier versions wrote the number alone
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
            logger.warning("%s can't be read (%s); what it is about may be done again", path, error)
            return 0

    def run_callbacks(self) -> bool:
        """Call the callbacks that are due since the last time. Returns whether there were any."""
        progress = self.progress
        due = [c for c in self.callbacks if _is_due(c.every, progress.callbacks_done, progress.images)]
        for callback in due:
            callback.call(self)
        progress.callbacks_done = progress.images
        if due and distributed.rank() == 0:
            checksums.write_json(self.folder / CALLBACKS_DONE_FILE, {"images": progress.callbacks_done})
        return bool(due)


class Run(TrainingRun):
    """Training of a MAR on images or cached latents.

    Args:
        config: all settings.
        folder: where the run keeps its files.
        source: what it learns from.
        tokenizer: images -> latents; moved to `device`.
        model: trained in place.
        device: where to train.
        held_out: what it is validated on.
        captions: reads captions, for a model that draws from words.
    """

    config: TrainConfig
    model: MAR
    stage = "model"

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        source: Source | LatentSource | StreamSource,
        tokenizer: Tokenizer,
        model: MAR,
        device: torch.device,
        held_out: Source | LatentSource | None = None,
        captions: CaptionReader | None = None,
    ) -> None:
        super().__init__(config, folder, device)
        self.source, self.held_out = source, held_out
        self.tokenizer = tokenizer.to(device).eval()
        self.model = model.to(device).train()
        self.ema = EMA(model, config.ema, config.ema_others, warm_up=config.ema_warmup)
        self.loss = parallelize.parallelize(DiffusionLoss(model), self.ema.models.values(), config, device)
        """The loss module, wrapped for DDP or FSDP."""
        self.optimizers = make_optimizers(model, config)
        self.captions = captions
        self.reader: ConditionReader = captions or ClassReader(source.classes, config.model.classes)
        self.grid_classes = tuple(source.classes[:GRID_CLASSES]) if config.model.classes else ()

    @property
    def transform(self) -> Transform:
        """Crop and channels of the images the tokenizer gets; held-out ones are turned upright if cached ones were."""
        cached = self.source.manifest if isinstance(self.source, LatentSource) else None
        upright = self.config.upright if cached is None else cached.upright
        return Transform(self.tokenizer.image_size(self.config.model.grid), self.tokenizer.image_channels, upright)

    @property
    def weights(self) -> dict[str, nn.Module]:
        """Models to sample from: `ema`, `raw`, other decays as `ema-0.9999`."""
        return {"ema": self.ema.model, "raw": self.model, **self.ema.others}

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's batches without end, from the current position."""
        config = self.config
        return batches(
            self.source, self.transform,
            batch=config.batch, seed=config.seed, start=self.progress.images, rank=distributed.rank(),
            world=distributed.world_size(), workers=config.workers, flip=config.flip_of_data, shift=config.shift,
            balance=config.balance, draw=self._draw_ahead() if config.workers else None, pin=self.device.type == "cuda",
        )  # fmt: skip

    def _draw_ahead(self) -> DrawAhead:
        config, progress = self.config, self.progress
        posterior = not self.tokenizer.deterministic
        return DrawAhead(config.model, config.seed, config.batch, progress.step, progress.images, posterior)

    def step(self, batch: Batch) -> StepResult:
        """Take one training step."""
        generator = make_generator(self.config.seed, _DROPOUT_STREAM, self.progress.step, distributed.rank())
        torch.manual_seed(generator.initial_seed())  # dropout
        return StepResult(self.forward_backward(batch), self.optimizer_step())

    def next_commands(self) -> tuple[Command, ...]:
        """Return commands that draw from the model."""
        return draw_commands(self.folder)

    def forward_backward(self, batch: Batch) -> float:
        """Compute the gradient of the mean loss over the global batch. Returns this rank's loss."""
        config, count = self.config, self.config.accumulate
        self.model.zero_grad(set_to_none=True)
        latents, condition = self.encode(batch), self.read_condition(batch).to(self.device, non_blocking=True)
        chunks = [tensor.chunk(count) for tensor in (latents, condition, torch.arange(len(latents)))]
        total = latents.new_zeros(())
        for i, (x, y, rows) in enumerate(zip(*chunks, strict=True)):
            draws = self._draws(batch, slice(int(rows[0]), int(rows[-1]) + 1))
            with parallelize.grad_sync(self.loss, last=i == count - 1):
                with autocast(self.device, config.precision):
                    loss: Tensor = self.loss(x, y, draws.to(self.device)) / count
                loss.backward()
            total += loss.detach()
        return total.item()

    def _draws(self, batch: Batch, rows: slice) -> StepRandomness:
        """Return the random numbers of a micro-batch: those that a worker drew, or the same ones drawn now."""
        step = self.progress.step
        if batch.draws and int(batch.draws["step"][0]) == step:
            return StepRandomness.from_rows({name: values[rows] for name, values in batch.draws.items()})
        return sample_randomness(self.model.config, self.config.seed, step, batch.positions[rows].tolist())

    def encode(self, batch: Batch) -> Tensor:
        """Encode images, or read their cached moments -> latents."""
        return to_latents(self.tokenizer, batch, self.config.seed, self.device)

    def read_condition(self, batch: Batch) -> Tensor:
        """Read the class numbers or the captions of a batch."""
        return self.reader.of_data(batch.labels, batch.captions)

    @cached_property
    def grid_conditions(self) -> list[int | str | None]:
        """Class numbers or prompts of a sample grid's images, row by row."""
        if self.captions is None:
            shown = range(min(self.config.model.classes, GRID_CLASSES))
            return [label for _ in range(GRID_ROWS) for label in shown] or [None] * GRID_UNCONDITIONAL
        known = [each[0] for each in captions_of(self.source) if each]
        chosen = [known[index] for index in stratified_indices(len(known), GRID_ROWS * GRID_CLASSES)]
        prompts: list[int | str | None] = [*self.captions.readable(chosen)]
        return prompts or [None] * GRID_UNCONDITIONAL

    def state_dict(self) -> dict[str, Any]:
        """Return all that the run needs to resume."""
        return {
            **super().state_dict(),
            **{name: model.state_dict() for name, model in self.ema.others.items()},
            "tokenizer": self.tokenizer.fitted_state(),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "data": data_state(self.source, self.data_digest),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. ConfigError if tokenizer or classes have changed."""
        self._check_tokenizer(state.get("tokenizer_fingerprint"))
        super().load_state_dict(state)
        for name, model in self.ema.others.items():
            model.load_state_dict(state[name])
        self.tokenizer.load_fitted_state(state["tokenizer"])
        by_position = self.config.hold_out > 0 and not (self.folder / HELD_OUT).is_file()
        self.data_note = resume_data(
            self.source, state.get("data"), self.progress.images, digest=self.data_digest, moved_from=self.moved_from,
            split_by_position=by_position,
        )  # fmt: skip

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer without what was fitted to this run's images."""
        return fingerprint(self.tokenizer, without=self.tokenizer.fitted_state())

    def _check_tokenizer(self, saved: str | None) -> None:
        """Compare with the fingerprint in a state; older states have none."""
        current = self.tokenizer_fingerprint
        if saved is not None and saved != current:
            raise ConfigError(
                f"{self.folder} holds a run of another tokenizer's latents ({saved[:12]}) than {self.config.tokenizer} "
                f"is now ({current[:12]}); put that one back to resume, or begin another run in another folder"
            )


def train(run: TrainingRun, log: Log) -> bool:
    """Train to the end of the run, and save its state.

    Returns False if Ctrl-C or SIGTERM stopped it before the end.
    """
    config, progress = run.config, run.progress
    loader = run.batches()
    with _stop_signals() as signals:
        run.run_callbacks()  # those that a killed session did not finish
        window = _LogWindow(progress)
        while not run.finished and not distributed.any_rank(bool(signals)):
            # one step
            tick, before = time.monotonic(), progress.images
            try:
                batch = next(loader)
            except WaitEnded:
                if distributed.in_group():  # the others have begun the step, which can't be saved without this rank
                    raise TrainingError(
                        f"rank {distributed.rank()} was told to end, and waits for pictures: it ends at the last saved "
                        "state; the same command goes on"
                    ) from None
                break
            with distributed.explain_lost_rank():
                loss, norm = run.step(batch)
            progress.seconds += time.monotonic() - tick

            # log
            log.skipped_images.update(batch.skipped)
            log.advance(progress.images, loss)
            window.add(loss)
            if progress.step % config.log_every == 0 or progress.images >= config.images:
                log.write(
                    progress.images,
                    step=progress.step,
                    loss=window.mean_loss(),
                    gradient_norm=norm,
                    lr=learning_rate(config, before),
                    images_per_second=window.images_per_second(),
                    skipped_steps=progress.skipped_steps,
                    skipped_share=window.skipped_share(),
                    seconds=round(progress.seconds, 1),
                    **run.extra_metrics,
                )
                window = _LogWindow(progress)

            # save, sample, validate
            if _is_due(config.save_every, before, progress.images):
                run.save()
            if run.run_callbacks():
                window.restart_clock()
    run.save()
    log.finished = run.finished
    return run.finished


class _LogWindow:
    """The steps since the last line of the log."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.losses: list[float] = []
        self.first_step, self.first_skipped = progress.step, progress.skipped_steps
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measure speed from now on: callbacks don't count."""
        self.first_image, self.start = self.progress.images, time.monotonic()

    def add(self, loss: float) -> None:
        if math.isfinite(loss):
            self.losses.append(loss)

    def mean_loss(self) -> float:
        """Average over the images of all ranks."""
        by_rank = distributed.all_gather_object((math.fsum(self.losses), len(self.losses)))
        total, count = (math.fsum(values) for values in zip(*by_rank, strict=True))
        return total / count if count else math.nan

    def images_per_second(self) -> float:
        return (self.progress.images - self.first_image) / (time.monotonic() - self.start)

    def skipped_share(self) -> float:
        return (self.progress.skipped_steps - self.first_skipped) / (self.progress.step - self.first_step)


def _is_due(every: int, before: int, now: int) -> bool:
    """Return whether a multiple of `every` lies in (before, now]."""
    return every > 0 and before // every < now // every


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, so that the current step finishes. A second Ctrl-C stops at once.

    A step whose batch does not come within WAIT_AFTER_SIGNAL_S is not begun: WaitEnded.
    """
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, WAIT_AFTER_SIGNAL_S, 1)

    def end(number: int, frame: Any) -> None:
        end_wait()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    if hasattr(signal, "setitimer"):  # not on Windows
        previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, end)
    try:
        yield received
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


@torch.no_grad()
def to_latents(tokenizer: Tokenizer, batch: Batch, seed: int, device: torch.device) -> Tensor:
    """Sample latents from the tokenizer's posterior, with noise keyed by (seed, position).

    Args:
        tokenizer: encodes images, or knows the format of cached moments.
        batch: images, or their cached moments.
        seed: of the noise.
        device: of the result.
    """
    if isinstance(batch, LatentBatch):
        posterior = to_posterior(tokenizer, batch.moments.to(device))
    else:
        assert isinstance(batch, ImageBatch)
        posterior = tokenizer.encode(batch.images.to(device, non_blocking=True))
    if tokenizer.deterministic:
        return posterior.mean
    if POSTERIOR_NOISE in batch.draws:
        return posterior.sample(batch.draws[POSTERIOR_NOISE].to(device, non_blocking=True))
    return posterior.sample(posterior_noise(posterior.mean, seed, batch.positions))


def posterior_noise(mean: Tensor, seed: int, positions: Tensor) -> Tensor:
    """Draw standard normal noise like `mean`, keyed by (seed, position)."""
    return _posterior_noise(mean.shape[1:], seed, positions.tolist()).to(mean.device)


def _posterior_noise(shape: Sequence[int], seed: int, positions: Sequence[int]) -> Tensor:
    """Draw posterior noise of a shape for each image."""
    generators = (make_generator(seed, _POSTERIOR_STREAM, position) for position in positions)
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


@dataclass(frozen=True)
class DrawAhead:
    """Draws a step's random numbers from their keys, in the loader.

    A function for workers. Without workers, a step draws the same numbers itself.
    """

    model: ModelConfig
    seed: int
    """The run's."""
    batch: int
    """Images of a step, over all ranks."""
    step: int
    """Number of the step that begins at position `images`."""
    images: int
    posterior: bool
    """Draw noise of the tokenizer's posterior too."""

    def __call__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Draw for the images of one step, a row each."""
        step = self.step + (positions[0] - self.images) // self.batch
        rows = sample_randomness(self.model, self.seed, step, positions).rows()
        if self.posterior:
            shape = (self.model.channels, *self.model.grid)
            rows[POSTERIOR_NOISE] = _posterior_noise(shape, self.seed, positions)
        return {**rows, "step": torch.full((len(positions),), step)}


def latent_noise_level(seed: int, positions: Tensor) -> Tensor:
    """Draw a uniform number in [0, 1) for each image, keyed by (seed, position)."""
    generators = (make_generator(seed, _LEVEL_STREAM, position) for position in positions.tolist())
    return torch.stack([torch.rand((), generator=generator) for generator in generators])


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Run matrix products in bfloat16 if `precision` is bf16; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
