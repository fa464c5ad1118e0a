"""The trunk in sampling: few images at a time, and few distinct shapes.

oneDNN compiles and caches one kernel for each new shape, and the shapes of a reveal step depend on how many tokens are
visible. In wide models, lengths are padded to multiples. Letters of shapes: n images, L tokens, d values of a token,
v visible tokens, r tokens whose z is computed, f width of z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mar.backends.cpu.memory import trim_heap
from mar.config import ModelConfig

MLP_BYTES = 2**24
"""Memory for the activations of a block's MLP; more images at a time leave the cache and gain nothing."""
WIDE_MODEL = 512
"""Trunk width from which on lengths are padded and the heap is trimmed; both cost less than a step shows."""
INPUT_MULTIPLE, OUTPUT_MULTIPLE = 32, 8
"""Wide models read a multiple of the one and compute z for a multiple of the other."""


def is_wide(config: ModelConfig) -> bool:
    """Return whether the encoder or the decoder is at least `WIDE_MODEL` wide."""
    return max(config.encoder.width, config.decoder.width) >= WIDE_MODEL


def images_per_group(config: ModelConfig) -> int:
    """Return how many images the trunk processes at a time."""
    widest = max(trunk.hidden for trunk in (config.encoder, config.decoder))
    return max(1, MLP_BYTES // (4 * widest * (config.buffer_size + config.tokens)))


def bucketed_trunk(model: Any) -> Callable[..., Tensor]:
    """Return a callable with the arguments and the result of `MAR.forward`."""
    config: ModelConfig = model.config

    def run(
        tokens: Float[Tensor, "n L d"],
        labels: Int[Tensor, " n"],
        visible: Int[Tensor, "n v"],
        *,
        padded: bool = False,
        query_idx: Int[Tensor, "n r"],
    ) -> Float[Tensor, "n r f"]:
        queries = query_idx.shape[1]
        if is_wide(config):
            length = round_up(visible.shape[1], INPUT_MULTIPLE, config.tokens)
            padded |= length > visible.shape[1]
            visible = _pad(visible, length, config.tokens)
            if queries > OUTPUT_MULTIPLE:
                query_idx = _pad(query_idx, round_up(queries, OUTPUT_MULTIPLE), config.tokens)
        size = images_per_group(config)
        groups = zip(*(each.split(size) for each in (tokens, labels, visible, query_idx)), strict=True)
        z = torch.cat([model(*group[:3], padded=padded, query_idx=group[3]) for group in groups])
        return z[:, :queries]

    return run


def round_up(count: int, multiple: int, most: int | None = None) -> int:
    """Return the next multiple, or `most` where that is less."""
    up = -(-count // multiple) * multiple
    return up if most is None else min(up, most)


def _pad(index: Int[Tensor, "n k"], length: int, value: int) -> Int[Tensor, "n length"]:
    return functional.pad(index, (0, length - index.shape[1]), value=value)


def free_memory(model: Any) -> None:
    """Return freed heap to the operating system after a reveal step of a wide model."""
    if is_wide(model.config):
        trim_heap()
