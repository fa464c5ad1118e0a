"""The best linear tokenizer: each square of pixels as its first principal components. Needs no training, only a look.

Squares of a photograph are mostly smooth: of the 48 values of a 4 x 4 square in colour, 16 components hold 99.7% of the
variance (CIFAR-10). In the others, a small model of pixels has to learn to draw next to nothing, and until it has, its
pictures are noisy.
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
"""A variance that is a smaller share of the mean square is nothing but the last digits of sums."""


class PCATokenizer(Tokenizer):
    """Squares of `stride` x `stride` pixels -> `channels` principal components of mean 0, all together of variance 1.

    Flat or enlarged pictures vary in fewer ways than that: the components that are left over are 0, whatever the
    picture, and nothing that is drawn for them shows.

    The variance of each is in proportion to its deviation in pixels: between pixels, where the first components are
    nearly all that a loss is about, and equal variances, where the last, which hardly show, count as much as the first.
    Either is learned less soon (docs/quality.md).

    The basis is empty until `fit` or a state dict fills it. ValueError for more components than a square has values.
    """

    deterministic = True
    basis: Float[Tensor, "k d"]
    """Orthonormal rows, the component of the largest variance first, and rows of 0 for those that are left over; d
    values of a square: colour, row, column."""
    centre: Float[Tensor, " d"]
    """The mean square."""

    def __init__(self, image_channels: int = 3, stride: int = 4, channels: int = 16) -> None:
        values = image_channels * stride**2
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels: got {image_channels}, expected 1 (grey) or 3 (colour)")
        if stride < 1 or not 1 <= channels <= values:
            raise ValueError(
                f"channels: got {channels}, expected 1 to {values}, the values of {stride} x {stride} pixels"
            )
        super().__init__(image_channels, channels, stride, None, None)
        self.register_buffer("basis", torch.zeros(channels, values))
        self.register_buffer("centre", torch.zeros(values))
        self.prepare({"per_channel": True, "measured": self.measured})

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Takes basis, mean and scales from `batches` of images (n, c, H, W) in [-1, 1].

        ValueError without any.
        """
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
            raise ValueError("principal components: there are no images to take them from")
        centre = total / count
        variances, basis = torch.linalg.eigh(products / count - torch.outer(centre, centre))
        variances, basis = variances.flip(0)[: self.channels], basis.T.flip(0)[: self.channels]
        kept = variances > ROUNDING * products.trace() / count
        # a component and its opposite are one; the sign is that of its largest value, or machines would differ
        signs = basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        self.basis.copy_(basis * signs * kept.unsqueeze(1))
        self.centre.copy_(centre)
        deviations = variances[kept].sqrt()
        scales = torch.ones_like(variances)  # of the left over ones, which are 0: any will do
        scales[kept] = (deviations * deviations.mean()).sqrt()
        self.set_statistics(torch.zeros(self.channels), scales)

    def found(self) -> dict[str, Tensor]:
        return {**super().found(), "basis": self.basis, "centre": self.centre}

    def take(self, found: Mapping[str, Tensor]) -> None:
        super().take(found)
        self.basis, self.centre = (found[name].to(self.mean.device) for name in ("basis", "centre"))

    def encode(self, images: Float[Tensor, "n c H W"]) -> Posterior:
        """images -> latents, surely: the posterior's standard deviation is 0."""
        self.check_images(images)
        squares = self._cut(images.float()) - self.centre.unsqueeze(-1)
        grid = images.shape[2] // self.stride, images.shape[3] // self.stride
        latents = self.normalise((self.basis @ squares).unflatten(-1, grid))
        return Posterior(latents, torch.zeros_like(latents))

    def decode(self, latents: Float[Tensor, "n k h w"]) -> Float[Tensor, "n c H W"]:
        """latents -> images, clipped to [-1, 1]."""
        size = latents.shape[2] * self.stride, latents.shape[3] * self.stride
        squares = self.basis.T @ self.denormalise(latents.float()).flatten(2) + self.centre.unsqueeze(-1)
        return functional.fold(squares, size, self.stride, stride=self.stride).clamp(-1, 1)

    def spec(self) -> dict[str, Any]:
        return {
            "kind": "pca", "image_channels": self.image_channels, "stride": self.stride, "channels": self.channels,
            **super().spec(),
        }  # fmt: skip

    def _cut(self, images: Float[Tensor, "n c H W"]) -> Float[Tensor, "n d l"]:
        """images -> their squares, row by row."""
        return functional.unfold(images, self.stride, stride=self.stride)
