"""Configure sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mar.config.fields import accept_old_names, one_of, positive, require
from mar.config.model import ModelConfig

GuidanceSchedule = Literal["linear", "constant"]
"""Raise the guidance scale linearly, or keep it constant."""
Solver = Literal["ancestral", "ddim", "dpm++2m", "dpm++2m-sde", "dpm++2s", "dpm++3s"]
"""Name a solver of `mar.diffusion.solvers`."""
TimestepSpacing = Literal["time", "log-snr"]
"""Space timesteps evenly in time or in log-SNR."""
MaskSchedule = Literal["cosine", "exponential"]
"""Choose how the number of masked tokens falls."""
RevealRule = Literal["counted", "binomial"]
"""Reveal a number of tokens at each step, or each token with a probability."""
Order = Literal["random", "checkerboard", "halton"]
"""Choose the order in which tokens are revealed."""
Preset = Literal["exact", "balanced", "fast"]
"""Name a preset of `mar.presets`."""

MAX_BINOMIAL_STEPS = 4096
"""Most steps of the binomial rule, which has a probability for each."""
MAX_SCALE = 1_000_000
"""Factors of sampling are at most this: far beyond it, float32 ends."""


@accept_old_names
@dataclass(frozen=True)
class SamplingConfig:
    """Settings of drawing images."""

    steps: int = 64
    """K: reveal steps (`num_iter` of the reference); at most one for each token."""
    diffusion_steps: int = 100
    """Diffusion steps for each token, of the 1000 it was trained on."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    guidance_schedule: GuidanceSchedule = "linear"
    """`linear`: from 1 up to the scale as tokens are revealed; `constant`: the scale at every step."""
    temperature: float = 1.0
    """Factor of the noise added at each diffusion step; of the noise at the start for solvers that add none."""
    x0_bound: float | None = None
    """Clip predicted clean tokens to this many standard deviations, for young models; `off` for official weights."""
    solver: Solver = "ancestral"
    """`ancestral` (the paper), `dpm++2m-sde` for fewer steps, or without noise `ddim`, `dpm++2m`, `dpm++2s`, `dpm++3s`
    (eMIGM's, evenly in log-SNR)."""
    timestep_spacing: TimestepSpacing = "time"
    """Space diffusion timesteps evenly in `time` (the paper) or in `log-snr`."""
    diffusion_steps_end: int | None = None
    """Diffusion steps at the last reveal step, linear in between (DiSA); by default `diffusion_steps` throughout."""
    start_t: float = 1.0
    """Start of diffusion, as a share of the trained timesteps; 0.95 skips the noisiest 5% (DiSA)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only while the share of known tokens is from the first to the second number, after the step."""
    uncond_interval: int = 1
    """Run the trunk without the class at every N-th guided step; reuse the last residual in between (LazyMAR)."""
    mask_schedule: MaskSchedule = "cosine"
    """Share of tokens masked after each step: `cosine` (the paper), or `exponential`, slower at first."""
    order: Order = "random"
    """Order of an image's tokens: `random` (the paper), random on a `checkerboard` first, or spread out by `halton`."""
    reveal: RevealRule = "counted"
    """Tokens revealed at each step: `counted`, as the mask schedule says, or `binomial`, as many on average (eMIGM)."""
    guidance_time: tuple[float, float] = (0.0, 1.0)
    """Guide only at steps that end after the first time and by the second; time falls from 1 to 0 (eMIGM)."""

    def __post_init__(self) -> None:
        positive(self, "steps", "diffusion_steps", "uncond_interval")
        require(
            0 <= self.guidance_scale <= MAX_SCALE,
            f"guidance_scale is {self.guidance_scale}, but it must be 0 or more, at most {MAX_SCALE:,}",
        )
        one_of(self, "guidance_schedule", GuidanceSchedule)
        require(0 <= self.temperature <= MAX_SCALE, f"temperature is {self.temperature}, outside [0, {MAX_SCALE:,}]")
        require(
            self.x0_bound is None or 0 < self.x0_bound <= MAX_SCALE,
            f"x0_bound is {self.x0_bound}, but it must be positive, at most {MAX_SCALE:,}",
        )
        one_of(self, "solver", Solver)
        one_of(self, "timestep_spacing", TimestepSpacing)
        one_of(self, "mask_schedule", MaskSchedule)
        one_of(self, "order", Order)
        one_of(self, "reveal", RevealRule)
        require(
            self.reveal == "counted" or self.steps <= MAX_BINOMIAL_STEPS,
            f"steps is {self.steps}, but the binomial rule takes at most {MAX_BINOMIAL_STEPS:,}",
        )
        if self.diffusion_steps_end is not None:
            positive(self, "diffusion_steps_end")
        require(0 < self.start_t <= 1, f"start_t is {self.start_t}, outside (0, 1]")
        for name in ("guidance_interval", "guidance_time"):
            given = getattr(self, name)
            is_pair = isinstance(given, tuple | list) and len(given) == 2
            require(is_pair, f"{name} is {given!r}, but it must be two numbers from 0 to 1")
            start, end = given
            object.__setattr__(self, name, (start, end))  # a list, as JSON has it, can't be hashed
            require(
                0 <= start <= end <= 1,
                f"{name} is {start} {end}, but it must be two numbers from 0 to 1, the smaller one first",
            )

    def check(self, model: ModelConfig) -> None:
        """Checks that `model` can be sampled like this; ConfigError otherwise."""
        timesteps = round(self.start_t * (model.head.diffusion_steps - 1)) + 1
        for name in ("diffusion_steps", "diffusion_steps_end"):
            steps = getattr(self, name) or 1
            less = f", of which start_t {self.start_t} leaves {timesteps}" if self.start_t < 1 else ""
            require(
                steps <= timesteps,
                f"{name} is {steps}, but the model's schedule has {model.head.diffusion_steps}{less}",
            )
        require(
            self.guidance_scale == 1.0 or model.guidable,
            f"guidance_scale {self.guidance_scale} needs a model that was trained to do without classes "
            f"(this one: {model.classes} classes, label_drop {model.label_drop}); use guidance_scale 1",
        )
