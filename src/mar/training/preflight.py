"""Estimate memory and disk of a run, and warn about doubtful settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mar import devices, distributed
from mar.checkpoint.files import require_room, size_text
from mar.checkpoint.store import model_shapes
from mar.config import ActivationCheckpointing, ModelConfig, TrainConfig
from mar.data.images import Source
from mar.data.latent_cache import LatentSource
from mar.data.loader import in_order
from mar.data.sources import open_source
from mar.data.splits import subset
from mar.data.stream import StreamSource
from mar.tokenizer.base import round_trip
from mar.training.log import Log
from mar.training.trainer import Run

# ---- memory and disk

# Floats that a step keeps for its backward pass, as measured (tests/unit/training), by activation checkpointing.
_BLOCK_FLOATS = {"none": 18, "selective": 10.5, "full": 1}
"""In a transformer block, per token and width; with `none`, two of them are for dropout."""
_HEAD_BLOCK_FLOATS = {"none": 10, "selective": 6, "full": 1}
"""In a block of the head, per row and width."""
_BF16_SHARE = {"none": 42 / 84, "selective": 24 / 58, "full": 1}
"""Share of a transformer block's bytes that bf16 keeps, counted on CUDA; inputs of blocks stay float32."""
_HEAD_BF16_SHARE = {"none": 24 / 43, "selective": 14 / 27, "full": 1}
"""The same of a block of the head."""
_HEAD_FLOATS = 8
"""In the head outside its blocks, per row and width."""
_RUN_FILES = ("state-*", ".mar-tmp-*", ".saving-*", "model*.safetensors")
"""Files of a run; hidden ones are leftovers of a killed one, removed before the next state is saved."""


@dataclass(frozen=True)
class Estimate:
    """Number of parameters, and sizes in bytes."""

    parameters: int
    weights: int
    """Weights, gradients, AdamW's two moments and the EMA, in float32."""
    activations: int
    """Activations that a step keeps for its backward pass."""
    state: int
    """One saved state."""
    disk: int
    """All files of the run together."""

    def text(self) -> str:
        """Describe it in one line."""
        return (
            f"{self.parameters / 1e6:.1f} million parameters; about {size_text(self.weights + self.activations)} of "
            f"memory ({size_text(self.activations)} of it for a batch), {size_text(self.disk)} of disk"
        )

    def check_disk(self, folder: Path) -> None:
        """Raise CheckpointError if a run's disk has too little room.

        Files that the folder already has will be replaced, but each only once its successor is written.
        """
        present = sum(_size(path) for pattern in _RUN_FILES for path in folder.glob(pattern))
        require_room(folder, max(self.disk - present, self.state + 4 * self.parameters))


def estimate(config: TrainConfig, processes: int = 1) -> Estimate:
    """Estimate what a run needs, in each of its processes."""
    parameters = sum(shape.numel() for shape in model_shapes(config.model).values())
    others = len(config.ema_others)
    state = 4 * (4 + others) * parameters  # weights, EMA, two moments
    micro_batch = config.batch // (processes * config.accumulate)
    exports = (3 if config.patience else 2) + others  # EMA and raw weights, and the best
    return Estimate(
        parameters=parameters,
        weights=4 * (5 + others) * parameters,
        activations=4 * activation_floats(config.model, micro_batch, config.activation_checkpointing, config.precision)
        + (2 * parameters if config.precision == "bf16" else 0),  # copies of the matrices in bfloat16
        state=state,
        disk=(config.keep + 1) * state + exports * 4 * parameters,  # one state more while it is being written
    )


def _size(path: Path) -> int:
    """Sum the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def activation_floats(
    model: ModelConfig, images: int, checkpointing: ActivationCheckpointing = "none", precision: str = "fp32"
) -> int:
    """Estimate the floats a step keeps, at the mean mask ratio.

    Args:
        model: is trained.
        images: of a micro-batch.
        checkpointing: of the blocks.
        precision: of the matrix products; of bf16 fewer floats are kept, counted as they are on CUDA.
    """
    half = precision == "bf16"
    block, head_block = float(_BLOCK_FLOATS[checkpointing]), float(_HEAD_BLOCK_FLOATS[checkpointing])
    recomputed, recomputed_head = float(_BLOCK_FLOATS["none"]), float(_HEAD_BLOCK_FLOATS["none"])
    if half:
        block, head_block = block * _BF16_SHARE[checkpointing], head_block * _HEAD_BF16_SHARE[checkpointing]
        recomputed, recomputed_head = recomputed * _BF16_SHARE["none"], recomputed_head * _HEAD_BF16_SHARE["none"]
    masked = round(model.tokens * (1 + model.mask_ratio_min) / 2)
    encoder_tokens = model.buffer_size + model.tokens - masked
    trunks = ((model.encoder, encoder_tokens), (model.decoder, model.buffer_size + model.tokens))
    rows = masked * model.head.batch_mul
    floats = sum(t.depth * tokens * t.width * block for t, tokens in trunks)
    floats += rows * model.head.width * (head_block * model.head.depth + _HEAD_FLOATS)
    if checkpointing == "none" and not half:  # dropout of attention weights: a byte each, a quarter of a float
        floats += sum(t.depth * t.num_heads * tokens**2 / 4 for t, tokens in trunks if model.attention_dropout)
    else:  # one block at a time is recomputed
        blocks = [tokens * t.width * recomputed for t, tokens in trunks]
        floats += max(*blocks, rows * model.head.width * recomputed_head)
    return round(images * floats)


# ---- warnings

ROUND_TRIP_IMAGES = 8
"""Number of images reconstructed to try a tokenizer."""
MIN_PSNR = 20.0
"""Decibels below which a tokenizer's reconstructions are too poor to train on."""
WIDE_TOKEN, WIDE_HEAD = 32, 1024
"""Tokens of more values than the one need a head of the other width: with 16 values FID is 3.5, with 64 it is 30."""
MAX_LR_FACTOR = 4.0
"""Factor by which a learning rate may differ from its recipe's."""
SMALL_DATASET, MANY_EPOCHS = 5_000, 100
"""A data set of fewer images than the one, seen as often as the other, may be memorized."""


