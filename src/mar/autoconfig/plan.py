"""Planning of `mar train folder`: from images and options to sizes and steps.

`choose` looks at the images and picks a recipe. The caller lets the user change it. `make_plan` says what is to be
done: a tokenizer of the run's own, a latent cache, the model.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from mar import zoo
from mar.autoconfig.sizes import (
    SIDES,
    DatasetSummary,
    LatentKind,
    LatentShape,
    crop_side,
    crop_size,
    default_latent_shape,
    largest_multiple,
    max_side,
    next_larger_count,
    own_shape,
    pca_shape,
    token_side,
    tokenizer_config_for,
    train_config_for,
)
from mar.autoconfig.summary import load_summary, summarize_cache
from mar.checkpoint import checksums
from mar.config import ConfigError, ModelConfig, TrainConfig, from_dict, resolve_image_channels
from mar.config.tokenizer import NEW_RUN, TokenizerKind, TokenizerTrainConfig
from mar.data.conditions import WORDS
from mar.data.latent_cache import LatentSource, is_cache, read_manifest
from mar.data.sources import open_data
from mar.data.stream import StreamSource
from mar.data.text_encoder import encoder_width
from mar.tokenizer import PixelTokenizer, Tokenizer, from_name, is_name
from mar.tokenizer.residual import ResidualTokenizer

Config = TypeVar("Config")

OWN = "own"
"""Name of a tokenizer that is trained first, on the run's own images."""


FOLDER = replace(
    train_config_for(DatasetSummary(10_000, 32, 3, tuple(map(str, range(10)))), (32, 32), pca_shape()),
    data="pictures",
    tokenizer="pca4",
)
"""The recipe for 10,000 color images of 32x32 in ten classes, for help and tables."""


@dataclass(frozen=True)
class Overrides:
    """Options that a user gave and other choices follow from. None: not given."""

    data: str
    out: Path
    tokenizer: str | None = None
    image_size: int | tuple[int, int] | None = None
    images: int | None = None
    classes: int | None = None
    label_drop: float | None = None
    upright: bool = True
    """A new run turns pictures upright."""
    caption_column: str | None = None
    """Column of captions in the data."""
    text: str | None = None
    """The reader of captions; "" leaves captions out."""
    own_tokenizer: bool = False
    """Options of a tokenizer of the run's own were given."""
    kind: TokenizerKind | None = None
    """Kind of that tokenizer."""
    stride: int | None = None
    """Stride of that tokenizer."""
    channels: int | None = None
    """Channels of that tokenizer."""
    tokenizer_images: int | None = None
    """Length of that tokenizer's training, in images seen."""
    grids: int = 10
    """Number of sample grids in the model's training."""
    timed: bool = False
    """The length of the model's training will follow from the time that the user gave."""
    smaller: int = 0
    """Sizes of model below the usual one, for little time."""


@dataclass(frozen=True)
class TokenLayout:
    """Crops of images, and the tokenizer that makes tokens of them."""

    size: tuple[int, int]
    """Height and width that images are cropped to."""
    tokenizer: str
    """A name of `mar.tokenizer.from_name`, `own`, or where a tokenizer is."""
    shape: LatentShape | None
    """None: pixels."""
    larger_from: int | None = None
    """From so many images on, crops would be larger; None where that does not follow from their number."""
    square: int | None = None
    """Side of the square that an oblong in the images' shape replaces; None: no oblong was chosen."""

    @property
    def needs_cache(self) -> bool:
        """True where latents are cached before the model is trained."""
        return self.shape is not None and self.shape.is_cached


@dataclass(frozen=True)
class Choice:
    """A recipe for some images, before a user's other options change it."""

    recipe: TrainConfig
    layout: TokenLayout
    summary: DatasetSummary
    tokenizer: TokenizerTrainConfig | None = None
    """Settings of a tokenizer of the run's own, if it needs one."""
    note: str | None = None
    """A line on what has changed since the run began."""
    from_cache: bool = False
    """The data are cached latents."""
    timed: bool = False
    """The length of the training will follow from the user's time."""
    has_little_time: bool = False
    """The model is smaller than usual, for little time."""


