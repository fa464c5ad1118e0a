"""Open a run from its configuration, and export its weights.

`open_run` puts data, tokenizer and model together, checks that they fit each other, and resumes the latest state.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mar import __version__, devices, distributed, zoo
from mar.checkpoint import checksums, official
from mar.checkpoint.run_state import RunState, changed_settings
from mar.config import ConfigError, ModelConfig, TrainConfig, from_dict, resolve_image_channels, to_dict
from mar.config.tokenizer import TokenizerTrainConfig
from mar.config.training import Precision
from mar.data.captions import captions_of, count_words
from mar.data.conditions import WORDS, CaptionReader, WordReader, reader_from_header
from mar.data.images import Source, Transform
from mar.data.latent_cache import LatentSource
from mar.data.loader import in_order
from mar.data.sources import open_data
from mar.data.splits import load_held_out, open_train_val, save_held_out
from mar.data.stream import StreamSource
from mar.data.text_encoder import TextReader, encoder_width
from mar.model.mar import MAR
from mar.model.positions import resize_positions
from mar.pipeline import Pipeline
from mar.random import make_generator
from mar.sampling.progress import meter
from mar.tokenizer import Tokenizer, from_name, is_name
from mar.tokenizer.base import fingerprint, measure_moments
from mar.training.parallelize import full_state_dict
from mar.training.trainer import Progress, Run

Config = TypeVar("Config")
"""Settings of a run: `TrainConfig` or `TokenizerTrainConfig`."""

logger = logging.getLogger(__name__)
RUN_FILE = "run.json"
"""File in a run's folder: its configuration."""
CAPTIONS_FILE = "captions.json"
"""File in a run's folder: what captions are read by."""
EXAMPLES = 8
"""Captions of the data that a model's notes name as examples of prompts."""
MANY_CAPTIONS = 200
"""From so many captions on, progress is shown while they are embedded."""
STATS_IMAGES = 10_000
"""Images of a stream, at most, to fit a tokenizer to."""
_MAY_CHANGE_ON_RESUME = {
    "images", "warmup", "decay", "workers", "save_every", "sample_every", "log_every", "log_to", "keep", "sampling",
    "strategy", "accumulate", "activation_checkpointing", "compile",
    "validate_every", "validate_on", "validate_count", "patience",
}  # fmt: skip
"""Settings that leave the steps so far as they were."""
_MAY_DIFFER_FROM_INIT = {
    "classes", "words", "text_width", "label_drop", "attention_dropout", "projection_dropout", "mask_ratio_min",
    "head.batch_mul", "grid", "mask_schedule", "tie_null",
}  # fmt: skip
"""Settings of a model that may differ from those of the weights it starts from."""


def load_unrounded(name: str) -> Pipeline:
    """Load a model to train on: in float32, which a GPU would round to draw faster."""
    return zoo.load(name, device="cpu", dtype=torch.float32)


def open_run(
    config: TrainConfig,
    folder: Path,
    *,
    device: torch.device,
    load_tokenizer: Callable[[str], Tokenizer] = zoo.load_tokenizer,
    load_model: Callable[[str], Pipeline] = load_unrounded,
) -> Run:
    """Open the run in a folder, resumed if there are saved states.

    ConfigError if the folder holds another run, or if data, tokenizer and model don't fit each other.

    Args:
        config: all settings.
        folder: where the run keeps its files.
        device: where to train.
        load_tokenizer: loads the tokenizer `config.tokenizer` names, unless it is built in.
        load_model: loads the weights `config.init` names.
    """
    resumed = check_same_run(config, folder) and bool(RunState(folder).states())

    # data, tokenizer, model
    source, held_out = open_run_data(config, folder)
    init = load_model(config.init) if config.init is not None and not resumed else None
    init_tokenizer = init.tokenizer if init is not None else None
    tokenizer = _open_tokenizer(config, source, load_tokenizer, init_tokenizer, fitted_in_state=resumed)
    captions = open_captions(config, folder)
    if isinstance(captions, TextReader):
        captions.to(device)
        embed_captions(captions, config, (source, held_out), folder)
    torch.manual_seed(make_generator(config.seed).initial_seed())
    model = MAR(config.model)
    if init is not None:
        init_from(model, init.model)
        _check_same_basis(tokenizer, init.tokenizer)

    # the run itself
    run = Run(config, folder, source, tokenizer, model, device, held_out, captions)
    run.moved_from = moved_from(config, folder)
    run.resume()
    save_config(config, folder)
    if captions is not None and distributed.rank() == 0:
        checksums.write_json(folder / CAPTIONS_FILE, captions.header())
    if config.hold_out and distributed.rank() == 0:
        save_held_out(folder, source)
    return run


