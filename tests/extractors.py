"""Small feature networks, for tests of evaluation and as FILE.py:function for the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from mar.evaluation.features import ModuleExtractor
from mar.random import make_generator

WIDTH = 6


class TinyNet(nn.Module):
    """Six features of a picture brought to 4x4 pixels, and three logits."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        draws = make_generator(seed)
        self.features = nn.Parameter(torch.randn(48, WIDTH, generator=draws) / 7)
        self.classes = nn.Parameter(5 * torch.randn(WIDTH, 3, generator=draws))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.tanh(functional.adaptive_avg_pool2d(pixels, 4).flatten(1) @ self.features)
        return values, values @ self.classes


class BrightnessNet(nn.Module):
    """Mean and half the mean as features; as logits whether a picture is dark, middling or bright."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean = pixels.mean((1, 2, 3))[:, None]
        return torch.cat([mean, mean / 2], 1), -((mean - torch.tensor([[0.0, 0.5, 1.0]])) ** 2)


def tiny(weights: Path | None = None) -> ModuleExtractor:
    """Scores, but knows no classes; seconds of arithmetic would be too many."""
    return ModuleExtractor(TinyNet(), "tiny", scores=True, width=WIDTH)


def retrained(weights: Path | None = None) -> ModuleExtractor:
    """The same name, other weights."""
    return ModuleExtractor(TinyNet(seed=4), "tiny", scores=True, width=WIDTH)


def other(weights: Path | None = None) -> ModuleExtractor:
    """The same weights under another name."""
    return ModuleExtractor(TinyNet(), "other", scores=True, width=WIDTH)


def brightness(weights: Path | None = None) -> ModuleExtractor:
    """Knows dark, middling and bright pictures."""
    return ModuleExtractor(BrightnessNet(), "brightness", width=2, classes=("dark", "middling", "bright"))


def insects(weights: Path | None = None) -> ModuleExtractor:
    """Knows the classes of `tiny.pipeline()`, in another order."""
    return ModuleExtractor(TinyNet(), "insects", width=WIDTH, classes=("Cat", "ant", "bee"))
