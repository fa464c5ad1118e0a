"""Summarize data sets, and keep summaries with runs.

A resumed run reads its summary: it stays the same run although its folder of images has grown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np
from jaxtyping import Float64

from mar.autoconfig.sizes import DatasetSummary, LatentKind, LatentShape
from mar.checkpoint import checksums
from mar.checkpoint.tokenizers import own_kind
from mar.config import ConfigError, from_dict, to_dict
from mar.config.tokenizer import Stride
from mar.data.captions import Captions, captions_of, count_words, split_words
from mar.data.images import Source, UnreadableImage, convert_channels, upright
from mar.data.latent_cache import (
    INDEX,
    MANIFEST,
    CacheManifest,
    LatentSource,
    read_captions,
    read_manifest,
)
from mar.data.splits import stratified_indices
from mar.tokenizer import PixelTokenizer
from mar.tokenizer.base import fingerprint

Item = TypeVar("Item")

SAMPLED_IMAGES = 64
"""Images that a summary is computed from."""
MAX_STRIDE = max(get_args(Stride))
"""Largest stride of a tokenizer that was trained here."""
MIN_IMAGES = 16
"""Fewer images are refused."""
SUMMARY_FILE = "pictures.json"
COMMON_SHARE, COMMON_TOLERANCE = 0.6, 1.1
"""Images have a common shape if such a share of them has the median aspect, to this factor."""
SQUARE_TOLERANCE = 1.15
"""An aspect up to this, or down to its inverse, counts as a square."""
MAX_ASPECT = 3.0
"""Longer images are cropped to this aspect, or to its inverse."""


def summarize_dataset(source: Source, name: str, turn_upright: bool = True) -> DatasetSummary:
    """Summarizes the images of `source` from an even sample.

    `name` is for messages; `turn_upright` says how images will be learned. ConfigError for fewer than 16 images,
    ValueError if no image of the sample can be read.
    """
    if len(source) < MIN_IMAGES:
        noun = "picture" if len(source) == 1 else "pictures"
        raise ConfigError(
            f"{name} has {len(source)} {noun}: expected at least {MIN_IMAGES}, and hundreds for good ones"
        )

    def sizes_and_pixels(index: int) -> tuple[int, float, np.ndarray]:
        image = source[index].image
        image = upright(image) if turn_upright else image
        step = max(min(image.size) // 128, 1)  # a part of the rows and columns of a large image is enough
        pixels = np.asarray(convert_channels(image, 3))[::step, ::step].copy()  # a view would keep all of it in memory
        return min(image.size), image.height / image.width, pixels

    sides, aspects, pixels = zip(*_read_sample(len(source), name, sizes_and_pixels), strict=True)
    channels = 1 if all((values == values[..., :1]).all() for values in pixels) else 3
    max_abs_z = _max_abs_z([values / 127.5 - 1 for values in pixels])
    aspect = common_aspect(np.array(aspects))
    return DatasetSummary(
        len(source), int(np.median(sides)), channels, tuple(source.classes), max_abs_z, aspect,
        *summarize_captions(captions_of(source)),
    )  # fmt: skip


def summarize_captions(captions: Captions) -> tuple[int, int]:
    """Returns the number of different words, and the longest caption's length.

    Both are 0 without captions.
    """
    texts = [text for each in captions for text in each]
    if not texts:
        return 0, 0
    return len(count_words(texts)), max(len(split_words(text)) for text in texts)


def common_aspect(aspects: Float64[np.ndarray, " n"]) -> float:
    """Returns the height by width that most images have; 1 if there is none, or nearly a square."""
    median = float(np.median(aspects))
    near = np.abs(np.log(aspects / median)) <= math.log(COMMON_TOLERANCE)
    if near.mean() < COMMON_SHARE or 1 / SQUARE_TOLERANCE <= median <= SQUARE_TOLERANCE:
        return 1.0
    return min(max(median, 1 / MAX_ASPECT), MAX_ASPECT)


def summarize_cache(source: LatentSource) -> tuple[DatasetSummary, LatentShape | None]:
    """Returns summary and latent shape of a cache; no shape: pixels."""
    manifest = source.manifest
    channels, height, _ = manifest.shape
    words, length = summarize_captions(source.captions)
    summary = DatasetSummary(
        manifest.pictures, min(manifest.size), 3, manifest.classes, words=words, caption_length=length
    )
    if channels in (1, 3) and manifest.fingerprint == fingerprint(PixelTokenizer(channels)):
        pixels = _read_sample(len(source), str(source.folder), lambda index: source.read(index, flip=False)[0].numpy())
        return replace(summary, image_channels=channels, max_abs_z=_max_abs_z(pixels)), None
    return summary, LatentShape(manifest.size[0] // height, channels, _latent_kind(manifest))


def _latent_kind(manifest: CacheManifest) -> LatentKind:
    """Returns the kind of a cache's latents; of earlier caches, as far as it can be told."""
    kind = manifest.tokenizer_kind or own_kind(Path(manifest.tokenizer))
    if kind is None and manifest.parts == 1:  # components have no variance, nor has DC-AE, whose strides are larger
        kind = "pca" if manifest.size[0] // manifest.shape[1] <= MAX_STRIDE else "dc"
    return "residual" if kind == "residual" else "pca" if kind == "pca" else "autoencoder"


