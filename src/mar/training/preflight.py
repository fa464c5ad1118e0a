"""What a run will need of memory and disk, said before its first step.

What is worth knowing before a run's first step: of its tokenizer, learning rate, precision, and few pictures.
"""

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

# Floats that a step keeps for its backward pass, as measured (tests/unit/training/test_estimate.py), by what is
# recomputed of them.
_BLOCK = {"none": 18, "selective": 10.5, "full": 1}
"""Of a transformer block, per token and unit of width; 2 fewer without dropout, where all is kept."""
_HEAD_BLOCK = {"none": 10, "selective": 6, "full": 1}
"""Of a block of the head, per row and unit of width."""
_HEAD = 8
"""Of the head outside its blocks, per row and unit of width."""
_KEPT = ("state-*", ".saving-*", "model*.safetensors")
"""What a run keeps in its folder, and what a killed one left there, which goes before the next state is written."""


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, and parameters."""

    parameters: int
    weights: int
    """Weights, gradients, AdamW's two moments and the EMA, float32."""
    activations: int
    """What a step keeps for its gradient."""
    state: int
    """One saved state."""
    disk: int
    """All that the run keeps on the disk at once."""

    def text(self) -> str:
        """One line for people."""
        return (
            f"{self.parameters / 1e6:.1f} million parameters; about {size_text(self.weights + self.activations)} of "
            f"memory ({size_text(self.activations)} of it for a batch), {size_text(self.disk)} of disk"
        )

    def check_disk(self, folder: Path) -> None:
        """Raises CheckpointError where the disk of `folder` has too little room for the run.

        What it holds of the run already is written over or removed; but a state, or a file of weights, is only given up
        once the next one is there.
        """
        there = sum(_size(path) for pattern in _KEPT for path in folder.glob(pattern))
        require_room(folder, max(self.disk - there, self.state + 4 * self.parameters))


