from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mar.tokenizer import PixelTokenizer, Posterior
from mar.tokenizer.base import measure_latents


class Blurry(PixelTokenizer):
    """Pixels whose posterior has a standard deviation of its own, in raw units."""

    def encode(self, images: Tensor) -> Posterior:
        posterior = super().encode(images)
        return Posterior(posterior.mean, torch.full_like(posterior.mean, 0.3) / self.std.view(-1, 1, 1))


def pictures() -> Tensor:
    noise = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1) + torch.tensor([-0.5, 0.0, 0.5]).view(3, 1, 1)


def test_latent_statistics_are_independent_of_batches() -> None:
    x = pictures()
    found = measure_latents(PixelTokenizer(3), x.split(7))
    assert found.images == 60
    assert found.mean == pytest.approx([x.double().mean().item()], rel=1e-9, abs=1e-9)
    assert found.std == pytest.approx([x.double().std(correction=0).item()], rel=1e-9)


def test_latent_statistics_per_channel() -> None:
    x = pictures()
    found = measure_latents(PixelTokenizer(3), x.split(7), per_channel=True)
    assert found.mean == pytest.approx(x.double().mean((0, 2, 3)).tolist(), rel=1e-9, abs=1e-9)
    assert found.std == pytest.approx(x.double().std((0, 2, 3), correction=0).tolist(), rel=1e-9)


def test_latent_statistics_normalize_and_are_stable() -> None:
    x, tokenizer = pictures(), PixelTokenizer(3)
    first = measure_latents(tokenizer, [x], per_channel=True)
    tokenizer.set_statistics(first.mean, first.std)
    latents = tokenizer.encode(x).mean
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    again = measure_latents(tokenizer, [x], per_channel=True)
    assert again.std == pytest.approx(first.std, rel=1e-6)


def test_latent_statistics_include_posterior_variance() -> None:
    x = pictures()
    for tokenizer in (Blurry(3), Blurry(3, mean=0.5, std=2.0)):
        found = measure_latents(tokenizer, [x])
        assert found.std == pytest.approx([(x.double().var(correction=0).item() + 0.09) ** 0.5], rel=1e-6)


def test_latent_statistics_without_images_are_refused() -> None:
    with pytest.raises(ValueError, match="got no images"):
        measure_latents(PixelTokenizer(3), [])
