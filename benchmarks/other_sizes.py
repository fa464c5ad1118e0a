"""What a bundled model draws at sizes other than the one it was trained at.

    python benchmarks/other_sizes.py fashion --data FASHION --classifier FILE --sizes 28 40 28x56 56
    python benchmarks/other_sizes.py emoji --data EMOJI --sizes 64 96 64x128 128 --rotary continued

Data, classifier and figures are those of `fashion_judge.py` and `emoji_judge.py`. Pictures are averaged to the trained
size before they are judged: the question is whether a whole picture of what was asked for comes out, not how sharp it
is. Pictures that are broken are judged as they are. `--sheet FOLDER` keeps the first ones of each size.
"""

from __future__ import annotations

import argparse
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_judge import SEED, Row, corner, judge_seen, load_real, read_rows
from fashion_judge import features, frechet, load_classifier, load_split, statistics
from torch import Tensor
from torch.nn import functional

import mar
from mar.data.images import image_grid
from mar.pipeline import Pipeline, to_pil


def draw(model: Pipeline, size: tuple[int, int], batch: int, sheet: Path | None, **asks: Any) -> Tensor:
    """Draw pictures of one size, and average them to the trained one; prints seconds a picture."""
    started = time.process_time()
    images: Tensor = model.sample(output="tensor", batch=batch, allow_broken=True, image_size=size, **asks)
    seconds = (time.process_time() - started) / len(images)
    print(f"{size[0]}x{size[1]}: {seconds:.3f} s a picture", flush=True)
    if sheet is not None:
        sheet.mkdir(parents=True, exist_ok=True)
        image_grid(to_pil(images[:20]), 10).save(sheet / f"{size[0]}x{size[1]}.png")
    return functional.interpolate(images, model.image_size, mode="area")


def judge_fashion(model: Pipeline, size: tuple[int, int], options: argparse.Namespace) -> dict[str, float]:
    """Judge classes in turn: class agreement, and the distance to the test pictures."""
    labels = [i % 10 for i in range(options.count)]
    images = draw(model, size, options.batch, options.sheet, labels=labels, preset=options.preset)
    levels = ((images.squeeze(1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    classifier = load_classifier(options.classifier)
    values, logits = features(classifier, levels)
    real, _ = features(classifier, load_split(options.data, "t10k").images)
    return {
        "of its class": float((logits.argmax(1) == np.array(labels)).mean()),
        "distance": frechet(*statistics(values), *statistics(real)),
    }


@cache
def read_emoji(data: Path) -> tuple[list[Row], Tensor]:
    """Read all real emoji, once."""
    rows = read_rows(data)
    return rows, load_real(data, rows)


def judge_emoji(model: Pipeline, size: tuple[int, int], options: argparse.Namespace) -> dict[str, float]:
    """Judge names of real emoji: whether the nearest of all is the one asked for."""
    rows, real = read_emoji(options.data)
    asked = random.Random(SEED).sample(range(len(rows)), options.count)
    prompts = [rows[i]["text"] for i in asked]
    images = draw(model, size, options.batch, options.sheet, prompts=prompts, preset=options.preset)
    return {**judge_seen(images, asked, rows, real), "corner": corner(images)}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["fashion", "emoji"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, help="for fashion: a file of `fashion_judge.py train`")
    parser.add_argument("--sizes", nargs="+", required=True, help="PIXELS or HEIGHTxWIDTH")
    parser.add_argument("--rotary", choices=["interpolated", "continued"], default="interpolated")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    model = mar.load(options.model, device="cpu")
    if options.rotary == "continued":
        with_grid = model.model.with_grid
        object.__setattr__(model.model, "with_grid", lambda grid: with_grid(grid, "continued"))
    judge = judge_fashion if options.model == "fashion" else judge_emoji
    for text in options.sizes:
        numbers = [int(number) for number in text.split("x")]
        figures = judge(model, (numbers[0], numbers[-1]), options)
        print("  " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
