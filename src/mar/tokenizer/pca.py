"""The PCA tokenizer: squares of pixels as their first principal components.

Principal components are the best linear tokenizer, fitted in one pass. Squares of a photograph are mostly smooth: 16 of
the 48 components of a 4 x 4 square in color hold 99.7% of the variance (CIFAR-10). A small model of pixels has to learn
that the others are nearly zero, and until then its images are noisy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mar.tokenizer.base import Posterior, Tokenizer

ROUNDING = 1e-10
"""Variances below this share of the mean square are rounding errors."""


class PCATokenizer(Tokenizer):
    """Squares of pixels -> principal components.

    All latents together have mean 0 and variance 1. The variance of a component is proportional to its standard
    deviation in pixels. With the variances of pixels, the first components would dominate the loss; with equal
    variances, the last would count as much as the first. Either is learned more slowly (docs/quality.md).

    Flat or enlarged images may vary in fewer components than `channels`: the others are 0, and decoding ignores them.
    The basis is 0 until `fit` or a state dict fills it.

    Args:
        image_channels: channels of the images, 1 or 3.
        stride: side of a square in pixels.
        channels: number of components, at most the number of values of a square.
    """

    deterministic = True
    learns_basis = True
    basis: Float[Tensor, "k d"]
    """Orthonormal rows, largest variance first, then rows of 0. The d values of a square: color, row, column."""
    centre: Float[Tensor, " d"]
    """Mean of all squares."""

    def __init__(self, image_channels: int = 3, stride: int = 4, channels: int = 16) -> None:
        values = image_channels * stride**2
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels: got {image_channels}, expected 1 (gray) or 3 (color)")
        if stride < 1 or not 1 <= channels <= values:
            raise ValueError(
                f"channels: got {channels}, expected 1 to {values}, the number of values of {stride} x {stride} pixels"
            )
        super().__init__(image_channels, channels, stride, None, None)
        self.register_buffer("basis", torch.zeros(channels, values))
        self.register_buffer("centre", torch.zeros(values))
        self.name = f"pca{stride}"
        self.prepare({"per_channel": True, "measured": False})

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Compute basis, mean and scales from images (n, c, H, W) in [-1, 1]. Raises ValueError without any."""
        values = self.basis.shape[1]
        total, products = torch.zeros(values, dtype=torch.float64), torch.zeros(values, values, dtype=torch.float64)
        count = 0
        for images in batches:
            self.check_images(images)
            squares = self._cut(images.cpu().double()).transpose(1, 2).reshape(-1, values)
            total += squares.sum(0)
            products += squares.T @ squares
            count += len(squares)
        if not count:
            raise ValueError("principal components: got no images, expected at least one")
        center = total / count
        variances, basis = torch.linalg.eigh(products / count - torch.outer(center, center))
        variances, basis = variances.flip(0)[: self.channels], basis.T.flip(0)[: self.channels]
        nonzero = variances > ROUNDING * products.trace() / count
        # the sign of a component is arbitrary; make its largest value positive, so that machines agree
        signs = basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        self.basis.copy_(basis * signs * nonzero.unsqueeze(1))
        self.centre.copy_(center)
        deviations = variances[nonzero].sqrt()
        scales = torch.ones_like(variances)  # components of variance 0 may have any scale
        scales[nonzero] = (deviations * deviations.mean()).sqrt()
        self.set_statistics(torch.zeros(self.channels), scales)

    def fitted_state(self) -> dict[str, Tensor]:
        """Return mean, standard deviation, basis and mean square."""
        return {**super().fitted_state(), "basis": self.basis, "centre": self.centre}

    def load_fitted_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the `fitted_state` of another tokenizer of these sizes."""
        super().load_fitted_state(state)
        self.basis, self.centre = (state[name].to(self.mean.device) for name in ("basis", "centre"))

    def encode(self, images: Float[Tensor, "n c H W"]) -> Posterior:
        """Project the squares of images on the basis."""
        self.check_images(images)
        squares = self._cut(images.float()) - self.centre.unsqueeze(-1)
        grid = images.shape[2] // self.stride, images.shape[3] // self.stride
        latents = self.normalize((self.basis @ squares).unflatten(-1, grid))
        return Posterior(latents, torch.zeros_like(latents))

    def decode(self, latents: Float[Tensor, "n k h w"]) -> Float[Tensor, "n c H W"]:
        """Compute squares from latents; images are clipped to [-1, 1]."""
        return self.decode_raw(latents).clamp(-1, 1)

    def decode_raw(self, latents: Float[Tensor, "n k h w"]) -> Float[Tensor, "n c H W"]:
        """Compute squares from normalized latents, not clipped."""
        size = latents.shape[2] * self.stride, latents.shape[3] * self.stride
        squares = self.basis.T @ self.denormalize(latents.float()).flatten(2) + self.centre.unsqueeze(-1)
        return functional.fold(squares, size, self.stride, stride=self.stride)

    def config(self) -> dict[str, Any]:
        """Return kind and sizes."""
        return {
            "kind": "pca", "image_channels": self.image_channels, "stride": self.stride, "channels": self.channels,
            **super().config(),
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PCATokenizer:
        """Create the tokenizer of `config()`."""
        return cls(config.get("image_channels", 3), config.get("stride", 4), config.get("channels", 16))

    @classmethod
    def from_name(cls, name: str, image_channels: int, channels: int | None) -> PCATokenizer:
        """Create the tokenizer of a name such as pca4; by default 16 components, or all if there are fewer."""
        stride = int(name.removeprefix("pca"))
        return cls(image_channels, stride, min(16, image_channels * stride**2) if channels is None else channels)

    def _cut(self, images: Float[Tensor, "n c H W"]) -> Float[Tensor, "n d l"]:
        """Cut images into squares, row by row."""
        return functional.unfold(images, self.stride, stride=self.stride)
