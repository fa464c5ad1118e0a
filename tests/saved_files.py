"""Small caches and tokenizers on disk."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from diffusers import AutoencoderKL

from mar.checkpoint.tokenizers import save_tokenizer
from mar.data.cache_writer import describe_cache, finish_cache, prepare_cache, write_shards
from mar.data.sources import open_source
from mar.tokenizer import PixelTokenizer
from mar.tokenizer.kl import KLTokenizer
from mar.tokenizer.pca import PCATokenizer


def make_cache(folder: Path) -> None:
    source, tokenizer = open_source(tiny.write_images(folder.parent / f"{folder.name}-pictures")), PixelTokenizer(1)
    about = describe_cache(
        source, tokenizer, size=(8, 8), dtype="fp16", shard=16, data="pictures", tokenizer_name="pixels"
    )
    shards = prepare_cache(folder, about)
    assert shards is not None
    write_shards(folder, about, source, tokenizer, shards, device=torch.device("cpu"), batch=4)
    finish_cache(folder, about)


def make_tokenizer(folder: Path) -> None:
    tokenizer = PCATokenizer(1, 2, 3)
    tokenizer.fit([torch.rand(4, 1, 8, 8)])
    save_tokenizer(tokenizer, folder)


def make_autoencoder(folder: Path) -> None:
    """Write a tokenizer in diffusers' format, with statistics."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,), layers_per_block=1, latent_channels=2, norm_num_groups=2,
    )  # fmt: skip
    save_tokenizer(KLTokenizer(autoencoder, mean=[0.1, 0.2], std=[1.0, 2.0]), folder)
