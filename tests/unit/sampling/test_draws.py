"""One stream of random numbers per picture, and none of them another's."""

from __future__ import annotations

import torch

from mar.sampling.noise import SeededNoise


def test_seeded_noise_depends_on_its_seed_only() -> None:
    together, alone = SeededNoise([5, 6, 5]), SeededNoise([6])
    together.noise(0, 3, 2, 4)  # what another image draws in between
    assert torch.equal(together.order(1, 9), alone.order(0, 9))
    together.noise(2, 1, 1, 1)
    assert torch.equal(together.noise(1, 3, 2, 4), alone.noise(0, 3, 2, 4))


def test_seeded_noise_of_other_seeds_differs() -> None:
    seeds = [0, 1, 2, 2**31, 2**32, 2**63]
    draws = SeededNoise(seeds)
    values = torch.stack([draws.noise(i, 1, 1, 400).flatten() for i in range(len(seeds))])
    correlation = torch.corrcoef(values).fill_diagonal_(0)
    assert correlation.abs().max() < 0.25  # five standard deviations
