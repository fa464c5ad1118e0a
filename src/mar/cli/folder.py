"""`mar train folder`: a model of one's own pictures, with sizes that are chosen from them and steps (`mar.cli.steps`)
that lead there; every choice may be changed by its option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from mar import zoo
from mar.autoconfig.sizes import (
    SIDES,
    DatasetSummary,
    LatentShape,
    components,
    default_latent_shape,
    larger_from,
    largest_for,
    largest_multiple,
    latent_shape_for,
    recipe_for,
    side_for,
)
from mar.autoconfig.summary import load_summary, summarize_cache
from mar.cli.cache import CacheOptions
from mar.cli.options import parse
from mar.cli.steps import FolderPlan
from mar.cli.tokenizer import TokenizerTrainOptions
from mar.cli.train import TrainOptions
from mar.config import ConfigError, TrainConfig, resolve_image_channels
from mar.config.tokenizer import Stride, TokenizerTrainConfig, tokenizer_for
from mar.data.latent_cache import LatentSource
from mar.data.sources import open_data
from mar.data.stream import StreamSource
from mar.presets import recipe
from mar.tokenizer import COMPONENTS, PCATokenizer, Tokenizer
from mar.training.run import check_classes, open_pictures

OWN = "own"
"""The tokenizer that is trained first, of the run's own pictures."""


@dataclass(frozen=True)
class OwnTokenizer(TokenizerTrainConfig):
    """The tokenizer that is trained first where pixels are too many; all else as for `mar tokenizer train`."""

    data: tyro.conf.Suppress[str] = ""
    image_size: tyro.conf.Suppress[int | tuple[int, int]] = 64
    image_channels: tyro.conf.Suppress[int | None] = None


@dataclass(frozen=True)
class FolderOptions(TrainOptions):
    """Trains a model on pictures of one's own, of sizes that fit them; before that a tokenizer, where it needs one.

    Every option changes one of the choices; --tokenizer own asks for a tokenizer where there would be none. The same
    command goes on where it stopped.
    """

    image_size: int | tuple[int, int] | None = None
    """Pictures are cut to squares of so many pixels, or to HEIGHT WIDTH; by default as large as they and their number
    allow."""
    vae: OwnTokenizer = field(default_factory=OwnTokenizer)


@dataclass(frozen=True)
class _ModelOverrides:
    classes: int | None = None
    label_drop: float | None = None


@dataclass(frozen=True)
class _TokenizerOverrides:
    stride: Stride | None = None
    channels: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class _UserOverrides:
    """The options that other choices follow from."""

    data: str | None = None
    tokenizer: str | None = None
    out: Path = Path("runs/folder")
    image_size: int | tuple[int, int] | None = None
    images: int | None = None
    model: _ModelOverrides = field(default_factory=_ModelOverrides)
    vae: _TokenizerOverrides = field(default_factory=_TokenizerOverrides)


@dataclass(frozen=True)
class _Tokens:
    """How pictures become tokens."""

    size: tuple[int, int]
    """Height and width that pictures are cut to."""
    tokenizer: str
    """pixels, pca4, own, or where one is."""
    cells: LatentShape | None
    """None: pixels."""
    larger_from: int | None = None
    """So many pictures would be cut to larger squares; None where that does not follow from their number."""

    @property
    def cached(self) -> bool:
        """Whether latents are cached before the model is trained."""
        return self.cells is not None and not self.cells.components


def plan(arguments: Sequence[str]) -> FolderPlan:
    """The steps that `mar train folder ARGUMENTS` asks for. ValueError where they can't be; nothing is done yet."""
    if "-h" in arguments or "--help" in arguments:
        print("shown: what is chosen for 10,000 colour pictures of 32x32 in ten classes\n")
        parse(FolderOptions, "train folder", arguments, FolderOptions(_UserOverrides.out, recipe("folder")))
    wishes = parse(_UserOverrides, "train folder", arguments, partly=True)
    own = any(word.startswith("--vae.") for word in arguments)
    if wishes.data is None:
        raise ConfigError("mar train folder needs --data: a folder of pictures, a Parquet file, or a `mar cache`")
    source = open_data(wishes.data)
    if isinstance(source, StreamSource):
        raise ConfigError(f"{wishes.data} can't be counted, as mar train folder has to; name another recipe")
    if isinstance(source, LatentSource):
        return _of_a_cache(arguments, wishes, source, own)
    _keep_apart(wishes.out, wishes.data)
    pictures, changed = load_summary(wishes.out, source, wishes.data)
    tokens = _tokens(wishes, pictures, own)
    options, chosen = _options(arguments, wishes, pictures, tokens)
    check_classes(options.config, source.classes)
    if options.config.patience:  # what it waits for has to be there before a tokenizer is trained
        open_pictures(options.config)
    steps = FolderPlan(
        options, chosen, (*_choices_text(options, pictures, tokens), *([changed] if changed else [])), pictures
    )
    return _with_latents(steps, options, tokens, wishes.out) if tokens.cached else steps


