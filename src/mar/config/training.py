"""Configure a training run."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Literal

from mar.config.fields import accept_old_names, fraction, one_of, positive, require
from mar.config.model import ModelConfig
from mar.config.sampling import SamplingConfig

Precision = Literal["fp32", "bf16"]
"""Choose the dtype of matrix products."""
Optimizer = Literal["adamw", "muon"]
"""Train all parameters with AdamW, or matrices with Muon."""
Strategy = Literal["ddp", "fsdp"]
"""Replicate the model on every rank, or shard it."""
LogTo = Literal["tensorboard", "wandb", "trackio"]
"""Name a service that gets the log too."""
ActivationCheckpointing = Literal["none", "selective", "full"]
"""Recompute no activations, cheap ones, or all."""


def resolve_image_channels(data: str, image_channels: int | None = None) -> int:
    """Returns `image_channels`, or by default 1 (gray) for fashion and 3 for other data."""
    return image_channels or (1 if data == "fashion" else 3)


@accept_old_names
@dataclass(frozen=True)
class TrainConfig:
    """A training run. Lengths are counted in images."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of the run's sample grids; the default of its exports."""
    data: str = "fashion"
    """`fashion`, a folder, Parquet or .tar files, OWNER/NAME on the Hub, a `mar cache`; or stream: and one of them."""
    tokenizer: str = "pixels"
    """`pixels`, `pca4` (components of 4 x 4 pixels), `kl16`, `detok`, `dc-ae`, or AutoencoderKL or DC of diffusers."""
    text: str = ""
    """Draw from captions, read by `words`, which are learned with the model, or by a text encoder: `minilm`, a folder,
    OWNER/NAME on the Hub; by default captions are not used."""
    caption_column: str | None = None
    """Column of captions in the data; by default text, caption or prompt. A cache has those that it was made with."""
    image_channels: int | None = None
    """Channels of pictures for principal components: 1 (gray) or 3; by default 1 for fashion and 3 for all else."""
    images: int = 1_000_000
    """Length of the run, in images seen."""
    batch: int = 256
    """Images per step, over all processes."""
    lr: float = 1e-4
    """Learning rate for 256 images a step; the rate used is lr * batch / 256."""
    warmup: int = 0
    """Images over which the learning rate rises linearly from 0."""
    decay: int = 0
    """Images at the end of the run over which the learning rate falls linearly to 0."""
    optimizer: Optimizer = "adamw"
    """`adamw` (the paper), or `muon` for the matrices inside the blocks and AdamW for all else."""
    muon_factor: float = 2.5
    """Muon's learning rate as a multiple of `lr`; Muon's updates are scaled to the size of AdamW's."""
    weight_decay: float = 0.02
    """Decoupled weight decay; none on biases, norms and the head."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 3.0
    """The gradient's norm is clipped to this."""
    ema: float = 0.9999
    """Decay of the running average of the weights."""
    ema_warmup: bool = True
    """Start from a decay of (1 + steps) / (10 + steps); else (the reference) young averages keep initial weights."""
    ema_others: tuple[float, ...] = ()
    """Decays of further averages, each exported as model-ema-DECAY.safetensors for comparison."""
    precision: Precision = "fp32"
    """`bf16`: matrix products in bfloat16, all else in float32."""
    tf32: bool = False
    """Round inputs of float32 products to TF32 on GPUs: faster, less exact."""
    strategy: Strategy = "ddp"
    """Several processes: `ddp` keeps the model on each, `fsdp` a shard of every tensor."""
    accumulate: int = 1
    """Micro-batches of a process in a step: less memory, the same step."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Recompute in backward: `selective`, all but matrix products, costs little; `full`, whole blocks, a third."""
    compile: bool = False
    """Compile the blocks with torch.compile; needs a compiler on the machine."""
    flip: bool | None = None
    """Mirror pictures at random; by default as the data allows, and not if captions are read: they may speak of left
    and right."""
    shift: int = 0
    """Shift each picture by up to N pixels each way, at random, with repeated edges: for few pictures."""
    balance: float = 0.0
    """Show pictures of small classes more often: from 0, as often as any others, to 1, all classes equally often."""
    upright: bool = False
    """Turn pictures upright by their EXIF orientation, as cameras write it; cached latents are as they were cached."""
    seed: int = 0
    workers: int = 0
    """Processes that read pictures ahead."""
    save_every: int = 50_000
    """Images between saved states."""
    keep: int = 2
    """Number of saved states to keep, the newest."""
    sample_every: int = 50_000
    """Images between sample grids; 0 draws none."""
    log_every: int = 50
    """Steps between lines of the log."""
    log_to: tuple[LogTo, ...] = ("tensorboard",)
    """Loggers beside log.jsonl: tensorboard, wandb, trackio, or several of them."""
    validate_every: int = 50_000
    """Images between losses of held-out pictures, by the EMA weights; 0 measures none."""
    validate_on: str | None = None
    """Held-out pictures; by default the test part of the data (of cached pictures too), if it has one."""
    validate_count: int = 1000
    """Held-out pictures to validate on, at most."""
    patience: int = 0
    """Stop after N validations in a row without a lower loss; 0 never does."""
    hold_out: int = 0
    """Hold out one of every N pictures to validate on; 0 trains on all."""
    init: str | None = None
    """Weights to start from: a name, a file, a folder; classes that differ start anew."""

    def __post_init__(self) -> None:
        require(abs(self.seed) < 2**64, f"seed is {self.seed}, but it must be below 2**64")
        positive(self, "images", "batch", "save_every", "keep", "log_every", "accumulate", "validate_count")
        not_negative = ("warmup", "decay", "shift", "sample_every", "validate_every", "patience", "workers")
        for name in (*not_negative, "weight_decay"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, but it must not be negative")
        for name in ("lr", "muon_factor", "clip"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but it must be positive")
        fraction(self, "ema", "beta1", "beta2")
        require(0 <= self.balance <= 1, f"balance is {self.balance}, but it must be from 0 to 1")
        require(
            self.precision in typing.get_args(Precision),
            f"precision is {self.precision!r}, but it must be fp32 or bf16",
        )
        require(
            self.optimizer in typing.get_args(Optimizer),
            f"optimizer is {self.optimizer!r}, but it must be adamw or muon",
        )
        require(
            self.strategy in typing.get_args(Strategy), f"strategy is {self.strategy!r}, but it must be ddp or fsdp"
        )
        require(
            self.hold_out == 0 or self.hold_out > 1,
            f"hold_out is {self.hold_out}, but it must be 0 (none) or at least 2",
        )
        require(
            self.patience == 0 or self.validate_every > 0,
            f"patience is {self.patience}, but validate_every 0 measures no loss; set validate_every",
        )
        others = self.ema_others
        require(
            all(0 <= decay < 1 for decay in others) and len({self.ema, *others}) == 1 + len(others),
            f"ema_others has {', '.join(map(str, others))}, but each must be from 0 to less than 1, and none twice or "
            f"ema's {self.ema}",
        )
        require(
            self.image_channels in (None, 1, 3),
            f"image_channels is {self.image_channels}, but it must be 1 (gray) or 3",
        )
        unknown = ", ".join(sorted({*self.log_to} - {*typing.get_args(LogTo)}))
        require(not unknown, f"log_to has {unknown}, but there are only {', '.join(typing.get_args(LogTo))}")
        one_of(self, "activation_checkpointing", ActivationCheckpointing)
        if not (self.text and self.model.condition == "none"):  # its words are still to be counted
            self.sampling.check(self.model)

    @property
    def flip_of_data(self) -> bool | None:
        """The choice of mirroring; None: as the data allows."""
        return False if self.flip is None and self.text else self.flip

    @property
    def scaled_lr(self) -> float:
        """The learning rate after warm-up and before decay."""
        return self.lr * self.batch / 256