# ---- the configuration in a run's folder


def load_config(kind: type[Config], folder: Path) -> Config | None:
    """Load the configuration of a folder's run, None without a run.

    ConfigError if it is damaged, or not of this kind.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        return from_dict(kind, checksums.read_json(path))  # older ones lack some settings
    except ConfigError as error:
        raise ConfigError(
            f"{folder} holds a run of another kind or version, or run.json is damaged ({error}); use another folder, "
            f"or a newer mar than this {__version__} if that began it"
        ) from error
    except (AttributeError, TypeError, ValueError, LookupError, OverflowError) as error:  # no JSON, or no configuration
        raise ConfigError(f"{path} is damaged ({error}); put it back as it was, or use another folder") from error


def save_config(config: TrainConfig | TokenizerTrainConfig, folder: Path) -> None:
    """Write the configuration to a run's folder, on rank 0."""
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        checksums.write_json(folder / RUN_FILE, to_dict(config))


def check_same_run(config: TrainConfig | TokenizerTrainConfig, folder: Path) -> bool:
    """Return whether the folder holds this run already. ConfigError if it holds another."""
    saved = load_config(type(config), folder)
    if saved is None:
        return False
    if isinstance(saved, TokenizerTrainConfig):
        saved = saved.resolved()  # files of earlier versions lack settings that a kind has defaults for
    fixed = {name: value for name, value in to_dict(saved).items() if name not in _MAY_CHANGE_ON_RESUME}
    now = to_dict(config)
    for name in ("data", "tokenizer"):
        if name in fixed and is_same_path(fixed[name], now[name], moved=name == "data" or not is_name(fixed[name])):
            fixed[name] = now[name]
    if changes := changed_settings(fixed, now):
        raise ConfigError(
            f"{folder} holds another run ({'; '.join(changes)}); "
            "use its settings to go on with it, or another folder for a new one"
        )
    return True


def moved_from(config: TrainConfig | TokenizerTrainConfig, folder: Path) -> str | None:
    """Return where the data of the folder's run was; None: it is still there."""
    saved = load_config(type(config), folder)
    if saved is None or is_same_path(saved.data, config.data):
        return None
    return saved.data


def is_same_path(before: str | None, now: str | None, *, moved: bool = False) -> bool:
    """Tell if two spellings name one file or folder: relative or absolute, through links, or `moved` since.

    What was moved is gone from where it was; images and tokenizer are compared when the state is loaded.
    """
    if before is None or now is None:
        return before == now
    kinds = [spec.partition(":")[0] if spec.startswith(("stream:", "hub:")) else "" for spec in (before, now)]
    if before == now or kinds[0] != kinds[1] or kinds[0] == "hub" or "://" in before + now:
        return before == now
    old, new = (Path(spec.removeprefix("stream:")).expanduser() for spec in (before, now))
    if not new.exists():
        return False
    return old.resolve() == new.resolve() or (moved and not old.exists() and before != "fashion")


def precision_by_default(config: TrainConfig, folder: Path, device: torch.device) -> Precision:
    """Return the precision of a run whose user named none.

    A run that goes on keeps its own. A new one has bf16 on GPUs with such products, else the recipe's.
    """
    if (saved := load_config(TrainConfig, folder)) is not None:
        return saved.precision
    return "bf16" if devices.default_precision(device) == "bf16" else config.precision


