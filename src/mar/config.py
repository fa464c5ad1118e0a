"""The configuration of a model, of sampling and of a training run: frozen dataclasses, validated on construction.

A field's docstring is its command-line help. `to_dict` and `from_dict` carry a config to JSON and back.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Prediction = Literal["noise", "v", "x0", "flow"]
NoisePath = Literal["cosine", "linear"]
Timesteps = Literal["uniform", "logit-normal"]
GuidanceSchedule = Literal["linear", "constant"]
Solver = Literal["ancestral", "ddim", "dpm++2m", "dpm++2m-sde", "dpm++2s"]
Spacing = Literal["time", "log-snr"]
RevealSchedule = Literal["cosine", "exponential"]
Order = Literal["random", "checkerboard", "halton"]
Preset = Literal["exact", "balanced", "fast"]
Precision = Literal["fp32", "bf16"]
Optimizer = Literal["adamw", "muon"]
Strategy = Literal["ddp", "fsdp"]
LogTo = Literal["tensorboard", "wandb", "trackio"]
Recompute = Literal["none", "selective", "full"]
Norm = Literal["layer", "rms"]
Mlp = Literal["gelu", "swiglu"]


class ConfigError(ValueError):
    """A configuration that can't be: the message says what was got and what was expected."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        _require(value >= 1, f"{name} is {value}, but it must be at least 1")


def _one_of(record: Any, name: str, words: Any) -> None:
    value, known = getattr(record, name), typing.get_args(words)
    listed = f"{', '.join(known[:-1])} or {known[-1]}"
    _require(value in known, f"{name} is {value!r}, but it must be {listed}")


