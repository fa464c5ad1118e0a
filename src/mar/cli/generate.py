"""`mar generate`: thousands of images on any number of processes, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mar.cli.options import (
    SamplingFlags,
    SizeFlag,
    check_asks,
    default_prompts,
    given_labels,
    given_prompts,
    interruptible,
    parse,
)
from mar.config import ConfigError
from mar.terminal import print_out

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mar.pipeline import Pipeline
    from mar.sampling.plan import Plan, WorkUnit
    from mar.sampling.progress import Advance
    from mar.sampling.sinks import Job

Format = Literal["png", "npz", "webdataset"]


@dataclass(frozen=True)
class GenerateOptions(SizeFlag, SamplingFlags):
    """Draws many pictures from a model. The same command goes on where it was stopped, and ends with the same files.

    Picture i has the seed SEED * 2**32 + i and depends on it and on its label or prompt alone. For several processes:
    torchrun --nproc-per-node 8 -m mar generate MODEL ...
    """

    model: Annotated[str, tyro.conf.Positional]
    """fashion, mar-base, mar-large, mar-huge, a file, a folder, or a Hub repository owner/name."""
    out: Path
    """Folder for the pictures, or a file OUT.npz."""
    format: Format | None = None
    """png: folders of classes, or one with metadata.jsonl for prompts; npz: for ADM's suite; webdataset: tar shards. By
    default npz for OUT.npz, else png."""
    per_class: int | None = None
    """Pictures of each class; by default 50."""
    count: int | None = None
    """Pictures in all, instead; the classes or prompts take turns."""
    labels: tuple[str, ...] = ()
    """Only these classes, by number or name; `none` for no class. By default all."""
    labels_file: Path | None = None
    """Instead of all these: a text file with the label of each picture, one a line."""
    prompt: tuple[str, ...] = ()
    """Words for a model that draws from them; `none` for no condition. By default its examples."""
    prompts: Path | None = None
    """Instead of --prompt: a text file with a prompt a line. Each is drawn once, or --count pictures in all."""
    seed: int = 0
    """Another seed draws other pictures."""
    batch: int = 64
    """Pictures drawn at once by each process; changes memory and speed, and pictures with int8 weights only."""


def generate(arguments: Sequence[str]) -> int:
    """Runs `mar generate`."""
    return interruptible("the same command goes on", lambda check: _generate(arguments, check))


def _generate(arguments: Sequence[str], check: Callable[[], None]) -> int:
    from mar import devices, distributed
    from mar.checkpoint.locks import exclusive
    from mar.sampling.plan import as_argument
    from mar.sampling.sinks import SINKS, write_all

    with distributed.collective_errors():
        options = parse(GenerateOptions, "generate", arguments)
        kind = _format(options)
        _check_labels(options)
        devices.choose_device(options.device)
    with distributed.process_group(options.device) as device, exclusive(options.out, is_file=kind == "npz"):
        with distributed.collective_errors():
            trained = options.load(options.model, device)
            model = options.at_size(trained)
            sink = SINKS[kind](_job(options, kind, model, trained.fingerprint()))

        def draw(unit: WorkUnit, advance: Advance) -> np.ndarray:
            [images] = model.stream(
                seeds=unit.seeds, batch=len(unit), allow_broken=options.allow_broken, advance=advance,
                **as_argument(unit.asks), **options.settings(),
            )  # fmt: skip
            return images.numpy()

        started = time.perf_counter()
        drawn = write_all(sink, draw, check)
        if distributed.rank() == 0:
            _print_summary(options.out, len(sink.job.plan), drawn, time.perf_counter() - started, device)
    return 0


def _format(options: GenerateOptions) -> Format:
    """Returns the output's format. Raises ConfigError for another kind of OUT."""
    is_npz = options.out.suffix == ".npz"
    kind: Format = options.format or ("npz" if is_npz else "png")
    if is_npz != (kind == "npz"):
        raise ConfigError(f"out is {options.out}, format {kind}: expected a file .npz for npz, a folder for the others")
    return kind