def saved_length(folder: Path) -> int:
    """Return the length, in images, at the last start; 0 without states."""
    saved = load_config(TrainConfig, folder)
    return 0 if saved is None or not RunState(folder).states() else saved.images


# ---- data


def open_run_data(
    config: TrainConfig, folder: Path | None = None
) -> tuple[Source | LatentSource | StreamSource, Source | LatentSource | None]:
    """Open the training data and the held-out images.

    The split is that noted in the run's folder. ConfigError if the classes are not the model's, or if early stopping
    has no held-out images.
    """
    source, held_out = open_train_val(
        config.data, classes=config.model.classes, every=config.hold_out, validate_on=config.validate_on,
        held_out=load_held_out(folder) if folder is not None and config.hold_out else None,
        caption_column=config.caption_column,
    )  # fmt: skip
    check_classes(config, source.classes)
    held_out = _with_same_classes(config, source, held_out)
    if config.patience and held_out is None:
        raise ConfigError(
            f"patience is {config.patience}, but there are no held-out pictures: {config.data} has no test part with "
            "the same classes; --hold-out 10 keeps one of ten from learning, --validate-on names others"
        )
    return source, held_out


def with_captions(config: TrainConfig) -> TrainConfig:
    """Return the config with its captions set up in the model.

    That is the number of words, or of features of a text encoder. ConfigError for data without captions, ValueError
    for an encoder that is not there.
    """
    if not config.text or config.model.takes_captions:
        return config
    if config.text == WORDS:
        model = replace(config.model, classes=0, words=len(_words_of_data(config)))
    else:
        model = replace(config.model, classes=0, text_width=encoder_width(config.text))
    return replace(config, model=model)


def _words_of_data(config: TrainConfig) -> tuple[str, ...]:
    """Return the words of the captions of a run's data. ConfigError if there are none."""
    source = open_data(config.data, config.model.classes, config.caption_column)
    if isinstance(source, StreamSource):
        raise ConfigError(
            f"{config.data} is read in passing, so that its words can't be counted; leave stream: or --text {WORDS} out"
        )
    words = count_words(caption for captions in captions_of(source) for caption in captions)
    if not words:
        raise _no_captions(config.data)
    return words


def _no_captions(data: str) -> ConfigError:
    return ConfigError(
        f"{data} has no captions: looked for columns text, caption and prompt (of metadata.jsonl or metadata.csv), and "
        "for .txt files beside the pictures; name another by --caption-column, or leave --text out"
    )


def open_captions(config: TrainConfig, folder: Path) -> CaptionReader | None:
    """Open the reader of captions: that of the run in a folder, or a new one.

    None for a model without captions.
    """
    if not config.text:
        return None
    path, model = folder / CAPTIONS_FILE, config.model
    reader: CaptionReader | None = None
    if path.is_file():
        try:
            reader = reader_from_header(checksums.read_json(path), model.buffer_size)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); put it back, or begin another run") from error
    elif config.text == WORDS:
        reader = WordReader(_words_of_data(config), model.buffer_size)
    else:
        reader = TextReader.of(config.text, model.buffer_size)
    if isinstance(reader, WordReader) and config.text == WORDS:
        if len(reader.words) != model.words:
            raise ConfigError(f"the model has {model.words:,} words, but the captions {len(reader.words):,}")
    elif isinstance(reader, TextReader) and config.text == reader.info.name:
        if (reader.info.width, reader.info.length) != (model.text_width, model.buffer_size):
            raise ConfigError(
                f"the model takes {model.buffer_size} tokens of {model.text_width} features, but the text encoder "
                f"{reader.info.name} gives {reader.info.length} of {reader.info.width}; set --model.text-width "
                f"{reader.info.width}"
            )
    else:
        raise ConfigError(f"{path} is not of captions read by {config.text}; put it back, or begin another run")
    return reader