def _fraction(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        _require(0 <= value < 1, f"{name} is {value}, but it must be at least 0 and less than 1")


@dataclass(frozen=True)
class TrunkConfig:
    """A stack of transformer blocks: the encoder or the decoder."""

    width: int = 768
    """Features of a token inside the stack."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Attention heads; they divide the width."""
    mlp_ratio: float = 4.0
    """Width of a block's MLP as a multiple of `width`."""
    norm: Norm = "layer"
    """How tokens are normalised in front of attention and MLP: `layer` (the paper), or `rms`, by their size alone."""
    mlp: Mlp = "gelu"
    """The MLP: `gelu` (the paper), or `swiglu`, two thirds as wide with a gate, for the same number of weights."""
    qk_norm: bool = False
    """Normalise each head's queries and keys by their size."""
    rotary: bool = False
    """Let attention see how far tokens are apart on the grid (rotary position embeddings), beside where they stand."""

    def __post_init__(self) -> None:
        _positive(self, "width", "depth", "heads")
        _one_of(self, "norm", Norm)
        _one_of(self, "mlp", Mlp)
        _require(self.mlp_ratio > 0, f"mlp_ratio is {self.mlp_ratio}, but it must be positive")
        _require(self.width % self.heads == 0, f"width {self.width} is not a multiple of the {self.heads} heads")
        _require(
            not self.rotary or self.head_width % 4 == 0,
            f"heads of {self.head_width} features can't be turned: rotary needs a multiple of 4",
        )

    @property
    def head_width(self) -> int:
        """Features of an attention head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Features inside a block's MLP; under `swiglu` its first layer makes twice as many."""
        full = self.width * self.mlp_ratio
        return 8 * math.ceil(full / 12) if self.mlp == "swiglu" else int(full)


@dataclass(frozen=True)
class HeadConfig:
    """The diffusion head: an MLP that draws one token given its condition z (paper, sections 3.2 and 4.1)."""

    width: int = 1024
    """Features of the MLP."""
    depth: int = 6
    """Residual blocks."""
    diffusion_steps: int = 1000
    """Length of the training noise schedule."""
    path: NoisePath = "cosine"
    """How noise comes in over the timesteps: by the paper's `cosine`, or `linear`, the path of flow matching."""
    prediction: Prediction = "noise"
    """What the network predicts: the noise (the paper, official weights), v = sqrt(a) noise - sqrt(1-a) x0, the clean
    token x0, or the flow, noise - x0."""
    timesteps: Timesteps = "uniform"
    """Which timesteps are learned: all alike (the paper), or more of the middle ones (`logit-normal`)."""
    batch_mul: int = 4
    """How many (timestep, noise) pairs each token is trained on per step."""

    def __post_init__(self) -> None:
        _positive(self, "width", "depth", "diffusion_steps", "batch_mul")
        _one_of(self, "path", NoisePath)
        _one_of(self, "prediction", Prediction)
        _one_of(self, "timesteps", Timesteps)


@dataclass(frozen=True)
class ModelConfig:
    """A MAR: which latents it models, its encoder, decoder and diffusion head."""

    channels: int = 16
    """Channels of the tokenizer's latents."""
    grid: tuple[int, int] = (16, 16)
    """Height and width of the latents, in latent cells."""
    patch: int = 1
    """A token is a patch x patch square of latent cells."""
    encoder: TrunkConfig = field(default_factory=TrunkConfig)
    decoder: TrunkConfig = field(default_factory=TrunkConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    buffer: int = 64
    """Tokens in front of the sequence that carry the class."""
    classes: int = 1000
    """Number of classes; 0 for an unconditional model."""
    label_drop: float = 0.1
    """Probability of training an image without its class; 0 makes guidance impossible."""
    attention_dropout: float = 0.1
    """Dropout of attention weights, in training."""
    projection_dropout: float = 0.1
    """Dropout after the projections of attention and MLP, in training."""
    mask_ratio_min: float = 0.7
    """Left end of the truncated normal(1, 0.25) from which a batch's mask ratio is drawn."""

    def __post_init__(self) -> None:
        _positive(self, "channels", "patch", "buffer")
        _require(self.classes >= 0, f"classes is {self.classes}, but it must be 0 (unconditional) or more")
        _fraction(self, "label_drop", "attention_dropout", "projection_dropout")
        _require(0 < self.mask_ratio_min <= 1, f"mask_ratio_min is {self.mask_ratio_min}, outside (0, 1]")
        height, width = self.grid
        _require(
            min(height, width) >= 1 and height % self.patch == 0 and width % self.patch == 0,
            f"a latent grid of {height}x{width} cells can't be cut into patches of {self.patch}x{self.patch}: "
            "choose an image size or a patch that divides it",
        )

    @property
    def tokens(self) -> int:
        """L: the number of tokens of an image."""
        return (self.grid[0] // self.patch) * (self.grid[1] // self.patch)

    @property
    def token_width(self) -> int:
        """d: the number of values of a token."""
        return self.channels * self.patch**2

    @property
    def guidable(self) -> bool:
        """Whether the model has learned to do without the class, as guidance needs."""
        return self.classes > 0 and self.label_drop > 0


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are drawn."""

    steps: int = 64
    """K: reveal steps; more than there are tokens means one token a step."""
    diffusion_steps: int = 100
    """Diffusion steps for each token, of the 1000 it was trained on."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    guidance_schedule: GuidanceSchedule = "linear"
    """`linear`: from 1 up to the scale as tokens are revealed; `constant`: the scale at every step."""
    temperature: float = 1.0
    """Factor of the noise added at each diffusion step; of the noise at the start for solvers that add none."""
    x0_bound: float | None = None
    """Clip the predicted clean token to this many standard deviations: for young models; off for official weights."""
    solver: Solver = "ancestral"
    """`ancestral` (the paper), or `dpm++2m-sde`, the same in fewer steps; without noise on the way `ddim`, `dpm++2m`,
    `dpm++2s`."""
    spacing: Spacing = "time"
    """How diffusion timesteps are spaced: evenly in `time` (the paper) or in `log-snr`."""
    diffusion_steps_end: int | None = None
    """Diffusion steps at the last reveal step, linear in between (DiSA); by default `diffusion_steps` throughout."""
    noisiest: float = 1.0
    """Where diffusion starts, as a share of the trained timesteps; 0.95 skips the noisiest 5% (DiSA)."""
    guidance_from: float = 0.0
    """Guide only from where this share of an image's tokens is known."""
    guidance_until: float = 1.0
    """Guide only up to where this share of an image's tokens is known."""
    guidance_refresh: int = 1
    """Run the trunk without the class at every so many guided steps, and keep its difference in between (LazyMAR)."""
    reveal_schedule: RevealSchedule = "cosine"
    """How many tokens are hidden after each step: `cosine` (the paper), or `exponential`, slower at first."""
    order: Order = "random"
    """Order of an image's tokens: `random` (the paper), random on a `checkerboard` first, or spread out by `halton`."""

    def __post_init__(self) -> None:
        _positive(self, "steps", "diffusion_steps", "guidance_refresh")
        _require(math.isfinite(self.guidance) and self.guidance >= 0, f"guidance is {self.guidance}, not 0 or more")
        _one_of(self, "guidance_schedule", GuidanceSchedule)
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0, f"temperature is {self.temperature}, not >= 0"
        )
        _require(self.x0_bound is None or self.x0_bound > 0, f"x0_bound is {self.x0_bound}, but it must be positive")
        _one_of(self, "solver", Solver)
        _one_of(self, "spacing", Spacing)
        _one_of(self, "reveal_schedule", RevealSchedule)
        _one_of(self, "order", Order)
        if self.diffusion_steps_end is not None:
            _positive(self, "diffusion_steps_end")
        _require(0 < self.noisiest <= 1, f"noisiest is {self.noisiest}, outside (0, 1]")
        _require(
            0 <= self.guidance_from <= self.guidance_until <= 1,
            f"guidance from {self.guidance_from} until {self.guidance_until}: not a part of the range from 0 to 1",
        )

    def check(self, model: ModelConfig) -> None:
        """Raises ConfigError where this way of drawing asks more than `model` has learned."""
        timesteps = round(self.noisiest * (model.head.diffusion_steps - 1)) + 1
        for name in ("diffusion_steps", "diffusion_steps_end"):
            steps = getattr(self, name) or 1
            less = f", of which noisiest {self.noisiest} leaves {timesteps}" if self.noisiest < 1 else ""
            _require(
                steps <= timesteps,
                f"{name} is {steps}, but the model's schedule has {model.head.diffusion_steps}{less}",
            )
        _require(
            self.guidance == 1.0 or model.guidable,
            f"guidance {self.guidance} needs a model that was trained to do without classes "
            f"(this one: {model.classes} classes, label_drop {model.label_drop}); use guidance 1",
        )


Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON-able values."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A config of class `kind` from plain values; missing fields keep their defaults.

    Raises ConfigError for a field that `kind` does not have: it was written by another version, or is not a config.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    _require(not unknown, f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(hints))}")
    return kind(**{name: _typed(hints[name], _spelt(name, value)) for name, value in values.items()})


def _spelt(name: str, value: Any) -> Any:
    """A value that an older version wrote, as this one spells it."""
    return {True: "full", False: "none"}[value] if name == "recompute" and isinstance(value, bool) else value


def _typed(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value)
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class TrainConfig:
    """A training run: what is learned from what, for how long, and how. Lengths are counted in images."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the run's sample grids are drawn; becomes the default of its exports."""
    data: str = "fashion"
    """`fashion` (bundled), a folder of class folders or of pictures, Parquet or .tar (WebDataset) files, OWNER/NAME on
    the Hub, a `mar cache`; or, read in passing, stream: and files, URLs or OWNER/NAME."""
    tokenizer: str = "pixels"
    """`pixels`, or a folder or repository of an AutoencoderKL in diffusers' format, or `kl16`."""
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
    """Muon's learning rate as a multiple of `lr`, where an update has the size of AdamW's."""
    weight_decay: float = 0.02
    """Decoupled weight decay; never on biases, norms and the head."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 3.0
    """The gradient's norm is clipped to this."""
    ema: float = 0.9999
    """Decay of the running average of the weights, reached after a warm-up: min(ema, (1 + steps) / (10 + steps))."""
    ema_others: tuple[float, ...] = ()
    """Decays of further averages, each exported beside as model-ema-DECAY.safetensors, to find the best one by."""
    precision: Precision = "fp32"
    """`bf16`: matrix products in bfloat16, all else in float32."""
    strategy: Strategy = "ddp"
    """Several processes: `ddp`, the model on each; `fsdp`, a share of every tensor on each."""
    accumulate: int = 1
    """Parts in which a process works through its share of a batch: less memory, the same step."""
    recompute: Recompute = "none"
    """Gradient checkpointing, what the backward pass computes again instead of keeping it: `selective`, all but matrix
    products, which costs little time; `full`, whole blocks, which costs a third."""
    compile: bool = False
    """Compile the blocks with torch.compile; needs a compiler on the machine."""
    flip: bool | None = None
    """Mirror every other picture; by default, where the data says that its pictures may be."""
    shift: int = 0
    """Move each picture by up to so many pixels each way, at random, its edges repeated: for few pictures."""
    seed: int = 0
    workers: int = 0
    """Processes that read pictures ahead."""
    save_every: int = 50_000
    """Images between saved states."""
    keep: int = 2
    """How many of the newest states are kept."""
    sample_every: int = 50_000
    """Images between sample grids; 0 draws none."""
    log_every: int = 50
    """Steps between lines of the log."""
    log_to: tuple[LogTo, ...] = ("tensorboard",)
    """What the log goes to beside log.jsonl: tensorboard, wandb, trackio, or several of them."""
    validate_every: int = 50_000
    """Images between losses of held-out pictures, by the EMA weights; 0 measures none."""
    validate_on: str | None = None
    """Pictures held out; by default the test part of the data (of the pictures that were cached), if it has one."""
    validate_count: int = 1000
    """Held-out pictures to validate on, at most."""
    patience: int = 0
    """Stop after so many validations in a row without a lower loss of the held-out pictures; 0 never does."""
    hold_out: int = 0
    """Keep one of every so many pictures from learning, to validate on; 0 learns from all."""
    init: str | None = None
    """Weights to start from: a name, a file, a folder; classes that differ start anew."""

    def __post_init__(self) -> None:
        _positive(self, "images", "batch", "save_every", "keep", "log_every", "accumulate", "validate_count")
        not_negative = ("warmup", "decay", "shift", "sample_every", "validate_every", "patience", "workers")
        for name in (*not_negative, "weight_decay"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, but it must not be negative")
        for name in ("lr", "muon_factor", "clip"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but it must be positive")
        _fraction(self, "ema", "beta1", "beta2")
        _require(self.precision in typing.get_args(Precision), f"precision is {self.precision!r}, not fp32 or bf16")
        _require(self.optimizer in typing.get_args(Optimizer), f"optimizer is {self.optimizer!r}, not adamw or muon")
        _require(self.strategy in typing.get_args(Strategy), f"strategy is {self.strategy!r}, not ddp or fsdp")
        _require(self.hold_out == 0 or self.hold_out > 1, f"hold_out is {self.hold_out}, not 0 (none) or at least 2")
        _require(
            self.patience == 0 or self.validate_every > 0,
            f"patience is {self.patience}, but validate_every 0 measures no loss that it could wait for",
        )
        others = self.ema_others
        _require(
            all(0 <= decay < 1 for decay in others) and len({self.ema, *others}) == 1 + len(others),
            f"ema_others has {', '.join(map(str, others))}, but each must be from 0 to less than 1, and none twice or "
            f"ema's {self.ema}",
        )
        unknown = ", ".join(sorted({*self.log_to} - {*typing.get_args(LogTo)}))
        _require(not unknown, f"log_to has {unknown}, but there are only {', '.join(typing.get_args(LogTo))}")
        _one_of(self, "recompute", Recompute)
        self.sampling.check(self.model)

    @property
    def scaled_lr(self) -> float:
        """The learning rate after warm-up and before decay."""
        return self.lr * self.batch / 256
