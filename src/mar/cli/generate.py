"""`mar generate`: as many pictures as an evaluation needs, from any number of processes, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mar.cli.options import SamplingFlags, interruptible, parse
from mar.config import ConfigError

if TYPE_CHECKING:
    import torch

    from mar.pipeline import Pipeline
    from mar.sampling.plan import Plan, WorkUnit
    from mar.sampling.sinks import Sink

Format = Literal["png", "npz", "webdataset"]


@dataclass(frozen=True)
class GenerateOptions(SamplingFlags):
    """Draws many pictures from a model. The same command goes on where it was stopped, and ends with the same files.

    Picture i has the seed SEED * 2**32 + i and depends on it and on its label alone. For several processes:
    torchrun --nproc-per-node 8 -m mar generate MODEL ...
    """

    model: Annotated[str, tyro.conf.Positional]
    """fashion, mar-base, mar-large, mar-huge, a file, a folder, or a Hub repository owner/name."""
    out: Path
    """Folder for the pictures, or a file OUT.npz."""
    format: Format | None = None
    """png: folders of classes; npz: as ADM's suite reads it; webdataset: tar shards. By default npz for OUT.npz."""
    per_class: int | None = None
    """Pictures of each class: 50 where nothing is said."""
    count: int | None = None
    """Pictures in all, instead; the classes take turns."""
    labels: tuple[str, ...] = ()
    """Only these classes, by number or name; `none` for no class. By default all."""
    labels_file: Path | None = None
    """Instead of all these: a text file with the label of each picture, one a line."""
    seed: int = 0
    """Pictures of another seed are others."""
    batch: int = 64
    """Pictures drawn at once by each process; changes memory and speed, and pictures with int8 weights only."""


def generate(arguments: Sequence[str]) -> int:
    """Run `mar generate`."""
    return interruptible("the same command goes on", lambda check: _generate(arguments, check))


def _generate(arguments: Sequence[str], check: Callable[[], None]) -> int:
    from mar import devices, distributed

    with distributed.collective_errors():
        options = parse(GenerateOptions, "generate", arguments)
        kind = _format(options)
        _one_way(options)
        devices.choose_device(options.device)
    with distributed.process_group(options.device) as device:
        with distributed.collective_errors():
            model = options.load(options.model, device)
            sink = _sink(options, kind, model)
        units = _prepared(sink)
        if units is None:
            if distributed.rank() == 0:
                print(f"{options.out} is finished: {len(sink.job.plan):,} pictures; nothing to do")
            return 0
        begun = time.perf_counter()
        _draw(options, model, sink, units, check)
        distributed.barrier()
        with distributed.collective_errors():
            sink.finish(distributed.rank(), distributed.world_size())
        if distributed.rank() == 0:
            sink.tidy()
            drawn, seconds = sum(len(unit.labels) for unit in units), time.perf_counter() - begun
            print(f"{len(sink.job.plan):,} pictures in {options.out}")
            print(f"{drawn:,} drawn in {seconds:.1f} s, {drawn / seconds:.2f} a second, {_where(device)}")
    return 0


def _where(device: torch.device) -> str:
    from mar import distributed

    world = distributed.world_size()
    return f"on {device}" if world == 1 else f"by {world} processes on {device.type}"


def _format(options: GenerateOptions) -> Format:
    """The output's format, after a look at whether OUT fits it."""
    archive = options.out.suffix == ".npz"
    kind: Format = options.format or ("npz" if archive else "png")
    if archive != (kind == "npz"):
        raise ConfigError(f"out is {options.out}, format {kind}: expected a file .npz for npz, a folder for the others")
    return kind


def _one_way(options: GenerateOptions) -> None:
    """Raises ConfigError where what to draw is said in two ways."""
    if options.per_class is not None and options.count is not None:
        raise ConfigError("per-class and count: got both, expected one of them")
    if options.labels_file is not None and (options.labels or options.per_class or options.count):
        raise ConfigError("labels-file says the label of each picture; leave labels, per-class and count out")


def _plan(options: GenerateOptions, model: Pipeline) -> Plan:
    from mar.data.labels import resolve_labels
    from mar.sampling.plan import Plan, read_labels

    def numbers(labels: Sequence[str | None]) -> list[int]:
        distinct = list(dict.fromkeys(labels))  # a name is looked up once, not 50,000 times
        known = dict(zip(distinct, resolve_labels(distinct, model.classes, model.model.config.classes), strict=True))
        return [known[label] for label in labels]

    if options.labels_file is not None:
        return Plan(tuple(numbers(read_labels(options.labels_file))), options.seed)
    names = [None if label.lower() == "none" else label for label in options.labels]
    classes = numbers(names) or list(range(model.model.config.classes)) or [-1]
    if options.count is not None:
        return Plan.total(options.count, classes, options.seed)
    return Plan.per_class(50 if options.per_class is None else options.per_class, classes, options.seed)


def _sink(options: GenerateOptions, kind: Format, model: Pipeline) -> Sink:
    """The output, which knows by its manifest everything that its bytes depend on."""
    from mar import __version__
    from mar.config import to_dict
    from mar.sampling.sinks import SINKS, Job

    sampling = model.sampling_with(**options.settings())
    plan = _plan(options, model)
    shape = (model.tokenizer.image_channels, *model.image_size)
    settings = {
        "mar": __version__, "model": Path(options.model).name, "weights": model.fingerprint(), "format": kind,
        "pictures": len(plan), "labels": plan.fingerprint(), "seed": plan.seed, "batch": options.batch,
        "dtype": options.dtype, "tf32": options.tf32, "allow_broken": options.allow_broken, "shape": shape,
        **to_dict(sampling),
    }  # fmt: skip
    facts = {**{key: settings[key] for key in ("model", "weights", "dtype")}, **to_dict(sampling)}
    return SINKS[kind](Job(options.out, plan, options.batch, shape, model.classes, settings, facts))


def _prepared(sink: Sink) -> list[WorkUnit] | None:
    """List the units that are missing, on rank 0 for all ranks; None where none is."""
    from mar import distributed
    from mar.sampling.sinks import prepare

    units = None
    with distributed.collective_errors():
        if distributed.rank() == 0:
            units = prepare(sink)
            if units is None:
                sink.tidy()
    missing: list[WorkUnit] | None = distributed.all_gather_object(units)[0]
    return missing


def _draw(
    options: GenerateOptions, model: Pipeline, sink: Sink, units: Sequence[WorkUnit], check: Callable[[], None]
) -> None:
    """Draws and writes this process's share of the units."""
    from mar import distributed
    from mar.sampling.generate import BrokenLatents
    from mar.sampling.progress import rank_meter

    mine = units[distributed.rank() :: distributed.world_size()]
    share, to_draw = (sum(len(unit.labels) for unit in part) for part in (mine, units))
    total, done = len(sink.job.plan), 0
    with rank_meter(share, total, total - to_draw, check) as show:

        def advance(part: float) -> None:
            show(done + part)

        for unit in mine:
            labels = [None if label < 0 else label for label in unit.labels]
            drawn = model.stream(
                labels, unit.seeds, batch=len(labels), allow_broken=options.allow_broken, advance=advance,
                **options.settings(),
            )  # fmt: skip
            try:
                [images] = drawn
            except BrokenLatents as error:
                raise BrokenLatents(f"pictures from {unit.first}: {error}") from error
            sink.write(unit, images.numpy())
            done += len(labels)
