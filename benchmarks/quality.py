"""Image quality over training time: trains a recipe for some minutes, and evaluates it meanwhile.

    python benchmarks/quality.py train --data PATH --recipe fashion --minutes 15 --seed 0 --out runs/quality/fashion-0
    python benchmarks/quality.py plot runs/quality/* --out quality.png
    python benchmarks/quality.py table runs/quality/*

PATH is the folder of the four gzipped IDX files of Fashion-MNIST, or a value of `mar train --data`. Fashion-MNIST is
evaluated by the classifier of `fashion_judge.py train` (`--classifier FILE`), other data by EfficientNet-Lite0.

A recipe is one of `mar train`'s, or `reference`: the paper's settings at the size of this data's recipe, with EMA
warm-up and a bounded x0. `--set model.patch_size=2` changes a setting. `--set tokenizer=FOLDER`, with channels and grid
to match, trains on latents instead of pixels.

Minutes are processor time divided by `--threads`, without evaluations. Other processes thus take none of them, though
they slow down each minute. The number of images that fit into the time is measured before the first step; warm-up and
decay of the learning rate are scaled to it. The report has the minutes that training really took.

The same command resumes an interrupted run. After its end, it adds evaluations with another `--count`,
`--guidance-scale` or `--weights`. All other settings have to stay the same; data and classifier may be moved.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quality_clock import Clock, TimedRun
from quality_data import Idx, evaluation_extractor, fingerprints, is_fashion, open_splits
from quality_notes import read_lines, require_same, write_lines
from quality_recipes import changed, settings
from quality_report import RESULTS_FILE, TRIAL_FILE, run_plot, run_table

from mar.checkpoint.files import write_text
from mar.config import TrainConfig, from_dict, to_dict
from mar.data.images import Source, Transform
from mar.data.loader import in_order
from mar.data.splits import subset
from mar.evaluation.evaluate import MetricOptions, collect, compare
from mar.evaluation.features import Extractor
from mar.evaluation.image_sets import GeneratedImages, SourceImages
from mar.model.mar import MAR
from mar.sampling.generate import BrokenLatents
from mar.sampling.plan import Plan
from mar.tokenizer import from_name, is_name
from mar.training.callbacks import Validation, export_and_sample, take_snapshot
from mar.training.log import Log, RunLog
from mar.training.run import check_classes
from mar.training.trainer import Callback, train
from mar.zoo import load_tokenizer

MARKS = (1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120)
"""Default minutes after which a run is evaluated, besides its end."""
WARM_UP_STEPS, MEASURED_SECONDS = 2, 6.0
"""Steps before the speed measurement, and the processor time that it takes."""


def open_trial(config: TrainConfig, folder: Path, parts: tuple[Source, Source]) -> TimedRun:
    """Open the run of `config`, resumed if it has saved states.

    `parts` are the training images and the held-out ones.
    """
    channels = config.model.channels
    image_channels = channels if config.tokenizer == "pixels" else 1 if is_fashion(Path(config.data)) else 3
    check_classes(config, parts[0].classes)
    name = config.tokenizer
    tokenizer = from_name(name, image_channels, channels) if is_name(name) else load_tokenizer(name)
    transform = Transform(tokenizer.image_size(config.model.grid), tokenizer.image_channels, config.upright)
    if not tokenizer.has_stats:
        tokenizer.fit(in_order(subset(parts[0], 1000), transform))
    torch.manual_seed(config.seed)
    run = TimedRun(config, folder, parts[0], tokenizer, MAR(config.model), torch.device("cpu"), held_out=parts[1])
    run.resume()
    return run


def fit_to_minutes(config: TrainConfig, parts: tuple[Source, Source], minutes: float, threads: int) -> TrainConfig:
    """Scale a recipe to the images that fit into some minutes, with decay and warm-up in proportion."""
    with tempfile.TemporaryDirectory() as folder:
        run = open_trial(config, Path(folder), parts)
        loader = run.batches()
        for _ in range(WARM_UP_STEPS):
            run.step(next(loader))
        start, steps = time.process_time(), 0
        while time.process_time() - start < MEASURED_SECONDS * threads:
            run.step(next(loader))
            steps += 1
        step_seconds = (time.process_time() - start) / threads / steps
    images = max(1, round(60 * minutes / step_seconds)) * config.batch
    share = images / config.images
    return replace(
        config, images=images, decay=round(config.decay * share), warmup=min(config.warmup, images // 8), sample_every=0
    )


class Trial:
    """A run, its clock, and its evaluations."""

    def __init__(
        self, run: TimedRun, log: Log, extractor: Extractor, minutes: float, threads: int, marks: Sequence[int] = MARKS
    ) -> None:
        self.run, self.log, self.extractor, self.marks = run, log, extractor, marks
        self.path = run.folder / RESULTS_FILE
        self.lines = [line for line in read_lines(self.path) if line["images"] <= run.progress.images]
        self.images_per_minute = run.config.images / minutes
        held = run.held_out
        assert isinstance(held, Idx | Source)
        self.size = run.tokenizer.image_size(run.config.model.grid)
        self.reference = collect(SourceImages(held, "held out", size=self.size), extractor).statistics
        self.validate = Validation(run, log)
        minutes_done = run.saved_minutes()
        if minutes_done is None:  # saved by an older version
            minutes_done = self.lines[-1]["minutes"] if self.lines else 0.0
        self.clock = run.clock = Clock(minutes_done, threads)

    def real_distance(self, count: int) -> float:
        """Compute the distance of `count` training images, the floor of any model's."""
        assert isinstance(self.run.source, Idx | Source)
        pictures = SourceImages(subset(self.run.source, count), "training images", size=self.size)
        return compare(collect(pictures, self.extractor), self.reference, self.extractor, MetricOptions()).distance

    def at_mark(self, count: int) -> None:
        """Evaluate the run by `count` images and save it, if a mark is reached."""
        minutes = round(self.run.progress.images / self.images_per_minute)
        if minutes in self.marks and self.run.progress.images < self.run.config.images:
            self.evaluate_once(count)
            self.run.save()

    def evaluate_once(self, count: int, weights: str = "ema", **changes: Any) -> dict[str, Any]:
        """Return the result of `evaluate` for the current state, evaluated if it is not recorded."""
        key = self._key(count, weights, **changes)
        names = {"images", "pictures", "weights", "guidance_scale"}
        recorded = (line for line in self.lines if {n: v for n, v in line.items() if n in names} == key)
        return next(recorded, None) or self.evaluate(count, weights, **changes)

    def _key(self, count: int, weights: str, **changes: Any) -> dict[str, Any]:
        """Return the fields of a result by which it is known."""
        key = {"images": self.run.progress.images, **changes}
        return key | ({} if weights == "ema" else {"weights": weights}) | {"pictures": count}

    def evaluate(self, count: int, weights: str = "ema", **changes: Any) -> dict[str, Any]:
        """Evaluate the current state by `count` images, and record the result.

        `changes` are settings of the sampling that differ from the recipe's.
        """
        line = {"minutes": self.clock.stop(), **self._key(count, weights, **changes)}
        snapshot = take_snapshot(self.run)
        if weights == "ema" and not changes:
            line |= {"val_loss": self.validate(snapshot)["val_loss"]}
            export_and_sample(snapshot, self.log)
        pipeline = snapshot.pipeline(weights)
        pipeline.sampling = replace(pipeline.sampling, **changes)
        plan = Plan.total(count, list(range(self.run.config.model.classes)) or [-1])
        start = time.process_time()
        try:
            features = collect(GeneratedImages(pipeline, plan, name="the run"), self.extractor, batch=100)
            report = compare(features, self.reference, self.extractor, MetricOptions())
            line |= {"distance": report.distance, "agreement": report.class_accuracy}
            line |= {"worst_class": report.worst_class_accuracy, "drawing_seconds": time.process_time() - start}
        except BrokenLatents as error:
            line |= {"broken": str(error)}
        self.lines.append(line)
        write_lines(self.path, self.lines)
        print(json.dumps(line), flush=True)
        self.clock.go()
        return line


