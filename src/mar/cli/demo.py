"""`mar demo` and `mar sample`: pictures from a model."""

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
    """Draws the bundled model's ten classes, and one picture while it is revealed."""

    out: Path = Path("out")
    """Folder for the two PNGs."""
    seed: int = 0
    """Seed of the first picture; the others count up from it."""
    rows: int = 1
    """Pictures of each class."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def demo(arguments: Sequence[str]) -> int:
    """Run `mar demo`."""
    options = parse(DemoOptions, "demo", arguments)
    from mar.data.images import image_grid
    from mar.zoo import load

    if options.rows < 1:
        raise ValueError(f"rows is {options.rows}, but it must be at least 1")
    model = load("fashion", device=options.device)
    labels = list(range(len(model.classes))) * options.rows
    seeds = [options.seed + i for i in range(len(labels))]
    facts: dict[str, Any] = {"model": "fashion", **to_dict(model.sampling)}

    begun = time.perf_counter()
    pictures = model.sample(labels=labels, seeds=seeds, progress=True)
    seconds = time.perf_counter() - begun
    columns = 5 if options.rows == 1 else len(model.classes)
    save_png(image_grid(pictures, columns, scale=4), options.out / "demo.png", labels=labels, seeds=seeds, **facts)

    growing = [step.images[0] for step in model.reveal(labels=[9], seeds=[options.seed + 9])]
    shown = [growing[round(i * (len(growing) - 1) / 9)] for i in range(10)]
    save_png(image_grid(shown, 10, scale=4), options.out / "reveal.png", labels=[9], seeds=[options.seed + 9], **facts)

    print(f"{options.out / 'demo.png'}    {', '.join(model.classes)}")
    print(f"{options.out / 'reveal.png'}  an ankle boot being revealed in {len(growing)} steps")
    print(f"{len(pictures)} pictures in {seconds:.1f} s, {seconds / len(pictures):.2f} s each, on {model.device}")
    return 0
