"""Configure the training of a tokenizer."""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace
from typing import Any, Literal

from mar.config import LogTo, Optimizer, Precision, resolve_image_channels
from mar.config.fields import accept_old_names, fraction, positive, require

Stride = Literal[2, 4, 8, 16]
TokenizerKind = Literal["kl", "residual"]
"""Name a kind of tokenizer to train."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "residual": {"width": 96, "depth": 2, "optimizer": "muon", "lr": 1.6e-2, "patience": 3},
    "kl": {"width": 16, "depth": 1, "optimizer": "adamw", "lr": 8e-3, "patience": 0},
}

NEW_RUN: dict[str, Any] = {"kind": "residual", "channels": 16, "upright": True}
"""Settings of new runs by default, where files without these settings mean others."""


@accept_old_names
@dataclass(frozen=True)
class TokenizerTrainConfig:
    """Training of a tokenizer on images. Lengths are counted in images.

    Defaults are those of files that lack a setting; the commands begin new runs with `NEW_RUN`.
    """

    data: str = "fashion"
    """fashion, a folder of pictures, Parquet or .tar (WebDataset) files, or OWNER/NAME on the Hub."""
    image_size: int | tuple[int, int] = 32
    """Pictures are cut to squares of so many pixels, or to HEIGHT WIDTH."""
    image_channels: int | None = None
    """Channels of the pictures: 1 (gray) or 3; by default 1 for fashion and 3 for all else."""
    kind: TokenizerKind = "kl"
    """`residual`: principal components with a learned residual; `kl`: a variational autoencoder (AutoencoderKL)."""
    stride: Stride = 4
    """Pixels of a latent cell's side."""
    channels: int = 4
    """Channels of the latents."""
    width: int | None = None
    """Features of the first stage, a multiple of 8; by default 16, for `residual` 96."""
    depth: int | None = None
    """Residual blocks of a stage; by default 1, for `residual` 2."""
    noise: float = 0.6
    """Noise on the latents that `residual` decodes in training: up to so many standard deviations, as images differ."""
    images: int = 200_000
    """Length of the run, in images seen."""
    batch: int = 32
    """Images per step."""
    optimizer: Optimizer | None = None
    """`adamw`, or `muon` for the hidden convolutions and AdamW for all else; by default adamw, for `residual` muon."""
    lr: float | None = None
    """Learning rate for 256 images a step, used times batch / 256; by default 8e-3, for `residual` 1.6e-2."""
    warmup: int = 3_000
    """Images over which the learning rate rises linearly from 0."""
    decay: int = 50_000
    """Images at the end of the run over which the learning rate falls linearly to 0."""
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0
    """The gradient's norm is clipped to this."""
    ema: float = 0.999
    """Decay of the running average of the weights; the average is exported."""
    kl: float = 1e-6
    """Weight of `kl`'s divergence of the posterior from a standard normal, summed over a picture's latents."""
    perceptual: float = 0.0
    """Weight of distances between features of EfficientNet-Lite0 (extra `eval`); 0.1 to 1 are sensible. 0: none."""
    adversarial: float = 0.0
    """Weight of a patch discriminator, relative to the other losses; 0.5 to 1 are sensible. 0: none."""
    adversarial_start: float = 0.5
    """Share of the run after which the discriminator starts."""
    precision: Precision = "fp32"
    """`bf16`: matrix products in bfloat16, all else in float32."""
    flip: bool | None = None
    """Mirror pictures at random; by default as the data allows."""
    upright: bool = False
    """Turn pictures upright by their EXIF orientation, as cameras write it."""
    seed: int = 0
    workers: int = 0
    """Processes that read pictures ahead."""
    save_every: int = 20_000
    """Images between saved states."""
    keep: int = 2
    """Number of saved states to keep, the newest."""
    sample_every: int = 50_000
    """Images between reconstructions of held-out pictures, with their PSNR; 0 makes none but at the end."""
    patience: int | None = None
    """Ends the run after so many such PSNRs that did not rise; 0: never. By default 0, for `residual` 3."""
    log_every: int = 50
    """Steps between lines of the log."""
    log_to: tuple[LogTo, ...] = ("tensorboard",)
    """Loggers beside log.jsonl: tensorboard, wandb, trackio, or several of them."""

    def __post_init__(self) -> None:
        depth = () if self.depth is None else ("depth",)
        positive(self, "channels", *depth, "images", "batch", "save_every", "keep", "log_every")
        require(self.kind in typing.get_args(TokenizerKind), f"kind is {self.kind!r}, but it must be kl or residual")
        for name in ("warmup", "decay", "sample_every", "workers", "kl", "noise", "perceptual", "adversarial"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, but it must not be negative")
        require(
            self.patience is None or self.patience >= 0,
            f"patience is {self.patience}, but it must not be negative",
        )
        require(
            not (self.patience and self.adversarial),
            f"patience is {self.patience}, but a discriminator lowers the PSNR; leave out one of them",
        )
        for name in ("lr", "clip"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}, but it must be positive")
        require(
            self.optimizer is None or self.optimizer in typing.get_args(Optimizer),
            f"optimizer is {self.optimizer!r}, but it must be adamw or muon",
        )
        fraction(self, "ema", "beta1", "beta2", "adversarial_start")
        require(
            self.precision in typing.get_args(Precision),
            f"precision is {self.precision!r}, but it must be fp32 or bf16",
        )
        require(self.stride in typing.get_args(Stride), f"stride is {self.stride}, but it must be 2, 4, 8 or 16")
        require(
            self.image_channels in (None, 1, 3),
            f"image_channels is {self.image_channels}, but it must be 1 (gray) or 3",
        )
        width = self.width
        require(width is None or (width >= 8 and width % 8 == 0), f"width is {width}, but it must be a multiple of 8")
        values = self.channels_in * self.stride**2
        require(
            self.kind == "kl" or self.channels <= values,
            f"channels is {self.channels}, but squares of {self.stride}x{self.stride} pixels have {values} values; "
            "take fewer channels, a larger stride, or kind kl",
        )
        height, width = self.size
        require(
            min(height, width) >= self.stride and height % self.stride == 0 and width % self.stride == 0,
            f"image_size is {height}x{width}, but it must be a multiple of the stride {self.stride}",
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def channels_in(self) -> int:
        """Channels of the pictures: `image_channels`, or the default for `data`."""
        return resolve_image_channels(self.data, self.image_channels)

    def resolved(self) -> TokenizerTrainConfig:
        """Return the config with its kind's defaults in place of None."""
        defaults = {name: value for name, value in _DEFAULTS[self.kind].items() if getattr(self, name) is None}
        if self.adversarial and "patience" in defaults:
            defaults["patience"] = 0
        return replace(self, **defaults)

    @property
    def scaled_lr(self) -> float:
        """The learning rate after warm-up and before decay."""
        lr = self.resolved().lr
        assert lr is not None
        return lr * self.batch / 256

    @property
    def adversarial_from(self) -> int:
        """Images seen when the discriminator starts."""
        return round(self.images * self.adversarial_start)
