"""l-DeTok's tokenizer (arXiv 2507.15856): a vision transformer as encoder and one as decoder.

Tensors have the authors' names. Training adds masked patches and noise, which this file leaves out: it encodes and
decodes.
Letters of shapes: n images of c channels and H x W pixels, h x w latent cells, L = h * w tokens of width d.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mar.tokenizer.base import Posterior, Statistic, Tokenizer

_EPSILON = 1e-6
_LOGVAR_RANGE = (-30.0, 20.0)
_IMAGE_CHANNELS = 3
VIT_SLICE = 64
"""Images that are encoded or decoded at a time, to bound memory; as many as `sample` draws at once."""


@dataclass(frozen=True)
class ViTSize:
    """Size of one transformer."""

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        # a head has rows and columns, sine and cosine, and at least two frequencies
        if min(self.width, self.depth, self.heads) < 1 or self.width % (4 * self.heads) or self.head_width < 8:
            raise ValueError(f"tokenizer: got {self}, expected heads whose width is a multiple of 4, 8 or more")

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads


@dataclass(frozen=True)
class ViTConfig:
    """Architecture of the tokenizer; by default the published BB."""

    image_size: int = 256
    """Pixels of a side; positions are learned, so there is no other size."""
    patch_size: int = 16
    """Pixels of a latent cell's side."""
    channels: int = 16
    """Channels of the latents."""
    encoder: ViTSize = ViTSize(768, 12, 12)
    decoder: ViTSize = ViTSize(768, 12, 12)

    def __post_init__(self) -> None:
        if min(self.image_size, self.patch_size, self.channels) < 1 or self.image_size % self.patch_size:
            raise ValueError(f"tokenizer: got {self}, expected an image_size that is a multiple of patch_size")
        if self.side < 2:
            raise ValueError(f"tokenizer: got {self}, expected two latent cells a side or more")

    @property
    def side(self) -> int:
        """Latent cells of a side."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """Invert `dataclasses.asdict`. Raises ValueError for other fields."""
        try:
            sizes = {name: ViTSize(**values[name]) for name in ("encoder", "decoder")}
            return cls(**{**values, **sizes})
        except (KeyError, TypeError) as error:
            raise ValueError(f"tokenizer: got the config {dict(values)!r}, expected that of a vit: {error}") from None


def rope_angles(side: int, head_width: int) -> Float[Tensor, "L d"]:
    """Compute the angles of a head's channels: the row's, then the column's.

    The two channels of a pair get different angles, which is the original's, so that this is no rotation.
    """
    k = head_width // 4
    frequencies = 2 * math.pi * 7 * 10 ** (-4 * torch.arange(k, dtype=torch.float64) / (k - 1))
    place = torch.linspace(0, 1, side, dtype=torch.float64)
    row, column = place.repeat_interleave(side)[:, None], place.repeat(side)[:, None]
    twice = frequencies.repeat(2)
    return torch.cat([row * twice, column * twice], dim=1)


class _RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + 1e-6) times a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, _EPSILON)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(_apply_rope(q, rope), _apply_rope(k, rope), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(a) * b)


class _Block(nn.Module):
    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        self.norm1 = _RMSNorm(size.width)
        self.attn = _Attention(size.width, size.heads)
        self.norm2 = _RMSNorm(size.width)
        self.mlp = _SwiGLU(size.width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class _Transformer(nn.Module):
    """Position, norm, blocks, norm: the part that encoder and decoder share."""

    def __init__(self, side: int, size: ViTSize) -> None:
        super().__init__()
        self.side, self.size = side, size
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(1, side**2, size.width))
        self.ln_pre = _RMSNorm(size.width)
        self.transformer = nn.ModuleList(_Block(size) for _ in range(size.depth))
        self.ln_post = _RMSNorm(size.width)

    def mix(self, x: Float[Tensor, "n L d"]) -> Float[Tensor, "n L d"]:
        angles = rope_angles(self.side, self.size.head_width)
        rope = (angles.cos().to(x), angles.sin().to(x))
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer:
            x = block(x, rope)
        return self.ln_post(x)


class _Encoder(_Transformer):
    """Images -> mean and log-variance, (n, L, 2 channels)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config.side, config.encoder)
        width, patch = config.encoder.width, config.patch_size
        self.patch_embed = nn.Sequential(nn.Conv2d(_IMAGE_CHANNELS, width, patch, patch))
        self.latent_head = nn.Linear(width, 2 * config.channels)

    def forward(self, images: Tensor) -> Tensor:
        return self.latent_head(self.mix(self.patch_embed(images).flatten(2).transpose(1, 2)))


