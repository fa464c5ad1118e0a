from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from tiny import noise

from mar.checkpoint.tokenizers import load_tokenizer, save_statistics, save_tokenizer
from mar.tokenizer import KLTokenizer
from mar.tokenizer.residual import ResidualTokenizer


def autoencoder() -> AutoencoderKL:
    """Of stable diffusion's shape, 4 channels and stride 8, but tiny."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8),
            norm_num_groups=2,
            latent_channels=4,
        )


def test_diffusers_folder_has_no_statistics(tmp_path: Path) -> None:
    made = autoencoder()
    made.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.channels, tokenizer.stride, tokenizer.has_stats) == (4, 8, False)
    # diffusers' default scaling_factor, 0.18215, is another model's.
    assert (tokenizer.mean.item(), tokenizer.std.item()) == (0.0, 1.0)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tokenizer.encode(image).mean, made.eval().encode(image).latent_dist.mean)


def test_diffusers_statistics_are_read_beside_it_or_in_vae(tmp_path: Path) -> None:
    tokenizer = KLTokenizer(autoencoder(), mean=[0.1, 0.2, 0.3, 0.4], std=[1.0, 2.0, 3.0, 4.0])
    save_tokenizer(tokenizer, tmp_path / "vae")
    for found in (load_tokenizer(tmp_path), load_tokenizer(tmp_path, "vae"), load_tokenizer(tmp_path / "vae")):
        assert found.has_stats
        theirs = found.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in tokenizer.state_dict().items())


def test_diffusers_statistics_can_be_added_later(tmp_path: Path) -> None:
    save_tokenizer(KLTokenizer(autoencoder()), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.has_stats
    tokenizer.set_statistics(0.25, 5.0)
    save_statistics(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).std.tolist() == [5.0]


def test_diffusers_statistics_of_a_pipeline_are_kept_where_they_are_read(tmp_path: Path) -> None:
    tokenizer = KLTokenizer(autoencoder())
    save_tokenizer(tokenizer, tmp_path / "vae")
    tokenizer.set_statistics(0.5, 2.0)
    assert save_statistics(tokenizer, tmp_path).parent == tmp_path / "vae"
    assert load_tokenizer(tmp_path).std.tolist() == [2.0]


def test_other_model_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"can't load a diffusers autoencoder from .*nothing"):
        load_tokenizer(tmp_path / "nothing")
    AutoencoderTiny(encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a diffusers AutoencoderTiny"):
        load_tokenizer(tmp_path)


def test_own_tokenizer_folder_round_trip_is_bitwise(tmp_path: Path) -> None:
    tokenizer = ResidualTokenizer(1, 2, 3, width=8, depth=1, sample_size=16)
    tokenizer.fit_linear([noise(4, 1, 8, 8)])
    for statistics in ((0.5, 2.0), ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])):
        tokenizer.set_statistics(*statistics)
        save_statistics(tokenizer, tmp_path)  # as `mar tokenizer stats` does
        save_tokenizer(tokenizer, tmp_path)
        again = load_tokenizer(tmp_path)
        images = noise(2, 1, 8, 8)
        assert torch.equal(again.encode(images).mean, tokenizer.encode(images).mean)
        assert (again.has_stats, again.config()) == (True, tokenizer.config())
    (tmp_path / "tokenizer.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="can't load the weights of"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"mean": [0]}', '{"mean": [0], "std": [-1]}', "[]"])
def test_broken_statistics_are_refused(tmp_path: Path, text: str) -> None:
    autoencoder().save_pretrained(tmp_path)
    (tmp_path / "mar_statistics.json").write_text(text)
    with pytest.raises(ValueError, match=r"mar_statistics\.json is not what"):
        load_tokenizer(tmp_path)
