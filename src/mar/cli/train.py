"""Run `mar train`, from a recipe; `mar train folder` plans first (`mar.cli.train_folder`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mar.cli.options import parse
from mar.config import ConfigError, TrainConfig
from mar.presets import PLANNED_RECIPES, RECIPE_NAMES, recipe
from mar.terminal import print_err, print_out

if TYPE_CHECKING:
    import torch

    from mar.data.captions import Captions
    from mar.evaluation.session import OnlineEvaluator
    from mar.training.callbacks import Snapshot, SnapshotCallback
    from mar.training.log import Log
    from mar.training.page import Page
    from mar.training.trainer import Run


@dataclass(frozen=True)
class TrainOptions:
    """Trains a model. The first argument may be a recipe; every option changes one of its settings.

    The same command resumes a run, also with another number of processes:
    torchrun --nproc-per-node 8 -m mar train RECIPE ...
    """

    out: Path | None = None
    """Folder of the run; by default runs/ and the name of the recipe."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    group_of_one: bool = False
    """Run one process of torchrun in a process group too, to try DDP or FSDP on one device."""
    eval_every: int = 0
    """Images between evaluations of the EMA and the raw weights; 0 makes none."""
    eval_count: int = 1000
    """Pictures to sample for an evaluation."""
    eval_reference: str | None = None
    """Real pictures, or an .npz of `mar stats`; by default the test part of the run's data, or all of it."""
    eval_features: str = "inception"
    """Features: inception (FID), efficientnet-lite0, FILE.py:function or module:function."""
    eval_weights: Path | None = None
    """File of weights for the features."""
    resume_official: Path | None = None
    """An official checkpoint-last.pth to resume from."""


def train(arguments: Sequence[str]) -> int:
    """Run `mar train [RECIPE]`."""
    from mar import devices, distributed

    name = arguments[0] if arguments and not arguments[0].startswith("-") else "fashion"
    if name in PLANNED_RECIPES:
        from mar.cli.train_folder import train_folder

        return train_folder(arguments[1:], name)
    with distributed.collective_errors():
        chosen = recipe(name)
        options = _options(name, chosen, arguments)
        from mar.training.run import precision_by_default, with_captions  # after --help, which needs no torch

        options = replace(options, config=with_captions(options.config))
        device = devices.choose_device(options.device)
        if not names_precision(arguments):
            assert options.out is not None
            precision = precision_by_default(options.config, options.out, device)
            options = replace(options, config=replace(options.config, precision=precision))
    with distributed.process_group(options.device, of_one=options.group_of_one) as device:
        return train_model(options, device, chosen, name)


def names_precision(arguments: Sequence[str]) -> bool:
    """Returns whether the user has chosen the precision."""
    return any(argument.partition("=")[0] == "--precision" for argument in arguments)


def _options(name: str, chosen: TrainConfig, arguments: Sequence[str]) -> TrainOptions:
    """Parses the options over the recipe `chosen`, called `name`."""
    rest = list(arguments[1:] if arguments[:1] == [name] else arguments)
    if "-h" in rest or "--help" in rest:
        print_out(f"mar train [RECIPE] --out FOLDER ...    recipes: {', '.join(RECIPE_NAMES)}; shown: {name}", "")
    options = parse(TrainOptions, f"train {name}", rest, TrainOptions(Path("runs", name), chosen))
    return replace(options, out=options.out or Path("runs", name))


def train_model(
    options: TrainOptions, device: torch.device, chosen: TrainConfig, name: str, page: Page | None = None
) -> int:
    """Train a model. Returns the exit code: 130 after a signal.

    Args:
        options: all settings.
        device: where to train.
        chosen: the recipe without the user's options.
        name: of the recipe.
        page: shows the run with the steps before it; by default it has a page of its own.
    """
    from mar.checkpoint.locks import exclusive

    assert options.out is not None
    with exclusive(options.out):
        return _train_model(options, device, chosen, name, page)


def _train_model(options: TrainOptions, device: torch.device, chosen: TrainConfig, name: str, page: Page | None) -> int:
    from mar import distributed
    from mar.checkpoint.files import check_writable
    from mar.training.log import log_accounts, open_log, require_writers
    from mar.training.preflight import check_tokenizer, learning_rate_warning, memorization_warning, precision_hint
    from mar.training.run import export, saved_length
    from mar.training.trainer import train as run_to_end

    with distributed.collective_errors():
        assert options.out is not None
        if distributed.rank() == 0:
            check_writable(options.out, is_file=False)
            require_writers(options.config.log_to)
        before = saved_length(options.out)
    with distributed.collective_errors():
        run = _open(options, device)
        log = open_log(run, page)
    try:
        with distributed.collective_errors():
            _add_callbacks(options, run, log)
            log_accounts(log, run)
            notes = [memorization_warning(options.config, run.source, before)]
            if not run.progress.images:
                notes += [learning_rate_warning(options.config, chosen, name), precision_hint(options.config, device)]
            for line in filter(None, notes):
                log.note(line)
            check_tokenizer(run, log)
            if run.data_note is not None:
                log.note(run.data_note)
                log.write(run.progress.images, data=run.data_note)
            finished = run_to_end(run, log)
    finally:
        log.close()
    if finished:
        export(run)
    skipped = set().union(*distributed.all_gather_object(log.skipped_images))
    if distributed.rank() == 0:
        _print_summary(run, finished, len(skipped))
    return 0 if finished else 130


