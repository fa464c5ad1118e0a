"""`mar demo`: draw images from words with the bundled model, and one while it is revealed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mar.cli.options import parse, save_png
from mar.config import to_dict
from mar.terminal import print_out

PROMPTS = (
    "grinning face", "woman astronaut dark skin tone", "man surfing light skin tone", "thumbs up medium skin tone",
    "red heart", "pizza", "strawberry", "tropical fish",
    "fox", "flag of Japan", "racing car", "rainbow",
)  # fmt: skip
"""Prompts of the grid, row by row."""
COLUMNS, SCALE, STRIP = 4, 2, 8
REVEALED = "woman astronaut dark skin tone"
"""Prompt of the image that is shown while it is revealed."""


@dataclass(frozen=True)
class DemoOptions:
    """Draws pictures from words with the bundled model, one step by step."""

    out: Path = Path("out")
    """Folder for the two PNGs."""
    prompt: tuple[str, ...] = ()
    """Words of your own, a picture each, instead of the usual ones."""
    seed: int = 0
    """Seed of the first picture; the others count up from it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def demo(arguments: Sequence[str]) -> int:
    """Runs `mar demo`."""
    options = parse(DemoOptions, "demo", arguments)
    from mar.checkpoint.files import check_writable
    from mar.data.images import image_grid
    from mar.zoo import load

    check_writable(options.out, is_file=False)
    model = load("emoji", device=options.device)
    prompts = list(options.prompt or PROMPTS)
    seeds = [options.seed + i for i in range(len(prompts))]
    facts: dict[str, Any] = {"model": "emoji", **to_dict(model.sampling)}

    started = time.perf_counter()
    images = model.sample(prompts=prompts, seeds=seeds, progress=True)
    seconds = time.perf_counter() - started
    grid = image_grid(images, min(COLUMNS, len(images)), SCALE)
    save_png(grid, options.out / "demo.png", prompts=prompts, seeds=seeds, **facts)

    revealed = options.prompt[0] if options.prompt else REVEALED
    seed = seeds[prompts.index(revealed)]
    steps = [step.images[0] for step in model.reveal(prompts=[revealed], seeds=[seed])]
    shown = [steps[round(i * (len(steps) - 1) / (STRIP - 1))] for i in range(STRIP)]
    strip = image_grid(shown, STRIP, SCALE)
    save_png(strip, options.out / "reveal.png", prompts=[revealed], seeds=[seed], **facts)

    print_out(f"{options.out / 'demo.png'}    {', '.join(prompts)}")
    print_out(f"{options.out / 'reveal.png'}  {revealed}, revealed in {len(steps)} steps")
    print_out(f"{len(images)} pictures in {seconds:.1f} s, {seconds / len(images):.2f} s each, on {model.device}")
    return 0
