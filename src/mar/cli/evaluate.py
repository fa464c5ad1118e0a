"""`mar evaluate`: how good a model or a set of pictures is, in numbers, and which way of drawing is best."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mar.cli.features import FeatureFlags, Split, check_count, interruptible, progress, say_memory
from mar.cli.options import SamplingFlags, one_voice, parse, save_png
from mar.config import ConfigError, to_dict

if TYPE_CHECKING:
    import torch

    from mar.evaluation.evaluate import Collected, Report
    from mar.evaluation.features import Extractor
    from mar.evaluation.neighbours import HeldOut
    from mar.evaluation.statistics import Statistics
    from mar.evaluation.streams import PictureSet
    from mar.evaluation.sweep import Table
    from mar.pipeline import Pipeline


@dataclass(frozen=True)
class EvaluateOptions(FeatureFlags, SamplingFlags):
    """Judges a model, or pictures that are there: FID or another Fréchet distance, Inception Score, KID, precision,
    recall, copies, class agreement. For several processes: torchrun --nproc-per-node 8 -m mar evaluate ..."""

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
    neighbours: bool = False
    """Also how near pictures come to those of the reference, which is to be what the model learned from."""
    held_out: str | None = None
    """Real pictures that it did not learn from, as for reference: also the share of copies, nearer than 99% of them."""
    held_out_split: Split = "test"
    """Which part of them."""
    neighbours_grid: Path | None = None
    """A .png of the pictures nearest to a reference picture: left the picture, right that of the reference."""
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
    sweep = any(argument.startswith("--sweep") for argument in arguments)
    note = "the same command goes on" if sweep else "nothing was written"
    return interruptible(note, lambda check: _evaluate(arguments, check))


def _evaluate(arguments: Sequence[str], check: Callable[[], None]) -> int:
    from mar import runtime

    with one_voice():
        options = parse(EvaluateOptions, "evaluate", arguments)
        runtime.choose_device(options.device)
        check_count(options.count)
        if options.out is not None and options.out.is_dir() and not options.sweep:
            raise ConfigError(f"out is the folder {options.out}, expected a file for the report (.json)")
        _check_grid(options)
    with runtime.process_group(options.device) as device:
        with one_voice():
            judge = _Judge(options, device, check)
        return _sweep(judge) if options.sweep else _once(judge)


def _check_grid(options: EvaluateOptions) -> None:
    path = options.neighbours_grid
    if path is None:
        return
    from mar.evaluation.inputs import is_statistics

    if path.suffix != ".png" or path.is_dir():
        raise ConfigError(f"neighbours-grid is {path}, expected a file .png")
    if options.sweep:
        raise ConfigError("neighbours-grid shows one way of drawing, but a sweep has several; leave out one of the two")
    for spec in (options.what, options.reference):
        if is_statistics(spec):
            raise ConfigError(f"neighbours-grid needs pictures on both sides, but {spec} has only their statistics")


class _Judge:
    """What stays the same from one set of pictures to the next: networks, model, reference.

    All is opened and checked before the first picture is drawn.
    """

    reference: Statistics
    held_out: HeldOut | None = None

    def __init__(self, options: EvaluateOptions, device: torch.device, check: Callable[[], None]) -> None:
        from mar.evaluation.evaluate import Wanted
        from mar.evaluation.features import open_extractor
        from mar.evaluation.inputs import is_pictures, open_either

        self.options, self.check = options, check
        self.model, self.given, size = None, None, options.size()
        if not is_pictures(options.what):
            self.model = self._load(device)
            size = self.model.image_size
        elif options.sweep:
            raise ConfigError(f"a sweep compares ways of drawing, but {options.what} is no model")
        neighbours = options.neighbours or options.held_out is not None or options.neighbours_grid is not None
        self.wanted = Wanted(options.kid, options.precision, options.splits, neighbours)
        self.extractor = options.extractor(device)
        self.classifier = (
            open_extractor(options.classifier, options.classifier_weights).to(device) if options.classifier else None
        )
        if self.model is None:
            self.given = open_either(options.what, self.extractor, self.wanted, size=size, limit=options.count)
            self._require_pictures()

        def opened(spec: str, split: Split) -> Statistics | PictureSet:
            return open_either(spec, self.extractor, self.wanted, split=split, size=size)

        self.opened = opened(options.reference, options.reference_split)
        self.opened_held_out = None if options.held_out is None else opened(options.held_out, options.held_out_split)

    def _load(self, device: torch.device) -> Pipeline:
        from mar.sampling.plan import Plan

        options = self.options
        model = options.load(options.what, device)
        model.sampling_with(**options.settings())
        if options.size() not in (None, model.image_size):
            height, width = model.image_size
            raise ConfigError(f"image-size is {options.image_size}, but {options.what} draws {height}x{width}")
        classes = list(range(model.model.config.classes)) or [-1]
        if options.count is None:
            self.plan = Plan.per_class(50, classes, options.seed)
        else:
            self.plan = Plan.total(options.count, classes, options.seed)
        return model

    def _require_pictures(self) -> None:
        from mar.evaluation.statistics import Statistics

        if not isinstance(self.given, Statistics):
            return
        for name in ("classifier", "count"):
            if getattr(self.options, name) is not None:
                raise ConfigError(f"{name} needs pictures, but {self.options.what} has only their statistics")

    def measure_reference(self) -> None:
        """Looks at the reference's pictures, unless it is statistics; and at those that are held out."""
        from mar.evaluation.neighbours import HeldOut

        self.reference = self._collect(self.opened, None).statistics
        if self.opened_held_out is not None:
            held_out = self._collect(self.opened_held_out, None).statistics
            with one_voice():
                self.held_out = HeldOut.of(held_out, self.reference)

    def report(self, **point: Any) -> Report:
        """On the pictures that are there, or on those drawn with the settings of `point`."""
        from mar.evaluation.evaluate import compare

        collected = self._collect(self._drawn(point) if self.given is None else self.given, self.classifier)
        with one_voice():
            return compare(collected, self.reference, self.extractor, self.wanted, self.held_out)

    def draw_grid(self, report: Report) -> None:
        """Writes the nearest pairs as a picture, where that was asked for."""
        from mar.evaluation.neighbours import sheet
        from mar.evaluation.statistics import Statistics

        path = self.options.neighbours_grid
        if path is None:
            return
        pictures = self._drawn({}) if self.given is None else self.given
        assert not isinstance(pictures, Statistics)  # `_check_grid`
        assert not isinstance(self.opened, Statistics)
        save_png(sheet(report.pairs, pictures, self.opened), path, pairs=report.to_dict()["pairs"])

    def _collect(self, opened: Statistics | PictureSet, classifier: Extractor | None) -> Collected:
        from mar.evaluation.evaluate import Collected, collect
        from mar.evaluation.statistics import Statistics
        from mar.evaluation.streams import DrawnPictures

        if isinstance(opened, Statistics):
            return Collected(opened)
        if self.wanted.features:
            say_memory(len(opened), self.extractor)
        with one_voice(), progress(len(opened), self.check) as advance:
            if isinstance(opened, DrawnPictures):
                opened.advance = advance
            return collect(
                opened, self.extractor, wanted=self.wanted, classifier=classifier, batch=self.options.batch,
                advance=advance,
            )  # fmt: skip

    def _drawn(self, point: dict[str, Any]) -> PictureSet:
        from mar.evaluation.streams import DrawnPictures

        assert self.model is not None
        return DrawnPictures(
            self.model, self.plan, name=self.options.what, allow_broken=self.options.allow_broken,
            advance=lambda done: self.check(), **{**self.options.settings(), **point},
        )  # fmt: skip

    def settings(self, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the numbers of a sweep over `points` depend on, beside the point."""
        from mar.evaluation.statistics import Statistics

        def named(opened: Statistics | PictureSet, spec: str) -> tuple[str, int | None]:
            if isinstance(opened, Statistics):
                return opened.about.source if opened.about else spec, opened.count
            return opened.name, len(opened)

        options, model, held_out = self.options, self.model, self.opened_held_out
        assert model is not None
        source, count = named(self.opened, options.reference)
        sampling = to_dict(model.sampling_with(**options.settings()))
        return {
            "weights": model.fingerprint(), "pictures": len(self.plan), "seed": options.seed, "dtype": options.dtype,
            "tf32": options.tf32, "features": self.extractor.fingerprint, "reference": source,
            "reference_pictures": count, "kid": options.kid, "precision": options.precision, "splits": options.splits,
            # None is as good as missing: sweeps of before there were neighbours go on
            "neighbours": self.wanted.neighbours or None,
            "held_out": None if held_out is None else list(named(held_out, str(options.held_out))),
            "classifier": self.classifier and self.classifier.fingerprint, "swept": ", ".join(sorted(points[0])),
            **{name: value for name, value in sampling.items() if name not in points[0]},
        }  # fmt: skip


def _once(judge: _Judge) -> int:
    from mar import runtime
    from mar.checkpoint.files import write_text

    judge.measure_reference()
    report, out = judge.report(), judge.options.out
    with one_voice():
        if runtime.rank() == 0:
            for name, value in report.lines():
                print(f"{name:<32} {value}")
            _warn(report)
            if out is not None:
                write_text(out, json.dumps(report.to_dict(), indent=1) + "\n")
            judge.draw_grid(report)
    return 0


def _sweep(judge: _Judge) -> int:
    from mar import runtime
    from mar.evaluation.plots import plot, require_matplotlib
    from mar.evaluation.sweep import Table, points

    folder = judge.options.out or Path("runs/sweep")
    with one_voice():
        require_matplotlib()
        wanted = points(judge.options.sweep)
        assert judge.model is not None
        for point in wanted:
            judge.model.sampling_with(**{**judge.options.settings(), **point})
        table = Table(folder, judge.settings(wanted))
        missing = [point for point in wanted if not table.has(point)]
    if missing:
        judge.measure_reference()
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
    with one_voice():
        if runtime.rank() == 0:
            table.write()  # a sweep may have been killed between its files
            plot(table, folder / "sweep.png")
            _show(table)
            print(f"{folder}: sweep.json, sweep.csv, sweep.png")
    return 0


def _show(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as Shown

    shown, best = Shown(box=None), table.best()
    # spreads and the worst class are in the files; here lines have to stay readable
    names = [name for name in table.columns() if not name.endswith(("_std", "_error")) and "worst" not in name]
    for name in names:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in table.rows:
        cells = dict(zip(table.columns(), table.cells(row), strict=True))
        shown.add_row(*(_short(cells[name]) for name in names), style="bold" if row is best else None)
    Console().print(shown)
    if best is not None:
        print(f"best: {_words(best.point)}: {best.report['metric']} {best.distance:.4g}")


def _short(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _warn(report: Report) -> None:
    for line in report.warnings:
        print(f"mar: {line}", file=sys.stderr)


def _words(point: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in point.items())