def estimate(config: TrainConfig, processes: int = 1) -> Estimate:
    """The needs of a run, for each of `processes` processes."""
    parameters = sum(shape.numel() for shape in model_shapes(config.model).values())
    others = len(config.ema_others)
    state = 4 * (4 + others) * parameters  # weights, EMA, two moments
    cuts = processes * config.accumulate
    exports = (3 if config.patience else 2) + others  # EMA and raw weights, and the best
    return Estimate(
        parameters=parameters,
        weights=4 * (5 + others) * parameters,
        activations=4 * activation_floats(config.model, config.batch // cuts, config.activation_checkpointing),
        state=state,
        disk=(config.keep + 1) * state + exports * 4 * parameters,  # one state more while it is being written
    )


def _size(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def activation_floats(model: ModelConfig, images: int, recompute: ActivationCheckpointing = "none") -> int:
    """Numbers that a step over `images` images keeps, at the mean mask ratio, the block at hand being whole."""
    masked = round(model.tokens * (1 + model.mask_ratio_min) / 2)
    seen = model.buffer_size + model.tokens - masked
    trunks = ((model.encoder, seen), (model.decoder, model.buffer_size + model.tokens))
    rows = masked * model.head.batch_mul
    kept = sum(t.depth * tokens * t.width * _BLOCK[recompute] for t, tokens in trunks)
    kept += rows * model.head.width * (_HEAD_BLOCK[recompute] * model.head.depth + _HEAD)
    if recompute == "none":  # a byte, a quarter of a float, for each weight of attention: its dropout
        kept += sum(t.depth * t.num_heads * tokens**2 / 4 for t, tokens in trunks if model.attention_dropout)
    else:
        whole = [tokens * t.width * _BLOCK["none"] for t, tokens in trunks]
        kept += max(*whole, rows * model.head.width * _HEAD_BLOCK["none"])
    return round(images * kept)


PICTURES = 8
"""So many go through the tokenizer and back."""
POOR = 20.0
"""Decibels below which a tokenizer is warned of: its pictures are hardly those that went in."""
WIDE_TOKEN = 32
WIDE_HEAD = 1024
"""Tokens above the one want a head of the other (16 values a token: FID 3.5; 64 values, the same model: FID 30)."""
RATE_FACTOR = 4.0
"""By how much a learning rate may differ from its recipe's."""
SMALL_DATASET = 5_000
OFTEN = 100
"""Fewer pictures than the one, each seen so many times or more, may be learned by heart."""


def check_tokenizer(run: Run, log: Log) -> None:
    """Warns, before the first step, of tokens that are wide for the head, and tells how well a tokenizer that is not
    pixels brings pictures back, with a warning where it does so badly. On the first process; nothing is refused."""
    if distributed.rank() != 0 or run.progress.images:
        return
    if (warning := wide_tokens(run.config.model)) is not None:
        log.note(warning)
    if run.tokenizer.lossless:
        return
    pictures = _source_images(run.source)
    if pictures is None:
        log.note("the tokenizer was not tried: the pictures that were cached are not where they were")
        return
    few = pictures if isinstance(pictures, StreamSource) else subset(pictures, PICTURES)
    found = round_trip(run.tokenizer, in_order(few, run.transform, batch=1, limit=PICTURES))
    log.write(0, tokenizer_psnr=found.psnr)
    log.note(f"the tokenizer brings {found.images} pictures back with a PSNR of {found.psnr:.1f} dB")
    if found.psnr < POOR:
        log.note(
            f"warning: that is less than {POOR:.0f} dB, and no model of its latents draws better pictures; train the "
            "tokenizer for longer, or choose one of more channels or a smaller stride"
        )


def wide_tokens(model: ModelConfig) -> str | None:
    """The warning for tokens that are wide for the diffusion head; None where they are not."""
    if model.token_width <= WIDE_TOKEN or model.head.width >= WIDE_HEAD:
        return None
    return (
        f"warning: a token has {model.token_width} values, but the head is only {model.head.width} wide, which is "
        f"little above {WIDE_TOKEN} values; set --model.head.width {WIDE_HEAD}, or a smaller --model.patch-size"
    )


def unusual_rate(config: TrainConfig, usual: TrainConfig, name: str) -> str | None:
    """The warning for a scaled learning rate, lr * batch / 256, that is more than four times off that of the recipe
    `usual`, called `name`; None where it is not."""
    own, its = config.scaled_lr, usual.scaled_lr
    factor, side = max((own / its, "times above the"), (its / own, "times below the"))
    if factor <= RATE_FACTOR:
        return None
    return (
        f"warning: the learning rate is {own:.3g} for {config.batch} pictures a step (--lr is for 256), {factor:.3g} "
        f"{side} {its:.3g} of the recipe {name}; --lr {its * 256 / config.batch:.3g} would be its rate"
    )


def copying(config: TrainConfig, source: Source | LatentSource | StreamSource, before: int = 0) -> str | None:
    """The warning for few pictures that are seen so often that a model may give them back as they are; None where they
    are many or seen seldom, where the run will stop by itself, and for a stream, which is not counted.

    `before`: how many were to be seen in all when the run was last begun; None too, where that was as often.
    """
    if config.patience or isinstance(source, StreamSource) or len(source) >= SMALL_DATASET:
        return None
    if not before < OFTEN * len(source) <= config.images:
        return None
    return (
        f"warning: {len(source):,} pictures will be seen {config.images // len(source):,} times each, and a model may "
        "learn them by heart: hold some out and stop when their loss rises (--hold-out 10 --patience 3, and another "
        "--out)"
    )


def faster_precision(config: TrainConfig, device: torch.device) -> str | None:
    """What to say of a run in float32 on a processor that is made for bfloat16, too; None where there is nothing."""
    if config.precision != "fp32" or device.type != "cpu" or not devices.multiplies_bf16():
        return None
    return "this processor has products in bfloat16: --precision bf16 (and another --out) sees more pictures a minute"


def _source_images(source: Source | LatentSource | StreamSource) -> Source | StreamSource | None:
    if not isinstance(source, LatentSource):
        return source
    try:
        return open_source(source.manifest.data)
    except ValueError:  # they may be on another machine by now
        return None
