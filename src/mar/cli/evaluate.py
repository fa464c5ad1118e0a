"""`mar evaluate`: metrics of a model or of a set of images, and sweeps over sampling settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mar.cli.options import SamplingFlags, given_prompts, interruptible, parse, save_png
from mar.cli.stats import FeatureFlags, Split, check_count, check_out
from mar.config import ConfigError
from mar.terminal import print_err, print_out, printable, unescaped

if TYPE_CHECKING:
    import torch

    from mar.evaluation.evaluate import Report
    from mar.evaluation.session import EvalOptions, EvalSession
    from mar.evaluation.sweep import Table


@dataclass(frozen=True)
class EvaluateOptions(FeatureFlags, SamplingFlags):
    """Measures a model, or pictures that are there: FID or another Fréchet distance, Inception Score, KID, precision,
    recall, copies, class accuracy. For several processes: torchrun --nproc-per-node 8 -m mar evaluate ..."""

    what: Annotated[str, tyro.conf.Positional]
    """A model by name, file or folder; a folder or .npz of pictures; or an .npz of `mar stats`."""
    reference: str
    """Real pictures: an .npz of `mar stats` or ADM's, an .npz or folder of pictures, a Parquet file, fashion."""
    reference_split: Split = "test"
    """The part of a reference that has several."""
    count: int | None = None
    """Pictures in all: of a model in turns of its classes or prompts, of a set spread over it. By default 50 of each
    class, each prompt once, or the whole set."""
    prompts: Path | None = None
    """A text file with a prompt a line, for a model that draws from words. By default the captions of the reference."""
    seed: int = 0
    """Another seed draws other pictures."""
    kid: bool = False
    """Also the kernel distance, with its standard error."""
    precision: bool = False
    """Also precision and recall."""
    neighbors: bool = False
    """Also the distance of pictures to those of the reference, for which take the training pictures."""
    held_out: str | None = None
    """Real pictures outside the training set, as for reference: also the share of copies, nearer than 99% of them."""
    held_out_split: Split = "test"
    """The part of them."""
    neighbors_grid: Path | None = None
    """A .png of the pictures nearest to a reference picture: left the picture, right that of the reference."""
    splits: int = 10
    """Parts over which the Inception Score is averaged."""
    classifier: str | None = None
    """FILE.py:function or module:function of a network that knows the classes: adds class accuracy."""
    classifier_weights: Path | None = None
    """A file of weights for it."""
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=FIRST:LAST:STEP or NAME=A,B,C: every combination; cfg (guidance_scale), K (steps), diffusion_steps, ..."""
    out: Path | None = None
    """The report's file (.json), or the sweep's folder (by default runs/sweep)."""


def evaluate(arguments: Sequence[str]) -> int:
    """Runs `mar evaluate`."""
    sweep = any(argument.startswith("--sweep") for argument in arguments)
    note = "the same command goes on" if sweep else "nothing was written"
    return interruptible(note, lambda check: _evaluate(arguments, check))


def _evaluate(arguments: Sequence[str], check: Callable[[], None]) -> int:
    from mar import devices, distributed
    from mar.backends import configure

    with distributed.collective_errors():
        options = parse(EvaluateOptions, "evaluate", arguments)
        devices.choose_device(options.device)
        _check(options)
    with distributed.process_group(options.device) as device:
        configure(device, tf32=options.tf32)
        with distributed.collective_errors():
            session = _open_session(options, device, check)
        return _sweep(options, session) if options.sweep else _report(options, session)


# ---- Options -> session


def _check(options: EvaluateOptions) -> None:
    """Raises ConfigError for options that contradict each other or the files that are there."""
    check_count(options.count)
    if options.classifier_weights is not None and options.classifier is None:
        raise ConfigError("classifier-weights are of a classifier; name it with --classifier")
    _check_out(options)
    _check_source(options)
    _check_grid(options)
    _check_writable(options)


def _check_writable(options: EvaluateOptions) -> None:
    """Raises CheckpointError where the report or the pictures can't be written; a sweep tries its folder later."""
    from mar import distributed
    from mar.checkpoint.files import check_writable

    for path in (None if options.sweep else options.out, options.neighbors_grid):
        if path is not None and distributed.rank() == 0:
            check_writable(path, is_file=True)


def _check_out(options: EvaluateOptions) -> None:
    out = options.out
    if out is None:
        return
    if not options.sweep and (out.suffix != ".json" or out.is_dir()):
        kind = "the folder " if out.is_dir() else ""
        raise ConfigError(f"out: got {kind}{out}, expected a file .json for the report")
    names = ("what", "reference", "held_out", "weights", "classifier_weights")
    check_out(out, **{name: getattr(options, name) for name in names})


def _check_source(options: EvaluateOptions) -> None:
    """Raises ConfigError for options of a model where there is none, and of pictures where there are none."""
    from mar.evaluation.image_sets import is_image_set, is_statistics

    if not is_image_set(options.what):
        return
    if options.sweep:
        raise ConfigError(f"a sweep compares ways of drawing, but {options.what} is no model")
    given = [*options.settings(), *(n for n in ("seed", "prompts", "tf32", "allow_broken") if getattr(options, n))]
    given += ["dtype"] if options.dtype is not None else []
    if given:
        name = given[0].replace("_", "-")
        raise ConfigError(f"{name} is of drawing, but {options.what} is no model; leave --{name} out")
    if is_statistics(options.what):
        for name in ("classifier", "count"):
            if getattr(options, name) is not None:
                raise ConfigError(f"{name} needs pictures, but {options.what} has only their statistics")


