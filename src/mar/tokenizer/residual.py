"""The residual tokenizer: principal components, and a small network that learns what they lack.

Encoder and decoder are linear maps plus convolutional networks:

    latents = PCA(image) + E(image)        image = PCA^T(latents) + D(latents)

The last layers of E and D start at zero, so an untrained tokenizer is as good as its principal components, and training
begins there. Squares of pixels become channels (space to depth) instead of strided convolutions, as in DC-AE (arXiv
2410.10733), whose residual autoencoding is the published kin.
Letters of shapes: n images of c channels and H x W pixels, k latent channels, h x w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mar.tokenizer.base import Posterior, Statistic, Tokenizer
from mar.tokenizer.pca import PCATokenizer

GROUPS = 8
"""Groups of a block's norm; widths are multiples of it."""


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice; added to the input. The last convolution starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = _zero(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Float[Tensor, "n w h v"]) -> Float[Tensor, "n w h v"]:
        """Return the input plus the block's output."""
        y = self.first(functional.silu(self.norm(x)))
        return x + self.second(functional.silu(y))


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualTokenizer(Tokenizer):
    """Images <-> principal components with a learned residual.

    Latents are deterministic. They are normalized per channel, as `PCATokenizer` scales its components: a channel's
    variance is proportional to its standard deviation in pixels.

    Args:
        image_channels: channels of the images, 1 or 3.
        stride: side of a latent cell in pixels, a power of two from 2.
        channels: channels of the latents.
        width: features of the first stage; the second, at the latents' size, has more.
        depth: blocks of a stage.
        mean, std: statistics of the raw latents, per channel.
        sample_size: side of the images that it was trained on, as diffusers calls it; a note.
    """

    deterministic = True

    def __init__(
        self,
        image_channels: int = 3,
        stride: int = 8,
        channels: int = 16,
        width: int = 96,
        depth: int = 2,
        mean: Statistic | None = None,
        std: Statistic | None = None,
        *,
        sample_size: int | None = None,
    ) -> None:
        if stride < 2 or stride & (stride - 1):
            raise ValueError(f"stride: got {stride}, expected a power of two from 2 on")
        if width < GROUPS or width % GROUPS:
            raise ValueError(f"width: got {width}, expected a multiple of {GROUPS}")
        super().__init__(image_channels, channels, stride, mean, std)
        self.width, self.depth, self.sample_size = width, depth, sample_size
        self.linear = PCATokenizer(image_channels, stride, channels)
        # pixels -> squares at half the latents' stride -> latent cells
        self.inner = inner = max(stride // 2, 1)
        pixels, deep = image_channels * inner**2, width + width * 2 // 3 // GROUPS * GROUPS
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(inner),
            nn.Conv2d(pixels, width, 3, padding=1),
            *(ResidualBlock(width) for _ in range(max(depth - 1, 1))),
            nn.PixelUnshuffle(stride // inner),
            nn.Conv2d(width * (stride // inner) ** 2, width, 1),
            *(ResidualBlock(width) for _ in range(depth)),
            _zero(nn.Conv2d(width, channels, 1)),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, deep, 3, padding=1),
            *(ResidualBlock(deep) for _ in range(depth + 1)),
            nn.Conv2d(deep, width * (stride // inner) ** 2, 1),
            nn.PixelShuffle(stride // inner),
            *(ResidualBlock(width) for _ in range(depth)),
            _zero(nn.Conv2d(width, pixels, 3, padding=1)),
            nn.PixelShuffle(inner),
        )
        self.prepare({"per_channel": True, "measured": False})

    @property
    def last_layer(self) -> nn.Conv2d:
        """Last convolution of the decoder."""
        layer = self.decoder[-2]
        assert isinstance(layer, nn.Conv2d)
        return layer

    @property
    def hidden_kernels(self) -> list[Tensor]:
        """Kernels of all convolutions but the last ones, whose outputs are features."""
        return [m.weight for net in (self.encoder, self.decoder) for m in net.modules()
                if isinstance(m, nn.Conv2d) and m is not self.encoder[-1] and m is not self.last_layer]  # fmt: skip

    def fit_linear(self, batches: Iterable[Tensor]) -> None:
        """Fit the principal components to images (n, c, H, W) in [-1, 1], before training."""
        self.linear.fit(batches)
        self.set_statistics(torch.zeros(self.channels), torch.ones(self.channels))

    def encode(self, images: Float[Tensor, "n c H W"]) -> Posterior:
        """Encode images in [-1, 1]."""
        self.check_images(images)
        latents = self.normalize(self.encode_raw(images.float()))
        return Posterior(latents, torch.zeros_like(latents))

    def decode(self, latents: Float[Tensor, "n k h w"]) -> Float[Tensor, "n c H W"]:
        """Decode normalized latents to images, clipped to [-1, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.decode_raw(self.denormalize(latents.float())).clamp(-1, 1)

    def encode_raw(self, images: Float[Tensor, "n c H W"]) -> Float[Tensor, "n k h w"]:
        """Return the principal components plus the encoder's residual."""
        return self.linear.encode(images).mean + self.encoder(images)

    def decode_raw(self, latents: Float[Tensor, "n k h w"]) -> Float[Tensor, "n c H W"]:
        """Return the components' image plus the decoder's residual, not clipped."""
        return self.linear.decode_raw(latents) + self.decoder(latents)

    def config(self) -> dict[str, Any]:
        """Return kind and sizes."""
        return {
            "kind": "residual", "image_channels": self.image_channels, "stride": self.stride,
            "channels": self.channels, "width": self.width, "depth": self.depth, "sample_size": self.sample_size,
            **super().config(),
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ResidualTokenizer:
        """Create the tokenizer of `config()`."""
        names = ("image_channels", "stride", "channels", "width", "depth", "sample_size")
        return cls(**{name: config[name] for name in names if name in config})

    def set_statistics(self, mean: Statistic, std: Statistic) -> None:
        """Set the statistics of raw latents, one each or per channel; they are kept per channel."""
        stats = (torch.as_tensor(value, dtype=torch.float32).reshape(-1) for value in (mean, std))
        super().set_statistics(*(value.expand(self.channels) if len(value) == 1 else value for value in stats))

    def prepare(self, config: Mapping[str, Any]) -> None:
        """Give the buffers the shapes of `config`, for `load_state_dict` to fill."""
        super().prepare(config)
        self.linear.has_stats = self.has_stats

    def arithmetic(self) -> dict[str, Any]:
        """Return the sizes without the note."""
        return {name: value for name, value in super().arithmetic().items() if name != "sample_size"}