def _add_callbacks(options: TrainOptions, run: Run, log: Log) -> None:
    """Adds sample grids, validation and evaluation to a run."""
    from mar.training.callbacks import Validation, export_and_sample, on_snapshot
    from mar.training.early_stopping import EarlyStopping

    config = options.config
    on_snapshot(run, log, config.sample_every, lambda snapshot: export_and_sample(snapshot, log))
    if config.validate_every and run.held_out is not None:
        validation: SnapshotCallback = Validation(run, log)
        if config.patience:
            validation = EarlyStopping(run, log, validation)
        on_snapshot(run, log, config.validate_every, validation)
    elif config.validate_every:
        log.note(
            f"no validation loss: {config.data} has no test part with the same classes; --validate-on names other "
            "pictures, --hold-out 20 keeps one of twenty from learning"
        )
    if options.eval_every:
        on_snapshot(run, log, options.eval_every, _make_evaluation(options, run, log))


def _open(options: TrainOptions, device: torch.device) -> Run:
    """Opens a new or saved run, and prints what it needs."""
    from mar import distributed
    from mar.training.preflight import estimate
    from mar.training.run import open_run, resume_official

    assert options.out is not None
    needs = estimate(options.config, distributed.world_size())
    needs.check_disk(options.out)
    run = open_run(options.config, options.out, device=device)
    if options.resume_official is not None:
        if run.progress.images:
            raise ConfigError(f"{options.out} has gone on already; leave --resume-official out to go on with it")
        resume_official(run, options.resume_official)
    if distributed.rank() == 0:
        print_err(needs.text())
    return run


def _print_summary(run: Run, finished: bool, skipped: int) -> None:
    """Prints skipped steps and images, and where the model is."""
    if not finished:
        print_err(f"stopped and saved at {run.progress.images:,} images; the same command goes on")
        return
    if run.progress.skipped_steps:
        print_err(f"{run.progress.skipped_steps} steps were skipped: the gradient was not finite")
    if skipped:
        print_err(f"{skipped} pictures could not be read and were skipped")
    print_out(f"{run.folder / 'model.safetensors'} (EMA) and model-raw.safetensors; draw: mar sample {run.folder}")


def check_evaluation(options: TrainOptions, image_size: tuple[int, int]) -> None:
    """Open network and reference of a run's evaluations. Raises ValueError where that can't be done.

    Args:
        options: of the run.
        image_size: height and width of its images.
    """
    if options.eval_every:
        _make_evaluator(options, upright=options.config.upright).open_reference(image_size)


def _make_evaluator(options: TrainOptions, *, upright: bool, captions: Captions = ()) -> OnlineEvaluator:
    """Make what evaluates a run, from its options, the way its images are turned, and their captions."""
    from mar.evaluation.features import open_extractor
    from mar.evaluation.session import OnlineEvaluator

    extractor = open_extractor(options.eval_features, options.eval_weights)
    reference = options.eval_reference or options.config.data
    return OnlineEvaluator(extractor, reference, options.eval_count, upright=upright, captions=captions)


def _make_evaluation(options: TrainOptions, run: Run, log: Log) -> SnapshotCallback:
    """Makes a callback that evaluates EMA and raw weights on all ranks.

    Broken images of a young model are a note, not an error.
    """
    from mar.data.captions import captions_of
    from mar.sampling.generate import BrokenLatents
    from mar.training.callbacks import take_snapshot

    captions = captions_of(run.held_out) or captions_of(run.source)
    evaluator = _make_evaluator(options, upright=run.transform.upright, captions=captions)
    evaluator.extractor = evaluator.extractor.to(run.device)
    # A wrong reference fails here, before hours of training.
    evaluator.check(take_snapshot(run).pipeline("ema"))

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for weights in snapshot.weights:
            try:
                report = evaluator(snapshot.drawing_pipeline(weights))
            except BrokenLatents as error:
                log.note(f"no evaluation of {weights} weights yet: {error}")
                continue
            metrics |= {f"{weights}_{n}": value for n, value in report.to_dict().items() if isinstance(value, float)}
            log.note(f"{weights}: " + ", ".join(f"{name} {value}" for name, value in report.lines()))
        return metrics

    return evaluate
