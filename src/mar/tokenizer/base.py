"""The contract of a tokenizer: images in [-1, 1] <-> latents of mean 0 and standard deviation 1.

The scale of the raw latents is kept here, in two buffers, and no other room knows of it.
"""

from __future__ import annotations

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
    they are, `measured` is False, and they have to be measured (`mar.tokenizer.statistics`) before a model is trained.
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
        from mar.tokenizer.statistics import measure  # which knows this class

        statistics = measure(self, batches)
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