def _with_latents(steps: FolderPlan, options: FolderOptions, tokens: _Tokens, out: Path) -> FolderPlan:
    """The same, with what has to be done before latents can be learned."""
    config, vae = options.config, options.vae
    assert tokens.cells is not None
    if config.shift:
        raise ConfigError(
            f"shift is {config.shift}, but the pictures are cached as latents, which can't be moved; "
            "leave --shift out, or learn pixels (--tokenizer pixels)"
        )
    size = (config.model.grid[0] * tokens.cells.stride, config.model.grid[1] * tokens.cells.stride)
    tokenizer, name = None, tokens.tokenizer
    if name == OWN:
        if config.model.channels != vae.channels:
            raise ConfigError(
                f"the model's latents have {config.model.channels} channels, its tokenizer's {vae.channels}; "
                "choose their number by --vae.channels alone"
            )
        flip = config.flip if vae.flip is None else vae.flip
        settings = {**vars(vae), "data": config.data, "image_size": size, "flip": flip}
        tokenizer = TokenizerTrainOptions(out / "tokenizer", TokenizerTrainConfig(**settings), options.device)
        name = str(tokenizer.out)
    cache = CacheOptions(
        config.data, out=out / "latents", tokenizer=name, image_size=size, flip=config.flip, workers=config.workers,
        device=options.device,
    )  # fmt: skip
    train = replace(
        options,
        config=replace(config, data=str(cache.out), tokenizer=name),
        eval_reference=options.eval_reference or config.data,
    )
    return replace(steps, train=train, tokenizer=tokenizer, cache=cache)


def _of_a_cache(arguments: Sequence[str], wishes: _UserOverrides, source: LatentSource, own: bool) -> FolderPlan:
    pictures, cells = summarize_cache(source)
    if own or wishes.tokenizer == OWN or wishes.image_size is not None:
        raise ConfigError(f"{wishes.data} holds cached latents: leave out --image-size, --vae.* and --tokenizer own")
    tokens = _Tokens(source.manifest.size, wishes.tokenizer or source.manifest.tokenizer, cells)
    options, chosen = _options(arguments, wishes, pictures, tokens, cached=True)
    return FolderPlan(options, chosen, _choices_text(options, pictures, tokens))


def _keep_apart(out: Path, data: str) -> None:
    """What a run draws must not become its data."""
    folder = Path(data).expanduser().resolve()
    if folder.is_dir() and out.resolve().is_relative_to(folder):
        raise ConfigError(f"{out} is in {data}, whose pictures are learned from; take another --out")


def _tokens(wishes: _UserOverrides, pictures: DatasetSummary, own: bool) -> _Tokens:
    """The size that pictures are cut to, and what makes tokens of them."""
    name = wishes.tokenizer or (OWN if own else None)
    if own and name != OWN:
        raise ConfigError(f"--vae.* is for a tokenizer of the run's own, but --tokenizer is {name}; leave one out")
    if name is not None and name != OWN:
        cells, largest = _named(name)
        return _Tokens(_size(wishes, pictures, largest, cells), name, cells)
    largest = largest_for(pictures.count)
    size = _size(wishes, pictures, largest)
    cells = default_latent_shape(pictures, size) if name is None else latent_shape_for(size)
    if cells is None:
        name = "pixels"
    elif cells.components:
        name = f"pca{cells.stride}"
    else:
        name, cells = OWN, LatentShape(wishes.vae.stride or cells.stride, wishes.vae.channels or cells.channels)
    larger = larger_from(pictures) if wishes.image_size is None else None
    return _Tokens(_size(wishes, pictures, largest, cells), name, cells, larger)


