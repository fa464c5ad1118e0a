"""Models that are small but awake: every weight is drawn, none is zero, so that outputs depend on all that goes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mar import runtime
from mar.config import HeadConfig, ModelConfig, SamplingConfig, TrainConfig, TrunkConfig
from mar.model.mar import MAR
from mar.pipeline import Pipeline
from mar.tokenizer import PixelTokenizer

TRUNK = TrunkConfig(width=16, depth=1, heads=2, mlp_ratio=2.0)
HEAD = HeadConfig(width=16, depth=1, prediction="v", batch_mul=2)
FAST = SamplingConfig(steps=4, diffusion_steps=4)


def config(**changes: Any) -> ModelConfig:
    """A model of 4x4 tokens of two values, three classes and v prediction, but for `changes`."""
    settings: dict[str, Any] = {
        "channels": 2, "grid": (4, 4), "encoder": TRUNK, "decoder": TRUNK, "head": HEAD, "buffer": 2, "classes": 3,
    }  # fmt: skip
    return ModelConfig(**{**settings, **changes})


def awake(model: MAR, seed: int = 0) -> MAR:
    """The model with every tensor drawn: an untrained head's last layers are zero, and hide what is before them."""
    generator = runtime.generator(seed, 77)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
    return model.eval()


def model(seed: int = 0, **changes: Any) -> MAR:
    """A model of `config(**changes)`, awake."""
    return awake(MAR(config(**changes)), seed)


def pipeline(seed: int = 0, **changes: Any) -> Pipeline:
    """A pixel-space model of grey pictures of 4x4 pixels with the classes ant, bee and cat."""
    changes = {"channels": 1, **changes}
    names = ("ant", "bee", "cat")[: changes.get("classes", 3)]
    tokenizer = PixelTokenizer(changes["channels"], mean=-0.4, std=0.5)
    return Pipeline(model(seed, **changes), tokenizer, classes=names, sampling=FAST, notes={"images": 5})


def train_config(**changes: Any) -> TrainConfig:
    """A run over the bundled pictures in 7x7 patches, 8 pictures a step; dropouts on as in the paper."""
    small = config(channels=1, grid=(28, 28), patch=7, classes=10)
    settings: dict[str, Any] = {
        "model": small, "sampling": FAST, "images": 80, "batch": 8, "lr": 0.03, "warmup": 24, "ema": 0.99,
        "save_every": 10_000, "sample_every": 0, "log_every": 1, "seed": 5,
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(*shape, generator=runtime.generator(seed, 78))
