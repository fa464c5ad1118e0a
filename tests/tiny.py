"""Small models with no zero weights, so that outputs depend on every input."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mar.config import HeadConfig, ModelConfig, SamplingConfig, TrainConfig, TrunkConfig
from mar.data.conditions import WordReader
from mar.model.mar import MAR
from mar.pipeline import Pipeline
from mar.random import make_generator
from mar.tokenizer import PixelTokenizer
from mar.training.run import open_run
from mar.training.trainer import Run

TRUNK = TrunkConfig(width=16, depth=1, num_heads=2, mlp_ratio=2.0)
HEAD = HeadConfig(width=16, depth=1, prediction="v", batch_mul=2)
FAST = SamplingConfig(steps=4, diffusion_steps=4)
WORDS = ("cat", "dog", "red", "blue", "a", "skin", "tone", "medium-dark", "dark", "man")
"""Words of a small model, the most frequent first."""


def tiny_config(**changes: Any) -> ModelConfig:
    """A model of 4x4 tokens of two values, three classes and v prediction, but for `changes`."""
    settings: dict[str, Any] = {
        "channels": 2, "grid": (4, 4), "encoder": TRUNK, "decoder": TRUNK, "head": HEAD, "buffer_size": 2, "classes": 3,
    }  # fmt: skip
    return ModelConfig(**{**settings, **changes})


def randomize(model: MAR, seed: int = 0) -> MAR:
    """The model with every tensor drawn: an untrained head's last layers are zero, and hide what is before them."""
    generator = make_generator(seed, 77)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
    return model.eval()


def tiny_model(seed: int = 0, **changes: Any) -> MAR:
    """A model of `config(**changes)`, awake."""
    return randomize(MAR(tiny_config(**changes)), seed)


def tiny_pipeline(seed: int = 0, **changes: Any) -> Pipeline:
    """A pixel-space model of grey pictures of 4x4 pixels with the classes ant, bee and cat."""
    changes = {"channels": 1, **changes}
    names = ("ant", "bee", "cat")[: changes.get("classes", 3)]
    tokenizer = PixelTokenizer(changes["channels"], mean=-0.4, std=0.5)
    return Pipeline(tiny_model(seed, **changes), tokenizer, classes=names, sampling=FAST, notes={"images": 5})


def tiny_words_pipeline(
    seed: int = 0, notes: dict[str, Any] | None = None, words: Sequence[str] = WORDS, **changes: Any
) -> Pipeline:
    """A pixel-space model of pictures of 4x4 pixels, grey by default, drawn from up to four of `words`."""
    model = tiny_model(seed, **{"channels": 1, "classes": 0, "words": len(words), "buffer_size": 4, **changes})
    reader = WordReader(words, model.config.buffer_size)
    return Pipeline(
        model, PixelTokenizer(model.config.channels, mean=-0.4, std=0.5), captions=reader, sampling=FAST, notes=notes
    )


def write_captions(folder: Path, captions: dict[str, str | list[str]]) -> Path:
    """A metadata.jsonl for pictures of a folder, by their names."""
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def write_images(folder: Path, count: int = 20) -> Path:
    """A folder of grey 8x8 pictures in two classes: bars across and bars down, each of its own brightness."""
    for i in range(count):
        values = np.zeros((8, 8), dtype=np.uint8)
        values[i % 4 :: 4] = 100 + 7 * i % 150
        path = folder / ("across" if i % 2 else "down") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values if i % 2 else values.T).save(path)
    return folder


def caption_images(folder: Path) -> Path:
    """Write a caption a picture of `write_images`, but none for the first; the third has two."""
    rows = []
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        texts = [f"a {'red' if i % 3 else 'blue'} bar {path.parent.name}", "a cat on the mat"][: 2 if i == 2 else 1]
        rows.append({"file_name": str(path.relative_to(folder)), "text": texts if i else None})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny_train_config(data: Path, **changes: Any) -> TrainConfig:
    """A run over `pictures`, 4 a step for ten steps; dropouts on as in the paper."""
    small = tiny_config(channels=1, grid=(8, 8), patch_size=2, classes=2)
    settings: dict[str, Any] = {
        "model": small, "sampling": FAST, "data": str(data), "images": 40, "batch": 4, "lr": 0.5, "warmup": 12,
        "ema": 0.99, "save_every": 10_000, "sample_every": 0, "log_every": 1, "seed": 5,
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})


def open_tiny_run(config: TrainConfig, folder: Path, load_model: Callable[[str], Pipeline] | None = None) -> Run:
    """The run on the CPU, which may load nothing but by `load_model`."""

    def nothing(name: str) -> Any:
        raise AssertionError(f"{name} is not to be loaded")

    cpu = torch.device("cpu")
    return open_run(config, folder, device=cpu, load_tokenizer=nothing, load_model=load_model or nothing)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(*shape, generator=make_generator(seed, 78))
