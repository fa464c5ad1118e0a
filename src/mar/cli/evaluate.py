"""`mar evaluate`: how good a model or a set of pictures is, in numbers, and which way of drawing is best."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mar.cli.options import SamplingFlags, interruptible, parse, save_png
from mar.cli.stats import FeatureFlags, Split, check_count, check_out
from mar.config import ConfigError

if TYPE_CHECKING:
    from mar.evaluation.evaluate import Report
    from mar.evaluation.session import EvalSession
    from mar.evaluation.sweep import Table


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
    """Pictures in all: of a model in turns of its classes, of a set spread over it. By default 50 of each class, or the
    whole set."""
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
    """NAME=FIRST:LAST:STEP or NAME=A,B,C: every combination; cfg (guidance_scale), K (steps), diffusion_steps, ..."""
    out: Path | None = None
    """Where the report (.json) goes, or the sweep's folder (by default runs/sweep)."""


def evaluate(arguments: Sequence[str]) -> int:
    """`mar evaluate`."""
    sweep = any(argument.startswith("--sweep") for argument in arguments)
    note = "the same command goes on" if sweep else "nothing was written"
    return interruptible(note, lambda check: _evaluate(arguments, check))


def _evaluate(arguments: Sequence[str], check: Callable[[], None]) -> int:
    from mar import devices, distributed
    from mar.evaluation.session import EvalSession

    with distributed.collective_errors():
        options = parse(EvaluateOptions, "evaluate", arguments)
        devices.choose_device(options.device)
        check_count(options.count)
        if options.classifier_weights is not None and options.classifier is None:
            raise ConfigError("classifier-weights are of a classifier; name it with --classifier")
        _check_out(options)
        _check_grid(options)
    with distributed.process_group(options.device) as device:
        with distributed.collective_errors():
            judge = EvalSession(options, device, check)
        return _sweep(judge) if options.sweep else _once(judge)


def _check_out(options: EvaluateOptions) -> None:
    out = options.out
    if out is None:
        return
    if not options.sweep and (out.suffix != ".json" or out.is_dir()):
        kind = "the folder " if out.is_dir() else ""
        raise ConfigError(f"out is {kind}{out}, expected a file .json for the report")
    names = ("what", "reference", "held_out", "weights", "classifier_weights")
    check_out(out, **{name: getattr(options, name) for name in names})


def _check_grid(options: EvaluateOptions) -> None:
    path = options.neighbours_grid
    if path is None:
        return
    from mar.evaluation.session import is_statistics

    if path.suffix != ".png" or path.is_dir():
        raise ConfigError(f"neighbours-grid is {path}, expected a file .png")
    if options.sweep:
        raise ConfigError("neighbours-grid shows one way of drawing, but a sweep has several; leave out one of the two")
    for spec in (options.what, options.reference):
        if is_statistics(spec):
            raise ConfigError(f"neighbours-grid needs pictures on both sides, but {spec} has only their statistics")


def _once(judge: EvalSession) -> int:
    from mar import distributed
    from mar.checkpoint.files import write_text

    judge.measure_reference()
    report, out, grid = judge.report(), judge.options.out, judge.options.neighbours_grid
    with distributed.collective_errors():
        if distributed.rank() == 0:
            for name, value in report.lines():
                print(f"{name:<32} {value}")
            _warn(report)
            sheet = judge.grid(report)  # pictures are drawn again: nothing is written before all is there
            if sheet is not None and grid is not None:
                save_png(sheet, grid, pairs=report.to_dict()["pairs"])
            if out is not None:
                write_text(out, json.dumps(report.to_dict(), indent=1) + "\n")
    return 0


def _sweep(judge: EvalSession) -> int:
    from mar import distributed
    from mar.evaluation.sweep import Table, plot, points, require_matplotlib

    folder = judge.options.out or Path("runs/sweep")
    with distributed.collective_errors():
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
        if distributed.rank() == 0:
            print(f"{place} of {len(missing)}: {_words(point)}", file=sys.stderr, flush=True)
        report = judge.report(**point)
        with distributed.collective_errors():
            if distributed.rank() == 0:
                table.add(point, report)
                plot(table, folder / "sweep.png")
                if place == 1:
                    _warn(report)
    with distributed.collective_errors():
        if distributed.rank() == 0:
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
