"""`mar train`: a run from a recipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mar.cli.options import parse
from mar.config import ConfigError, TrainConfig
from mar.presets import RECIPES, recipe


@dataclass(frozen=True)
class TrainOptions:
    """Trains a model. The first argument may be a recipe; every other option changes one of its settings.

    The same command goes on where a run stopped.
    """

    out: Path | None = None
    """Folder of the run; by default runs/ and the name of the recipe."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    resume_official: Path | None = None
    """An official checkpoint-last.pth of a run that was interrupted, to be gone on with."""


def train(arguments: Sequence[str]) -> int:
    """`mar train [RECIPE]`."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else "fashion"
    default = TrainOptions(Path("runs", name), recipe(name))
    rest = list(arguments[1:] if named else arguments)
    if "-h" in rest or "--help" in rest:
        print(f"mar train [RECIPE] --out FOLDER ...    recipes: {', '.join(RECIPES)}; shown: {name}\n")
    options = parse(TrainOptions, f"train {name}", rest, default)
    folder = options.out or Path("runs", name)
    from mar import runtime, zoo
    from mar.training.estimate import estimate
    from mar.training.log import RunLog
    from mar.training.loop import train as run_to_end
    from mar.training.run import adopt_official, export, open_run, snapshot

    if runtime.world_size() > 1:
        raise ConfigError(f"training on {runtime.world_size()} processes is not there yet; start one, without torchrun")
    device = runtime.choose_device(options.device)
    needs = estimate(options.config)
    needs.check_disk(folder)
    run = open_run(options.config, folder, device=device, load_tokenizer=zoo.load_tokenizer, load_model=zoo.load)
    if options.resume_official is not None:
        if run.progress.images:
            raise ConfigError(f"{folder} has gone on already; leave --resume-official out to go on with it")
        adopt_official(run, options.resume_official)
    print(needs.text(), file=sys.stderr)
    log = RunLog(run.folder, options.config.images, run.progress.images)
    run.on_snapshot = lambda at: snapshot(at, log)
    try:
        finished = run_to_end(run, log)
    finally:
        log.close()
    if not finished:
        print(f"stopped and saved at {run.progress.images:,} images; the same command goes on", file=sys.stderr)
        return 130
    export(run)
    if run.progress.skipped_steps:
        print(f"{run.progress.skipped_steps} steps were skipped: loss or gradient was not finite", file=sys.stderr)
    if log.skipped_pictures:
        print(f"{len(log.skipped_pictures)} pictures could not be read and were skipped", file=sys.stderr)
    print(f"{folder / 'model.safetensors'} (EMA) and model-raw.safetensors; draw: mar sample {folder}")
    return 0
