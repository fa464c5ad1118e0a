"""Variational autoencoders: diffusers' `AutoencoderKL` behind the tokenizer's contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from mar.tokenizer.base import Posterior, Statistic, Tokenizer

KL16_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "block_out_channels": [128, 128, 256, 256, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
}
"""The reference's KL-16 in diffusers' terms: stride 16, 16 channels, 66.5 M parameters."""

KL16_STD = 1 / 0.2325
"""Standard deviation of KL-16's raw latents, published with the official weights; their mean counts as 0."""


SLICE = 32
"""Images that are encoded or decoded at a time on a GPU: 256 of 256x256 pixels would need 8.6 GB for one tensor."""

_ARITHMETIC = ("down_block_types", "up_block_types", "act_fn", "norm_num_groups")


class _SiLU(nn.SiLU):
    """SiLU that works in place when gradients are off, which saves 67 MB at 256x256 pixels.

    In an autoencoder its input is the output of a norm, and nothing else reads that.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input, inplace=not torch.is_grad_enabled())


def _slice_size(tensor: Shaped[Tensor, "n c h w"]) -> int:
    """Return how many images are computed at once: on a CPU all, since slices differ in last bits there."""
    return max(len(tensor), 1) if tensor.device.type == "cpu" else SLICE


class KLTokenizer(Tokenizer):
    """A variational autoencoder, whose decoder always runs in float32."""

    def __init__(self, autoencoder: AutoencoderKL, mean: Statistic | None = None, std: Statistic | None = None) -> None:
        config = autoencoder.config
        super().__init__(
            image_channels=config.in_channels,
            channels=config.latent_channels,
            stride=2 ** (len(config.block_out_channels) - 1),
            mean=mean,
            std=std,
        )
        self.autoencoder = autoencoder.eval()
        for parent in [*autoencoder.modules()]:
            for name, child in parent.named_children():
                if type(child) is nn.SiLU:
                    setattr(parent, name, _SiLU())

    def encode(self, images: Float[Tensor, "n c H W"]) -> Posterior:
        """Encode images in the encoder's dtype to a float32 posterior; in slices on a GPU, as `decode`."""
        self.check_images(images)
        dtype = self.autoencoder.encoder.conv_in.weight.dtype
        raw = [self.autoencoder.encode(part.to(dtype)).latent_dist for part in images.split(_slice_size(images))]
        mean, logvar = (torch.cat([getattr(part, name).float() for part in raw]) for name in ("mean", "logvar"))
        return Posterior(self.normalize(mean), torch.exp(0.5 * logvar) / self.std.view(-1, 1, 1))

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k H W"]:
        """Decode normalized latents to images, clipped to [-1, 1], float32.

        On a GPU at most `SLICE` images at a time, which bounds memory, and changes images by rounding at most.
        """
        raw = self.denormalize(latents.float())
        with torch.autocast(raw.device.type, enabled=False):
            images = [self.autoencoder.decode(part).sample for part in raw.split(_slice_size(raw))]
        return (torch.cat(images) if len(images) > 1 else images[0]).clamp(-1, 1)

    def config(self) -> dict[str, Any]:
        """Return kind and architecture."""
        return {"kind": "kl", "config": plain_config(self.autoencoder.config), **super().config()}

    def arithmetic(self) -> dict[str, Any]:
        """Return the settings that change the arithmetic, apart from the weights.

        Other fields of diffusers' config are left out, since a newer version with more fields would change every
        fingerprint.
        """
        arithmetic = super().arithmetic()
        return {**arithmetic, "config": {name: arithmetic["config"].get(name) for name in _ARITHMETIC}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> KLTokenizer:
        """Create the tokenizer of `config()`, with random weights."""
        if not isinstance(config.get("config"), Mapping):
            raise ValueError(
                f"tokenizer: got config {config.get('config')!r}, expected one of a diffusers AutoencoderKL"
            )
        return from_config(config["config"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Implement `.to(...)` and its kin; the decoder stays in float32, unrounded."""
        decoder_parameters = [*self.autoencoder.decoder.parameters()]
        if self.autoencoder.post_quant_conv is not None:
            decoder_parameters += self.autoencoder.post_quant_conv.parameters()
        originals = [parameter.data for parameter in decoder_parameters]
        super()._apply(fn, recurse)
        for parameter, data in zip(decoder_parameters, originals, strict=True):
            if parameter.dtype is not torch.float32 and not data.is_meta:
                parameter.data = data.to(parameter.device, torch.float32)
        return self


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert diffusers' config to JSON-able values, without files and versions."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.items()
        if not name.startswith("_")
    }


def from_config(config: Mapping[str, Any]) -> KLTokenizer:
    """Create a tokenizer with random weights and unknown statistics.

    `config` is diffusers'. Raises ValueError for a class other than `AutoencoderKL`.
    """
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ValueError(f"tokenizer: got a diffusers {kind}, expected an AutoencoderKL")
    return KLTokenizer(AutoencoderKL.from_config(plain_config(config)))


def kl16() -> KLTokenizer:
    """Create the official KL-16 with its published scale and random weights."""
    tokenizer = from_config(KL16_CONFIG)
    tokenizer.set_statistics(0.0, KL16_STD)
    return tokenizer