@dataclass(frozen=True)
class TokenizerStep:
    """Train a tokenizer on the images."""

    config: TokenizerTrainConfig
    out: Path

    def command(self) -> str:
        """Return the command that makes this step."""
        default = TokenizerTrainConfig(**{**NEW_RUN, "upright": self.config.upright})
        words = ["mar", "tokenizer", "train", self.config.data, "--out", str(self.out)]
        for field in fields(self.config):
            value = getattr(self.config, field.name)
            if field.name != "data" and value != getattr(default, field.name):
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
        words += [] if self.config.upright else ["--no-upright"]
        return shlex.join(words)


@dataclass(frozen=True)
class CacheStep:
    """Cache the latents of all images."""

    data: str
    out: Path
    tokenizer: str
    image_size: tuple[int, int]
    flip: bool | None
    upright: bool
    workers: int
    caption_column: str | None = None


@dataclass(frozen=True)
class FolderPlan:
    """The steps of `mar train folder`; None: a step is not needed."""

    train: TrainConfig
    """The model's run."""
    recipe: TrainConfig
    """The model's run before the user's options changed it."""
    lines: tuple[str, ...]
    """The choices in words."""
    summary: DatasetSummary | None = None
    """Summary of the images, from which the choices follow; None for cached latents."""
    tokenizer: TokenizerStep | None = None
    cache: CacheStep | None = None


def choose(overrides: Overrides) -> Choice:
    """Choose a recipe for the images of `overrides.data`.

    Raises ConfigError for options that contradict each other, and for data that can't be counted.
    """
    source = open_data(overrides.data, caption_column=overrides.caption_column)
    if isinstance(source, StreamSource):
        raise ConfigError(f"{overrides.data} can't be counted, as mar train folder has to; name another recipe")
    if isinstance(source, LatentSource):
        return _choose_for_cache(overrides, source)
    _check_out_is_apart(overrides.out, overrides.data)
    summary, note = load_summary(overrides.out, source, overrides.data, overrides.upright)
    layout = _layout(overrides, summary)
    tokenizer = None
    if layout.tokenizer == OWN:
        assert layout.shape is not None
        tokenizer = tokenizer_config_for(summary, layout.size, layout.shape, overrides.tokenizer_images, layout.square)
        tokenizer = replace(tokenizer, noise=_begun_settings(overrides.out).get("noise", tokenizer.noise))
    return Choice(
        _recipe(overrides, summary, layout), layout, summary, tokenizer, note, timed=overrides.timed,
        has_little_time=overrides.smaller > 0,
    )  # fmt: skip


