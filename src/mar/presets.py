"""Name recipes and sampling presets, with their costs and results."""

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
from mar.published import MODELS, PUBLISHED, SAMPLING


@dataclass(frozen=True)
class SamplingPreset:
    """Bounds for faster sampling. None keeps the model's own setting, and no setting is raised."""

    steps: float | None = None
    """K as a multiple of the square root of L, the side of a square grid of tokens."""
    diffusion_steps: int | None = None
    """The same for every model: a solver's need does not depend on the model's own number."""
    solver: Solver | None = None
    timestep_spacing: TimestepSpacing | None = None
    start_t: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    uncond_interval: int | None = None

    def apply(self, sampling: SamplingConfig, tokens: int) -> SamplingConfig:
        """Returns `sampling` within these bounds, for images of L `tokens`.

        Settings stay as they are where reveal and diffusion steps are both within: solver, spacing and guidance of a
        preset were measured with more steps than its own.
        """
        steps = sampling.steps if self.steps is None else math.ceil(self.steps * math.sqrt(tokens))
        if self._has_steps_of(sampling, steps):
            return sampling
        end = min(sampling.guidance_interval[1], self.guidance_interval[1])
        start = min(max(sampling.guidance_interval[0], self.guidance_interval[0]), end)
        first, last = sampling.diffusion_steps, sampling.diffusion_steps_end
        if self.diffusion_steps is not None:
            first, last = min(first, self.diffusion_steps), None if last is None else min(last, self.diffusion_steps)
        return replace(
            sampling,
            steps=min(sampling.steps, steps),
            diffusion_steps=first,
            diffusion_steps_end=last,
            solver=self.solver or sampling.solver,
            timestep_spacing=self.timestep_spacing or sampling.timestep_spacing,
            start_t=min(self.start_t or 1.0, sampling.start_t),
            guidance_interval=(start, end),
            uncond_interval=max(self.uncond_interval or 1, sampling.uncond_interval),
        )

    def _has_steps_of(self, sampling: SamplingConfig, steps: int) -> bool:
        """Tells whether `sampling` has at most `steps` reveal steps, and the diffusion steps of this preset."""
        if self.steps is None or self.diffusion_steps is None:
            return False
        most = max(sampling.diffusion_steps, sampling.diffusion_steps_end or 1)
        return sampling.steps <= steps and most <= self.diffusion_steps


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
"""Sampling presets by name. They leave models with fewer steps alone, such as eMIGM's.

Fréchet distance of 5,000 images of the bundled model, and time: `exact` 2.30; `balanced` 2.03 in 0.56 of the time;
`fast` 2.16 in 0.27 of it. On MAR-B's shape `balanced` takes a quarter to a third of the time, `fast` an eighth to a
ninth (docs/sampling.md).
"""


def apply_preset(sampling: SamplingConfig, tokens: int, preset: str) -> SamplingConfig:
    """Returns a model's own settings within the bounds of a preset.

    `tokens` is L, the tokens of an image. ConfigError for an unknown preset.
    """
    for name, bounds in SAMPLING_PRESETS.items():
        if name == preset:
            return bounds.apply(sampling, tokens)
    raise ConfigError(f"preset is {preset!r}, but it must be one of {', '.join(SAMPLING_PRESETS)}")


IMAGENET_IMAGES = 1_281_167
"""Number of training images of ImageNet."""


def _imagenet(name: str) -> TrainConfig:
    """Returns the paper's recipe for ImageNet 256x256 and 800 epochs.

    Cached latents give the same run: `--data CACHE`. Authors and users of the reference report: 400 epochs of L in 1
    day 7 hours on 32 H100, or from cached latents in 1 day 11 hours on 16. The loss stays near 0.25 to 0.35 while
    images keep getting better. FIDs are those of `SAMPLING`. None of it was run here.
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


def _imagenet_emigm(name: str) -> TrainConfig:
    """Returns eMIGM's recipe for ImageNet: that of the paper with its masks and tied vector.

    Its authors train 800 epochs in float16, with batches of 1,024 (xs, small) or 2,048. FIDs are those of `PUBLISHED`.
    None of it was run here.
    """
    model = PUBLISHED[name]
    return replace(
        _imagenet("mar-base"),
        model=model.config,
        sampling=model.sampling,
        tokenizer=model.tokenizer,
        batch=model.batch,
    )


def _imagenet_detok(name: str) -> TrainConfig:
    """Returns the recipe of l-DeTok's MAR: a constant rate of 2e-4, no warm-up, weight decay or clipping.

    Its authors train without dropout in the MLP, which here follows the projections'. FIDs are those of `PUBLISHED`.
    None of it was run here.
    """
    model = PUBLISHED[name]
    return replace(
        _imagenet("mar-base"),
        model=model.config,
        sampling=replace(model.sampling, steps=64),
        tokenizer=model.tokenizer,
        batch=model.batch,
        lr=2e-4 * 256 / model.batch,
        warmup=0,
        weight_decay=0.0,
        clip=1e9,
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

Images of the right class and Fréchet distance after training on the full set of 60,000, on one core (AVX2, float32;
docs/quality.md): 82% and 17 in 5 minutes, 92% and 7 to 8 in 15, 95% and 2.2 in 64. Each run is fitted to its time. The
paper's settings reach 86% and 15 in 64 minutes. On processors with bfloat16 products, `--precision bf16` sees a third
more images in the same time.

The bundled model was trained earlier: without rotary positions, on 210,000 images at a rate of 0.008, in bf16.
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
"""The trunk and rates of `FASHION` for the 50,000 images of CIFAR-10, from class folders or Parquet files.

Tokens are 16 principal components of 4x4 pixels, and the model predicts x0; 3.6 million parameters. By minutes of one
core (AVX2, float32, 29 images a second; docs/quality.md): after 5 minutes colors and their layout; after 15 skies,
ground and first shapes; after 56 horses on grass, ships and cars. The Fréchet distances (EfficientNet-Lite0) are 726,
699 and 479; 56 for real images, 1,963 for the paper's settings after an hour.
"""

RECIPES: dict[str, TrainConfig] = {
    "fashion": FASHION,
    "cifar10": CIFAR10,
    "imagenet-base": _imagenet("mar-base"),
    "imagenet-large": _imagenet("mar-large"),
    "imagenet-huge": _imagenet("mar-huge"),
    **{f"imagenet-{name}": _imagenet_emigm(name) for name in PUBLISHED if name.startswith("emigm-")},
    **{f"imagenet-{name}": _imagenet_detok(name) for name in PUBLISHED if name.startswith("detok-")},
}
"""Training recipes by name."""
PLANNED_RECIPES: dict[str, tuple[str, ...]] = {
    "folder": (),
    "emoji": ("--image-size", "64", "--vae.images", "100000", "--images", "250000", "--sample-every", "25000",
              "--save-every", "10000", "--sampling.steps", "24"),
}  # fmt: skip
"""Recipes that `mar.autoconfig.plan` makes from the images: options beside which all else is chosen.

`folder` is for pictures of one's own. `emoji` made the bundled model that draws from words (docs/text.md).
"""
RECIPE_NAMES = (*RECIPES, *PLANNED_RECIPES)
"""Names that `mar train` takes."""


def recipe(name: str) -> TrainConfig:
    """Returns a recipe by name; ConfigError for an unknown one."""
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(RECIPE_NAMES)}")
    return RECIPES[name]
