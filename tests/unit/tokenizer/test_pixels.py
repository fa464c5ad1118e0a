from __future__ import annotations

import json

import pytest
import torch

from mar.tokenizer import PixelTokenizer, Posterior, build


def images(channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, channels, 4, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_pixels_encode_normalizes_and_decode_inverts() -> None:
    x = images()
    tokenizer = PixelTokenizer(3, mean=[0.1, 0.2, -0.3], std=[0.5, 2.0, 0.25])
    posterior = tokenizer.encode(x)
    torch.testing.assert_close(posterior.mean[:, 2], (x[:, 2] + 0.3) / 0.25)
    assert not posterior.std.any()
    torch.testing.assert_close(tokenizer.decode(posterior.mean), x)


def test_pixels_decode_clips() -> None:
    tokenizer = PixelTokenizer(1, mean=0.0, std=2.0)
    latents = torch.tensor([-9.0, -0.25, 9.0]).view(1, 1, 1, 3)
    assert tokenizer.decode(latents).flatten().tolist() == [-1.0, -0.5, 1.0]


def test_pixels_without_statistics_pass_through() -> None:
    tokenizer = PixelTokenizer(3)
    assert not tokenizer.has_stats
    assert torch.equal(tokenizer.encode(images()).mean, images())
    tokenizer.set_statistics(0.5, 0.25)
    assert tokenizer.has_stats


@pytest.mark.parametrize("statistics", [(0.25, 0.5), ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0]), (0.1, [1.0, 2.0, 3.0]), None])
def test_pixels_from_config_and_state_is_equal(statistics: tuple | None) -> None:
    tokenizer = PixelTokenizer(3, *(statistics or ()))
    again = build(json.loads(json.dumps(tokenizer.config())))
    again.load_state_dict(tokenizer.state_dict())
    assert again.has_stats == (statistics is not None)
    assert again.config() == tokenizer.config()
    assert torch.equal(again.encode(images()).mean, tokenizer.encode(images()).mean)


def test_pixels_statistics_stay_float32() -> None:
    tokenizer = PixelTokenizer(3, mean=0.1234567, std=0.7654321).to(torch.bfloat16)
    assert (tokenizer.mean.dtype, tokenizer.std.dtype) == (torch.float32, torch.float32)
    assert tokenizer.mean.item() == pytest.approx(0.1234567, rel=1e-7)
    assert tokenizer.decode(torch.zeros(1, 3, 1, 1, dtype=torch.bfloat16)).dtype == torch.float32


def test_posterior_sample_is_reparametrized() -> None:
    mean, std, noise = torch.randn(3, 1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Posterior(mean, std).sample(noise), mean + std * noise)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.0, 0.0, "expected positive"),
        (float("nan"), 1.0, "finite"),
        ([0.0, 0.0], 1.0, "expected 1 or 3"),
        (0.0, None, "only one of them"),
    ],
)
def test_pixels_invalid_statistics_are_refused(mean: float, std: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelTokenizer(3, mean, std)


def test_pixels_invalid_input_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1 channels, expected 3 for this tokenizer"):
        PixelTokenizer(3).encode(images(1))
    with pytest.raises(ValueError, match="image_channels: got 2"):
        PixelTokenizer(2)
    with pytest.raises(ValueError, match="got kind 'vq', expected pixels, residual, pca, kl, vit or dc"):
        build({"kind": "vq"})
    with pytest.raises(ValueError, match="got config None, expected one of a diffusers AutoencoderKL"):
        build({"kind": "kl"})
