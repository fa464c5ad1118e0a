"""DC-AE (arXiv 2410.10733): diffusers' `AutoencoderDC` behind the contract of tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderDC
from jaxtyping import Float
from torch import Tensor

from mar.tokenizer.base import Posterior, Statistic, Tokenizer
from mar.tokenizer.kl import plain_config

_RESIDUAL, _ATTENTION = ["ResBlock"] * 3, ["EfficientViTBlock"] * 3
DC_AE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": [*_RESIDUAL, *_ATTENTION],
    "decoder_block_types": [*_RESIDUAL, *_ATTENTION],
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [0, 4, 8, 2, 2, 2],
    "decoder_layers_per_block": [0, 5, 10, 2, 2, 2],
    "encoder_qkv_multiscales": [[]] * 6,
    "decoder_qkv_multiscales": [[]] * 6,
    "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * 3,
    "decoder_act_fns": ["relu"] * 3 + ["silu"] * 3,
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "scaling_factor": 0.3189,
}
"""DC-AE f32c32-in-1.0 in diffusers' terms: stride 32, 32 channels, 323 M parameters."""

_UNSET_SCALE = 1.0
"""diffusers' default of the scale, in files that have none."""
DC_SLICE = 4
"""Images that are encoded or decoded at a time, to bound memory at 512 pixels and more."""


class DCTokenizer(Tokenizer):
    """An autoencoder without a posterior; it always runs in float32.

    Its mean counts as 0, and its standard deviation as 1 / `scaling_factor`, where its config has one.
    """

    deterministic = True

    def __init__(self, autoencoder: AutoencoderDC, mean: Statistic | None = None, std: Statistic | None = None) -> None:
        config = autoencoder.config
        if mean is None and std is None and config.scaling_factor != _UNSET_SCALE:
            mean, std = 0.0, 1 / config.scaling_factor
        stride = 2 ** (len(config.encoder_block_out_channels) - 1)
        super().__init__(config.in_channels, config.latent_channels, stride, mean, std)
        self.autoencoder = autoencoder.eval()

    def encode(self, images: Float[Tensor, "n c H W"]) -> Posterior:
        """Encode images, some at a time, to float32 latents."""
        self.check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            raw = [self.autoencoder.encode(part).latent for part in images.float().split(DC_SLICE)]
        mean = self.normalize(torch.cat(raw))
        return Posterior(mean, torch.zeros_like(mean))

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k H W"]:
        """Decode normalized latents, some at a time, to images in [-1, 1]."""
        raw = self.denormalize(latents.float())
        with torch.autocast(raw.device.type, enabled=False):
            images = [self.autoencoder.decode(part).sample for part in raw.split(DC_SLICE)]
        return torch.cat(images).clamp(-1, 1)

    def config(self) -> dict[str, Any]:
        """Return kind and architecture."""
        return {"kind": "dc", "config": plain_config(self.autoencoder.config), **super().config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DCTokenizer:
        """Create the tokenizer of `config()`, with random weights."""
        if not isinstance(config.get("config"), Mapping):
            raise ValueError(
                f"tokenizer: got config {config.get('config')!r}, expected one of a diffusers AutoencoderDC"
            )
        return cls(AutoencoderDC.from_config(plain_config(config["config"])))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Implement `.to(...)` and its kin; weights stay in float32, unrounded."""
        return super()._apply(lambda t: fn(t) if t.is_meta else t.to(fn(t).device), recurse)
