"""The contract of a tokenizer: images in [-1, 1] <-> latents of mean 0 and standard deviation 1.

The scale of the raw latents is kept here, in two buffers, and no other room knows of it.

Mean and standard deviation of a tokenizer's raw latents, by one pass over images.

What a tokenizer says of a picture before anything is drawn or scaled: what a latent cache keeps.

Raw moments do not know the tokenizer's mean and standard deviation, so that a cache outlives measuring them anew.

What is left of a picture that goes through a tokenizer and back: no model of its latents can do better.
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
"""One number, or one for each channel."""


@dataclass(frozen=True)
class Posterior:
    """What encoding says of the normalised latents: an independent normal for each value."""

    mean: Float[Tensor, "n c h w"]
    std: Float[Tensor, "n c h w"]
    """0 everywhere for a tokenizer that is a plain function."""

    def sample(self, noise: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Latents drawn with the given standard normal `noise`."""
        return self.mean + self.std * noise


class Tokenizer(nn.Module, ABC):
    """Images <-> latents. Made from values and state dicts; reads no files.

    Without `mean` and `std` the statistics of the raw latents are unknown: the tokenizer then passes them through as
    they are, `measured` is False, and they have to be measured (`mar.tokenizer.base`) before a model is trained.
    """

    mean: Tensor
    std: Tensor
    deterministic = False
    """Whether the posterior's standard deviation is 0: an image has one latent."""

    def __init__(
        self, image_channels: int, channels: int, stride: int, mean: Statistic | None, std: Statistic | None
    ) -> None:
        super().__init__()
        self.image_channels = image_channels
        self.channels = channels
        self.stride = stride
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))
        self.measured = False
        if (mean is None) != (std is None):
            raise ValueError("mean and std: got only one of them, expected both or neither")
        if mean is not None and std is not None:
            self.set_statistics(mean, std)

    def set_statistics(self, mean: Statistic, std: Statistic) -> None:
        """Takes the mean and standard deviation of the raw latents: one number each, or one for each channel."""
        new = [torch.as_tensor(value, dtype=torch.float32, device="cpu").reshape(-1) for value in (mean, std)]
        for name, value in zip(("mean", "std"), new, strict=True):
            if len(value) not in (1, self.channels) or not value.isfinite().all():
                expected = f"1 or {self.channels} finite numbers"
                raise ValueError(f"{name} of the latents: got {value.tolist()}, expected {expected}")
        if not (new[1] > 0).all():
            raise ValueError(f"std of the latents: got {new[1].tolist()}, expected positive numbers")
        # Real numbers even where the weights are still to come (on the meta device).
        device = torch.device("cpu") if self.mean.is_meta else self.mean.device
        self.mean, self.std = (value.clone().to(device) for value in torch.broadcast_tensors(*new))
        self.measured = True

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Takes what it lacks, one mean and one deviation of all raw latents, from `batches` of images (n, c, H, W) in
        [-1, 1]. ValueError without images."""

        statistics = measure_latents(self, batches)
        self.set_statistics(statistics.mean, statistics.std)

    def found(self) -> dict[str, Tensor]:
        """What it has taken from pictures, by name: a run saves it, and gives it to `take` when it goes on."""
        return {"mean": self.mean, "std": self.std}

    def take(self, found: Mapping[str, Tensor]) -> None:
        """Takes over what another of its kind has `found`."""
        self.set_statistics(found["mean"], found["std"])

    @abstractmethod
    def encode(self, images: Float[Tensor, "n c H W"]) -> Posterior:
        """images in [-1, 1] -> posterior of their normalised latents (n, channels, H / stride, W / stride)."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k H W"]:
        """normalised latents -> images, clipped to [-1, 1], float32."""

    def spec(self) -> dict[str, Any]:
        """All that `build` needs, together with `state_dict()`, to make this tokenizer again; JSON-able."""
        return {"measured": self.measured, "per_channel": len(self.mean) > 1}

    def image_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width, in pixels, of images whose latents have so many rows and columns."""
        return grid[0] * self.stride, grid[1] * self.stride

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError for images that can't be cut into latent cells, or have other channels."""
        _, c, height, width = images.shape
        if c != self.image_channels:
            raise ValueError(f"images: got {c} channels, but this tokenizer takes {self.image_channels}")
        if height % self.stride or width % self.stride:
            raise ValueError(f"images: got {height}x{width} pixels, expected multiples of the stride {self.stride}")

    def normalise(self, raw: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """raw latents -> latents of mean 0 and standard deviation 1."""
        return (raw - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def denormalise(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """latents of mean 0 and standard deviation 1 -> raw latents."""
        return latents * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)

    def prepare(self, spec: Mapping[str, Any]) -> None:
        """Gives the buffers the shapes that `spec()` tells, for `load_state_dict` to fill, and the flag its value."""
        if spec.get("per_channel", False):
            self.mean, self.std = self.mean.new_zeros(self.channels), self.std.new_ones(self.channels)
        self.measured = bool(spec.get("measured", False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to(...)` and its kin; what was found in pictures moves along but stays in float32."""
        found = self.found()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not found["mean"].is_meta:
            for name, value in found.items():
                setattr(self, name, value.to(self.mean.device))
        return self


@dataclass(frozen=True)
class LatentStats:
    """Of raw latents: one number each, or one for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    """How many images were measured."""


def measure_latents(tokenizer: Tokenizer, batches: Iterable[Tensor], per_channel: bool = False) -> LatentStats:
    """The statistics of what `tokenizer` makes of `batches` of images (n, c, H, W) in [-1, 1], on its device.

    They are those of sampled latents, without sampling: the variance is that of the posterior's mean plus the mean of
    the posterior's variance. Sums are in float64. The tokenizer is not changed: `set_statistics` does that. Raises
    ValueError without images.
    """
    sums = torch.zeros(2, tokenizer.channels, dtype=torch.float64)
    values = images = 0
    with torch.no_grad():
        for batch in batches:
            posterior = tokenizer.encode(batch.to(tokenizer.mean.device))
            mean = tokenizer.denormalise(posterior.mean).double()
            std = posterior.std.double() * tokenizer.std.double().view(-1, 1, 1)
            sums += torch.stack([mean.sum((0, 2, 3)), (mean.square() + std.square()).sum((0, 2, 3))]).cpu()
            values += mean[:, 0].numel()
            images += len(batch)
    if not images:
        raise ValueError("tokenizer statistics: there are no images to measure")
    first, second = (sums if per_channel else sums.mean(1, keepdim=True)) / values
    std = (second - first.square()).clamp(min=0).sqrt()
    return LatentStats(tuple(first.tolist()), tuple(std.tolist()), images)


# What changes an autoencoder's arithmetic and does not show in its weights. The rest of diffusers' config is left out:
# a newer version that notes more in it would make every cache another tokenizer's.
_ARITHMETIC = ("down_block_types", "up_block_types", "act_fn", "norm_num_groups")


@dataclass(frozen=True)
class LatentMoments:
    """Mean and log-variance of raw latents, float32."""

    mean: Float[Tensor, "n c h w"]
    logvar: Float[Tensor, "n c h w"] | None
    """None for a deterministic tokenizer."""

    def to(self, device: torch.device) -> LatentMoments:
        """The same on another device."""
        return LatentMoments(self.mean.to(device), None if self.logvar is None else self.logvar.to(device))


def unscaled_moments(tokenizer: Tokenizer, images: Float[Tensor, "n k H W"]) -> LatentMoments:
    """images in [-1, 1] -> moments of what `tokenizer.encode` makes of them: of the raw latents where its mean is 0
    and its standard deviation 1."""
    posterior = tokenizer.encode(images)
    mean = posterior.mean.float()
    return LatentMoments(mean, None if tokenizer.deterministic else 2 * posterior.std.float().log())


def to_posterior(tokenizer: Tokenizer, moments: LatentMoments) -> Posterior:
    """raw moments -> posterior of the normalised latents, as `tokenizer.encode` gives it for the pictures."""
    mean = tokenizer.normalise(moments.mean)
    if moments.logvar is None:
        return Posterior(mean, torch.zeros_like(mean))
    return Posterior(mean, torch.exp(0.5 * moments.logvar) / tokenizer.std.view(-1, 1, 1))


def measure_moments(batches: Iterable[LatentMoments]) -> LatentStats:
    """The statistics that `mar.tokenizer.base.measure_latents` finds on the pictures, from their raw moments: one
    number each. Raises ValueError without any."""
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
    """sha256, in hex, of all that raw moments depend on: the tokenizer's kind and weights, not its statistics.

    `without`: tensors that are left out.
    """
    left_out = {*without}
    spec = {name: value for name, value in tokenizer.spec().items() if name not in ("measured", "per_channel")}
    if "config" in spec:
        spec["config"] = {name: spec["config"].get(name) for name in _ARITHMETIC}
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if name not in left_out:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