def _read_sample(count: int, name: str, read: Callable[[int], Item]) -> list[Item]:
    """Reads images spread evenly over `count`. ValueError if none of them can be read."""
    items = []
    indices = stratified_indices(count, SAMPLED_IMAGES).tolist()
    for index in indices:
        with suppress(UnreadableImage):
            items.append(read(index))
    if not items:
        raise ValueError(f"data: none of {len(indices)} pictures of {name} that were looked at can be read")
    return items


def _max_abs_z(images: list[np.ndarray]) -> float:
    """Returns the distance of black or white from the mean, the larger one, in standard deviations.

    Pixels are in [-1, 1]. Each image has the same weight.
    """
    mean = float(np.mean([image.mean() for image in images]))
    square = float(np.mean([np.square(image).mean() for image in images]))
    return (1 + abs(mean)) / max(square - mean**2, 1e-4) ** 0.5


# ---- the summary of a run


def load_summary(
    folder: Path, source: Source, name: str, turn_upright: bool = True
) -> tuple[DatasetSummary, str | None]:
    """Returns the summary of a run, or of a new one.

    Args:
        folder: Of the run.
        source: Its images.
        name: Of the images, for messages.
        turn_upright: A new run turns them upright.

    Returns:
        The summary; and a line on the images added or removed since.

    Raises:
        ConfigError: The classes have changed.
    """
    path = folder / SUMMARY_FILE
    if not path.is_file() or not has_begun(folder):
        return summarize_dataset(source, name, turn_upright), None
    try:
        saved = from_dict(DatasetSummary, checksums.read_json(path))
    except (AttributeError, TypeError, ValueError) as error:  # no JSON, or JSON that is no record
        raise ConfigError(f"{path} can't be understood ({error}); take another --out") from error
    if saved.classes != tuple(source.classes):
        raise ConfigError(
            f"{name} has {_class_list(source.classes)} now, but {_class_list(saved.classes)} when {folder} began; put "
            f"the folders back to go on, or take another --out for a new run"
        )
    if not (folder / "run.json").is_file():  # the model's words are still to be chosen
        latents = folder / "latents"
        is_cached = (latents / INDEX).is_file()
        captions = read_captions(latents, read_manifest(latents)) if is_cached else captions_of(source)
        words, length = summarize_captions(captions)
        saved = replace(saved, words=words, caption_length=length)
    changed = len(source) != saved.count
    return saved, f"{name} has {len(source):,} pictures now, {saved.count:,} when the run began" if changed else None


def has_begun(folder: Path) -> bool:
    """Returns whether a run has begun, so that its choices stay."""
    first = ("run.json", "tokenizer/run.json", f"latents/{MANIFEST}")
    return any((folder / name).is_file() for name in first)


def save_summary(folder: Path, summary: DatasetSummary) -> None:
    """Saves a summary with a run, unless its model has begun."""
    path = folder / SUMMARY_FILE
    if not path.is_file() or not (folder / "run.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        checksums.write_json(path, to_dict(summary))


def _class_list(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"the classes {shown}" if names else "no classes"
