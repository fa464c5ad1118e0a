"""How good pictures are after so many minutes of learning: a recipe is trained for a time and judged on the way.

    python benchmarks/quality.py train --data PATH --recipe fashion --minutes 15 --seed 0 --out runs/quality/fashion-0
    python benchmarks/quality.py plot runs/quality/* --out quality.png
    python benchmarks/quality.py table runs/quality/*

PATH is the folder of the four gzipped IDX files of Fashion-MNIST, judged by the classifier that `fashion_judge.py
train` made (`--classifier FILE`), or what `mar train --data` takes, judged by EfficientNet-Lite0. A recipe is one of
`mar train`'s, or `reference`: the paper's settings at the size of this data's recipe, with EMA warm-up and a bounded
x0. `--set model.patch_size=2` changes a setting of it; `--set tokenizer=FOLDER` with channels and grid to match, what
is learned from raw pixels otherwise.

Minutes are the processor time that learning took, divided by `--threads`: a busy neighbour takes none of them, though
fewer pictures are seen in each while it works. How many pictures fit into them is measured before the first step, and
warm-up and decay of the learning rate are fitted to that; the time it took in the end is told beside. Judging is not
counted. The same command goes on where a run was stopped; of one at its end it judges what was not judged yet: another
`--count`, `--guidance-scale` or `--weights`. All else has to be as it was when the run was begun; the data and the
classifier may have been moved.
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
from quality_data import Idx, fingerprints, is_fashion, open_judge, open_parts
from quality_notes import read_lines, require_same, write_lines
from quality_recipes import changed, settings
from quality_report import MARKED, TRIAL, run_plot, run_table

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
"""Minutes after which a run is judged, beside its end, where no others are wanted."""
WARM_UP, MEASURED = 2, 6.0
"""Steps that are not timed, and seconds of processor time that are, to find out how many pictures a minute has."""


def open_trial(config: TrainConfig, folder: Path, parts: tuple[Source, Source]) -> TimedRun:
    """The run of `config` on the first part, held against the second; resumed where it has saved states."""
    channels = config.model.channels
    image_channels = channels if config.tokenizer == "pixels" else 1 if is_fashion(Path(config.data)) else 3
    check_classes(config, parts[0].classes)
    name = config.tokenizer
    tokenizer = from_name(name, image_channels, channels) if is_name(name) else load_tokenizer(name)
    transform = Transform(tokenizer.image_size(config.model.grid), tokenizer.image_channels)
    if not tokenizer.has_stats:
        tokenizer.fit(in_order(subset(parts[0], 1000), transform))
    torch.manual_seed(config.seed)
    run = TimedRun(config, folder, parts[0], tokenizer, MAR(config.model), torch.device("cpu"), held_out=parts[1])
    run.resume()
    return run


def fitted(config: TrainConfig, parts: tuple[Source, Source], minutes: float, threads: int) -> TrainConfig:
    """The recipe with as many pictures as the minutes have; its decay, and at most its warm-up, in proportion."""
    with tempfile.TemporaryDirectory() as folder:
        run = open_trial(config, Path(folder), parts)
        loader = run.batches()
        for _ in range(WARM_UP):
            run.step(next(loader))
        begun, steps = time.process_time(), 0
        while time.process_time() - begun < MEASURED * threads:
            run.step(next(loader))
            steps += 1
        a_step = (time.process_time() - begun) / threads / steps
    images = max(1, round(60 * minutes / a_step)) * config.batch
    share = images / config.images
    return replace(
        config, images=images, decay=round(config.decay * share), warmup=min(config.warmup, images // 8), sample_every=0
    )


class Trial:
    """A run, its clock, and what is said of it at its marks."""

    def __init__(
        self, run: TimedRun, log: Log, extractor: Extractor, minutes: float, threads: int, marks: Sequence[int] = MARKS
    ) -> None:
        self.run, self.log, self.extractor, self.marks = run, log, extractor, marks
        self.path = run.folder / MARKED
        self.lines = [line for line in read_lines(self.path) if line["images"] <= run.progress.images]
        self.a_minute = run.config.images / minutes
        held = run.held_out
        assert isinstance(held, Idx | Source)
        self.size = run.tokenizer.image_size(run.config.model.grid)
        self.reference = collect(SourceImages(held, "held out", size=self.size), extractor).statistics
        self.validate = Validation(run, log)
        so_far = run.saved_minutes()
        if so_far is None:  # saved by an older version
            so_far = self.lines[-1]["minutes"] if self.lines else 0.0
        self.clock = run.clock = Clock(so_far, threads)

    def real(self, count: int) -> float:
        """The distance of as many training pictures, evenly taken."""
        assert isinstance(self.run.source, Idx | Source)
        pictures = SourceImages(subset(self.run.source, count), "learned from", size=self.size)
        return compare(collect(pictures, self.extractor), self.reference, self.extractor, MetricOptions()).distance

    def at_mark(self, count: int) -> None:
        """Judges the run by `count` pictures and saves it, if it has come to a mark."""
        minutes = round(self.run.progress.images / self.a_minute)
        if minutes in self.marks and self.run.progress.images < self.run.config.images:
            self.once(count)
            self.run.save()

    def once(self, count: int, weights: str = "ema", **changes: Any) -> dict[str, Any]:
        """The line that `judge` wrote of the run as it is now, or writes where there is none yet."""
        wanted = self._about(count, weights, **changes)
        names = {"images", "pictures", "weights", "guidance_scale"}
        written = (line for line in self.lines if {n: v for n, v in line.items() if n in names} == wanted)
        return next(written, None) or self.judge(count, weights, **changes)

    def _about(self, count: int, weights: str, **changes: Any) -> dict[str, Any]:
        """What a line is of."""
        about = {"images": self.run.progress.images, **changes}
        return about | ({} if weights == "ema" else {"weights": weights}) | {"pictures": count}

    def judge(self, count: int, weights: str = "ema", **changes: Any) -> dict[str, Any]:
        """A line of what is known of the run now, its pictures drawn with `changes` of the recipe's sampling."""
        line = {"minutes": self.clock.stop(), **self._about(count, weights, **changes)}
        snapshot = take_snapshot(self.run)
        if weights == "ema" and not changes:
            line |= {"val_loss": self.validate(snapshot)["val_loss"]}
            export_and_sample(snapshot, self.log)
        drawer = snapshot.pipeline(weights)
        drawer.sampling = replace(drawer.sampling, **changes)
        plan = Plan.total(count, list(range(self.run.config.model.classes)) or [-1])
        begun = time.process_time()
        try:
            found = collect(GeneratedImages(drawer, plan, name="the run"), self.extractor, batch=100)
            report = compare(found, self.reference, self.extractor, MetricOptions())
            line |= {"distance": report.distance, "agreement": report.class_accuracy}
            line |= {"worst_class": report.worst_class_accuracy, "drawing_seconds": time.process_time() - begun}
        except BrokenLatents as error:
            line |= {"broken": str(error)}
        self.lines.append(line)
        write_lines(self.path, self.lines)
        print(json.dumps(line), flush=True)
        self.clock.go()
        return line


