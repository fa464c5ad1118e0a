"""What is left of a picture that goes through a tokenizer and back: no model of its latents can do better."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mar.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class RoundTrip:
    """Of some pictures, there and back."""

    psnr: float
    """Decibels: the mean of the pictures' peak signal-to-noise ratios; nan without pictures."""
    pictures: int


def psnr(images: Float[Tensor, "n c h w"], others: Float[Tensor, "n c h w"]) -> Float[Tensor, "n"]:
    """Peak signal-to-noise ratio of each pair of pictures in [-1, 1], in decibels: 10 log10(2^2 / mean squared error);
    at most 100, for pictures that are the same."""
    error = (images - others).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Float[Tensor, "n c H W"]) -> Float[Tensor, "n c H W"]:
    """images -> latents, the posterior's means -> images, on the tokenizer's device."""
    return tokenizer.decode(tokenizer.encode(images.to(tokenizer.mean.device)).mean)


def round_trip(tokenizer: Tokenizer, batches: Iterable[Tensor]) -> RoundTrip:
    """How well `tokenizer` brings back `batches` of images (n, c, H, W) in [-1, 1]."""
    values = [psnr(images, reconstruct(tokenizer, images).to(images.device)) for images in batches]
    every = torch.cat(values).double() if values else torch.zeros(0)
    return RoundTrip(float(every.mean()), len(every))
