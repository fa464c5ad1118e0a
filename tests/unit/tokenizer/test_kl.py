from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from mar.tokenizer import KLTokenizer, build
from mar.tokenizer.kl import from_config, kl16

TINY = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 8, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


@pytest.fixture
def tiny() -> KLTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return from_config(TINY).requires_grad_(False)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_kl_tokenizer_fulfills_the_contract(tiny: KLTokenizer, images: torch.Tensor) -> None:
    assert (tiny.image_channels, tiny.channels, tiny.stride) == (3, 4, 4)
    assert not tiny.has_stats
    posterior = tiny.encode(images)
    assert posterior.mean.shape == posterior.std.shape == (2, 4, 2, 3)
    assert (posterior.std > 0).all()
    decoded = tiny.decode(posterior.mean)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1


def test_kl_encode_normalizes_and_decode_undoes_it(tiny: KLTokenizer, images: torch.Tensor) -> None:
    raw, plain = tiny.encode(images), tiny.decode(torch.ones(1, 4, 2, 2))
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([2.0, 0.5, 1.0, 4.0])
    tiny.set_statistics(mean, std)
    scaled = tiny.encode(images)
    torch.testing.assert_close(scaled.mean, (raw.mean - mean.view(4, 1, 1)) / std.view(4, 1, 1))
    torch.testing.assert_close(scaled.std, raw.std / std.view(4, 1, 1))
    normalized = ((1 - mean) / std).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    torch.testing.assert_close(tiny.decode(normalized), plain)


def test_kl_bfloat16_encodes_and_decodes_in_float32(tiny: KLTokenizer, images: torch.Tensor) -> None:
    latents = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(2))
    before, exact = tiny.decode(latents), tiny.encode(images)
    half = tiny.to(torch.bfloat16)
    assert half.autoencoder.encoder.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(half.decode(latents), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.decode(latents), before)
    rounded = half.encode(images)
    assert rounded.mean.dtype == torch.float32
    assert not torch.equal(rounded.mean, exact.mean)
    torch.testing.assert_close(rounded.mean, exact.mean, atol=0.05, rtol=0.05)


def test_kl_from_config_and_state_is_equal(tiny: KLTokenizer, images: torch.Tensor) -> None:
    tiny.set_statistics([0.1, 0.2, 0.3, 0.4], 2.0)
    again = build(json.loads(json.dumps(tiny.config()))).requires_grad_(False)  # oneDNN rounds otherwise with gradients
    again.load_state_dict(tiny.state_dict())
    assert again.config() == tiny.config()
    assert torch.equal(again.encode(images).mean, tiny.encode(images).mean)


def test_kl_activations_are_reused_without_gradients(tiny: KLTokenizer) -> None:
    """Outputs are bitwise those of diffusers' module; activations share the memory of their input."""
    own = AutoencoderKL.from_config(tiny.autoencoder.config).requires_grad_(False)
    own.load_state_dict(tiny.autoencoder.state_dict())
    latents = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(2))
    places: list[tuple[int, int]] = []
    activations = [module for module in tiny.autoencoder.decoder.modules() if isinstance(module, nn.SiLU)]
    assert len(activations) == sum(isinstance(module, nn.SiLU) for module in own.decoder.modules()) > 0
    for module in activations:
        module.register_forward_hook(lambda _, given, made: places.append((given[0].data_ptr(), made.data_ptr())))
    with torch.no_grad():
        assert torch.equal(tiny.decode(latents), own.decode(latents).sample.clamp(-1, 1))
    assert len(places) >= len(activations)
    assert all(before == after for before, after in places)
    places.clear()
    tiny.decode(latents)
    assert all(before != after for before, after in places)


def test_kl_on_meta_device_is_filled_later(tiny: KLTokenizer) -> None:
    with torch.device("meta"):
        empty = build(tiny.config())
    empty = empty.to_empty(device="cpu").requires_grad_(False)
    empty.load_state_dict(tiny.state_dict())
    latents = torch.zeros(1, 4, 2, 2)
    assert torch.equal(empty.decode(latents), tiny.decode(latents))


def test_kl16_has_the_published_scale() -> None:
    with torch.device("meta"):
        tokenizer = kl16()
    assert (tokenizer.channels, tokenizer.stride, tokenizer.has_stats) == (16, 16, True)
    assert tokenizer.to_empty(device="cpu").std.tolist() == pytest.approx([1 / 0.2325])
    assert sum(p.numel() for p in tokenizer.autoencoder.parameters()) == 66_456_019


def test_kl_invalid_input_is_refused(tiny: KLTokenizer) -> None:
    with pytest.raises(ValueError, match="got 10x8 pixels, expected multiples of the stride 4"):
        tiny.encode(torch.zeros(1, 3, 10, 8))
    with pytest.raises(ValueError, match="got a diffusers AutoencoderTiny, expected an AutoencoderKL"):
        from_config({"_class_name": "AutoencoderTiny"})


@pytest.mark.parametrize(("device", "expected"), [("cpu", [70]), ("meta", [32, 32, 6])])
def test_kl_computes_few_images_at_a_time_but_on_a_cpu(
    tiny: KLTokenizer, device: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a batch stays whole: convolutions of other batches differ in last bits."""
    sizes: list[int] = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # knows no meta device
    tiny = tiny.to(device)
    decode, encode = tiny.autoencoder.decode, tiny.autoencoder.encode

    def counted(raw: torch.Tensor) -> object:
        sizes.append(len(raw))
        return decode(raw)

    def counted_encode(pixels: torch.Tensor) -> object:
        sizes.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(tiny.autoencoder, "decode", counted)
    monkeypatch.setattr(tiny.autoencoder, "encode", counted_encode)
    with torch.no_grad():
        assert len(tiny.encode(torch.zeros(70, 3, 8, 8, device=device)).mean) == 70
        assert sizes == expected
        sizes.clear()
        images = tiny.decode(torch.zeros(70, tiny.channels, 2, 2, device=device))
    assert sizes == expected
    assert len(images) == 70
