"""Random streams by key, independent of global state."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Int
from torch import Tensor

_ORDER = 0x0DE4  # separates the stream of shuffled orders from other uses of a seed


def make_generator(*key: int) -> torch.Generator:
    """Create a CPU generator whose stream depends on `key` alone."""
    return torch.Generator().manual_seed(hash_seed(*key))


def hash_seed(*key: int) -> int:
    """Hash a sequence of integers to 64 bits, by splitmix64."""
    state = 0x9E3779B97F4A7C15
    for number in key:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 31)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    return state


@functools.lru_cache(maxsize=2)
def permutation(length: int, seed: int, epoch: int) -> Int[Tensor, "length"]:
    """Return the shuffled indices of an epoch."""
    return torch.randperm(length, generator=make_generator(seed, _ORDER, epoch))
