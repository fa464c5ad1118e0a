"""Putting a run together: data, tokenizer, model; and what it leaves behind: weights to use."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mar import distributed
from mar.checkpoint import official
from mar.checkpoint.files import write_text
from mar.checkpoint.run_state import RunState, changed_settings
from mar.config import ConfigError, ModelConfig, TrainConfig, from_dict, resolve_image_channels, to_dict
from mar.data.images import Source, Transform
from mar.data.latent_cache import LatentSource
from mar.data.loader import in_order
from mar.data.splits import load_held_out, open_train_val, save_held_out
from mar.data.stream import StreamSource
from mar.model.mar import MAR
from mar.pipeline import Pipeline
from mar.random import make_generator
from mar.tokenizer import Tokenizer, from_name, is_name
from mar.tokenizer.base import fingerprint, measure_moments
from mar.training.parallelize import full_state_dict
from mar.training.trainer import Progress, Run

Config = TypeVar("Config")

RUN_FILE = "run.json"
MEASURED = 10_000
"""Pictures of a stream, at most, that a tokenizer's statistics are of."""
# Settings that may change when a run is resumed: they do not touch what has been learned so far.
_FREE = {"images", "decay", "workers", "save_every", "sample_every", "log_every", "keep", "sampling"}
_FREE |= {"strategy", "accumulate", "activation_checkpointing", "compile", "log_to"}
_FREE |= {"validate_every", "validate_on", "validate_count", "patience"}
# Settings of a model that may differ from those of the weights it starts from.
_LEARNING = {"classes", "label_drop", "attention_dropout", "projection_dropout", "mask_ratio_min"}


def open_run(
    config: TrainConfig,
    folder: Path,
    *,
    device: torch.device,
    load_tokenizer: Callable[[str], Tokenizer],
    load_model: Callable[[str], Pipeline],
) -> Run:
    """The run of `config` in `folder`, resumed where it has saved states.

    ConfigError where the folder holds another run, the data is not what the model is for, or a tokenizer's latents.
    """
    resumed = check_same(config, folder) and bool(RunState(folder).states())
    source, held_out = open_pictures(config, folder)
    start = load_model(config.init) if config.init is not None and not resumed else None
    learned = start.tokenizer if start is not None else None
    tokenizer = _tokenizer(config, source, load_tokenizer, learned, measured_later=resumed)
    torch.manual_seed(make_generator(config.seed).initial_seed())
    model = MAR(config.model)
    if start is not None:
        initialise_from(model, start.model)
        _check_components(tokenizer, start.tokenizer)
    run = Run(config, folder, source, tokenizer, model, device, held_out=held_out)
    run.resume()
    keep_settings(config, folder)
    if config.hold_out and distributed.rank() == 0:
        save_held_out(folder, source)
    return run


def open_pictures(
    config: TrainConfig, folder: Path | None = None
) -> tuple[Source | LatentSource | StreamSource, Source | LatentSource | None]:
    """What a run, in `folder` if it has begun, learns from, and what it is validated on.

    ConfigError where the classes are not the model's, or where the run waits for pictures to be validated on that there
    are none of.
    """
    source, held_out = open_train_val(
        config.data, classes=config.model.classes, every=config.hold_out, validate_on=config.validate_on,
        held_out=load_held_out(folder) if folder is not None and config.hold_out else None,
    )  # fmt: skip
    check_classes(config, source.classes)
    held_out = _of_the_same_classes(config, source, held_out)
    if config.patience and held_out is None:
        raise ConfigError(
            f"patience is {config.patience}, but there are no held-out pictures: {config.data} has no test part with "
            "the same classes; --hold-out 10 keeps one of ten from learning, --validate-on names others"
        )
    return source, held_out


def check_classes(config: TrainConfig, classes: Sequence[str]) -> None:
    """Raises ConfigError where the model's classes are not the data's; a model may do without any."""
    if config.model.classes not in (0, len(classes)):
        raise ConfigError(
            f"the model has {config.model.classes} classes, but {config.data} has {len(classes)}; "
            f"set --model.classes {len(classes)}, or 0 for an unconditional model"
        )


def _of_the_same_classes(
    config: TrainConfig, source: Source | LatentSource | StreamSource, held_out: Source | LatentSource | None
) -> Source | LatentSource | None:
    """The held-out pictures, if their class numbers mean the same. ConfigError for others that were asked for."""
    if held_out is None or not config.model.classes or tuple(held_out.classes) == tuple(source.classes):
        return held_out
    if config.validate_on is None:
        return None
    raise ConfigError(
        f"{config.validate_on} has {len(held_out.classes)} classes that are not the {len(source.classes)} of "
        f"{config.data}; validate on pictures with the same classes, by the same names"
    )