def _choose_for_cache(overrides: Overrides, source: LatentSource) -> Choice:
    if overrides.own_tokenizer or overrides.tokenizer == OWN or overrides.image_size is not None:
        raise ConfigError(f"{overrides.data} holds cached latents: leave out --image-size, --vae.* and --tokenizer own")
    summary, shape = summarize_cache(source)
    layout = TokenLayout(source.manifest.size, overrides.tokenizer or source.manifest.tokenizer, shape)
    side, (height, width) = token_side(layout.size, shape), layout.size
    if height % side or width % side:
        fit = [str(max(pixels // side, 1) * side) for pixels in dict.fromkeys(layout.size)]
        raise ConfigError(
            f"{overrides.data} holds latents of pictures of {height}x{width}, expected multiples of {side}; make "
            f"another cache with `mar cache --image-size {' '.join(fit)}`"
        )
    # cached latents, or pixels, can't be shifted or turned
    recipe = replace(_recipe(overrides, summary, layout), shift=0, upright=source.manifest.upright)
    return Choice(
        recipe, layout, summary, from_cache=True, timed=overrides.timed, has_little_time=overrides.smaller > 0
    )


def _check_out_is_apart(out: Path, data: str) -> None:
    """Raise ConfigError where the run's own samples would become its data."""
    folder = Path(data).expanduser().resolve()
    if folder.is_dir() and out.resolve().is_relative_to(folder):
        raise ConfigError(f"{out} is in {data}, whose pictures are learned from; take another --out")


# ---- size and tokenizer


def _layout(overrides: Overrides, summary: DatasetSummary) -> TokenLayout:
    """Choose the size of crops, and what makes tokens of them."""
    name = overrides.tokenizer or (OWN if overrides.own_tokenizer else None)
    if overrides.own_tokenizer and name != OWN:
        raise ConfigError(f"--vae.* is for a tokenizer of the run's own, but --tokenizer is {name}; leave one out")
    if name is not None and name != OWN:
        shape, largest = _shape_of(name)
        size, square = _crop(overrides, summary, largest, shape)
        return TokenLayout(size, name, shape, square=square)
    largest = max_side(summary.count)
    size = _square_or_given(overrides, summary, largest)
    kind = overrides.kind or _begun_settings(overrides.out).get("kind", NEW_RUN["kind"])
    shape = own_shape(size, kind) if name == OWN else default_latent_shape(summary, size, kind)
    if shape is None:
        assert PixelTokenizer.name is not None
        name = PixelTokenizer.name
    elif not shape.is_cached:
        name = f"pca{shape.stride}"
    else:
        name = OWN
        shape = replace(shape, stride=overrides.stride or shape.stride)
        most = summary.image_channels * shape.stride**2 if shape.has_components else shape.channels
        shape = replace(shape, channels=overrides.channels or min(shape.channels, most))
    larger = next_larger_count(summary) if overrides.image_size is None else None
    size, square = _crop(overrides, summary, largest, shape)
    return TokenLayout(size, name, shape, larger, square)


def _shape_of(name: str) -> tuple[LatentShape | None, int]:
    """Return the latents of the tokenizer called `name`, and the largest side of crops for it."""
    tokenizer = from_name(name, image_channels=3) if is_name(name) else zoo.load_tokenizer(name)
    if tokenizer.lossless:
        return None, SIDES[1]
    if tokenizer.learns_basis:
        default = pca_shape(tokenizer.stride)
        return default if is_name(name) else replace(default, channels=tokenizer.channels), SIDES[1]
    kind: LatentKind = "residual" if isinstance(tokenizer, ResidualTokenizer) else "autoencoder"
    return LatentShape(tokenizer.stride, tokenizer.channels, kind, tokenizer.fixed_size), _trained_side(tokenizer)


def _begun_settings(out: Path) -> dict[str, Any]:
    """Return the settings that a run begun in `out` keeps by default; a new one has none."""
    tokenizer = _begun_config(TokenizerTrainConfig, out / "tokenizer")
    latents = read_manifest(out / "latents") if is_cache(out / "latents") else None
    train = _begun_config(TrainConfig, out)
    upright = [begun.upright for begun in (train, latents, tokenizer) if begun is not None]
    return {
        **({"kind": tokenizer.kind, "noise": tokenizer.noise} if tokenizer is not None else {}),
        **({"upright": upright[0]} if upright else {}),
        **(
            {"balance": train.balance, "sampling": train.sampling, "prediction": train.model.head.prediction}
            if train is not None
            else {}
        ),
    }


def _begun_config(kind: type[Config], folder: Path) -> Config | None:
    """Return the config of the run that began in a folder; None: none did."""
    try:
        return from_dict(kind, checksums.read_json(folder / "run.json"))
    except (OSError, AttributeError, TypeError, ValueError):
        return None  # what is wrong with a damaged one, its training says


def _trained_side(tokenizer: Tokenizer) -> int:
    """Return the side of the images that a tokenizer was trained on, at most the largest side."""
    config = tokenizer.config()
    side = config.get("sample_size", config.get("config", {}).get("sample_size"))
    is_known = isinstance(side, int) and side >= 8 * tokenizer.stride  # else diffusers' default, which says nothing
    return min(side, SIDES[0]) if is_known else SIDES[0]


def _square_or_given(overrides: Overrides, summary: DatasetSummary, largest: int) -> tuple[int, int]:
    """Return height and width of crops, before the images' shape and tokens are considered."""
    size = overrides.image_size
    if size is None:
        size = crop_side(summary, largest)
    return (size, size) if isinstance(size, int) else size


def _crop(
    overrides: Overrides, summary: DatasetSummary, largest: int, shape: LatentShape | None
) -> tuple[tuple[int, int], int | None]:
    """Return height and width of crops, and `TokenLayout.square`."""
    size = _square_or_given(overrides, summary, largest)
    if shape is not None and shape.image_size is not None:
        only = shape.image_size
        if overrides.image_size is not None and size != only:
            got = f"{size[0]}x{size[1]}"
            raise ConfigError(f"image-size: got {got}, expected {only[0]}x{only[1]}: the tokenizer knows no other size")
        return only, None
    if overrides.image_size is not None:
        return size, None
    square = largest_multiple(size[0], shape)
    size = crop_size(summary, square, shape)
    return size, None if size == (square, square) else square


def _recipe(overrides: Overrides, summary: DatasetSummary, layout: TokenLayout) -> TrainConfig:
    labeled = summary if overrides.classes != 0 else replace(summary, classes=())
    if overrides.text == "":
        labeled = replace(labeled, words=0, caption_length=0)
    text = overrides.text
    if text and not summary.words:
        raise ConfigError(f"text is {text}, but {overrides.data} has no captions; leave --text out")
    recipe = train_config_for(
        labeled, layout.size, layout.shape, images=overrides.images, grids=overrides.grids, square=layout.square,
        text=text, text_width=0 if text in (None, "", WORDS) else encoder_width(text), smaller=overrides.smaller,
    )  # fmt: skip
    begun = _begun_settings(overrides.out)
    # components are taken of images with the channels that they have
    fitted = is_name(layout.tokenizer) and from_name(layout.tokenizer, image_channels=3).learns_basis
    unusual = fitted and resolve_image_channels(overrides.data) != summary.image_channels
    sampling = begun.get("sampling", recipe.sampling)
    head = replace(recipe.model.head, prediction=begun.get("prediction", recipe.model.head.prediction))
    return replace(
        recipe,
        data=overrides.data,
        tokenizer=layout.tokenizer,
        caption_column=overrides.caption_column,
        image_channels=summary.image_channels if unusual else None,
        upright=begun.get("upright", recipe.upright),
        balance=begun.get("balance", recipe.balance),
        model=replace(recipe.model, head=head),
        sampling=replace(sampling, guidance_scale=1.0) if overrides.label_drop == 0 else sampling,
    )


# ---- steps


def make_plan(choice: Choice, config: TrainConfig, tokenizer: TokenizerTrainConfig | None, out: Path) -> FolderPlan:
    """Return the steps that lead to a model.

    Args:
        choice: of `choose`.
        config: its recipe with the user's options.
        tokenizer: the settings of a tokenizer of the run's own with the user's options.
        out: folder of the run.
    """
    lines = (*_describe(choice, config), *([choice.note] if choice.note else []))
    if choice.from_cache:
        return FolderPlan(config, choice.recipe, lines)
    plan = FolderPlan(config, choice.recipe, lines, choice.summary)
    return _with_latents(plan, choice.layout, tokenizer, out) if choice.layout.needs_cache else plan


def _with_latents(
    plan: FolderPlan, layout: TokenLayout, tokenizer: TokenizerTrainConfig | None, out: Path
) -> FolderPlan:
    """Return the plan with a latent cache, and the tokenizer's training before it."""
    config = plan.train
    assert layout.shape is not None
    if config.shift:
        raise ConfigError(
            f"shift is {config.shift}, but the pictures are cached as latents, which can't be moved; "
            "leave --shift out, or learn pixels (--tokenizer pixels)"
        )
    size = (config.model.grid[0] * layout.shape.stride, config.model.grid[1] * layout.shape.stride)
    step, name = None, layout.tokenizer
    if name == OWN:
        assert tokenizer is not None
        if config.model.channels != tokenizer.channels:
            raise ConfigError(
                f"the model's latents have {config.model.channels} channels, its tokenizer's {tokenizer.channels}; "
                "choose their number by --vae.channels alone"
            )
        flip = config.flip_of_data if tokenizer.flip is None else tokenizer.flip
        settings = {
            **vars(tokenizer), "data": config.data, "image_size": size, "flip": flip, "upright": config.upright,
        }  # fmt: skip
        step = TokenizerStep(TokenizerTrainConfig(**settings), out / "tokenizer")
        name = str(step.out)
    elif config.model.channels != layout.shape.channels:
        raise ConfigError(
            f"model.channels is {config.model.channels}, but the latents of {name} have {layout.shape.channels}; "
            "leave it out"
        )
    cache = CacheStep(
        config.data,
        out / "latents",
        name,
        size,
        config.flip_of_data,
        config.upright,
        config.workers,
        config.caption_column,
    )
    return replace(plan, train=replace(config, data=str(cache.out), tokenizer=name), tokenizer=step, cache=cache)


def describe_size(model: ModelConfig) -> str:
    """Return the size of a model in words."""
    return (
        f"{model.encoder.depth} + {model.decoder.depth} blocks {model.encoder.width} wide, head "
        f"{model.head.depth} x {model.head.width}"
    )


def _describe(choice: Choice, config: TrainConfig) -> tuple[str, str]:
    """Say in two lines what the images are like, and which model was chosen for them."""
    summary, layout, model = choice.summary, choice.layout, config.model
    classes = f"in {len(summary.classes)} classes" if summary.classes else "without classes"
    if model.words:
        classes = f"with captions of {model.words:,} different words"
    elif config.text:
        classes = f"with captions, read by {config.text}"
    captions = f"; captions of up to {model.buffer_size} tokens" if config.text else ""
    color = "gray " if summary.image_channels == 1 else "color "
    if choice.from_cache and layout.shape is not None:
        color = ""  # latents do not say it
    by = {PixelTokenizer.name: "raw pixels", OWN: "by a tokenizer of their own"}.get(
        layout.tokenizer, f"by {layout.tokenizer}"
    )
    if layout.shape is not None and not layout.shape.is_cached:
        by = "as principal components"
    stride = layout.shape.stride if layout.shape else 1
    height, width = model.grid[0] * stride, model.grid[1] * stride
    chosen = (height, width) == layout.size
    larger = layout.larger_from if chosen else None
    more = f" (larger from {larger:,} pictures on, or by --image-size)" if larger else ""
    if layout.square and chosen:
        ratio, shape = max(summary.aspect, 1 / summary.aspect), "high as wide" if summary.aspect > 1 else "wide as high"
        more += f", as most are {ratio:.2f} times as {shape}"
    time = " in so little time" if choice.has_little_time else ""
    seen = "as many pictures as there is time for" if choice.timed else f"{config.images:,} pictures"
    return (
        f"{config.data}: {summary.count:,} {color}pictures {classes}, typically of {summary.side} pixels, cut to "
        f"{height}x{width}{more}; {by}, {model.tokens} tokens of {model.token_width} values each",
        f"for so many pictures{time}: {describe_size(model)}; {seen} to be seen in all, {config.batch} a step"
        f"{captions}",
    )