def _check_grid(options: EvaluateOptions) -> None:
    from mar.evaluation.image_sets import is_statistics

    path = options.neighbors_grid
    if path is None:
        return
    if path.suffix != ".png" or path.is_dir():
        raise ConfigError(f"neighbors-grid: got {path}, expected a file .png")
    if options.sweep:
        raise ConfigError("neighbors-grid shows one way of drawing, but a sweep has several; leave out one of the two")
    for spec in (options.what, options.reference):
        if is_statistics(spec):
            raise ConfigError(f"neighbors-grid needs pictures on both sides, but {spec} has only their statistics")


def _open_session(options: EvaluateOptions, device: torch.device, check: Callable[[], None]) -> EvalSession:
    from mar.evaluation.features import open_extractor
    from mar.evaluation.image_sets import is_image_set
    from mar.evaluation.session import EvalSession

    model = None if is_image_set(options.what) else options.load(options.what, device)
    extractor, classifier = options.extractor(device), None
    if options.classifier is not None:
        classifier = open_extractor(options.classifier, options.classifier_weights).to(device)
    return EvalSession(_eval_options(options), extractor, model=model, classifier=classifier, check=check)


def _eval_options(options: EvaluateOptions) -> EvalOptions:
    from mar.evaluation.evaluate import MetricOptions
    from mar.evaluation.session import EvalOptions

    neighbors = options.neighbors or options.neighbors_grid is not None
    return EvalOptions(
        source=options.what,
        reference=options.reference,
        reference_split=options.reference_split,
        held_out=options.held_out,
        held_out_split=options.held_out_split,
        metrics=MetricOptions(options.kid, options.precision, options.splits, neighbors),
        count=options.count,
        seed=options.seed,
        prompts=given_prompts(file=options.prompts),
        image_size=options.size(),
        upright=options.upright,
        batch=options.batch,
        sampling=options.settings(),
        allow_broken=options.allow_broken,
    )


# ---- One report


def _report(options: EvaluateOptions, session: EvalSession) -> int:
    from mar import distributed
    from mar.checkpoint.files import write_text

    report = session.report()
    with distributed.collective_errors():
        if distributed.rank() == 0:
            for name, value in report.lines():
                print_out(f"{name:<32} {value}")
            _warn(report)
            if options.neighbors_grid is not None:  # draws images again: nothing is written before all is there
                grid = session.pair_grid(report)
                save_png(grid, options.neighbors_grid, pairs=report.to_dict()["pairs"])
            if options.out is not None:
                write_text(options.out, json.dumps(report.to_dict(), indent=1) + "\n")
    return 0


def _warn(report: Report) -> None:
    for line in report.warnings:
        print_err(f"mar: warning: {line}")


# ---- A sweep


def _sweep(options: EvaluateOptions, session: EvalSession) -> int:
    from mar.checkpoint.locks import exclusive

    folder = options.out or Path("runs/sweep")
    with exclusive(folder):
        return _sweep_in(folder, options, session)


def _sweep_in(folder: Path, options: EvaluateOptions, session: EvalSession) -> int:
    from mar import distributed
    from mar.checkpoint.files import check_writable
    from mar.evaluation.sweep import Table, plot, point_text, points, require_matplotlib

    with distributed.collective_errors():
        require_matplotlib()
        all_points = points(options.sweep)
        assert session.model is not None
        for point in all_points:
            session.model.sampling_with(**{**options.settings(), **point})
        loading = {"dtype": options.resolved_dtype(session.model.device), "tf32": options.tf32}
        table = Table(folder, {**session.sweep_settings(all_points), **loading})
        missing = [point for point in all_points if not table.has(point)]
        if missing and distributed.rank() == 0:
            check_writable(folder, is_file=False)
    missing = distributed.all_gather_object(missing)[0]  # another machine may not see the folder
    if missing:
        session.measure_reference()
    for number, point in enumerate(missing, 1):
        if distributed.rank() == 0:
            print_err(f"{number} of {len(missing)}: {point_text(point)}")
        report = session.report(**point)
        with distributed.collective_errors():
            if distributed.rank() == 0:
                table.add(point, report)
                plot(table, folder / "sweep.png")
                if number == 1:
                    _warn(report)
    with distributed.collective_errors():
        if distributed.rank() == 0:
            table.write()  # a sweep may have been killed between its files
            plot(table, folder / "sweep.png")
            _print_table(table)
            print_out(f"{folder}: sweep.json, sweep.csv, sweep.png")
    return 0


def _print_table(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    from mar.evaluation.sweep import point_text

    printed, best = RichTable(box=None), table.best()
    # spreads and the worst class are in the files; here lines have to stay readable
    names = [name for name in table.columns() if not name.endswith(("_std", "_error")) and "worst" not in name]
    for name in names:
        printed.add_column(name.replace("_", " "), justify="right")
    for row in table.rows:
        cells = dict(zip(table.columns(), table.cells(row), strict=True))
        texts = [Text(printable(_short(cells[name]))) for name in names]
        printed.add_row(*texts, style="bold" if row is best else None)
    Console(file=unescaped(sys.stdout)).print(printed)
    if best is not None:
        print_out(f"best: {point_text(best.point)}: {best.report['metric']} {best.distance:.4g}")


def _short(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