def saved_settings(kind: type[Config], folder: Path) -> Config | None:
    """The settings of the run that `folder` holds, None where it holds none. ConfigError where they are not of this
    kind, or damaged."""
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        return from_dict(kind, json.loads(path.read_text(encoding="utf-8")))  # older ones lack some settings
    except ConfigError as error:
        raise ConfigError(f"{folder} holds a run of another kind or version ({error}); use another folder") from error
    except (AttributeError, TypeError, ValueError) as error:  # what JSON, or a config, is not made of
        raise ConfigError(f"{path} is damaged ({error}); put it back as it was, or use another folder") from error


def check_same(config: Any, folder: Path) -> bool:
    """Whether `folder` holds this run already; ConfigError where it holds another."""
    saved = saved_settings(type(config), folder)
    if saved is None:
        return False
    before, now = to_dict(saved), to_dict(config)
    if different := changed_settings({k: v for k, v in before.items() if k not in _FREE}, now):
        raise ConfigError(
            f"{folder} holds another run ({'; '.join(different)}); "
            "use its settings to go on with it, or another folder for a new one"
        )
    return True


def length_before(folder: Path) -> int:
    """Images that the run in `folder` was to see in all when it was last begun; 0 where it has yet to save a state."""
    saved = saved_settings(TrainConfig, folder)
    return 0 if saved is None or not RunState(folder).states() else saved.images


def keep_settings(config: Any, folder: Path) -> None:
    """Notes in `folder` which run it holds, on the first process."""
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RUN_FILE, json.dumps(to_dict(config), indent=1))


def _tokenizer(
    config: TrainConfig,
    source: Source | LatentSource | StreamSource,
    load_tokenizer: Callable[[str], Tokenizer],
    learned: Tokenizer | None = None,
    *,
    measured_later: bool,
) -> Tokenizer:
    """What makes latents of the pictures; it takes over the components that weights to start from have `learned`."""
    channels = config.model.channels
    if is_name(config.tokenizer):
        try:
            image_channels = resolve_image_channels(config.data, config.image_channels)
            tokenizer = from_name(config.tokenizer, image_channels, channels)
        except ValueError as error:
            others = "pca4, kl16, or one in diffusers' format"
            if isinstance(source, LatentSource):
                others = source.manifest.tokenizer
            raise ConfigError(f"{error}; choose --tokenizer {others}") from None
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    if isinstance(source, LatentSource):
        _check_cache(config, source, tokenizer)
    if tokenizer.channels != channels:
        raise ConfigError(f"the tokenizer's latents have {tokenizer.channels} channels, the model's {channels}")
    if config.image_channels not in (None, tokenizer.image_channels):
        raise ConfigError(
            f"image_channels is {config.image_channels}, but the tokenizer takes {tokenizer.image_channels}; "
            "leave --image-channels out, which is for components that a run takes itself (--tokenizer pca4)"
        )
    if not tokenizer.has_stats and not measured_later:  # a resumed run has the statistics in its state
        if learned is not None and _components(learned) == _components(tokenizer) is not None:
            tokenizer.load_fitted_state(learned.fitted_state())
        elif isinstance(source, LatentSource):
            statistics = measure_moments(source.in_order())
            tokenizer.set_statistics(statistics.mean, statistics.std)
        else:
            transform = Transform(tokenizer.image_size(config.model.grid), tokenizer.image_channels)
            limit = MEASURED if isinstance(source, StreamSource) else None
            tokenizer.fit(in_order(source, transform, limit=limit))
    return tokenizer


def _components(tokenizer: Tokenizer) -> tuple[int, ...] | None:
    """What principal components are of; None for another tokenizer."""
    if not tokenizer.learns_basis:
        return None
    return tokenizer.image_channels, tokenizer.stride, tokenizer.channels


def _check_components(own: Tokenizer, learned: Tokenizer) -> None:
    """Raises ConfigError where weights that learned principal components would be given other latents, or the reverse.

    Two autoencoders are not compared: what one has learned of another's latents may be a start.
    """
    components = [tokenizer.learns_basis for tokenizer in (own, learned)]
    if any(components) and fingerprint(own) != fingerprint(learned):
        remedy = f"--tokenizer {learned.name} takes theirs" if components[1] else "take theirs"
        raise ConfigError(f"the weights to start from have learned other latents than this tokenizer makes; {remedy}")


