"""The contract of a tokenizer: images in [-1, 1] <-> latents of mean 0 and standard deviation 1.

The scale of the raw latents is kept here, in two buffers; no other room knows of it. Below the contract are the
statistics of raw latents, their moments (what a latent cache stores), and how well images come back.
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


@dataclass(frozen=True)
class Posterior:
    """The distribution of an image's normalized latents: an independent normal for each value."""

    mean: Float[Tensor, "n c h w"]
    std: Float[Tensor, "n c h w"]
    """0 everywhere for a deterministic tokenizer."""

    def sample(self, noise: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Draw latents with the given standard normal `noise`."""
        return self.mean + self.std * noise


class Tokenizer(nn.Module, ABC):
    """Images <-> latents. Made from values and state dicts; reads no files.

    Without `mean` and `std` the statistics of the raw latents are unknown: latents are then the raw ones, `has_stats`
    is False, and `fit` has to measure them before a model is trained.
    """

    mean: Tensor
    std: Tensor
    deterministic = False
    """Whether an image has one latent: the posterior's standard deviation is 0."""
    name: str | None = None
    """What `mar.tokenizer.from_name` calls it. None: it is loaded from files."""
    lossless = False
    """Whether every image comes back as it was."""
    learns_basis = False
    """Whether `fit` takes more than mean and standard deviation from the images, so that latents depend on them."""

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

    # ---- what every tokenizer has of its own

    @abstractmethod
    def encode(self, images: Float[Tensor, "n c H W"]) -> Posterior:
        """Encode images in [-1, 1] to the posterior of latents (n, channels, H / stride, W / stride)."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k H W"]:
        """Decode normalized latents to images, clipped to [-1, 1], float32."""

    def config(self) -> dict[str, Any]:
        """Return all that `mar.tokenizer.build` needs beside `state_dict()`; JSON-able."""
        return {"measured": self.has_stats, "per_channel": len(self.mean) > 1}

    def arithmetic(self) -> dict[str, Any]:
        """Return the part of `config()` that latents depend on, apart from the weights."""
        return {name: value for name, value in self.config().items() if name not in ("measured", "per_channel")}

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Tokenizer:
        """Create the tokenizer that `config()` describes, with weights and statistics still to come."""

    @classmethod
    def from_name(cls, name: str, image_channels: int, channels: int | None) -> Tokenizer:
        """Create the tokenizer of a name; for kinds whose entry in `TOKENIZERS` has names."""
        raise NotImplementedError(f"{cls.__name__} is loaded from files, got the name {name!r}")

    # ---- statistics

    def set_statistics(self, mean: Statistic, std: Statistic) -> None:
        """Set mean and standard deviation of the raw latents: one number each, or one for each channel."""
        new = [torch.as_tensor(value, dtype=torch.float32, device="cpu").reshape(-1) for value in (mean, std)]
        for name, value in zip(("mean", "std"), new, strict=True):
            if len(value) not in (1, self.channels) or not value.isfinite().all():
                expected = f"1 or {self.channels} finite numbers"
                raise ValueError(f"{name} of the latents: got {value.tolist()}, expected {expected}")
        if not (new[1] > 0).all():
            raise ValueError(f"std of the latents: got {new[1].tolist()}, expected positive numbers")
        # real numbers even where the weights are still to come (on the meta device)
        device = torch.device("cpu") if self.mean.is_meta else self.mean.device
        self.mean, self.std = (value.clone().to(device) for value in torch.broadcast_tensors(*new))
        self.has_stats = True

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Measure one mean and standard deviation of all raw latents on images (n, c, H, W) in [-1, 1].

        Raises ValueError without images.
        """
        stats = measure_latents(self, batches)
        self.set_statistics(stats.mean, stats.std)

    def fitted_state(self) -> dict[str, Tensor]:
        """Return what `fit` has measured, by name; a run saves it."""
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
        """Implement `.to(...)` and its kin; the fitted state moves along but stays in float32."""
        fitted = self.fitted_state()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not fitted["mean"].is_meta:
            for name, value in fitted.items():
                setattr(self, name, value.to(self.mean.device))
        return self

    # ---- images

    def image_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return height and width, in pixels, of images with latents of `grid` rows and columns."""
        return grid[0] * self.stride, grid[1] * self.stride

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError for images of other channels, or that can't be cut into latent cells."""
        _, c, height, width = images.shape
        if c != self.image_channels:
            raise ValueError(f"images: got {c} channels, but this tokenizer takes {self.image_channels}")
        if height % self.stride or width % self.stride:
            raise ValueError(f"images: got {height}x{width} pixels, expected multiples of the stride {self.stride}")


# ---- statistics of raw latents


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation of raw latents: one number each, or one for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    """How many images were measured."""


def measure_latents(tokenizer: Tokenizer, batches: Iterable[Tensor], per_channel: bool = False) -> LatentStats:
    """Measure the raw latents of images (n, c, H, W) in [-1, 1], on the tokenizer's device.

    These are the statistics of sampled latents, without sampling: the variance is that of the posterior's mean plus
    the mean of the posterior's variance. Sums are in float64. The tokenizer is not changed. Raises ValueError without
    images.
    """
    sums = torch.zeros(2, tokenizer.channels, dtype=torch.float64)
    values = images = 0
    with torch.no_grad():
        for batch in batches:
            posterior = tokenizer.encode(batch.to(tokenizer.mean.device))
            mean = tokenizer.denormalize(posterior.mean).double()
            std = posterior.std.double() * tokenizer.std.double().view(-1, 1, 1)
            sums += torch.stack([mean.sum((0, 2, 3)), (mean.square() + std.square()).sum((0, 2, 3))]).cpu()
            values += mean[:, 0].numel()
            images += len(batch)
    if not images:
        raise ValueError("tokenizer statistics: there are no images to measure")
    first, second = (sums if per_channel else sums.mean(1, keepdim=True)) / values
    std = (second - first.square()).clamp(min=0).sqrt()
    return LatentStats(tuple(first.tolist()), tuple(std.tolist()), images)


# ---- moments of raw latents


@dataclass(frozen=True)
class LatentMoments:
    """Mean and log-variance of raw latents, float32: what a latent cache stores.

    They do not depend on the tokenizer's mean and standard deviation, so that a cache outlives measuring them anew.
    """

    mean: Float[Tensor, "n c h w"]
    logvar: Float[Tensor, "n c h w"] | None
    """None for a deterministic tokenizer."""

    def to(self, device: torch.device) -> LatentMoments:
        """Return the same on another device."""
        return LatentMoments(self.mean.to(device), None if self.logvar is None else self.logvar.to(device))


def unscaled_moments(tokenizer: Tokenizer, images: Float[Tensor, "n k H W"]) -> LatentMoments:
    """Encode images to moments, which are the raw ones where the tokenizer's mean is 0 and its deviation 1."""
    posterior = tokenizer.encode(images)
    mean = posterior.mean.float()
    return LatentMoments(mean, None if tokenizer.deterministic else 2 * posterior.std.float().log())


def to_posterior(tokenizer: Tokenizer, moments: LatentMoments) -> Posterior:
    """Turn raw moments into the posterior that `tokenizer.encode` gives for the images."""
    mean = tokenizer.normalize(moments.mean)
    if moments.logvar is None:
        return Posterior(mean, torch.zeros_like(mean))
    return Posterior(mean, torch.exp(0.5 * moments.logvar) / tokenizer.std.view(-1, 1, 1))


def measure_moments(batches: Iterable[LatentMoments]) -> LatentStats:
    """Compute the statistics of `measure_latents`, one number each, from raw moments.

    Raises ValueError without any.
    """
    first = second = 0.0
    values = images = 0
    for moments in batches:
        mean = moments.mean.double()
        first += float(mean.sum())
        second += float(mean.square().sum())
        second += 0.0 if moments.logvar is None else float(moments.logvar.double().exp().sum())
        values += mean.numel()
        images += len(mean)
    if not images:
        raise ValueError("tokenizer statistics: there are no latents to measure")
    mean_of_all = first / values
    return LatentStats((mean_of_all,), (max(second / values - mean_of_all**2, 0.0) ** 0.5,), images)


def fingerprint(tokenizer: Tokenizer, without: Iterable[str] = ("mean", "std")) -> str:
    """Hash (sha256, hex) all that raw moments depend on: kind and weights, not the statistics.

    `without`: names of tensors that are left out.
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
    """How well images come back: no model of the latents can do better."""

    psnr: float
    """Decibels: the mean of the images' peak signal-to-noise ratios; nan without images."""
    images: int


def psnr(images: Float[Tensor, "n c h w"], others: Float[Tensor, "n c h w"]) -> Float[Tensor, "n"]:
    """Compute 10 log10(2^2 / mean squared error) of each pair of images in [-1, 1], in decibels, at most 100."""
    error = (images - others).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Float[Tensor, "n c H W"]) -> Float[Tensor, "n c H W"]:
    """Encode images and decode the posterior's means, on the tokenizer's device."""
    return tokenizer.decode(tokenizer.encode(images.to(tokenizer.mean.device)).mean)


def round_trip(tokenizer: Tokenizer, batches: Iterable[Tensor]) -> RoundTrip:
    """Measure how well `tokenizer` brings back images (n, c, H, W) in [-1, 1]."""
    values = [psnr(images, reconstruct(tokenizer, images).to(images.device)) for images in batches]
    every = torch.cat(values).double() if values else torch.zeros(0)
    return RoundTrip(float(every.mean()), len(every))