def _check_labels(options: GenerateOptions) -> None:
    """Raises ConfigError for labels or prompts that are given in two ways."""
    if options.per_class is not None and options.count is not None:
        raise ConfigError("per-class and count: got both, expected one of them")
    if options.labels_file is not None and (options.labels or options.per_class or options.count):
        raise ConfigError("--labels-file says the label of each picture; leave --labels, --per-class and --count out")
    if (options.prompt or options.prompts is not None) and options.per_class is not None:
        raise ConfigError("--per-class is of classes; give --count, the number of pictures in all")


def _plan(options: GenerateOptions, model: Pipeline) -> Plan:
    """Plans the images. Raises ValueError for labels or prompts that the model can't draw."""
    from mar.sampling.plan import read_labels

    labels = given_labels(options.labels)
    if options.labels_file is not None:
        labels = read_labels(options.labels_file)
    prompts = given_prompts(options.prompt, options.prompts)
    if prompts is not None or model.captions is not None:
        check_asks(model, labels, prompts)
    if model.captions is not None:
        return _plan_prompts(options, model, prompts, labels)
    return _plan_classes(options, model, labels)


def _plan_prompts(
    options: GenerateOptions, model: Pipeline, prompts: Sequence[str | None] | None, labels: Sequence[str | None] | None
) -> Plan:
    """Plans images of prompts: each once, or --count in turns; without any, 50 of the model's examples."""
    from mar.sampling.plan import Plan

    if options.per_class is not None:
        raise ConfigError(f"--per-class: {options.model} draws from words and has no classes; give --count")
    given = labels if prompts is None else prompts  # labels are None: `check_asks` has refused others
    asks = [prompt or "" for prompt in (default_prompts(model) if given is None else given)]
    count = options.count
    if count is None:
        count = 50 if given is None else len(asks)
    return Plan.total(count, asks, options.seed)


def _plan_classes(options: GenerateOptions, model: Pipeline, labels: Sequence[str | None] | None) -> Plan:
    """Plans images of classes."""
    from mar.data.labels import resolve_labels
    from mar.sampling.plan import Plan

    distinct = list(dict.fromkeys(labels or ()))  # a name is looked up once, not 50,000 times
    numbers = resolve_labels(distinct, model.classes, model.model.config.classes)
    by_label = dict(zip(distinct, numbers, strict=True))
    given = [by_label[label] for label in labels or ()]
    if options.labels_file is not None:
        return Plan(tuple(given), options.seed)
    classes = given or list(range(model.model.config.classes)) or [-1]
    if options.count is not None:
        return Plan.total(options.count, classes, options.seed)
    return Plan.per_class(50 if options.per_class is None else options.per_class, classes, options.seed)


def _job(options: GenerateOptions, kind: Format, model: Pipeline, weights: str) -> Job:
    from mar import __version__
    from mar.config import to_dict
    from mar.sampling.sinks import Job

    sampling = model.sampling_with(**options.settings())
    plan = _plan(options, model)
    shape = (model.tokenizer.image_channels, *model.image_size)
    settings = {
        "mar": __version__, "model": Path(options.model).name, "weights": weights, "format": kind,
        "pictures": len(plan), "prompts" if plan.has_prompts else "labels": plan.fingerprint(), "seed": plan.seed,
        "batch": options.batch,
        "dtype": options.resolved_dtype(model.device), "tf32": options.tf32,
        "allow_broken": options.allow_broken, "shape": shape, **to_dict(sampling),
    }  # fmt: skip
    named = ("model", "weights", "dtype", *(["tf32"] if options.tf32 else []))
    size = {} if options.image_size is None else {"image_size": model.image_size}
    facts = {**{key: settings[key] for key in named}, **size, **to_dict(sampling)}
    return Job(options.out, plan, options.batch, shape, model.classes, settings, facts)


def _print_summary(out: Path, total: int, drawn: int | None, seconds: float, device: torch.device) -> None:
    from mar import distributed

    if drawn is None:
        print_out(f"{out} is finished: {total:,} pictures; nothing to do")
        return
    world = distributed.world_size()
    place = f"on {device}" if world == 1 else f"by {world} processes on {device.type}"
    print_out(f"{total:,} pictures in {out}")
    print_out(f"{drawn:,} drawn in {seconds:.1f} s, {drawn / seconds:.2f} a second, {place}")
