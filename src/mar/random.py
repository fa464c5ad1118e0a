"""Random numbers by key: every stream follows from the numbers that name it, never from global state."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Int
from torch import Tensor

_ORDER = 0x0DE4  # each use of a seed has a stream of its own


def make_generator(*key: int) -> torch.Generator:
    """Return a CPU generator whose stream depends on the numbers of `key` and on nothing else."""
    return torch.Generator().manual_seed(hash_seed(*key))


def hash_seed(*key: int) -> int:
    """Hash the numbers of `key` to 64 bits, by splitmix64: (1, 2) differs from (2, 1) and from 12."""
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