def open_or_create(args: argparse.Namespace, parts: tuple[Source, Source]) -> dict[str, Any]:
    """Return the recorded settings of a trial: options, and the recipe scaled to the minutes.

    A new trial is recorded. Raises ValueError if the folder has a trial with other settings.
    """
    options: dict[str, Any] = {"recipe": args.recipe, "minutes": args.minutes, "threads": args.threads}
    options |= {"seed": args.seed, "data": args.data.name, **fingerprints(args.data, parts, args.classifier)}
    file = args.out / TRIAL_FILE
    if file.is_file():
        trial: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        before, now = changed(trial["set"]), changed(args.set)
        # older versions recorded these two in the config only
        older = {"seed": trial["config"]["seed"], "data": Path(trial["config"]["data"]).name}
        defaults = dict.fromkeys(sorted({*before, *now}), "as in the recipe")
        require_same(args.out, {**older, **trial, **defaults, **before}, {**options, **defaults, **now})
        trial["config"]["data"] = str(args.data)  # it may have been moved
        return trial
    config = fit_to_minutes(
        replace(settings(args.recipe, args.data, args.set), seed=args.seed), parts, args.minutes, args.threads
    )
    trial = {**options, "set": args.set, "config": to_dict(config)}
    write_text(file, json.dumps(trial, indent=1))
    return trial