def embed_captions(
    reader: TextReader,
    config: TrainConfig,
    sources: Sequence[Source | LatentSource | StreamSource | None],
    folder: Path,
) -> None:
    """Compute the features of all captions once, on rank 0.

    They are kept with the latent cache, if the data is one. A stream's captions are embedded in passing. Called by all
    ranks.

    Args:
        reader: has the encoder.
        config: names the data.
        sources: what is trained on, and what is validated on.
        folder: of the run.
    """
    if isinstance(sources[0], StreamSource):
        return
    known = [caption for source in sources for captions in captions_of(source) for caption in captions]
    if not captions_of(sources[0]):
        raise _no_captions(config.data)
    cache = sources[0].folder if isinstance(sources[0], LatentSource) else folder
    kept_in = cache if os.access(cache, os.W_OK) else folder
    error = None
    if distributed.rank() == 0:
        try:
            if new := reader.missing(known, kept_in):
                with meter(len(new) >= MANY_CAPTIONS, len(new), unit="caption") as advance:
                    reader.add_to_table(new, kept_in, advance)
        except (ValueError, OSError) as caught:
            error = str(caught)
    error = distributed.all_gather_object(error)[0]
    if error is not None:
        raise ConfigError(error)
    reader.missing((), kept_in)
    reader.release()


def check_classes(config: TrainConfig, classes: Sequence[str]) -> None:
    """Raise ConfigError if model and data differ in number of classes."""
    if config.model.classes not in (0, len(classes)):
        raise ConfigError(
            f"the model has {config.model.classes} classes, but {config.data} has {len(classes)}; "
            f"set --model.classes {len(classes)}, or 0 for an unconditional model"
        )


def _with_same_classes(
    config: TrainConfig, source: Source | LatentSource | StreamSource, held_out: Source | LatentSource | None
) -> Source | LatentSource | None:
    """Return the held-out images if their classes are those of the data, else None.

    ConfigError if they were chosen by `validate_on`.
    """
    if held_out is None or not config.model.classes or tuple(held_out.classes) == tuple(source.classes):
        return held_out
    if config.validate_on is None:
        return None
    raise ConfigError(
        f"{config.validate_on} has {len(held_out.classes)} classes that are not the {len(source.classes)} of "
        f"{config.data}; validate on pictures with the same classes, by the same names"
    )


# ---- tokenizer


def _open_tokenizer(
    config: TrainConfig,
    source: Source | LatentSource | StreamSource,
    load_tokenizer: Callable[[str], Tokenizer],
    init: Tokenizer | None = None,
    *,
    fitted_in_state: bool,
) -> Tokenizer:
    """Open the run's tokenizer, and fit it to the data if it needs that.

    Args:
        config: names it.
        source: the training data.
        load_tokenizer: loads one that is not built in.
        init: tokenizer of the weights to start from, whose principal components are taken over.
        fitted_in_state: what would be fitted is in the saved state.
    """
    channels = config.model.channels
    if is_name(config.tokenizer):
        try:
            image_channels = resolve_image_channels(config.data, config.image_channels)
            tokenizer = from_name(config.tokenizer, image_channels, channels)
        except ValueError as error:
            others = "pca4, kl16, detok, dc-ae, or one in diffusers' format"
            if isinstance(source, LatentSource):
                others = source.manifest.tokenizer
            raise ConfigError(f"{error}; choose --tokenizer {others}") from None
    else:
        tokenizer = load_tokenizer(config.tokenizer)

    # does it fit?
    if isinstance(source, LatentSource):
        _check_cache(config, source, tokenizer)
    if tokenizer.channels != channels:
        raise ConfigError(f"the tokenizer's latents have {tokenizer.channels} channels, the model's {channels}")
    height, width = tokenizer.image_size(config.model.grid)
    if expected := tokenizer.unfit(height, width):
        raise ConfigError(f"--model.grid: got one for pictures of {height}x{width}, expected one for {expected}")
    if config.image_channels not in (None, tokenizer.image_channels):
        raise ConfigError(
            f"image_channels is {config.image_channels}, but the tokenizer takes {tokenizer.image_channels}; "
            "leave --image-channels out: it is for principal components (--tokenizer pca4)"
        )

    # statistics and principal components
    if not tokenizer.has_stats and not fitted_in_state:
        if init is not None and _basis(init) == _basis(tokenizer) is not None:
            tokenizer.load_fitted_state(init.fitted_state())
        elif isinstance(source, LatentSource):
            statistics = measure_moments(source.in_order())
            tokenizer.set_statistics(statistics.mean, statistics.std)
        else:
            transform = Transform((height, width), tokenizer.image_channels, config.upright)
            limit = STATS_IMAGES if isinstance(source, StreamSource) else None
            tokenizer.fit(in_order(source, transform, limit=limit))
    return tokenizer