def check_tokenizer(run: Run, log: Log) -> None:
    """Log the PSNR of a lossy tokenizer before a run's first step.

    Warns if it is low, or if tokens are wide.
    """
    if distributed.rank() != 0 or run.progress.images:
        return
    if (warning := token_width_warning(run.config.model)) is not None:
        log.note(warning)
    if run.tokenizer.lossless:
        return
    source = _source_images(run.source)
    if source is None:
        log.note("the tokenizer was not tried: the pictures that were cached are not where they were")
        return
    if not isinstance(source, StreamSource):
        source = subset(source, ROUND_TRIP_IMAGES)
    result = round_trip(run.tokenizer, in_order(source, run.transform, batch=1, limit=ROUND_TRIP_IMAGES))
    if not result.images:
        log.note("the tokenizer was not tried: none of the pictures for that can be read")
        return
    log.write(0, tokenizer_psnr=result.psnr)
    log.note(f"the tokenizer brings {result.images} pictures back with a PSNR of {result.psnr:.1f} dB")
    if result.psnr < MIN_PSNR:
        log.note(
            f"warning: that is less than {MIN_PSNR:.0f} dB, and no model of its latents draws better pictures; train "
            "the tokenizer for longer, or choose one of more channels or a smaller stride"
        )


def _source_images(source: Source | LatentSource | StreamSource) -> Source | StreamSource | None:
    """Return the images of a source; of a latent cache, those it was made from, None if they have moved."""
    if not isinstance(source, LatentSource):
        return source
    try:
        return open_source(source.manifest.data)
    except (ValueError, OSError):  # perhaps another user's, who lets nobody in
        return None


def token_width_warning(model: ModelConfig) -> str | None:
    """Warn about tokens that are wide for the diffusion head."""
    if model.token_width <= WIDE_TOKEN or model.head.width >= WIDE_HEAD:
        return None
    return (
        f"warning: a token has {model.token_width} values, but the head is only {model.head.width} wide, which is "
        f"little above {WIDE_TOKEN} values; set --model.head.width {WIDE_HEAD}, or a smaller --model.patch-size"
    )


def learning_rate_warning(config: TrainConfig, recipe: TrainConfig, name: str) -> str | None:
    """Warn about a scaled learning rate far from that of its recipe."""
    lr, usual = config.scaled_lr, recipe.scaled_lr
    factor, side = max((lr / usual, "times above the"), (usual / lr, "times below the"))
    if factor <= MAX_LR_FACTOR:
        return None
    return (
        f"warning: the learning rate is {lr:.3g} for {config.batch} pictures a step (--lr is for 256), {factor:.3g} "
        f"{side} {usual:.3g} of the recipe {name}; --lr {usual * 256 / config.batch:.3g} would be its rate"
    )


def memorization_warning(
    config: TrainConfig, source: Source | LatentSource | StreamSource, warned_length: int = 0
) -> str | None:
    """Warn when a small data set risks memorization.

    There is none about streams, which are not counted, and runs with early stopping. `warned_length` is the length of
    the run at its last start: if that was long enough, the warning has been given.
    """
    if config.patience or isinstance(source, StreamSource) or len(source) >= SMALL_DATASET:
        return None
    if not warned_length < MANY_EPOCHS * len(source) <= config.images:
        return None
    return (
        f"warning: {len(source):,} pictures will be seen {config.images // len(source):,} times each, and a model may "
        "memorize them: hold some out and stop when their loss rises (--hold-out 10 --patience 3, and another --out)"
    )


def precision_hint(config: TrainConfig, device: torch.device) -> str | None:
    """Predict a gain from bfloat16 on a CPU that multiplies in it."""
    if config.precision != "fp32" or device.type != "cpu" or not devices.multiplies_bf16():
        return None
    return "this processor has products in bfloat16: --precision bf16 (and another --out) sees more pictures a minute"