def _check_cache(config: TrainConfig, source: LatentSource, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where a cache is of another tokenizer or of other sizes, or lacks the changed pictures."""
    about = source.manifest
    if about.fingerprint != (own := fingerprint(tokenizer)):
        raise ConfigError(
            f"{config.data} was cached by the tokenizer {about.tokenizer} ({about.fingerprint[:12]}), but the run's is "
            f"{config.tokenizer} ({own[:12]}); choose --tokenizer {about.tokenizer}, or cache the pictures by this one"
        )
    if about.size != (wanted := tokenizer.image_size(config.model.grid)):
        raise ConfigError(
            f"{config.data} is of pictures of {about.size[0]}x{about.size[1]}, but the model is for "
            f"{wanted[0]}x{wanted[1]}; set --model.grid {about.shape[1]} {about.shape[2]}, or cache them anew"
        )
    if config.shift:
        raise ConfigError(
            f"{config.data} holds latents of pictures as they are, which can't be moved by {config.shift} pixels; "
            "train with --shift 0, or from the pictures"
        )
    if config.flip and not about.flips:
        raise ConfigError(
            f"{config.data} holds no flipped pictures; train with --flip False, or cache anew with --flip True"
        )


def initialise_from(model: MAR, other: MAR) -> list[str]:
    """Takes over the weights of `other`; returns the names of tensors that start anew since their shapes differ.

    Classes are another set's, so that their embedding starts anew unless the count agrees. ConfigError where anything
    differs that weights are made for: it would not be the same model.
    """
    now, then = _made_for(model.config), _made_for(other.config)
    if different := [f"{name} {then[name]}, here {now[name]}" for name in now if now[name] != then[name]]:
        raise ConfigError(f"the weights to start from are of another model: {'; '.join(different)}")
    own, theirs = model.state_dict(), other.state_dict()
    anew = [name for name, tensor in own.items() if name not in theirs or theirs[name].shape != tensor.shape]
    model.load_state_dict({name: own[name] if name in anew else theirs[name] for name in own})
    return anew


def _made_for(config: ModelConfig) -> dict[str, Any]:
    """The settings without which weights mean nothing; the others are how they are trained, and with what classes."""
    values = to_dict(config)
    head = {f"head.{name}": value for name, value in values.pop("head").items() if name != "batch_mul"}
    return {name: value for name, value in values.items() if name not in _LEARNING} | head


def adopt_official(run: Run, path: Path) -> None:
    """Goes on with a training run of the reference from its `checkpoint-last.pth`: weights, EMA, optimizer, epoch.

    Images seen are counted as finished epochs times the pictures of this run's source. ConfigError for a file without
    an optimizer, or of another model.
    """
    read = official.read_mar(path)
    if isinstance(run.source, StreamSource):
        raise ConfigError(f"epochs of {path} can't be counted in pictures of a stream; leave stream: out of --data")
    if run.config.optimizer != "adamw":
        raise ConfigError(f"{path} was trained by AdamW; go on with it with --optimizer adamw")
    if read.optimizer is None or read.raw is None or read.ema is None or read.epoch is None:
        raise ConfigError(f"{path} has no optimizer and epoch to go on with; start from its weights with --init {path}")
    try:
        averages = [(average, read.ema) for average in run.ema.models.values()]
        for model, weights in [(run.model, read.raw), *averages]:
            set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"{path} is of another model than this run's ({reason}); choose its recipe") from None
    state = get_optimizer_state_dict(run.model, run.optimizers)
    state["state"] = {name: dict(moments) for name, moments in read.optimizer.items()}
    set_optimizer_state_dict(run.model, run.optimizers, state)
    images = (read.epoch + 1) * len(run.source)
    run.progress = Progress(step=images // run.config.batch, images=images, watched=images)
    run.save()


def pipeline(run: Run, weights: str = "ema") -> Pipeline:
    """The run as it stands, ready to draw, on every process; `weights` are one of `run.weights`."""
    model = MAR(run.config.model).to(run.device)
    model.load_state_dict(full_state_dict(run.weights[weights].state_dict()))
    notes: dict[str, Any] = {"images": run.progress.images, "steps": run.progress.step, "data": run.config.data}
    kind, _, decay = weights.partition("-")
    if decay:
        notes["ema"] = float(decay)
    return Pipeline(
        model,
        run.tokenizer,
        classes=run.source.classes if run.config.model.classes else (),
        sampling=run.config.sampling,
        weights=kind,
        notes=notes,
    )


def export(run: Run) -> list[Path]:
    """Writes the run's EMA and raw weights as files to use; every process takes part, the first writes."""
    paths = []
    for weights in run.weights:
        whole = pipeline(run, weights)
        paths.append(run.folder / file_of(weights))
        if distributed.rank() == 0:
            whole.save(paths[-1])
    return paths


def file_of(weights: str) -> str:
    """The file of a run's folder that has these weights."""
    return "model.safetensors" if weights == "ema" else f"model-{weights}.safetensors"
