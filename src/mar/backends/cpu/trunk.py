"""The trunk in sampling: few images at a time, few distinct shapes.

oneDNN compiles and caches one kernel per shape, and the shapes of a reveal step depend on the number of visible tokens.
In wide models, lengths are therefore padded to multiples. Letters of shapes: n images, L tokens, d values of a token,
v visible tokens, r tokens whose z is computed, f width of z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from mar.backends.cpu.memory import trim_heap
from mar.config import ModelConfig

MLP_BYTES = 2**24
"""Memory for the activations of a block's MLP; more images at a time overflow the cache and gain nothing."""
WIDE_MODEL = 512
"""From this trunk width on, lengths are padded and the heap is trimmed, at no measurable cost."""
INPUT_MULTIPLE, OUTPUT_MULTIPLE = 32, 8
"""Wide models pad the number of visible tokens and of output tokens to multiples of these."""


def is_wide(config: ModelConfig) -> bool:
    """Return whether the encoder or the decoder is at least `WIDE_MODEL` wide."""
    return max(config.encoder.width, config.decoder.width) >= WIDE_MODEL


def images_per_group(config: ModelConfig) -> int:
    """Return the number of images that the trunk processes at a time."""
    widest = max(trunk.hidden for trunk in (config.encoder, config.decoder))
    return max(1, MLP_BYTES // (4 * widest * (config.buffer_size + config.tokens)))


def bucketed_trunk(model: Any) -> Callable[..., Tensor]:
    """Return a callable with the arguments and the result of `MAR.forward`."""
    config: ModelConfig = model.config

    def run(
        tokens: Float[Tensor, "n L d"],
        condition: Shaped[Tensor, "n ..."],
        visible: Int[Tensor, "n v"],
        *,
        padded: bool = False,
        query_idx: Int[Tensor, "n r"],
    ) -> Float[Tensor, "n r f"]:
        # padding, of the input and of the output
        queries = query_idx.shape[1]
        if is_wide(config):
            length = round_up(visible.shape[1], INPUT_MULTIPLE, config.tokens)
            padded |= length > visible.shape[1]
            visible = _pad(visible, length, config.tokens)
            if queries > OUTPUT_MULTIPLE:
                query_idx = _pad(query_idx, round_up(queries, OUTPUT_MULTIPLE), config.tokens)
        # groups of images
        size = images_per_group(config)
        groups = zip(*(each.split(size) for each in (tokens, condition, visible, query_idx)), strict=True)
        z = torch.cat([model(*group[:3], padded=padded, query_idx=group[3]) for group in groups])
        return z[:, :queries]

    return run


def round_up(count: int, multiple: int, maximum: int | None = None) -> int:
    """Round up to the next multiple, at most to `maximum`."""
    rounded = -(-count // multiple) * multiple
    return rounded if maximum is None else min(rounded, maximum)


def _pad(index: Int[Tensor, "n k"], length: int, value: int) -> Int[Tensor, "n length"]:
    return functional.pad(index, (0, length - index.shape[1]), value=value)


def free_memory(model: Any) -> None:
    """Return freed heap to the operating system, for wide models."""
    if is_wide(model.config):
        trim_heap()
