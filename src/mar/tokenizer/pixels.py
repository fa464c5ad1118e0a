"""The tokenizer that does nothing but scale: latents are pixels."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mar.tokenizer.base import Posterior, Statistic, Tokenizer


class PixelTokenizer(Tokenizer):
    """Pixels as latents, scaled to mean 0 and standard deviation 1; a latent cell is one pixel."""

    deterministic = True

    def __init__(self, image_channels: int = 3, mean: Statistic | None = None, std: Statistic | None = None) -> None:
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels: got {image_channels}, expected 1 (grey) or 3 (colour)")
        super().__init__(image_channels, channels=image_channels, stride=1, mean=mean, std=std)

    def encode(self, images: Float[Tensor, "n c H W"]) -> Posterior:
        """images -> latents, surely: the posterior's standard deviation is 0."""
        self.check_images(images)
        latents = self.normalise(images.float())
        return Posterior(latents, torch.zeros_like(latents))

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """latents -> images, clipped to [-1, 1]."""
        return self.denormalise(latents.float()).clamp(-1, 1)

    def spec(self) -> dict[str, Any]:
        return {"kind": "pixels", "image_channels": self.image_channels, **super().spec()}