class _Decoder(_Transformer):
    """Raw latents, (n, L, channels) -> images, not clipped."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config.side, config.decoder)
        width, self.patch_size = config.decoder.width, config.patch_size
        # read and written with the file, but only training uses it
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.decoder_embed = nn.Linear(config.channels, width)
        values = config.patch_size**2 * _IMAGE_CHANNELS
        self.ffn = nn.Sequential(nn.Identity(), nn.Conv2d(width, values, 1))
        self.conv_out = nn.Conv2d(_IMAGE_CHANNELS, _IMAGE_CHANNELS, 3, padding=1)

    def forward(self, raw: Tensor) -> Tensor:
        x = self.mix(self.decoder_embed(raw)).transpose(1, 2).unflatten(2, (self.side, self.side))
        patches = self.ffn(x).unflatten(1, (self.patch_size, self.patch_size, _IMAGE_CHANNELS))
        # (n, row, column, color, h, w) -> (n, color, h, row, w, column)
        return self.conv_out(patches.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3))


class ViTTokenizer(Tokenizer):
    """l-DeTok's tokenizer; it always runs in float32."""

    def __init__(self, vit: ViTConfig, mean: Statistic | None = None, std: Statistic | None = None) -> None:
        super().__init__(_IMAGE_CHANNELS, vit.channels, vit.patch_size, mean, std)
        self.vit = vit
        self.fixed_size = (vit.image_size, vit.image_size)
        self.encoder = _Encoder(vit)
        self.decoder = _Decoder(vit)
        self.eval()

    def encode(self, images: Float[Tensor, "n c H W"]) -> Posterior:
        """Encode images, some at a time, to a float32 posterior."""
        self.check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            moments = _in_slices(self.encoder, images.float()).transpose(1, 2)
        mean, logvar = moments.unflatten(2, (self.vit.side, self.vit.side)).chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(*_LOGVAR_RANGE))
        return Posterior(self.normalize(mean), std / self.std.view(-1, 1, 1))

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k H W"]:
        """Decode normalized latents, some at a time, to float32 images in [-1, 1]."""
        side = self.vit.side
        if tuple(latents.shape[1:]) != (self.channels, side, side):
            raise ValueError(
                f"latents: got {tuple(latents.shape[1:])}, expected {(self.channels, side, side)}: "
                f"this tokenizer knows one size, {self.vit.image_size} pixels"
            )
        raw = self.denormalize(latents.float()).flatten(2).transpose(1, 2)
        with torch.autocast(raw.device.type, enabled=False):
            images = _in_slices(self.decoder, raw)
        return images.clamp(-1, 1)

    def config(self) -> dict[str, Any]:
        """Return kind and architecture."""
        return {"kind": "vit", "vit": asdict(self.vit), **super().config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ViTTokenizer:
        """Create the tokenizer of `config()`, with random weights."""
        if not isinstance(config.get("vit"), Mapping):
            raise ValueError(f"tokenizer: got vit {config.get('vit')!r}, expected the config of one")
        return cls(ViTConfig.from_dict(config["vit"]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Implement `.to(...)` and its kin; weights stay in float32, unrounded."""
        return super()._apply(lambda t: fn(t) if t.is_meta else t.to(fn(t).device), recurse)


def _in_slices(network: nn.Module, values: Float[Tensor, "n ..."]) -> Tensor:
    """Apply a network to a batch, at most `VIT_SLICE` images at a time."""
    parts = [network(part) for part in values.split(VIT_SLICE)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _apply_rope(x: Float[Tensor, "n heads L d"], rope: tuple[Tensor, Tensor]) -> Float[Tensor, "n heads L d"]:
    cos, sin = rope
    paired = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + paired * sin