def _named(name: str) -> tuple[LatentShape | None, int]:
    """The cells of a tokenizer that is asked for, and the side that pictures are cut to for it, if they have it."""
    if name == "pixels":
        return None, SIDES[1]
    if taken := COMPONENTS.fullmatch(name):
        return components(int(taken[1])), SIDES[1]
    found = zoo.load_tokenizer(name)
    if isinstance(found, PCATokenizer):
        return LatentShape(found.stride, found.channels, components=True), SIDES[1]
    return LatentShape(found.stride, found.channels), _trained_at(found)


def _size(
    wishes: _UserOverrides, pictures: DatasetSummary, largest: int, cells: LatentShape | None = None
) -> tuple[int, int]:
    found = wishes.image_size
    if found is None:
        found = largest_multiple(side_for(pictures, largest), cells)
    return (found, found) if isinstance(found, int) else found


def _trained_at(tokenizer: Tokenizer) -> int:
    """The side of the pictures that a tokenizer has learned from, as far as it says so, and up to the largest side."""
    side = tokenizer.config().get("config", {}).get("sample_size")
    told = isinstance(side, int) and side >= 8 * tokenizer.stride  # else diffusers' default, which means nothing
    return min(side, SIDES[0]) if told else SIDES[0]


def _options(
    arguments: Sequence[str],
    wishes: _UserOverrides,
    pictures: DatasetSummary,
    tokens: _Tokens,
    *,
    cached: bool = False,
) -> tuple[FolderOptions, TrainConfig]:
    """The options, with what is chosen in place of those that were not given; and what was chosen. What is `cached`,
    be it pixels, can't be moved."""
    labelled = pictures if wishes.model.classes != 0 else replace(pictures, classes=())
    chosen = recipe_for(labelled, tokens.size, tokens.cells, images=wishes.images)
    shift = 0 if cached else chosen.shift
    data, name = wishes.data or "", tokens.tokenizer
    usual = COMPONENTS.fullmatch(name) is None or resolve_image_channels(data) == pictures.image_channels
    image_channels = None if usual else pictures.image_channels
    chosen = replace(chosen, data=data, tokenizer=name, image_channels=image_channels, shift=shift)
    if wishes.model.label_drop == 0:
        chosen = replace(chosen, sampling=replace(chosen.sampling, guidance_scale=1.0))
    vae = OwnTokenizer()
    if tokens.cells is not None and tokens.tokenizer == OWN:
        own = tokenizer_for(pictures, tokens.size, tokens.cells.stride, tokens.cells.channels, wishes.vae.images)
        vae = OwnTokenizer(**vars(own))
    default = FolderOptions(wishes.out, chosen, vae=vae)
    options = parse(FolderOptions, "train folder", arguments, default)
    return replace(options, out=wishes.out), chosen


def _choices_text(options: FolderOptions, pictures: DatasetSummary, tokens: _Tokens) -> tuple[str, ...]:
    """Two lines: what the pictures are like and are made to, and the model that was chosen for them."""
    model, many = options.config.model, f"{pictures.count:,}"
    kinds = f"in {len(pictures.classes)} classes" if pictures.classes else "without classes"
    colours = "grey" if pictures.image_channels == 1 else "colour"
    names = {"pixels": "raw pixels", OWN: "by a tokenizer of their own"}
    if tokens.cells is not None and tokens.cells.components:
        names[tokens.tokenizer] = "as principal components"
    by = names.get(tokens.tokenizer, f"by {tokens.tokenizer}")
    encoder, decoder, head = model.encoder, model.decoder, model.head
    stride = tokens.cells.stride if tokens.cells else 1
    size = model.grid[0] * stride, model.grid[1] * stride
    larger = tokens.larger_from if size == tokens.size else None
    more = f" (larger from {larger:,} pictures on, or by --image-size)" if larger else ""
    return (
        f"{options.config.data}: {many} {colours} pictures {kinds}, typically of {pictures.side} pixels, cut to "
        f"{size[0]}x{size[1]}{more}; {by}, {model.tokens} tokens of {model.token_width} values each",
        f"for so many pictures: {encoder.depth} + {decoder.depth} blocks {encoder.width} wide, head {head.depth} x "
        f"{head.width}; {options.config.images:,} pictures to be seen in all, {options.config.batch} a step",
    )
