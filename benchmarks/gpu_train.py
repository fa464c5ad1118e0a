"""Train a recipe for a stated time on this device, and export it: `gpu.py --train RECIPE --minutes 5`."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from quality_recipes import settings

from mar.config import ConfigError, TrainConfig
from mar.presets import RECIPES, recipe
from mar.sampling.generate import BrokenLatents
from mar.training.log import open_log
from mar.training.run import export, open_run
from mar.training.speed import model_speed
from mar.training.trainer import train

if TYPE_CHECKING:
    from gpu_steps import Bench

MEASURE_SECONDS = 10.0
"""Time to measure the speed of training, part of the stated time."""
RESERVE_SECONDS = 5.0
"""Kept back for opening the run and writing the model."""
CHUNK = 20
"""Steps after which the time is looked at."""


def train_for(bench: Bench) -> None:
    """Train for `--minutes`, with the recipe's schedule fitted to what this device sees in that time."""
    options, begun = bench.options, time.monotonic()
    config = configure(bench)
    seconds = 60 * options.minutes
    speed = model_speed(config, bench.device, min(MEASURE_SECONDS, 0.1 * seconds)).images_per_second
    left = seconds - (time.monotonic() - begun) - bench.size(RESERVE_SECONDS, 0.0)
    config = fit(config, max(int(speed * left / config.batch), bench.size(100, 4)) * config.batch)
    bench.report({"measured images/s": speed, "images": config.images, "precision": config.precision})

    run = open_run(config, options.out / f"train-{options.train}", device=bench.device)
    log = open_log(run)
    # a stop before the planned end exports what there is
    deadline = begun + seconds + 30
    try:
        step = run.step

        def watched(batch):  # type: ignore[no-untyped-def]
            if run.progress.step % CHUNK == 0 and time.monotonic() > deadline:
                run.should_stop = True
            return step(batch)

        run.step = watched  # type: ignore[method-assign]
        trained = time.monotonic()
        train(run, log)
        trained = time.monotonic() - trained
    finally:
        log.close()
    paths = export(run)
    bench.report({
        "trained": {"images": run.progress.images, "s": trained, "images/s": run.progress.images / max(trained, 1e-9)},
        "files": ", ".join(str(path) for path in paths), "seconds in all": time.monotonic() - begun,
    })  # fmt: skip
    if run.progress.images:
        from mar import load

        labels = [0, 1] if config.model.classes > 1 else [None, None]
        try:
            load(paths[0], device=bench.device).sample(labels, [0, 1])
            bench.report({"a sample of the export": "drawn"})
        except BrokenLatents as error:
            bench.report({"a sample of the export": str(error)[:200]})


def configure(bench: Bench) -> TrainConfig:
    """Return the recipe with `--set` and without snapshots. ConfigError for a recipe that plans from its data."""
    options = bench.options
    if options.train not in RECIPES:
        raise ConfigError(
            f"got --train {options.train}, expected one of {', '.join(RECIPES)}; a recipe that plans from its images "
            f"is `mar train {options.train} --data FOLDER --minutes {options.minutes:g}`"
        )
    base = recipe(options.train)
    config = settings(options.train, base.data, options.set)  # type: ignore[arg-type]
    if bench.rehearse:
        trunk = replace(config.model.encoder, width=20, depth=1)
        model = replace(config.model, encoder=trunk, decoder=trunk, head=replace(config.model.head, width=16, depth=1))
        config = replace(config, model=model, sampling=replace(config.sampling, steps=2, diffusion_steps=2))
    return replace(
        config, precision=options.precision, sample_every=0, validate_every=0, save_every=10**9, log_to=(),
        log_every=10,
    )  # fmt: skip


def fit(config: TrainConfig, images: int) -> TrainConfig:
    """Return a configuration of another length, with warm-up and decay in proportion."""
    factor = images / config.images
    return replace(config, images=images, warmup=int(config.warmup * factor), decay=int(config.decay * factor))