def begin(args: argparse.Namespace, parts: tuple[Source, Source]) -> dict[str, Any]:
    """What is noted of a trial: how it was asked for, and the recipe as it came out. Begun, where it was not yet; else
    ValueError where it was another one."""
    told: dict[str, Any] = {"recipe": args.recipe, "minutes": args.minutes, "threads": args.threads}
    told |= {"seed": args.seed, "data": args.data.name, **fingerprints(args.data, parts, args.classifier)}
    note = args.out / TRIAL
    if note.is_file():
        kept: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        before, now = changed(kept["set"]), changed(args.set)
        older = {"seed": kept["config"]["seed"], "data": Path(kept["config"]["data"]).name}  # did not note them apart
        every = dict.fromkeys(sorted({*before, *now}), "as in the recipe")
        require_same(args.out, {**older, **kept, **every, **before}, {**told, **every, **now})
        kept["config"]["data"] = str(args.data)  # where it is now
        return kept
    config = fitted(
        replace(settings(args.recipe, args.data, args.set), seed=args.seed), parts, args.minutes, args.threads
    )
    kept = {**told, "set": args.set, "config": to_dict(config)}
    write_text(note, json.dumps(kept, indent=1))
    return kept


def run_train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    parts = open_parts(args.data)
    network = open_judge(args.data, args.classifier)
    kept = begin(args, parts)
    config = from_dict(TrainConfig, kept["config"])
    run = open_trial(config, args.out, parts)
    log = RunLog(args.out, config.images, run.progress.images)
    try:
        if unknown := {*args.weights} - {*run.weights}:
            raise ValueError(f"--weights {' '.join(sorted(unknown))}: this run has {', '.join(run.weights)}")
        trial = Trial(run, log, network, kept["minutes"], kept["threads"], args.marks)
        run.callbacks.append(Callback(max(config.batch, int(trial.a_minute)), lambda _: trial.at_mark(args.on_the_way)))
        trial.clock.go()
        if not train(run, log):
            return
        last = trial.once(args.count)
        for guidance in args.guidance_scale:
            trial.once(args.count, guidance_scale=guidance)
        for weights in args.weights:
            trial.once(args.count, weights)
        print(f"{trial.real(args.count):.3f} is the distance of {args.count:,} training pictures")
        print(f"wanted {kept['minutes']:g} minutes, took {last['minutes']:.2f}; {config.images:,} pictures")
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
    verb.add_argument("--classifier", type=Path, help="for Fashion-MNIST: what `fashion_judge.py train` made")
    verb.add_argument("--count", type=int, default=5000, help="pictures that are drawn and judged at the end")
    verb.add_argument("--on-the-way", type=int, default=1000, help="and at each mark")
    verb.add_argument("--marks", type=int, nargs="*", default=MARKS, metavar="MINUTES", help="when, beside the end")
    verb.add_argument("--guidance-scale", type=float, nargs="*", default=[], help="further scales to judge at the end")
    verb.add_argument("--weights", nargs="*", default=[], help="others to judge at the end: raw, ema-0.99 (ema_others)")
    verb.set_defaults(run=run_train)
    verb = verbs.add_parser("table", help="all marks of runs, as Markdown")
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
