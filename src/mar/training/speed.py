"""Measure how fast a run trains on this machine, before it begins.

The steps are real ones, of a run that is thrown away: data and state of the run to come stay as they are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mar import distributed
from mar.config import TrainConfig
from mar.config.tokenizer import TokenizerTrainConfig
from mar.data.captions import Captions
from mar.data.conditions import CaptionReader, WordReader
from mar.data.images import Example, Transform, UnreadableImage
from mar.data.loader import Batch, LatentBatch
from mar.data.splits import hold_out, stratified_indices
from mar.model.conditions import NO_CONDITION, drop_condition
from mar.model.mar import MAR
from mar.tokenizer.base import LatentMoments
from mar.tokenizer.pca import PCATokenizer
from mar.training.callbacks import sample_share, take_snapshot
from mar.training.tokenizer import OBJECTIVES, TokenizerRun
from mar.training.trainer import GRID_CLASSES, GRID_ROWS, Run, TrainingRun

WARM_UP_STEPS = 2
"""Steps before the clock starts: kernels are chosen and memory is allocated in the first ones."""
MIN_STEPS = 3
"""Steps measured, at least."""
IMAGES_READ = 16
"""Images whose reading is measured, at most."""


@dataclass(frozen=True)
class _NoImages:
    """An empty source with class names, and captions for sample grids."""

    classes: tuple[str, ...]
    captions: Captions = ()
    flips: bool = False

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Example:
        raise IndexError(index)


class _RandomLatents(Run):
    """A run on one batch of random latents, again and again."""

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's share of the batch without end."""
        model, count = self.config.model, self.config.batch // distributed.world_size()
        labels = torch.arange(count) % model.classes if model.classes else torch.full((count,), -1)
        latents = torch.randn(count, model.channels, *model.grid)
        captions = ("a",) * count if self.captions else ()
        yield from repeat(LatentBatch(labels, torch.arange(count), (), LatentMoments(latents, None), captions=captions))


class _RandomText(CaptionReader):
    """Reads every caption as random features of its own length."""

    def __init__(self, length: int, width: int) -> None:
        self.length, self.width = length, width

    def embed(self, captions: Sequence[str]) -> Float[Tensor, "n w c_and_1"]:
        """Return half a buffer of features for each caption; NO_CONDITION for ""."""
        rows = torch.full((len(captions), self.length, self.width + 1), float(NO_CONDITION))
        rows[:, : self.length // 2 + 1] = 1
        rows[:, : self.length // 2 + 1, :-1].normal_()
        return drop_condition(rows, torch.tensor([not caption for caption in captions]))


def tokenizer_speed(
    config: TokenizerTrainConfig, device: torch.device, seconds: float, load_network: Callable[[], Any]
) -> float:
    """Return the images per second of a tokenizer's training.

    Args:
        config: of the run.
        device: where it will train.
        seconds: to measure.
        load_network: loads an EfficientNet-Lite0 for the perceptual loss.
    """
    config = config.resolved()
    source, held_out = hold_out(config.data, None)
    module = OBJECTIVES[config.kind].make(config)
    network = load_network() if config.perceptual else None
    with tempfile.TemporaryDirectory() as folder:
        run = TokenizerRun(config, Path(folder), source, held_out, module, device, network)
        return images_per_second(run, seconds)


def reading_seconds(config: TokenizerTrainConfig) -> float:
    """Return the mean time to read an image of a tokenizer's data."""
    config = config.resolved()
    source, _ = hold_out(config.data, None)
    transform = Transform(config.size, config.channels_in, config.upright)
    indices, begun = stratified_indices(len(source), IMAGES_READ).tolist(), time.monotonic()
    for index in indices:
        with suppress(UnreadableImage):
            transform(source[index].image)
    return (time.monotonic() - begun) / len(indices)


@dataclass(frozen=True)
class ModelSpeed:
    """Speed of a model in training and drawing."""

    images_per_second: float
    """In training, of all ranks together."""
    grid_seconds: float
    """Time to draw the sample grids of a snapshot; 0 if it was not measured."""


def model_speed(config: TrainConfig, device: torch.device, seconds: float, *, draw: bool = False) -> ModelSpeed:
    """Measure a model's training on random latents; called by all ranks.

    Args:
        config: of the run.
        device: where it will train.
        seconds: to measure.
        draw: also measure the time of its sample grids.
    """
    model = config.model
    stride = next(stride for stride in range(1, model.channels + 1) if 3 * stride**2 >= model.channels)
    tokenizer = PCATokenizer(3, stride, model.channels)
    classes = tuple(map(str, range(model.classes)))
    reader: CaptionReader | None = None
    if model.words:
        reader = WordReader([chr(ord("a") + i) for i in range(model.words)], model.buffer_size)
    elif model.text_width:
        reader = _RandomText(model.buffer_size, model.text_width)
    with tempfile.TemporaryDirectory() as folder:
        source = _NoImages(classes, () if reader is None else (("a",),) * (GRID_ROWS * GRID_CLASSES))
        run = _RandomLatents(config, Path(folder), source, tokenizer, MAR(model), device, captions=reader)
        speed, grid_seconds = images_per_second(run, seconds), 0.0
        if draw:
            begun = time.monotonic()
            snapshot = take_snapshot(run)
            rank, world = distributed.rank(), distributed.world_size()
            for weights in snapshot.weights:
                sample_share(snapshot.drawing_pipeline(weights), snapshot.asks, rank, world, allow_broken=True)
            grid_seconds = time.monotonic() - begun
    return ModelSpeed(*distributed.all_gather_object((speed, grid_seconds))[0])  # rank 0 decides for all


def images_per_second(run: TrainingRun, seconds: float) -> float:
    """Train a run for some seconds; return its images per second."""
    loader = run.batches()
    for _ in range(WARM_UP_STEPS):
        run.step(next(loader))
    steps, begun = 0, time.monotonic()
    while steps < MIN_STEPS or distributed.any_rank(time.monotonic() - begun < seconds):
        run.step(next(loader))
        steps += 1
    return steps * run.config.batch / (time.monotonic() - begun)
