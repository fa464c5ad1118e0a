"""Run `mar train folder`: plan for a folder of pictures, train a tokenizer and cache latents, then train the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mar.cli.options import name_batch, parse
from mar.cli.tokenizer import TokenizerTrainOptions, load_network, train_tokenizer
from mar.cli.train import TrainOptions, check_evaluation, names_precision, train_model
from mar.config import ConfigError
from mar.config.tokenizer import Stride, TokenizerKind, TokenizerTrainConfig
from mar.presets import PLANNED_RECIPES
from mar.terminal import print_err, print_out

if TYPE_CHECKING:
    import torch

    from mar.autoconfig.plan import CacheStep, FolderPlan, TokenizerStep
    from mar.autoconfig.timing import TimePlan
    from mar.config import TrainConfig
    from mar.training.page import Page

MEASURE_SECONDS = 2.0
"""Time to measure a speed for, so that a message says how long a run takes."""
MIN_IMAGES_TIMED = 5_000
"""Shorter trainings begin without such a message."""

VERB = "train folder"


# ---- options


@dataclass(frozen=True)
class OwnTokenizer(TokenizerTrainConfig):
    """The tokenizer for large pictures; options as for `mar tokenizer train`."""

    data: tyro.conf.Suppress[str] = ""
    image_size: tyro.conf.Suppress[int | tuple[int, int]] = 64
    image_channels: tyro.conf.Suppress[int | None] = None
    upright: tyro.conf.Suppress[bool] = False


@dataclass(frozen=True)
class FolderOptions(TrainOptions):
    """Trains a model on your pictures, with sizes chosen for them.

    Large pictures get a tokenizer first; --tokenizer own trains one in any case. Every option replaces a choice.
    The same command resumes.
    """

    minutes: float | None = None
    """Time for all of it on this machine, without --eval-every; lengths are chosen for it, and kept when the run is
    continued."""
    hours: float | None = None
    """The same in hours."""
    image_size: int | tuple[int, int] | None = None
    """Pictures are cut to squares of so many pixels, or to HEIGHT WIDTH; by default as their size, shape and number
    allow."""
    vae: OwnTokenizer = field(default_factory=OwnTokenizer)


@dataclass(frozen=True)
class _ModelOverrides:
    classes: int | None = None
    label_drop: float | None = None


@dataclass(frozen=True)
class _TokenizerOverrides:
    kind: TokenizerKind | None = None
    stride: Stride | None = None
    channels: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class _FolderOverrides:
    """Options that choices follow from."""

    data: str | None = None
    tokenizer: str | None = None
    out: Path = Path("runs/folder")
    minutes: float | None = None
    hours: float | None = None
    image_size: int | tuple[int, int] | None = None
    images: int | None = None
    sample_every: int | None = None
    validate_every: int | None = None
    upright: bool = True
    caption_column: str | None = None
    text: str | None = None
    model: _ModelOverrides = field(default_factory=_ModelOverrides)
    vae: _TokenizerOverrides = field(default_factory=_TokenizerOverrides)


def plan_folder(arguments: Sequence[str], lengths: TimePlan | None = None) -> tuple[FolderPlan, FolderOptions]:
    """Plan `mar train folder ARGUMENTS`; nothing is done yet.

    `lengths` are chosen for the user's time; by default those of the run that is continued. Returns the plan, and the
    options with the configuration of the model's run.
    """
    from mar.autoconfig.plan import FOLDER, Overrides, choose, make_plan
    from mar.training.run import check_classes, open_run_data

    if "-h" in arguments or "--help" in arguments:
        print_out("shown: what is chosen for 10,000 color pictures of 32x32 in ten classes", "")
        parse(FolderOptions, VERB, arguments, FolderOptions(_FolderOverrides.out, FOLDER))
    given = parse(_FolderOverrides, VERB, arguments, partly=True)
    if given.data is None:
        raise ConfigError("mar train folder needs --data: a folder of pictures, a Parquet file, or a `mar cache`")
    lengths = lengths or _saved_lengths(given)
    choice = choose(
        Overrides(
            data=given.data,
            out=given.out,
            tokenizer=given.tokenizer,
            image_size=given.image_size,
            images=lengths.model_images or given.images,
            classes=given.model.classes,
            label_drop=given.model.label_drop,
            upright=given.upright,
            caption_column=given.caption_column,
            text=given.text,
            own_tokenizer=any(word.startswith("--vae.") for word in arguments),
            kind=given.vae.kind,
            stride=given.vae.stride,
            channels=given.vae.channels,
            tokenizer_images=given.vae.images or lengths.tokenizer_images,
            grids=lengths.grids or Overrides.grids,
            timed=(given.minutes or given.hours) is not None and not (lengths.model_images or given.images),
            smaller=lengths.smaller,
        )
    )
    vae = OwnTokenizer() if choice.tokenizer is None else OwnTokenizer(**vars(choice.tokenizer))
    options = parse(FolderOptions, VERB, arguments, FolderOptions(given.out, choice.recipe, vae=vae))
    if not choice.from_cache:
        check_classes(options.config, choice.summary.classes)
        if options.config.patience or options.config.validate_on:  # to be there before a tokenizer is trained
            open_run_data(options.config)
    plan = make_plan(choice, options.config, options.vae, given.out)
    reference = options.eval_reference or (options.config.data if plan.cache else None)
    return plan, replace(options, out=given.out, config=plan.train, eval_reference=reference)


def _saved_lengths(given: _FolderOverrides) -> TimePlan:
    """Return the lengths of the run that is continued, or none. ConfigError where they contradict the options."""
    from mar.autoconfig.timing import TimePlan, duration, seconds_of

    seconds, saved = seconds_of(given.minutes, given.hours), _saved_time_plan(given)
    if given.images is not None:
        if seconds is not None:
            raise ConfigError(f"got --images {given.images} and a time, which chooses the number; leave one out")
        return replace(saved or TimePlan(0.0), model_images=None, grids=None)  # it is made longer, or shorter
    if saved is None or seconds in (None, saved.seconds):
        return saved or TimePlan(0.0)
    raise ConfigError(
        f"{given.out} was planned for {duration(saved.seconds)}, not {duration(seconds)}; give that time, or --images "
        f"for another length, or take another --out"
    )


def _saved_time_plan(given: _FolderOverrides) -> TimePlan | None:
    """Return the time plan of a run, or none. Before a run has begun, another time makes another plan."""
    from mar.autoconfig.summary import has_begun
    from mar.autoconfig.timing import load_time_plan, seconds_of

    saved, seconds = load_time_plan(given.out), seconds_of(given.minutes, given.hours)
    is_same = saved is None or seconds in (None, saved.seconds)
    return saved if is_same or has_begun(given.out) else None


def _recipe_options(name: str, arguments: Sequence[str]) -> list[str]:
    """Return the options of a recipe, without its lengths where they follow from a time."""
    from mar.autoconfig.timing import PLAN_FILE

    words = PLANNED_RECIPES[name]
    given = parse(_FolderOverrides, VERB, _without_help(arguments), partly=True)
    is_timed = (given.minutes or given.hours) is not None or (given.out / PLAN_FILE).is_file()
    lengths = ("--images", "--vae.images", "--sample-every") if is_timed else ()
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for option, value in pairs if option not in lengths for word in (option, value)]


def _without_help(arguments: Sequence[str]) -> list[str]:
    return [word for word in arguments if word not in ("-h", "--help")]


def train_folder(arguments: Sequence[str], name: str = "folder") -> int:
    """Run `mar train folder`, or another recipe of `PLANNED_RECIPES`."""
    from mar import devices, distributed, zoo

    started = time.monotonic()
    arguments = [*(() if name == "folder" else ("--out", f"runs/{name}")), *arguments]
    arguments = [*_recipe_options(name, arguments), *arguments]
    with distributed.collective_errors():
        given = parse(_FolderOverrides, VERB, _without_help(arguments), partly=True)
        plan, options = plan_folder(arguments)
        from mar.checkpoint.files import check_writable  # after --help, which needs no torch
        from mar.checkpoint.locks import exclusive
        from mar.training.log import require_writers
        from mar.training.run import precision_by_default

        device = devices.choose_device(options.device)
        if not names_precision(arguments):
            assert options.out is not None
            precision = precision_by_default(plan.train, options.out, device)
            if precision != plan.train.precision:
                arguments = [*arguments, "--precision", precision]
                plan, options = plan_folder(arguments)
    assert options.out is not None
    with distributed.process_group(options.device, of_one=options.group_of_one) as device, exclusive(options.out):
        with distributed.collective_errors():
            if distributed.rank() == 0:
                check_writable(options.out, is_file=False)
                require_writers(options.config.log_to)
            if options.config.init is not None:
                zoo.check_name(options.config.init)  # before hours of the other steps
            if plan.cache is not None:
                check_evaluation(options, plan.cache.image_size)
        steps = _Steps(arguments, given, device, started)
        try:
            plan, options, code = steps.run_first(plan, options)
            return code or train_model(options, device, plan.recipe, name, steps.page)
        finally:
            if steps.page is not None:
                steps.page.close()


class _Steps:
    """The steps before the model's training, and the lengths that they choose.

    Args:
        arguments: of the command, after `folder`.
        given: those that choices follow from.
        device: where to train.
        started: `time.monotonic()` when the command began.
    """

    def __init__(self, arguments: Sequence[str], given: _FolderOverrides, device: torch.device, started: float) -> None:
        self.arguments, self.given, self.device, self.started = arguments, given, device, started
        self.page: Page | None = None
        """Shows all steps; rank 0 has it."""
        self.lengths: TimePlan | None = None
        """Those that this session has chosen, also if the disk refused their file."""

    def run_first(self, plan: FolderPlan, options: FolderOptions) -> tuple[FolderPlan, FolderOptions, int]:
        """Train the tokenizer and cache the latents, where that is left to do.

        Returns plan and options with the model's length, and the exit code.
        """
        from mar import distributed
        from mar.autoconfig.summary import save_summary
        from mar.training.preflight import estimate
        from mar.training.run import check_same_run

        assert options.out is not None
        with distributed.collective_errors():
            check_same_run(plan.train, options.out)
            _check_pictures(plan)
            self._check_time(plan, options.out)
            estimate(plan.train, distributed.world_size()).check_disk(options.out)
            untrained = None if plan.tokenizer is None or _is_trained(plan.tokenizer) else plan.tokenizer
            for line in plan.lines:
                _note(line)
            if plan.summary is not None and distributed.rank() == 0:
                save_summary(options.out, plan.summary)
            if untrained is not None and distributed.world_size() > 1:
                raise ConfigError(
                    f"got {distributed.world_size()} processes, but a tokenizer is trained by one: first run "
                    f"`{untrained.command()}`, then this command again"
                )

        self._open_page(plan, options, untrained)
        earlier = 0.0 if plan.tokenizer is None else _logged_seconds(plan.tokenizer.out)
        if untrained is not None:
            name_batch("--vae.batch", untrained.config.batch)
        plan, options = self._choose_tokenizer_length(plan, options, untrained)
        assert options.out is not None
        lengths = self.lengths or _saved_time_plan(self.given)
        if self.page is not None and lengths is not None:
            self.page.deadline = self.started + lengths.seconds - earlier
        if untrained is not None:
            assert plan.tokenizer is not None
            _note(f"first, the tokenizer: {plan.tokenizer.out}")
            step = TokenizerTrainOptions(plan.tokenizer.out, plan.tokenizer.config, options.device)
            if code := train_tokenizer(step, self.page):
                return plan, options, code
        name_batch(None)
        if plan.cache is not None and (code := _cache_latents(plan.cache, options, self.page)):
            return plan, options, code
        if self.page is not None:
            self.page.open("model")
        plan, options = self._choose_model_length(plan, options, earlier)
        if plan.cache is not None:
            _note(f"then the model: {options.out}")
        return plan, options, 0

    def _check_time(self, plan: FolderPlan, out: Path) -> None:
        """Raise ConfigError for a time of a run that was begun without one, or whose tokenizer has used it up."""
        from mar.autoconfig.timing import duration, seconds_of

        seconds = seconds_of(self.given.minutes, self.given.hours)
        if seconds is None or _saved_time_plan(self.given) is not None:
            return
        if _has_states(plan, out):
            raise ConfigError(f"{out} was begun without a time; leave it out, or take another --out")
        earlier = 0.0 if plan.tokenizer is None else _logged_seconds(plan.tokenizer.out)
        if earlier >= seconds:
            raise ConfigError(
                f"{duration(seconds)} are for tokenizer and model, but the tokenizer took {duration(earlier)}; give "
                "more time, or --images"
            )

    def _open_page(self, plan: FolderPlan, options: FolderOptions, untrained: TokenizerStep | None) -> None:
        """Write the page of all steps, on rank 0, and say where it is."""
        from mar import distributed
        from mar.training.page import Page
        from mar.training.page_html import Stage, draw_commands

        assert options.out is not None
        if distributed.rank() != 0:
            return
        stages = [Stage("model", options.out, plan.train.images, sample_every=plan.train.sample_every)]
        if plan.cache is not None:
            stages.insert(0, Stage("latents", plan.cache.out))
        if plan.tokenizer is not None:
            stages.insert(0, Stage("tokenizer", plan.tokenizer.out, plan.tokenizer.config.images))
        self.page = Page(options.out, stages, draw_commands(options.out))
        _note(f"watch it: {self.page.uri}")
        self.page.open("model" if plan.cache is None else "latents" if untrained is None else "tokenizer")

    def _choose_tokenizer_length(
        self, plan: FolderPlan, options: FolderOptions, untrained: TokenizerStep | None
    ) -> tuple[FolderPlan, FolderOptions]:
        """Begin a plan for the user's time. Without one, say how long the trainings take."""
        from mar.autoconfig.timing import FEW_IMAGES, TimePlan, duration, encoding_seconds, seconds_of, tokenizer_images
        from mar.data.splits import TOKENIZER_HOLD_OUT
        from mar.training.speed import reading_seconds, tokenizer_speed
        from mar.training.tokenizer import EVAL_IMAGES, STATS_IMAGES

        assert options.out is not None
        seconds = seconds_of(self.given.minutes, self.given.hours)
        if _saved_time_plan(self.given) is not None or _has_states(plan, options.out):
            return plan, options
        if seconds is None:
            self._estimate(plan, untrained)
            return plan, options
        images = None
        if untrained is not None and self.given.vae.images is None:
            assert plan.summary is not None
            speed = tokenizer_speed(untrained.config, self.device, _measure_seconds(seconds), load_network)
            count = plan.summary.count
            # its components and statistics are of a part of the pictures, latents of all, mostly mirrored too
            part = min(count, STATS_IMAGES)
            reading = reading_seconds(untrained.config) * (2 * part + count)
            encoding = encoding_seconds(part + 2 * count, speed)
            images = tokenizer_images(
                max(seconds - reading - encoding, 0.0), speed, untrained.config.batch, count,
                min(count // TOKENIZER_HOLD_OUT, EVAL_IMAGES),
            )  # fmt: skip
            _note(
                f"{duration(seconds)} in all: about {duration(images / speed)} for the tokenizer ({images:,} pictures, "
                f"{speed:.0f} a second), {duration(reading + encoding)} to read and encode pictures for components, "
                "statistics and latents, and the model with the rest"
            )
            if reading > seconds / 2:
                _note("warning: most of the time goes into reading; copies of fewer pixels are read faster")
            left = max(seconds - images / speed - reading - encoding, 0.0)
            seen = left * self._fit_size(plan, TimePlan(seconds, images), left)[1]
            if seen < FEW_IMAGES:
                height, width = untrained.config.size
                _note(
                    f"warning: that is little: a model of {height}x{width} pixels will see about {seen:,.0f} pictures, "
                    f"and draws shapes from about {FEW_IMAGES:,} on; give more time, or a smaller --image-size"
                )
        elif untrained is None and plan.tokenizer is not None:
            images = plan.tokenizer.config.images
        return self._replan(options, TimePlan(seconds, images))

    def _estimate(self, plan: FolderPlan, untrained: TokenizerStep | None) -> None:
        """Say how long the trainings take on this machine, if they are long."""
        from mar.autoconfig.timing import duration
        from mar.training.speed import model_speed, tokenizer_speed

        config = plan.train
        if config.images + (untrained.config.images if untrained else 0) < MIN_IMAGES_TIMED:
            return
        parts = []
        if untrained is not None:
            speed = tokenizer_speed(untrained.config, self.device, MEASURE_SECONDS, load_network)
            parts.append(("tokenizer", untrained.config.images, speed))
        parts.append(("model", config.images, model_speed(config, self.device, MEASURE_SECONDS).images_per_second))
        times = [f"{name} {duration(images / speed)} ({speed:.0f} pictures a second)" for name, images, speed in parts]
        if self.page is not None:
            self.page.expect("model", parts[-1][1] / parts[-1][2])
        _note(f"on this machine: {', '.join(times)}; --minutes N fits all into N minutes")

    def _choose_model_length(
        self, plan: FolderPlan, options: FolderOptions, earlier: float
    ) -> tuple[FolderPlan, FolderOptions]:
        """Choose the length of the model's training for the time that is left.

        `earlier` sessions spent so many seconds on the tokenizer.
        """
        from mar import distributed
        from mar.autoconfig.plan import describe_size
        from mar.autoconfig.timing import FEW_IMAGES, duration, model_length
        from mar.training.speed import model_speed

        assert options.out is not None
        lengths = self.lengths or _saved_time_plan(self.given)
        if lengths is None or lengths.model_images is not None or self.given.images is not None:
            return plan, options
        seconds, usual = lengths.seconds - earlier, plan.train.model
        lengths, _ = self._fit_size(plan, lengths, seconds - (time.monotonic() - self.started))
        with distributed.collective_errors():
            plan, options = plan_folder(self.arguments, lengths)
        if plan.train.model != usual:
            _note(
                f"the time is too short for {describe_size(usual)}; a smaller model learns more in it: "
                f"{describe_size(plan.train.model)}"
            )
        is_drawn = self.given.sample_every != 0
        speed = model_speed(plan.train, self.device, _measure_seconds(lengths.seconds), draw=is_drawn)
        left = max(seconds - (time.monotonic() - self.started), 0.0)
        length = model_length(
            left, speed.images_per_second, speed.grid_seconds, plan.train.batch, sample_every=self.given.sample_every,
            held_out=_count_held_out(plan.train), validate_every=self.given.validate_every,
        )  # fmt: skip
        with_grids = f", with {length.grids} sample grids on the way" if length.grids else ""
        _note(
            f"{duration(left)} are left: the model sees {length.images:,} pictures "
            f"({speed.images_per_second:.0f} a second){with_grids}; without the limit it would see "
            f"{plan.train.images:,}, in {duration(plan.train.images / speed.images_per_second)}"
        )
        if length.images < FEW_IMAGES:
            _note(f"warning: it draws shapes from about {FEW_IMAGES:,} pictures on; --images N makes its run longer")
        return self._replan(options, replace(lengths, model_images=length.images, grids=length.grids))

    def _fit_size(self, plan: FolderPlan, lengths: TimePlan, seconds: float) -> tuple[TimePlan, float]:
        """Choose the size of a model that will be trained for so many seconds.

        Returns the lengths with that size, and the images per second of its training.
        """
        from mar import distributed
        from mar.autoconfig.timing import ENOUGH_IMAGES
        from mar.training.speed import model_speed

        named = ("--model.encoder", "--model.decoder", "--model.head", "--init")
        is_chosen = any(word.startswith(named) for word in self.arguments)
        while True:
            speed = model_speed(plan.train, self.device, _measure_seconds(lengths.seconds) / 2).images_per_second
            is_enough = distributed.all_gather_object(speed * seconds >= ENOUGH_IMAGES)[0]  # by rank 0's clock
            if is_enough or is_chosen:
                return lengths, speed
            smaller = replace(lengths, smaller=lengths.smaller + 1)
            with distributed.collective_errors():
                next_plan, _ = plan_folder(self.arguments, smaller)
            if next_plan.train.model == plan.train.model:  # there is no smaller one
                return lengths, speed
            plan, lengths = next_plan, smaller

    def _replan(self, options: FolderOptions, lengths: TimePlan) -> tuple[FolderPlan, FolderOptions]:
        """Keep the lengths that rank 0 has chosen, and plan with them."""
        from mar import distributed
        from mar.autoconfig.timing import save_time_plan
        from mar.checkpoint.files import CheckpointError

        assert options.out is not None
        with distributed.collective_errors():
            self.lengths = lengths = distributed.all_gather_object(lengths)[0]
            if distributed.rank() == 0:
                try:
                    save_time_plan(lengths, options.out)
                except CheckpointError as error:
                    _note(f"{error}; if it is stopped, give --images instead of the time")
            return plan_folder(self.arguments, lengths)


def _note(text: str) -> None:
    """Print a line for people, on rank 0."""
    from mar import distributed

    if distributed.rank() == 0:
        print_err(text)


def _measure_seconds(seconds: float) -> float:
    """Return for how long speeds are measured, to plan so many seconds."""
    return min(MEASURE_SECONDS * 3, seconds / 100)


def _count_held_out(config: TrainConfig) -> int:
    """Return the number of images that a validation of a run sees."""
    from mar.training.run import open_run_data

    if not config.validate_every:
        return 0
    _, held_out = open_run_data(config)
    return 0 if held_out is None else min(len(held_out), config.validate_count)


def _cache_latents(step: CacheStep, options: FolderOptions, page: Page | None) -> int:
    from mar.cli.cache import CacheOptions, make_cache
    from mar.data.latent_cache import INDEX

    if (step.out / INDEX).is_file():
        return 0
    _note(f"then the latents of all pictures: {step.out}")
    if page is not None:
        page.open("latents")
    cache = CacheOptions(
        step.data, out=step.out, tokenizer=step.tokenizer, image_size=step.image_size, flip=step.flip,
        upright=step.upright, caption_column=step.caption_column, workers=step.workers, device=options.device,
    )  # fmt: skip
    return make_cache(cache, None if page is None else page.show_latents)


def _check_pictures(plan: FolderPlan) -> None:
    """Compare pictures that were moved with those of finished steps, and note their new place on rank 0.

    Raises ConfigError for other pictures.
    """
    import torch

    from mar import distributed
    from mar.checkpoint.run_state import RunState
    from mar.data.images import source_digest
    from mar.data.latent_cache import INDEX, read_manifest, write_manifest
    from mar.data.sources import open_source
    from mar.training.run import is_same_path, moved_from
    from mar.training.tokenizer import open_tokenizer_run

    tokenizer, cache = plan.tokenizer, plan.cache
    if tokenizer is not None and distributed.world_size() == 1 and _is_trained(tokenizer):
        was_moved = moved_from(tokenizer.config, tokenizer.out) is not None
        if was_moved and RunState(tokenizer.out).states():  # they know the pictures
            open_tokenizer_run(tokenizer.config, tokenizer.out, device=torch.device("cpu"), load_network=load_network)
    if cache is None or not (cache.out / INDEX).is_file():
        return
    manifest = read_manifest(cache.out)
    if is_same_path(manifest.data, cache.data):
        return
    if source_digest(open_source(cache.data, caption_column=cache.caption_column)) != manifest.source:
        raise ConfigError(
            f"{cache.out} holds latents of {manifest.data}, and the pictures of {cache.data} are others; give --data "
            f"{manifest.data} to go on, or another --out for a new run"
        )
    if distributed.rank() == 0:
        write_manifest(cache.out, replace(manifest, data=cache.data))


def _has_states(plan: FolderPlan, out: Path) -> bool:
    """Return whether the model's training has saved states, or that of its tokenizer, which is not finished."""
    from mar.checkpoint.run_state import RunState

    folders = [out] if plan.tokenizer is None or _is_trained(plan.tokenizer) else [out, plan.tokenizer.out]
    return any(RunState(folder).states() for folder in folders)


def _logged_seconds(folder: Path) -> float:
    """Return the time in steps of a run, over all sessions; 0 without a log."""
    from mar.training.page import is_number, read_log

    lines = read_log(folder / "log.jsonl")
    return max((float(line["seconds"]) for line in lines if is_number(line.get("seconds"))), default=0.0)


def _is_trained(step: TokenizerStep) -> bool:
    """Return whether a tokenizer is finished. Raises ConfigError where another one is."""
    from mar.checkpoint.tokenizers import is_saved
    from mar.training.run import check_same_run, load_config

    if not is_saved(step.out):
        return False
    check_same_run(step.config.resolved(), step.out)
    saved = load_config(TokenizerTrainConfig, step.out)
    if saved is not None and saved.images != step.config.images:
        raise ConfigError(
            f"{step.out} is finished: it has seen {saved.images:,} pictures, not {step.config.images:,}; "
            f"give --vae.images {saved.images}, or take another --out"
        )
    return True
