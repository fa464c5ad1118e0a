"""Recipes for `quality.py`: those of `mar train` and the paper's, with changed settings."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quality_data import is_fashion

from mar.config import ConfigError, HeadConfig, TrainConfig, TrunkConfig, from_dict, to_dict
from mar.presets import recipe


def settings(name: str, data: Path, changes: Sequence[str]) -> TrainConfig:
    """Return a recipe with `changes` such as model.patch_size=2.

    Raises ConfigError for unknown recipes and settings.
    """
    base = reference(recipe("fashion" if is_fashion(data) else "cifar10")) if name == "reference" else recipe(name)
    values = to_dict(replace(base, data=str(data)))
    for change in changes:
        path, _, text = change.partition("=")
        *groups, last = path.split(".")
        inside: Any = values
        for group in groups:
            inside = inside.get(group) if isinstance(inside, dict) else None
        if not isinstance(inside, dict) or last not in inside or isinstance(inside[last], dict):
            raise ConfigError(f"--set {change}: a recipe has no setting {path}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):  # a word
            value = text
        is_list_item = isinstance(inside[last], list) and not isinstance(value, list | tuple)
        inside[last] = [value] if is_list_item else value
    return from_dict(TrainConfig, values)


def changed(changes: Sequence[str]) -> dict[str, str]:
    """Return the values of `--set` by setting; the last one counts."""
    parts = (change.partition("=") for change in changes)
    return {f"--set {path}": value for path, _, value in parts}


def reference(base: TrainConfig) -> TrainConfig:
    """Return the paper's settings at the size of `base`, on pixels in patches of 4 x 4.

    Objective, optimizer, dropout and the constant learning rate are the paper's; the sizes of trunk and head are those
    of `base`.
    """
    head = HeadConfig(width=base.model.head.width, depth=base.model.head.depth)
    encoder, decoder = (TrunkConfig(t.width, t.depth, t.num_heads) for t in (base.model.encoder, base.model.decoder))
    channels, side = (1, 28) if base.model.channels == 1 else (3, 32)  # Fashion-MNIST or CIFAR-10
    model = replace(
        base.model, channels=channels, grid=(side, side), patch_size=4, encoder=encoder, decoder=decoder, head=head,
        attention_dropout=0.1, projection_dropout=0.1, mask_ratio_min=0.7,
    )  # fmt: skip
    return replace(
        base, model=model, tokenizer="pixels", sampling=replace(base.sampling, x0_bound=3.0), batch=64, lr=3.2e-3,
        warmup=6_400, decay=0, optimizer="adamw", weight_decay=0.02, ema=0.999, clip=3.0,
    )  # fmt: skip
