"""`mar demo` and `mar sample`: pictures from a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mar.cli.options import SamplingFlags, parse, save_png
from mar.config import to_dict


@dataclass(frozen=True)
class DemoOptions:
    """Draws the ten classes of the bundled model, and one picture as it is revealed."""

    out: Path = Path("out")
    """Folder for the two PNGs."""
    seed: int = 0
    """Seed of the first picture; the others count up from it."""
    rows: int = 1
    """Pictures of each class."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def demo(arguments: Sequence[str]) -> int:
    """`mar demo`."""
    options = parse(DemoOptions, "demo", arguments)
    from mar.pictures import grid
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
    save_png(grid(pictures, columns, scale=4), options.out / "demo.png", labels=labels, seeds=seeds, **facts)

    growing = [step.images[0] for step in model.reveal(labels=[9], seeds=[options.seed + 9])]
    shown = [growing[round(i * (len(growing) - 1) / 9)] for i in range(10)]
    save_png(grid(shown, 10, scale=4), options.out / "reveal.png", labels=[9], seeds=[options.seed + 9], **facts)

    print(f"{options.out / 'demo.png'}    {', '.join(model.classes)}")
    print(f"{options.out / 'reveal.png'}  an ankle boot being revealed in {len(growing)} steps")
    print(f"{len(pictures)} pictures in {seconds:.1f} s, {seconds / len(pictures):.2f} s each, on {model.device}")
    return 0


@dataclass(frozen=True)
class SampleOptions(SamplingFlags):
    """Draws pictures from a model into a folder of PNGs. What is left out is the model's own default."""

    model: Annotated[str, tyro.conf.Positional]
    """fashion, mar-base, mar-large, mar-huge, a file, a folder, or a Hub repository owner/name."""
    labels: tuple[str, ...] = ()
    """Class numbers or names; `none` for no class. By default every class (at most ten), or none."""
    count: int = 1
    """Pictures of each label."""
    seed: int = 0
    """Seed of the first picture; the others count up from it."""
    out: Path = Path("out")
    """Folder for the PNGs."""
    batch: int = 16
    """Pictures drawn at once; changes memory and speed, and pictures with int8 weights only."""


def sample(arguments: Sequence[str]) -> int:
    """`mar sample`."""
    options = parse(SampleOptions, "sample", arguments)
    from mar.data.labels import resolve_labels
    from mar.pictures import grid
    from mar.sampling.sinks.folder import slug

    if options.count < 1:
        raise ValueError(f"count is {options.count}, but it must be at least 1")
    model = options.load(options.model)
    settings = options.settings()
    asked: list[str | int | None] = [None if label.lower() == "none" else label for label in options.labels]
    labels = [label for label in asked or _default_labels(model) for _ in range(options.count)]
    seeds = [options.seed + i for i in range(len(labels))]
    begun = time.perf_counter()
    pictures = model.sample(
        labels, seeds, batch=options.batch, progress=True, allow_broken=options.allow_broken, **settings
    )
    seconds = time.perf_counter() - begun
    facts = {
        "model": options.model, "weights": model.fingerprint(), "dtype": options.dtype,
        **to_dict(model.sampling_with(**settings)),
    }  # fmt: skip
    numbers = resolve_labels(labels, model.classes, model.model.config.classes)
    for label, number, seed, picture in zip(labels, numbers, seeds, pictures, strict=True):
        name = model.classes[label] if isinstance(label, int) and model.classes else str(label).lower()
        drawn = {"label": None if number < 0 else number, "seed": seed}  # as `mar generate` has it
        save_png(picture, options.out / f"{slug(name)}-{seed:05d}.png", **drawn, **facts)
    sheet = grid(pictures, columns=options.count if options.count > 1 else min(len(pictures), 10))
    save_png(sheet, options.out / "grid.png", labels=[None if n < 0 else n for n in numbers], seeds=seeds, **facts)
    print(f"{len(pictures)} pictures and grid.png in {options.out}")
    print(f"{seconds:.1f} s, {seconds / len(pictures):.2f} s a picture, on {model.device}")
    return 0


def _default_labels(model: Any) -> list[str | int | None]:
    return list(range(min(model.model.config.classes, 10))) or [None]
