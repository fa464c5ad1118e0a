"""`mar evaluate`: how good a model or a set of pictures is, in numbers, and which way of drawing is best."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mar.cli.features import FeatureFlags, Split, interruptible, progress, say_memory
from mar.cli.options import SamplingFlags, one_voice, parse
from mar.config import ConfigError, to_dict

if TYPE_CHECKING:
    import torch

    from mar.evaluation.evaluate import Collected, Report
    from mar.evaluation.statistics import Statistics
    from mar.evaluation.streams import PictureSet
    from mar.evaluation.sweep import Table
    from mar.sampling.plan import Plan


@dataclass(frozen=True)
class EvaluateOptions(FeatureFlags, SamplingFlags):
    """Judges a model, or pictures that are there: FID or another Fréchet distance, Inception Score, KID, precision,
    recall, class agreement. For several processes: torchrun --nproc-per-node 8 -m mar evaluate ..."""

    what: Annotated[str, tyro.conf.Positional]
    """A model by name, file or folder; a folder or .npz of pictures; or an .npz of `mar stats`."""
    reference: str
    """Real pictures: an .npz of `mar stats` or ADM's, an .npz or folder of pictures, a Parquet file, fashion."""
    reference_split: Split = "test"
    """Which part of a reference that has several."""
    count: int | None = None
    """Pictures in all, the classes taking turns. By default 50 of each class, or all that are there."""
    seed: int = 0
    """Pictures of another seed are others."""
    kid: bool = False
    """Also the kernel distance, with its standard error."""
    precision: bool = False
    """Also precision and recall."""
    splits: int = 10
    """Parts over which the Inception Score is averaged."""
    classifier: str | None = None
    """FILE.py:function or module:function of a network that knows the classes: is a picture of the class asked for?"""
    classifier_weights: Path | None = None
    """A file of weights for it."""
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=FIRST:LAST:STEP or NAME=A,B,C: judge every combination; cfg (guidance), K (steps), diffusion_steps, ..."""
    out: Path | None = None
    """Where the report (.json) goes, or the sweep's folder (by default runs/sweep)."""


def evaluate(arguments: Sequence[str]) -> int:
    """`mar evaluate`."""
    return interruptible("a sweep goes on by the same command", lambda check: _evaluate(arguments, check))


def _evaluate(arguments: Sequence[str], check: Callable[[], None]) -> int:
    from mar import runtime

    with one_voice():
        options = parse(EvaluateOptions, "evaluate", arguments)
        runtime.choose_device(options.device)
        if options.count is not None and options.count < 2:
            raise ConfigError(f"count is {options.count}, but it must be at least 2")
    with runtime.process_group(options.device) as device:
        with one_voice():
            judge = _Judge(options, device, check)
        return _sweep(judge) if options.sweep else _once(judge)


