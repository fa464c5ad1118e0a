"""Named models and recipes, each with what it costs and what to expect."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from mar.config import (
    ConfigError,
    HeadConfig,
    ModelConfig,
    Preset,
    SamplingConfig,
    Solver,
    TimestepSpacing,
    TrainConfig,
    TrunkConfig,
)


def _official(width: int, depth: int, heads: int, head_depth: int, head_width: int) -> ModelConfig:
    trunk = TrunkConfig(width, depth, heads)
    return ModelConfig(encoder=trunk, decoder=trunk, head=HeadConfig(width=head_width, depth=head_depth))


MODELS: dict[str, ModelConfig] = {
    "mar-base": _official(768, 12, 12, head_depth=6, head_width=1024),
    "mar-large": _official(1024, 16, 16, head_depth=8, head_width=1280),
    "mar-huge": _official(1280, 20, 16, head_depth=12, head_width=1536),
}
"""The paper's models for ImageNet 256x256 in KL-16 latents: 208, 479 and 943 million parameters (paper, table 4)."""

SAMPLING: dict[str, SamplingConfig] = {
    "mar-base": SamplingConfig(steps=256, guidance_scale=2.9),
    "mar-large": SamplingConfig(steps=256, guidance_scale=3.0),
    "mar-huge": SamplingConfig(steps=256, guidance_scale=3.2),
}
"""The guidance with which each official model reaches its published FID: 2.31, 1.78, 1.55 (paper, table 4)."""


@dataclass(frozen=True)
class SamplingPreset:
    """A way to draw sooner. What is None stays the model's own, and nothing is more than that."""

    steps: float | None = None
    """K: reveal steps as a multiple of the square root of L, the side of a square grid of tokens."""
    diffusion_steps: int | None = None
    """The same number for every model: what a solver needs does not depend on how many a model takes by itself."""
    solver: Solver | None = None
    timestep_spacing: TimestepSpacing | None = None
    start_t: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    uncond_interval: int | None = None

    def of(self, sampling: SamplingConfig, tokens: int) -> SamplingConfig:
        """`sampling` so hastened, for pictures of L `tokens`."""
        reveals = sampling.steps if self.steps is None else math.ceil(self.steps * math.sqrt(tokens))
        end = min(sampling.guidance_interval[1], self.guidance_interval[1])
        start = min(max(sampling.guidance_interval[0], self.guidance_interval[0]), end)
        first, last = sampling.diffusion_steps, sampling.diffusion_steps_end
        if self.diffusion_steps is not None:
            first, last = min(first, self.diffusion_steps), None if last is None else min(last, self.diffusion_steps)
        return replace(
            sampling,
            steps=min(sampling.steps, reveals),
            diffusion_steps=first,
            diffusion_steps_end=last,
            solver=self.solver or sampling.solver,
            timestep_spacing=self.timestep_spacing or sampling.timestep_spacing,
            start_t=min(self.start_t or 1.0, sampling.start_t),
            guidance_interval=(start, end),
            uncond_interval=max(self.uncond_interval or 1, sampling.uncond_interval),
        )


SAMPLING_PRESETS: dict[Preset, SamplingPreset] = {
    "exact": SamplingPreset(),
    "balanced": SamplingPreset(
        steps=1.75, solver="dpm++2m-sde", timestep_spacing="log-snr", diffusion_steps=12, start_t=0.95
    ),
    "fast": SamplingPreset(
        steps=1.05,
        solver="dpm++2m-sde",
        timestep_spacing="log-snr",
        diffusion_steps=8,
        start_t=0.95,
        guidance_interval=(0.1, 1.0),
        uncond_interval=3,
    ),
}
"""Ways to draw, by name. 5,000 pictures of the bundled model: `exact` is at a distance of 2.30, `balanced` at 2.03 in
0.56 of the time, `fast` at 2.16 in 0.27 of it; on MAR-B's shape they take a quarter to a third, and an eighth to a
ninth (docs/sampling.md)."""


def apply_preset(sampling: SamplingConfig, tokens: int, preset: str) -> SamplingConfig:
    """A model's own way of drawing pictures of L `tokens`, made sooner by a preset."""
    for name, haste in SAMPLING_PRESETS.items():
        if name == preset:
            return haste.of(sampling, tokens)
    raise ConfigError(f"preset is {preset!r}, but it must be one of {', '.join(SAMPLING_PRESETS)}")


IMAGENET_IMAGES = 1_281_167
"""Number of training images of ImageNet."""


