"""DC-AE: diffusers' AutoencoderDC keeps the tokenizer's contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from tiny import tiny_model

from mar import zoo
from mar.checkpoint import store
from mar.checkpoint.tokenizers import save_tokenizer
from mar.nn import init_empty_weights
from mar.pipeline import Pipeline
from mar.tokenizer import build
from mar.tokenizer.dc import DC_SLICE, DCTokenizer

SCALE = 0.3189
TINY = {
    "latent_channels": 8,
    "attention_head_dim": 4,
    "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "encoder_layers_per_block": [1, 1],
    "decoder_layers_per_block": [1, 1],
    "encoder_qkv_multiscales": [[], [5]],
    "decoder_qkv_multiscales": [[], [5]],
    "scaling_factor": SCALE,
}


@pytest.fixture
def tiny() -> DCTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DCTokenizer(AutoencoderDC(**TINY)).requires_grad_(False)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(DC_SLICE + 1, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_dc_latents_are_the_encoders_times_the_scale(tiny: DCTokenizer, images: torch.Tensor) -> None:
    posterior = tiny.encode(images)
    raw = tiny.autoencoder.encode(images).latent
    torch.testing.assert_close(posterior.mean, raw * SCALE)
    assert not posterior.std.any()
    decoded = tiny.decode(posterior.mean)
    torch.testing.assert_close(decoded, tiny.autoencoder.decode(raw).sample.clamp(-1, 1), atol=1e-5, rtol=0)
    assert (tiny.channels, tiny.stride, tiny.image_channels) == (8, 2, 3)


def test_dc_without_a_scale_has_no_statistics() -> None:
    assert not DCTokenizer(AutoencoderDC(**{**TINY, "scaling_factor": 1.0})).has_stats


def test_dc_folder_of_diffusers_is_loaded_with_its_scale(
    tmp_path: Path, tiny: DCTokenizer, images: torch.Tensor
) -> None:
    tiny.autoencoder.save_pretrained(tmp_path / "theirs")
    theirs = zoo.load_tokenizer(str(tmp_path / "theirs"))
    assert isinstance(theirs, DCTokenizer)
    assert theirs.std.tolist() == pytest.approx([1 / SCALE])
    torch.testing.assert_close(theirs.encode(images).mean, tiny.encode(images).mean)
    tiny.set_statistics(0.5, 3.0)
    save_tokenizer(tiny, tmp_path / "ours")
    assert zoo.load_tokenizer(str(tmp_path / "ours")).std.tolist() == [3.0]


def test_dc_from_config_and_state_is_equal(tiny: DCTokenizer, images: torch.Tensor) -> None:
    again = build(json.loads(json.dumps(tiny.config()))).requires_grad_(False)
    again.load_state_dict(tiny.state_dict())
    assert torch.equal(again.encode(images).mean, tiny.encode(images).mean)
    latents = tiny.encode(images).mean
    assert torch.equal(again.to(torch.bfloat16).decode(latents), tiny.decode(latents))


@pytest.mark.parametrize("earlier", [False, True])
def test_dc_with_batch_norm_comes_back_from_a_model_file(
    earlier: bool, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm counts its batches in an integer, which earlier versions saved, and could not read."""
    torch.manual_seed(0)
    tokenizer = DCTokenizer(AutoencoderDC(**TINY, decoder_norm_types=["batch_norm", "rms_norm"]))
    assert any(tensor.dtype is torch.int64 for tensor in tokenizer.state_dict().values())
    pipeline = Pipeline(tiny_model(channels=8), tokenizer, classes=("ant", "bee", "cat"))
    with monkeypatch.context() as patch:
        if earlier:
            patch.setattr(store, "_COUNTER", "no such end")
        pipeline.save(tmp_path / "model.safetensors")
    again = Pipeline.open(tmp_path / "model.safetensors").tokenizer
    latents = tokenizer.encode(images).mean
    assert torch.equal(again.encode(images).mean, latents)
    assert torch.equal(again.decode(latents), tokenizer.decode(latents))
    assert store.verify(tmp_path / "model.safetensors")


def test_dc_of_the_published_shape_fits_emigm_at_512() -> None:
    transformer = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
    config = {
        "encoder_block_types": transformer,
        "decoder_block_types": transformer,
        "encoder_layers_per_block": [0, 4, 8, 2, 2, 2],
        "decoder_layers_per_block": [0, 5, 10, 2, 2, 2],
        "scaling_factor": SCALE,
    }
    with init_empty_weights():
        tokenizer = DCTokenizer(AutoencoderDC(**config))
    assert (tokenizer.channels, tokenizer.stride) == (32, 32)
    assert tokenizer.image_size((16, 16)) == (512, 512)
