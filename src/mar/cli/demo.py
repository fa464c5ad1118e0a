"""`mar demo`: draw images from the bundled model, and one while it is revealed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mar.cli.options import parse, save_png
from mar.config import to_dict


@dataclass(frozen=True)
class DemoOptions:
    """Draws the bundled model's ten classes, and one picture step by step."""

    out: Path = Path("out")
    """Folder for the two PNGs."""
    seed: int = 0
    """Seed of the first picture; the others count up from it."""
    rows: int = 1
    """Pictures of each class."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def demo(arguments: Sequence[str]) -> int:
    """Runs `mar demo`."""
    options = parse(DemoOptions, "demo", arguments)
    from mar.data.images import image_grid
    from mar.zoo import load

    if options.rows < 1:
        raise ValueError(f"rows: got {options.rows}, expected at least 1")
    model = load("fashion", device=options.device)
    labels = list(range(len(model.classes))) * options.rows
    seeds = [options.seed + i for i in range(len(labels))]
    facts: dict[str, Any] = {"model": "fashion", **to_dict(model.sampling)}

    started = time.perf_counter()
    images = model.sample(labels=labels, seeds=seeds, progress=True)
    seconds = time.perf_counter() - started
    columns = 5 if options.rows == 1 else len(model.classes)
    save_png(image_grid(images, columns, scale=4), options.out / "demo.png", labels=labels, seeds=seeds, **facts)

    steps = [step.images[0] for step in model.reveal(labels=[9], seeds=[options.seed + 9])]
    ten_steps = [steps[round(i * (len(steps) - 1) / 9)] for i in range(10)]
    save_png(
        image_grid(ten_steps, 10, scale=4), options.out / "reveal.png", labels=[9], seeds=[options.seed + 9], **facts
    )

    print(f"{options.out / 'demo.png'}    {', '.join(model.classes)}")
    print(f"{options.out / 'reveal.png'}  an ankle boot being revealed in {len(steps)} steps")
    print(f"{len(images)} pictures in {seconds:.1f} s, {seconds / len(images):.2f} s each, on {model.device}")
    return 0