def _basis(tokenizer: Tokenizer) -> tuple[int, ...] | None:
    """Return the shape of the principal components; None for another tokenizer."""
    if not tokenizer.learns_basis:
        return None
    return tokenizer.image_channels, tokenizer.stride, tokenizer.channels


def _check_same_basis(tokenizer: Tokenizer, init: Tokenizer) -> None:
    """Raise ConfigError if either tokenizer has principal components and the other has not the same ones.

    Two autoencoders are not compared: weights for the latents of one may be a start for another's.
    """
    learns_basis = [tokenizer.learns_basis, init.learns_basis]
    if any(learns_basis) and fingerprint(tokenizer) != fingerprint(init):
        remedy = f"--tokenizer {init.name} takes theirs" if learns_basis[1] else "take theirs"
        raise ConfigError(f"the weights to start from have learned other latents than this tokenizer makes; {remedy}")


def _check_cache(config: TrainConfig, source: LatentSource, tokenizer: Tokenizer) -> None:
    """Raise ConfigError if a latent cache has another tokenizer or size, or lacks the augmentations."""
    cache = source.manifest
    if cache.fingerprint != (current := fingerprint(tokenizer)):
        raise ConfigError(
            f"{config.data} was cached by the tokenizer {cache.tokenizer} ({cache.fingerprint[:12]}), but the run's is "
            f"{config.tokenizer} ({current[:12]}); choose --tokenizer {cache.tokenizer}, or cache the pictures by this "
            "one"
        )
    if cache.size != (size := tokenizer.image_size(config.model.grid)):
        raise ConfigError(
            f"{config.data} is of pictures of {cache.size[0]}x{cache.size[1]}, but the model is for "
            f"{size[0]}x{size[1]}; set --model.grid {cache.shape[1]} {cache.shape[2]}, or cache them anew"
        )
    if config.shift:
        raise ConfigError(
            f"{config.data} holds latents of pictures as they are, which can't be moved by {config.shift} pixels; "
            "train with --shift 0, or from the pictures"
        )
    if config.flip and not cache.flips:
        raise ConfigError(
            f"{config.data} holds no flipped pictures; train with --flip False, or cache anew with --flip True"
        )
    if config.upright and not cache.upright:
        raise ConfigError(
            f"{config.data} holds latents of pictures as they lie in their files; train with --no-upright, or cache "
            "anew with --upright True"
        )


# ---- weights to start from


def init_from(model: MAR, other: MAR) -> list[str]:
    """Copy the weights of another model. Returns names of tensors not copied.

    The class embedding is not copied if the number of classes differs. Positions are resized to another grid. A tied
    vector becomes mask token and null class; of two, the mask token becomes the tied one. ConfigError for another
    architecture.
    """
    own, theirs = _architecture(model.config), _architecture(other.config)
    if changes := [f"{name} {theirs[name]}, here {own[name]}" for name in own if own[name] != theirs[name]]:
        raise ConfigError(f"the weights to start from are of another model: {'; '.join(changes)}")
    state, init = model.state_dict(), other.state_dict()
    if other.config.tie_null:
        init["null_class"] = init["mask_token"].unsqueeze(0)
    if other.config.token_grid != model.config.token_grid:
        init |= _resized_positions(init, other.config, model.config)
    kept = [name for name, tensor in state.items() if name not in init or init[name].shape != tensor.shape]
    model.load_state_dict({name: state[name] if name in kept else init[name] for name in state})
    return kept


