"""The contract of tokenizers: images in [-1, 1] <-> normalized latents.

Normalized latents have mean 0 and standard deviation 1. A tokenizer keeps the scale of its raw latents in two buffers;
no other module knows it. Below the contract: statistics of raw latents, their moments (the content of a latent cache),
fingerprint, and reconstruction.
Letters of shapes: n images of c or k channels and H x W pixels, h x w latent cells.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Statistic = float | Sequence[float] | Tensor
"""One number, or one per channel."""


@dataclass(frozen=True)
class Posterior:
    """Distribution of an image's normalized latents: independent normals."""

    mean: Float[Tensor, "n c h w"]
    std: Float[Tensor, "n c h w"]
    """Zero for a deterministic tokenizer."""

    def sample(self, noise: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Draw latents with the given standard normal `noise`."""
        return self.mean + self.std * noise


class Tokenizer(nn.Module, ABC):
    """Images <-> normalized latents.

    Args:
        image_channels: channels of the images.
        channels: channels of the latents.
        stride: pixels per latent cell, in each direction.
        mean, std: statistics of the raw latents. Without them `has_stats` is False, latents are the raw ones, and `fit`
            has to measure them before training.
    """

    mean: Tensor
    std: Tensor
    deterministic = False
    """True if the posterior's standard deviation is 0."""
    name: str | None = None
    """Name for `mar.tokenizer.from_name` (None: it is loaded from files)."""
    lossless = False
    """True if decoding restores every image exactly."""
    fixed_size: tuple[int, int] | None = None
    """The only height and width of its images, in pixels (None: any multiples of the stride)."""
    learns_basis = False
    """True if `fit` measures more than mean and standard deviation, so that raw latents depend on its images."""

    def __init__(
        self, image_channels: int, channels: int, stride: int, mean: Statistic | None, std: Statistic | None
    ) -> None:
        super().__init__()
        self.image_channels = image_channels
        self.channels = channels
        self.stride = stride
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))
        self.has_stats = False
        if (mean is None) != (std is None):
            raise ValueError("mean and std: got only one of them, expected both or neither")
        if mean is not None and std is not None:
            self.set_statistics(mean, std)

    # ---- to be implemented by each tokenizer

    @abstractmethod
    def encode(self, images: Float[Tensor, "n c H W"]) -> Posterior:
        """Encode images in [-1, 1] to the posterior of their latents."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k H W"]:
        """Decode normalized latents to images, clipped to [-1, 1], float32."""

    def config(self) -> dict[str, Any]:
        """Return the JSON-able config for `mar.tokenizer.build`."""
        return {"measured": self.has_stats, "per_channel": len(self.mean) > 1}

    def arithmetic(self) -> dict[str, Any]:
        """Return the part of `config()` that latents depend on."""
        return {name: value for name, value in self.config().items() if name not in ("measured", "per_channel")}

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Tokenizer:
        """Create the tokenizer of a `config()`, before `load_state_dict`."""

    @classmethod
    def from_name(cls, name: str, image_channels: int, channels: int | None) -> Tokenizer:
        """Create a tokenizer by name, if its entry in `TOKENIZERS` has names."""
        raise NotImplementedError(f"{cls.__name__}: got the name {name!r}, expected files to load it from")

    # ---- statistics

    def set_statistics(self, mean: Statistic, std: Statistic) -> None:
        """Set the statistics of raw latents, one each or per channel."""
        stats = [torch.as_tensor(value, dtype=torch.float32, device="cpu").reshape(-1) for value in (mean, std)]
        for name, value in zip(("mean", "std"), stats, strict=True):
            if len(value) not in (1, self.channels) or not value.isfinite().all():
                expected = f"1 or {self.channels} finite numbers"
                raise ValueError(f"{name} of the latents: got {value.tolist()}, expected {expected}")
        if not (stats[1] > 0).all():
            raise ValueError(f"std of the latents: got {stats[1].tolist()}, expected positive numbers")
        # on the CPU before the weights are loaded (then all is on the meta device)
        device = torch.device("cpu") if self.mean.is_meta else self.mean.device
        self.mean, self.std = (value.clone().to(device) for value in torch.broadcast_tensors(*stats))
        self.has_stats = True

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Measure mean and standard deviation of raw latents, one number each.

        `batches` are images (n, c, H, W) in [-1, 1]. Raises ValueError without images.
        """
        stats = measure_latents(self, batches)
        self.set_statistics(stats.mean, stats.std)

    def fitted_state(self) -> dict[str, Tensor]:
        """Return the tensors that `fit` measured, by name; a run saves them."""
        return {"mean": self.mean, "std": self.std}

    def load_fitted_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the `fitted_state` of another tokenizer of this kind."""
        self.set_statistics(state["mean"], state["std"])

    def normalize(self, raw: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Scale raw latents to mean 0 and standard deviation 1."""
        return (raw - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def denormalize(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Scale normalized latents to raw ones."""
        return latents * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)

    def prepare(self, config: Mapping[str, Any]) -> None:
        """Give the buffers the shapes of `config`, for `load_state_dict` to fill."""
        if config.get("per_channel", False):
            self.mean, self.std = self.mean.new_zeros(self.channels), self.std.new_ones(self.channels)
        self.has_stats = bool(config.get("measured", False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Implement `.to(...)` and its kin; the fitted state stays in float32."""
        fitted = self.fitted_state()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not fitted["mean"].is_meta:
            for name, value in fitted.items():
                setattr(self, name, value.to(self.mean.device))
        return self

    # ---- images

    def image_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return height and width in pixels of images with `grid` latent cells."""
        return grid[0] * self.stride, grid[1] * self.stride

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError for images of other channels or of unfit sizes."""
        _, c, height, width = images.shape
        if c != self.image_channels:
            raise ValueError(f"images: got {c} channels, expected {self.image_channels} for this tokenizer")
        if expected := self.unfit(height, width):
            raise ValueError(f"images: got {height}x{width} pixels, expected {expected}")

    def unfit(self, height: int, width: int) -> str | None:
        """Return which sizes of images are expected, in words; None: this one will do."""
        if self.fixed_size not in (None, (height, width)):
            return "{}x{}: the tokenizer knows no other size".format(*self.fixed_size)
        if min(height, width) < 1 or height % self.stride or width % self.stride:
            return f"multiples of the stride {self.stride}"
        return None


# ---- statistics of raw latents


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation of raw latents, one each or per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    """Number of images measured."""


def measure_latents(tokenizer: Tokenizer, batches: Iterable[Tensor], per_channel: bool = False) -> LatentStats:
    """Measure the raw latents of images (n, c, H, W) in [-1, 1].

    These are the statistics of sampled latents, computed without sampling: the variance is that of the posterior's mean
    plus the mean of the posterior's variance. Sums are in float64. The tokenizer is not changed. Raises ValueError
    without images.
    """
    sums = torch.zeros(2, tokenizer.channels, dtype=torch.float64)
    values = images = 0
    with torch.no_grad():
        for batch in batches:
            posterior = tokenizer.encode(batch.to(tokenizer.mean.device))
            mean = tokenizer.denormalize(posterior.mean).cpu().double()  # Apple's GPUs have no float64
            std = posterior.std.cpu().double() * tokenizer.std.cpu().double().view(-1, 1, 1)
            sums += torch.stack([mean.sum((0, 2, 3)), (mean.square() + std.square()).sum((0, 2, 3))])
            values += mean[:, 0].numel()
            images += len(batch)
    if not images:
        raise ValueError("tokenizer statistics: got no images that can be read, expected at least one")
    mean, second_moment = (sums if per_channel else sums.mean(1, keepdim=True)) / values
    std = (second_moment - mean.square()).clamp(min=0).sqrt()
    return LatentStats(tuple(mean.tolist()), tuple(std.tolist()), images)


# ---- moments of raw latents


@dataclass(frozen=True)
class LatentMoments:
    """Mean and log-variance of raw latents, float32, as a cache stores them.

    They do not depend on the tokenizer's statistics, so a cache stays valid if these are measured again.
    """

    mean: Float[Tensor, "n c h w"]
    logvar: Float[Tensor, "n c h w"] | None
    """None for a deterministic tokenizer."""

    def to(self, device: torch.device) -> LatentMoments:
        """Move the moments to a device; from pinned memory, without waiting for it."""
        mean, logvar = self.mean.to(device, non_blocking=True), self.logvar
        return LatentMoments(mean, None if logvar is None else logvar.to(device, non_blocking=True))

    def pin_memory(self) -> LatentMoments:
        """Copy the moments to pinned memory."""
        return LatentMoments(self.mean.pin_memory(), None if self.logvar is None else self.logvar.pin_memory())


def unscaled_moments(tokenizer: Tokenizer, images: Float[Tensor, "n k H W"]) -> LatentMoments:
    """Encode images to raw moments, with a tokenizer of mean 0 and std 1."""
    posterior = tokenizer.encode(images)
    mean = posterior.mean.float()
    return LatentMoments(mean, None if tokenizer.deterministic else 2 * posterior.std.float().log())


def to_posterior(tokenizer: Tokenizer, moments: LatentMoments) -> Posterior:
    """Convert raw moments to the posterior that `tokenizer.encode` returns."""
    mean = tokenizer.normalize(moments.mean)
    if moments.logvar is None:
        return Posterior(mean, torch.zeros_like(mean))
    return Posterior(mean, torch.exp(0.5 * moments.logvar) / tokenizer.std.view(-1, 1, 1))


def measure_moments(batches: Iterable[LatentMoments]) -> LatentStats:
    """Compute statistics from raw moments, one number each.

    Raises ValueError without moments.
    """
    total = total_of_squares = 0.0
    values = images = 0
    for moments in batches:
        mean = moments.mean.double()
        total += float(mean.sum())
        total_of_squares += float(mean.square().sum())
        total_of_squares += 0.0 if moments.logvar is None else float(moments.logvar.double().exp().sum())
        values += mean.numel()
        images += len(mean)
    if not images:
        raise ValueError("tokenizer statistics: got no latents, expected at least one")
    overall_mean = total / values
    std = max(total_of_squares / values - overall_mean**2, 0.0) ** 0.5
    return LatentStats((overall_mean,), (std,), images)


# ---- fingerprint


def fingerprint(tokenizer: Tokenizer, without: Iterable[str] = ("mean", "std")) -> str:
    """Hash (sha256, hex) kind and weights, on which raw moments depend.

    Tensors whose names are in `without` do not count, by default the statistics.
    """
    left_out = {*without}
    digest = hashlib.sha256(json.dumps(tokenizer.arithmetic(), sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if name not in left_out:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- reconstruction


@dataclass(frozen=True)
class RoundTrip:
    """Quality of reconstructions, an upper limit for any model of the latents."""

    psnr: float
    """Mean of the images' peak signal-to-noise ratios, in decibels; nan without images."""
    images: int


def psnr(images: Float[Tensor, "n c h w"], others: Float[Tensor, "n c h w"]) -> Float[Tensor, "n"]:
    """Compute the PSNR of each pair of images in [-1, 1], in decibels.

    It is 10 log10(2^2 / mean squared error), at most 100.
    """
    error = (images - others).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Float[Tensor, "n c H W"]) -> Float[Tensor, "n c H W"]:
    """Encode images and decode the posterior's mean, on the tokenizer's device."""
    return tokenizer.decode(tokenizer.encode(images.to(tokenizer.mean.device)).mean)


def round_trip(tokenizer: Tokenizer, batches: Iterable[Tensor]) -> RoundTrip:
    """Measure the reconstruction of images (n, c, H, W) in [-1, 1]."""
    values = [psnr(images, reconstruct(tokenizer, images).to(images.device)) for images in batches]
    all_values = torch.cat(values).double() if values else torch.zeros(0)
    return RoundTrip(float(all_values.mean()), len(all_values))
