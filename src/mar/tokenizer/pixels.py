"""Pixels as latents, scaled to mean 0 and standard deviation 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mar.tokenizer.base import Posterior, Statistic, Tokenizer


class PixelTokenizer(Tokenizer):
    """Pixels scaled to mean 0 and standard deviation 1."""

    deterministic = True
    name = "pixels"
    lossless = True

    def __init__(self, image_channels: int = 3, mean: Statistic | None = None, std: Statistic | None = None) -> None:
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels: got {image_channels}, expected 1 (gray) or 3 (color)")
        super().__init__(image_channels, channels=image_channels, stride=1, mean=mean, std=std)

    def encode(self, images: Float[Tensor, "n c H W"]) -> Posterior:
        """Scale images to latents."""
        self.check_images(images)
        latents = self.normalize(images.float())
        return Posterior(latents, torch.zeros_like(latents))

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Scale latents back to images, clipped to [-1, 1]."""
        return self.denormalize(latents.float()).clamp(-1, 1)

    def config(self) -> dict[str, Any]:
        """Return kind and channels."""
        return {"kind": "pixels", "image_channels": self.image_channels, **super().config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PixelTokenizer:
        """Create the tokenizer of `config()`."""
        return cls(config.get("image_channels", 3))

    @classmethod
    def from_name(cls, name: str, image_channels: int, channels: int | None) -> PixelTokenizer:
        """Create the tokenizer; by default, latents have the images' channels."""
        if channels not in (None, 1, 3):
            raise ValueError(f"channels: got {channels} for latents of pixels, expected 1 or 3")
        return cls(channels or image_channels)