def _resized_positions(state: Mapping[str, Tensor], old: ModelConfig, new: ModelConfig) -> dict[str, Tensor]:
    """Resize all learned positions to another grid."""
    resized = {}
    for name, buffer in (("encoder", old.buffer_size), ("decoder", old.buffer_size), ("diffusion", 0)):
        position = state[f"{name}_position"]
        resized[f"{name}_position"] = resize_positions(position, buffer, old.token_grid, new.token_grid)
    logger.warning(
        "positions of %d x %d tokens are resized to %d x %d; the model has to learn them again",
        *old.token_grid,
        *new.token_grid,
    )
    return resized


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """Return the settings that have to agree for weights to be of use."""
    settings = to_dict(config)
    settings |= {f"head.{name}": value for name, value in settings.pop("head").items()}
    return {name: value for name, value in settings.items() if name not in _MAY_DIFFER_FROM_INIT}


def resume_official(run: Run, path: Path) -> None:
    """Resume a run of the reference from its `checkpoint-last.pth`.

    That has weights, EMA, optimizer and epoch. Finished epochs count as that many times the images of this run's data.
    ConfigError for a file without optimizer, or of another model.
    """
    checkpoint = official.read_mar(path)
    if isinstance(run.source, StreamSource):
        raise ConfigError(f"epochs of {path} can't be counted in pictures of a stream; leave stream: out of --data")
    if run.config.optimizer != "adamw":
        raise ConfigError(f"{path} was trained by AdamW; go on with it with --optimizer adamw")
    if checkpoint.optimizer is None or checkpoint.raw is None or checkpoint.ema is None or checkpoint.epoch is None:
        raise ConfigError(f"{path} has no optimizer and epoch to go on with; start from its weights with --init {path}")

    # weights and EMA
    averages = [(average, checkpoint.ema) for average in run.ema.models.values()]
    try:
        for model, weights in [(run.model, checkpoint.raw), *averages]:
            set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"{path} is of another model than this run's ({reason}); choose its recipe") from None

    # optimizer and progress
    state = get_optimizer_state_dict(run.model, run.optimizers)
    state["state"] = {name: dict(moments) for name, moments in checkpoint.optimizer.items()}
    set_optimizer_state_dict(run.model, run.optimizers, state, options=StateDictOptions(full_state_dict=True))
    images = (checkpoint.epoch + 1) * len(run.source)
    run.progress = Progress(step=images // run.config.batch, images=images, callbacks_done=images)
    run.save()


# ---- weights to use


def make_pipeline(run: Run, weights: str = "ema") -> Pipeline:
    """Copy weights, named as in `run.weights`, to a pipeline on every rank."""
    model = MAR(run.config.model).to(run.device)
    model.load_state_dict(full_state_dict(run.weights[weights].state_dict()))
    notes: dict[str, Any] = {"images": run.progress.images, "steps": run.progress.step, "data": run.config.data}
    kind, _, decay = weights.partition("-")
    if run.captions is not None:
        notes["examples"] = run.grid_conditions[:EXAMPLES]
    if decay:
        notes["ema"] = float(decay)
    return Pipeline(
        model,
        run.tokenizer,
        classes=run.source.classes if run.config.model.classes else (),
        captions=run.captions,
        sampling=run.config.sampling,
        weights=kind,
        notes=notes,
    )


def export(run: Run) -> list[Path]:
    """Write EMA, raw and other weights to files; called by all ranks."""
    paths = []
    for weights in run.weights:
        pipeline = make_pipeline(run, weights)
        paths.append(run.folder / weights_file(weights))
        if distributed.rank() == 0:
            pipeline.save(paths[-1])
    return paths


def weights_file(weights: str) -> str:
    """Return the file name of weights in a run's folder."""
    return "model.safetensors" if weights == "ema" else f"model-{weights}.safetensors"