def run_train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    parts = open_splits(args.data)
    extractor = evaluation_extractor(args.data, args.classifier)
    recorded = open_or_create(args, parts)
    config = from_dict(TrainConfig, recorded["config"])
    run = open_trial(config, args.out, parts)
    log = RunLog(args.out, config.images, run.progress.images)
    try:
        if unknown := {*args.weights} - {*run.weights}:
            raise ValueError(f"--weights: got {' '.join(sorted(unknown))}, expected one of {', '.join(run.weights)}")
        trial = Trial(run, log, extractor, recorded["minutes"], recorded["threads"], args.marks)
        run.callbacks.append(
            Callback(max(config.batch, int(trial.images_per_minute)), lambda _: trial.at_mark(args.on_the_way))
        )
        trial.clock.go()
        if not train(run, log):
            return
        last = trial.evaluate_once(args.count)
        for guidance in args.guidance_scale:
            trial.evaluate_once(args.count, guidance_scale=guidance)
        for weights in args.weights:
            trial.evaluate_once(args.count, weights)
        print(f"distance of {args.count:,} training images: {trial.real_distance(args.count):.3f}")
        print(f"planned {recorded['minutes']:g} minutes, took {last['minutes']:.2f}; {config.images:,} images")
    finally:
        log.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("train", help="train a recipe for some minutes")
    verb.add_argument("--data", type=Path, required=True)
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--recipe", default="fashion")
    verb.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE")
    verb.add_argument("--minutes", type=float, default=15.0)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    verb.add_argument("--classifier", type=Path, help="for Fashion-MNIST: a file of `fashion_judge.py train`")
    verb.add_argument("--count", type=int, default=5000, help="images to generate and evaluate at the end")
    verb.add_argument("--on-the-way", type=int, default=1000, help="images to evaluate at each mark")
    verb.add_argument(
        "--marks", type=int, nargs="*", default=MARKS, metavar="MINUTES", help="evaluate after these minutes"
    )
    verb.add_argument(
        "--guidance-scale", type=float, nargs="*", default=[], help="further scales to evaluate at the end"
    )
    verb.add_argument(
        "--weights",
        nargs="*",
        default=[],
        help="further weights to evaluate at the end: raw, or ema-0.99 of ema_others",
    )
    verb.set_defaults(run=run_train)
    verb = verbs.add_parser("table", help="all results of trials, as Markdown")
    verb.add_argument("folders", type=Path, nargs="+")
    verb.set_defaults(run=run_table)
    verb = verbs.add_parser("plot", help="distance over minutes")
    verb.add_argument("folders", type=Path, nargs="+")
    verb.add_argument("--out", type=Path, default=Path("quality.png"))
    verb.set_defaults(run=run_plot)
    args = parser.parse_args()
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
