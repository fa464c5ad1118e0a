"""What is worth knowing before a run's first step: of its tokenizer, learning rate, precision, and few pictures."""

from __future__ import annotations

import torch

from mar import runtime
from mar.config import ModelConfig, TrainConfig
from mar.data.heldout import spread
from mar.data.latents import LatentSource
from mar.data.loader import in_order
from mar.data.sources import Source, StreamSource, open_source
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
RATE_FACTOR = 4.0
"""By how much a learning rate may differ from its recipe's."""
FEW = 5_000
OFTEN = 100
"""Fewer pictures than the one, each seen so many times or more, may be learned by heart."""


def check_tokenizer(run: Run, log: Log) -> None:
    """Warns, before the first step, of tokens that are wide for the head, and tells how well a tokenizer that is not
    pixels brings pictures back, with a warning where it does so badly. On the first process; nothing is refused."""
    if runtime.rank() != 0 or run.progress.images:
        return
    if (warning := wide_tokens(run.config.model)) is not None:
        log.note(warning)
    if isinstance(run.tokenizer, PixelTokenizer):
        return
    pictures = _pictures(run.source)
    if pictures is None:
        log.note("the tokenizer was not tried: the pictures that were cached are not where they were")
        return
    few = pictures if isinstance(pictures, StreamSource) else spread(pictures, PICTURES)
    found = round_trip(run.tokenizer, in_order(few, run.transform, batch=1, limit=PICTURES))
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
    if config.patience or isinstance(source, StreamSource) or len(source) >= FEW:
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
    if config.precision != "fp32" or device.type != "cpu" or not runtime.multiplies_bf16():
        return None
    return "this processor has products in bfloat16: --precision bf16 (and another --out) sees more pictures a minute"


def _pictures(source: Source | LatentSource | StreamSource) -> Source | StreamSource | None:
    if not isinstance(source, LatentSource):
        return source
    try:
        return open_source(source.about.data)
    except ValueError:  # they may be on another machine by now
        return None