class _Judge:
    """What stays the same from one set of pictures to the next: networks, model, reference."""

    def __init__(self, options: EvaluateOptions, device: torch.device, check: Callable[[], None]) -> None:
        from mar.evaluation.evaluate import Wanted
        from mar.evaluation.features import open_extractor
        from mar.evaluation.inputs import is_pictures, open_reference

        self.options, self.check = options, check
        given = is_pictures(options.what)
        if given and options.sweep:
            raise ConfigError(f"a sweep compares ways of drawing, but {options.what} is no model")
        self.model = None if given else options.load(options.what, device)
        if self.model is not None:
            replace(self.model.sampling, **options.settings()).check(self.model.model.config)
        self.wanted = Wanted(options.kid, options.precision, options.splits)
        self.extractor = options.extractor(device)
        self.classifier = (
            open_extractor(options.classifier, options.classifier_weights).to(device) if options.classifier else None
        )
        size = options.size() or (None if self.model is None else self.model.image_size)
        self.reference: Statistics = open_reference(
            options.reference, self.extractor, self.wanted, split=options.reference_split, size=size,
            batch=options.batch, advance=lambda done: check(),
        )  # fmt: skip

    def plan(self) -> Plan:
        """Which pictures to draw."""
        from mar.sampling.plan import Plan

        assert self.model is not None
        classes = list(range(self.model.model.config.classes)) or [-1]
        if self.options.count is not None:
            return Plan.total(self.options.count, classes, self.options.seed)
        return Plan.per_class(50, classes, self.options.seed)

    def report(self, **point: Any) -> Report:
        """On the pictures that are there, or on those drawn with the settings of `point`."""
        from mar.evaluation.evaluate import compare

        collected = self._collect(point)
        with one_voice():
            return compare(collected, self.reference, self.extractor, self.wanted)

    def _collect(self, point: dict[str, Any]) -> Collected:
        from mar.evaluation.evaluate import Collected, collect
        from mar.evaluation.inputs import is_statistics, open_pictures
        from mar.evaluation.statistics import Statistics

        options = self.options
        if self.model is None and is_statistics(options.what):
            with one_voice():
                found = Statistics.load(Path(options.what), features=self.wanted.features)
            return Collected(found, None, None, (), (), 0.0)
        given: PictureSet | None = None
        with one_voice():
            if self.model is None:
                given = open_pictures(options.what, size=options.size(), limit=options.count)
            count = len(self.plan()) if given is None else len(given)
            if self.wanted.features:
                say_memory(count, self.extractor)
        with one_voice(), progress(count, self.check) as advance:
            pictures = given or self._drawn(point, advance)
            return collect(
                pictures, self.extractor, wanted=self.wanted, classifier=self.classifier, batch=options.batch,
                advance=advance,
            )  # fmt: skip

    def _drawn(self, point: dict[str, Any], advance: Callable[[float], None]) -> PictureSet:
        from mar.evaluation.streams import DrawnPictures

        assert self.model is not None
        return DrawnPictures(
            self.model, self.plan(), name=self.options.what, allow_broken=self.options.allow_broken, advance=advance,
            **{**self.options.settings(), **point},
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What a sweep's numbers depend on, beside its points."""
        options, model = self.options, self.model
        assert model is not None
        about = None if self.reference.about is None else to_dict(self.reference.about)
        return {
            "weights": model.fingerprint(), "pictures": len(self.plan()), "seed": options.seed, "dtype": options.dtype,
            "features": self.extractor.fingerprint, "reference": about or options.reference, "kid": options.kid,
            "precision": options.precision, "splits": options.splits,
            "classifier": self.classifier and self.classifier.fingerprint,
            "sampling": to_dict(replace(model.sampling, **options.settings())),
        }  # fmt: skip


def _once(judge: _Judge) -> int:
    from mar import runtime
    from mar.checkpoint.files import write_text

    report, out = judge.report(), judge.options.out
    with one_voice():
        if runtime.rank() == 0:
            for name, value in report.lines():
                print(f"{name:<32} {value}")
            _warn(report)
            if out is not None:
                write_text(out, json.dumps(report.to_dict(), indent=1) + "\n")
    return 0


def _sweep(judge: _Judge) -> int:
    from mar import runtime
    from mar.evaluation.plots import plot
    from mar.evaluation.sweep import Table, points

    folder = judge.options.out or Path("runs/sweep")
    with one_voice():
        wanted = points(judge.options.sweep)
        assert judge.model is not None
        for point in wanted:
            replace(judge.model.sampling, **{**judge.options.settings(), **point}).check(judge.model.model.config)
        table = Table(folder, judge.settings())
        missing = [point for point in wanted if not table.has(point)]
    for place, point in enumerate(missing, 1):
        if runtime.rank() == 0:
            print(f"{place} of {len(missing)}: {_words(point)}", file=sys.stderr, flush=True)
        report = judge.report(**point)
        with one_voice():
            if runtime.rank() == 0:
                table.add(point, report)
                plot(table, folder / "sweep.png")
                if place == 1:
                    _warn(report)
    if runtime.rank() == 0:
        _show(table)
        print(f"{folder}: sweep.json, sweep.csv, sweep.png")
    return 0


def _show(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as Shown

    shown, best = Shown(box=None), table.best()
    for name in table.columns():
        shown.add_column(name.replace("_", " "), justify="right")
    for row in table.rows:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in table.cells(row)]
        shown.add_row(*cells, style="bold" if row is best else None)
    Console().print(shown)
    if best is not None:
        print(f"best: {_words(best.point)}: {best.report['metric']} {best.distance:.4g}")


def _warn(report: Report) -> None:
    for line in report.warnings:
        print(f"mar: {line}", file=sys.stderr)


def _words(point: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in point.items())
