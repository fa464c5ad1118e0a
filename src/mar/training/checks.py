"""What is worth knowing of a tokenizer before a model learns its latents."""

from __future__ import annotations

from mar import runtime
from mar.config import ModelConfig, TrainConfig
from mar.data.heldout import spread
from mar.data.latents import LatentSource
from mar.data.loader import in_order
from mar.data.sources import Source, open_source
from mar.data.transforms import Transform
from mar.tokenizer import PixelTokenizer
from mar.tokenizer.roundtrip import round_trip
from mar.training.log import Log
from mar.training.loop import Run

PICTURES = 8
"""So many go through the tokenizer and back."""
POOR = 20.0
"""Decibels below which a tokenizer is warned of: its pictures are hardly those that went in."""
WIDE_TOKEN = 32
WIDE_HEAD = 1024
"""Tokens above the one want a head of the other (16 values a token: FID 3.5; 64 values, the same model: FID 30)."""
FAR_OFF = 4
"""So many times the recipe's learning rate, or so many times less, is warned of."""


def check_tokenizer(run: Run, log: Log) -> None:
    """Tells the log, before the first step, how well a tokenizer that is not pixels brings pictures back, and warns
    where it does so badly or where its tokens are wide for the head. On the first process; nothing is refused."""
    if runtime.rank() != 0 or run.progress.images or isinstance(run.tokenizer, PixelTokenizer):
        return
    if (warning := wide_tokens(run.config.model)) is not None:
        log.note(warning)
    pictures = _pictures(run.source)
    if pictures is None:
        log.note("the tokenizer was not tried: the pictures that were cached are not where they were")
        return
    height, width = (side * run.tokenizer.stride for side in run.config.model.grid)
    transform = Transform((height, width), run.tokenizer.image_channels)
    found = round_trip(run.tokenizer, in_order(spread(pictures, PICTURES), transform, batch=1))
    log.write(0, tokenizer_psnr=found.psnr)
    log.note(f"the tokenizer brings {found.pictures} pictures back with a PSNR of {found.psnr:.1f} dB")
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
        f"little above {WIDE_TOKEN} values; set --model.head.width {WIDE_HEAD}, or a smaller --model.patch"
    )


def rate_far_off(config: TrainConfig, recipe: TrainConfig) -> str | None:
    """The warning for a learning rate that is far from that of the recipe that `config` came from; None where it is
    not."""
    rate, usual = config.scaled_lr, recipe.scaled_lr
    if usual / FAR_OFF <= rate <= usual * FAR_OFF:
        return None
    return (
        f"warning: a step's learning rate is {rate:.3g} (lr x batch / 256), {rate / usual:.2g} times the recipe's "
        f"{usual:.3g} at its batch of {recipe.batch}; change --lr if that is not meant"
    )


def _pictures(source: Source | LatentSource) -> Source | None:
    if not isinstance(source, LatentSource):
        return source
    try:
        return open_source(source.about.data)
    except ValueError:  # they may be on another machine by now
        return None