def _imagenet(name: str) -> TrainConfig:
    """The paper's recipe for ImageNet 256x256, for the 800 epochs of the released weights.

    From pictures or from their latents it is the same run: `--data CACHE`. What the reference's authors and users
    report for theirs: 400 epochs of L in 1 day 7 hours on 32 H100, from cached latents in 1 day 11 hours on 16; the
    loss stands near 0.25 to 0.35 while pictures keep getting better; the FIDs of `SAMPLING`. None of it was run here.
    """
    return TrainConfig(
        model=MODELS[name],
        sampling=replace(SAMPLING[name], steps=64),
        data="imagenet/train",
        tokenizer="kl16",
        images=800 * IMAGENET_IMAGES,
        batch=2048,
        lr=1e-4,
        warmup=100 * IMAGENET_IMAGES,
        ema=0.9999,
        precision="bf16",
        flip=True,
        workers=8,
        save_every=IMAGENET_IMAGES,
        sample_every=5 * IMAGENET_IMAGES,
        validate_every=5 * IMAGENET_IMAGES,
    )


FASHION = TrainConfig(
    model=ModelConfig(
        channels=1,
        grid=(28, 28),
        patch_size=4,
        encoder=TrunkConfig(width=160, depth=3, num_heads=5, rotary=True),
        decoder=TrunkConfig(width=160, depth=5, num_heads=5, rotary=True),
        head=HeadConfig(width=224, depth=3, prediction="v", batch_mul=3),
        buffer_size=8,
        classes=10,
        attention_dropout=0.0,
        projection_dropout=0.0,
    ),
    sampling=SamplingConfig(steps=20, diffusion_steps=25, guidance_scale=4.0, x0_bound=2.2),
    data="fashion",
    images=210_000,
    batch=32,
    lr=1.2e-2,
    warmup=6_000,
    decay=70_000,
    optimizer="muon",
    ema=0.999,
    save_every=20_000,
    sample_every=20_000,
)
"""3.5 million parameters on 10,000 pictures of Fashion-MNIST in raw pixels, 4x4 patches.

On the full set of 60,000, fitted to its time, by minutes of one core (AVX2, float32; docs/quality.md): after 5 minutes
classes are plain to see (82% are of the class asked for, Fréchet distance 17), after 15 they are 92% (7 to 8), and
after 64 95% (2.2), where the paper's settings come to 86% and 15. Where the processor has products in bfloat16,
`--precision bf16` sees a third more pictures in the same time.

The bundled model is from before its rotary positions and its rate of 0.012: 210,000 pictures at 0.008, in bf16.
"""

X0_SAMPLING: dict[str, Any] = {
    "solver": "dpm++2m-sde",
    "diffusion_steps": 12,
    "timestep_spacing": "log-snr",
    "start_t": 0.95,
}
"""Sampling of models that predict x0: the paper's noisy process in few steps, without the learned variances."""

CIFAR10 = replace(
    FASHION,
    model=replace(
        FASHION.model, channels=16, grid=(8, 8), patch_size=1, head=replace(FASHION.model.head, prediction="x0")
    ),
    tokenizer="pca4",
    sampling=SamplingConfig(steps=24, guidance_scale=4.0, x0_bound=10.0, **X0_SAMPLING),
    data="cifar10",
    images=1_000_000,
    decay=330_000,
    save_every=50_000,
    sample_every=50_000,
)
"""The trunk and the rates of `FASHION` for CIFAR-10's 50,000 pictures, from class folders or Parquet files: 16
principal components of each square of 4x4 pixels, whose clean values are predicted; 3.6 million parameters.

By minutes of one core (AVX2, float32, 29 pictures a second; docs/quality.md): after 5 minutes colours and their layout,
after 15 skies, ground and the beginnings of shapes, at a Fréchet distance of 726 and 699 (EfficientNet-Lite0; real
ones: 56), after 56 horses on grass, ships and cars, at 479, where the paper's settings have 1,963 after an hour.
"""

RECIPES: dict[str, TrainConfig] = {
    "fashion": FASHION,
    "cifar10": CIFAR10,
    "imagenet-base": _imagenet("mar-base"),
    "imagenet-large": _imagenet("mar-large"),
    "imagenet-huge": _imagenet("mar-huge"),
}
"""Training recipes by name. `folder` is another: `mar.autoconfig.plan` chooses it from the images."""
RECIPE_NAMES = (*RECIPES, "folder")


def recipe(name: str) -> TrainConfig:
    """The recipe called `name`; ConfigError names those that there are."""
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(RECIPE_NAMES)}")
    return RECIPES[name]
