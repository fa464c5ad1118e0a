"""Choices for a folder of images: their size, the tokenizer, the size of the model."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mar.autoconfig.sizes import (
    DatasetSummary,
    LatentShape,
    crop_side,
    crop_size,
    default_latent_shape,
    largest_multiple,
    max_side,
    next_larger_count,
    own_shape,
    pca_shape,
    tokenizer_config_for,
    train_config_for,
)
from mar.config import ConfigError, HeadConfig, TrainConfig
from mar.model.mar import MAR

KINDS = ("ant", "bee", "cat")


def chosen(count: int, side: int, image_channels: int = 3, classes: tuple[str, ...] = KINDS) -> tuple[int, TrainConfig]:
    """The side, and the recipe, that pictures get where nothing else is asked for."""
    pictures = DatasetSummary(count, side, image_channels, classes)
    found = crop_side(pictures, max_side(count))
    return found, train_config_for(pictures, (found, found), default_latent_shape(pictures, (found, found)))


@pytest.mark.parametrize(
    ("count", "pixels", "side", "tokens", "token_width", "trunk", "head"),
    [
        (100, 375, 64, 64, 16, 192, 256),  # a few photographs: latents
        (9_999, 375, 128, 256, 16, 192, 256),
        (60_000, 375, 256, 256, 16, 256, 384),
        (1_281_167, 400, 256, 256, 16, 768, 1024),
        (500, 70, 64, 64, 16, 192, 256),
        (500, 63, 32, 64, 16, 192, 256),  # small ones: principal components
        (50_000, 32, 32, 64, 16, 256, 384),
        (10_000, 28, 28, 49, 16, 192, 256),
        (10_000, 8, 8, 16, 12, 192, 256),  # the smallest: pixels
        (10_000, 15, 14, 49, 12, 192, 256),
    ],
)
def test_recipe_for_count_and_resolution_gives_sizes(
    count: int, pixels: int, side: int, tokens: int, token_width: int, trunk: int, head: int
) -> None:
    found, config = chosen(count, pixels)
    model = config.model
    assert (found, model.tokens, model.token_width) == (side, tokens, token_width)
    assert (model.encoder.width, model.decoder.width, model.head.width) == (trunk, trunk, head)
    assert model.classes == 3


def test_recipe_wide_tokens_get_a_wide_head() -> None:
    _, gray = chosen(500, 28, image_channels=1)
    color = train_config_for(DatasetSummary(500, 28, 3, KINDS), (28, 28))  # pixels, as they may be asked for
    assert (gray.model.token_width, color.model.token_width) == (16, 48)
    assert gray.model.head.width < color.model.head.width


def test_recipe_principal_components_predict_x0_and_keep_rare_values() -> None:
    _, config = chosen(500, 32)
    assert (config.model.channels, config.model.grid, config.model.patch_size) == (16, (8, 8), 1)
    assert (config.model.head.prediction, config.sampling.x0_bound) == ("x0", 10)
    assert chosen(500, 32, image_channels=1)[1].model.head.prediction == "v"
    autoencoder = train_config_for(DatasetSummary(500, 64, 3, KINDS), (64, 64), own_shape((64, 64), "kl"))
    assert autoencoder.model.head.prediction == "v"
    _, residual = chosen(500, 64)
    assert (residual.model.head.prediction, residual.sampling.x0_bound, residual.shift) == ("x0", 10, 0)


def test_recipe_without_classes_has_no_guidance() -> None:
    assert chosen(500, 28)[1].sampling.guidance_scale == 3
    assert chosen(500, 28, classes=())[1].sampling.guidance_scale == 1
    assert chosen(500, 28, classes=("only",))[1].sampling.guidance_scale == 1


@pytest.mark.parametrize("count", [16, 19_999, 20_000, 199_999, 200_000, 10**7])
@pytest.mark.parametrize("side", [8, 20, 32, 64, 500])
def test_every_recipe_makes_a_valid_config(count: int, side: int) -> None:
    _, config = chosen(count, side)
    assert config.warmup + config.decay < config.images
    assert config.images >= max(100_000, 40 * count)
    assert 1e-4 <= config.scaled_lr <= 1.5e-3
    assert config.save_every <= config.images // 10
    assert 16 <= config.model.tokens <= 256


def test_recipe_more_images_get_a_larger_model() -> None:
    sizes = []
    for count in (1_000, 50_000):
        model = MAR(chosen(count, 32)[1].model)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert 4e6 < sizes[0] < sizes[1] < 14e6


def test_recipe_other_tokenizer_gets_at_most_16_tokens_a_side() -> None:
    pictures = DatasetSummary(60_000, 256, 3)
    kl8 = train_config_for(pictures, (256, 256), LatentShape(stride=8, channels=4)).model
    assert (kl8.grid, kl8.patch_size, kl8.token_width, kl8.tokens) == ((32, 32), 2, 16, 256)
    oblong = train_config_for(pictures, (128, 256), LatentShape(stride=16, channels=16)).model
    assert (oblong.grid, oblong.patch_size) == ((8, 16), 1)
    wide = train_config_for(pictures, (256, 256), LatentShape(stride=16, channels=64)).model
    assert wide.head == HeadConfig(512, 3, prediction="v", batch_mul=2)


def test_recipe_classes_are_balanced_and_guided_words_are_not() -> None:
    labeled = DatasetSummary(500, 64, 3, classes=("ant", "bee"))

    def chosen_for(summary: DatasetSummary, size: int, latents: LatentShape | None) -> tuple[float, float]:
        config = train_config_for(summary, (size, size), latents)
        return config.balance, config.sampling.guidance_scale

    assert chosen_for(labeled, 64, own_shape((64, 64))) == (0.5, 5.0)
    assert chosen_for(labeled, 64, own_shape((64, 64), "kl")) == (0.5, 3.0)
    assert chosen_for(labeled, 32, pca_shape()) == (0.5, 3.0)
    assert chosen_for(DatasetSummary(500, 64, 3), 64, own_shape((64, 64))) == (0.0, 1.0)
    words = DatasetSummary(500, 64, 3, classes=("ant", "bee"), words=9, caption_length=4)
    assert chosen_for(words, 64, own_shape((64, 64))) == (0.0, 1.5)


def test_recipe_pixels_are_bounded_by_black_and_white() -> None:
    dark = DatasetSummary(500, 32, 1, max_abs_z=6.21)  # as radiographs are
    assert train_config_for(dark, (32, 32)).sampling.x0_bound == 6.3
    assert train_config_for(dark, (32, 32), LatentShape(4, 4)).sampling.x0_bound == 4


@pytest.mark.parametrize(
    ("count", "size", "cells", "shift"),
    [
        (4_999, (32, 32), None, 2),
        (5_000, (32, 32), None, 0),
        (500, (28, 28), None, 1),
        (500, (8, 8), None, 0),
        (500, (128, 128), None, 4),
        (500, (32, 64), None, 2),
        (500, (64, 64), LatentShape(8, 16), 0),  # cached as they are
        (500, (64, 64), pca_shape(), 4),
    ],
)
def test_recipe_few_images_get_random_shifts(
    count: int, size: tuple[int, int], cells: LatentShape | None, shift: int
) -> None:
    config = train_config_for(DatasetSummary(count, 128, 3), size, cells)
    assert (config.shift, config.flip) == (shift, None)


def test_recipe_given_length_is_split_into_phases() -> None:
    config = train_config_for(DatasetSummary(500, 32, 3), (32, 32), images=640)
    assert (config.images, config.warmup, config.decay) == (640, 64, 213)
    assert (config.save_every, config.sample_every) == (64, 64)
    shortest = train_config_for(DatasetSummary(500, 32, 3), (32, 32), images=1)
    assert (shortest.save_every, shortest.sample_every) == (1, 1)


def test_recipe_invalid_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="only 5 pixels wide or high: expected at least 8; --image-size 8"):
        crop_side(DatasetSummary(500, 5, 3), 256)
    with pytest.raises(ConfigError, match="image-size: got 30x30, expected multiples of 4"):
        train_config_for(DatasetSummary(500, 30, 3), (30, 30))
    with pytest.raises(ConfigError, match="image-size: got 60x64, expected multiples of 8"):
        train_config_for(DatasetSummary(500, 64, 3), (60, 64), LatentShape(8, 16))
    for size in ((0, 0), (-4, -4), (32, 0), (-32, 32)):
        for cells in (None, LatentShape(8, 16)):
            with pytest.raises(ConfigError, match=rf"image-size: got {size[0]}x{size[1]}, expected a height and a"):
                train_config_for(DatasetSummary(500, 32, 3), size, cells)


@pytest.mark.parametrize(
    ("count", "side", "more"),
    [
        (1_000, 500, 5_000),
        (3_000, 128, 5_000),
        (5_000, 500, 50_000),
        (3_000, 100, None),  # 64 of 100 pixels, however many there are
        (3_000, 64, None),
        (60_000, 500, None),
    ],
)
def test_images_for_a_larger_model_are_counted(count: int, side: int, more: int | None) -> None:
    assert next_larger_count(DatasetSummary(count, side, 3)) == more
    if more is not None:
        assert chosen(more, side)[0] > chosen(count, side)[0]


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 33, 99])
@pytest.mark.parametrize("side", [8, 14, 28, 32, 64, 128, 256])
def test_recipe_chosen_size_is_divisible(side: int, stride: int) -> None:
    cells = pca_shape(stride)
    found = largest_multiple(side, cells)
    assert side - found < max(side / 8, 2 * stride)
    config = train_config_for(DatasetSummary(6_000, side, 3), (found, found), cells)
    assert config.model.grid[0] * stride == found
    assert largest_multiple(side, None) == side


def test_tokenizer_recipe_grows_with_the_images() -> None:
    pictures = DatasetSummary(500, 300, 1, KINDS)
    small = tokenizer_config_for(pictures, (64, 64), LatentShape(8, 16))
    assert (small.image_channels, small.size, small.stride, small.channels) == (1, (64, 64), 8, 16)
    assert small.images == 60_000
    assert small.warmup + small.decay < small.images
    large = tokenizer_config_for(DatasetSummary(100_000, 300, 3), (256, 256), LatentShape(16, 16))
    assert large.width > tokenizer_config_for(pictures, (128, 128), LatentShape(8, 16)).width > small.width
    assert large.images == 1_000_000
    short = tokenizer_config_for(pictures, (64, 64), LatentShape(8, 16), images=8)
    assert (short.images, short.warmup, short.decay) == (8, 0, 2)
    residual = tokenizer_config_for(pictures, (64, 64), own_shape((64, 64)))
    shorter = tokenizer_config_for(pictures, (64, 64), own_shape((64, 64)), images=1_500)
    assert (residual.noise, shorter.noise) == (0.6, 0.15)
    assert (residual.kind, residual.decay, residual.width) == ("residual", residual.images, None)


@pytest.mark.parametrize(
    ("side", "aspect", "latents", "size"),
    [
        (64, 4 / 3, LatentShape(8, 16), (72, 56)),
        (64, 3 / 4, LatentShape(8, 16), (56, 72)),
        (64, 1.0, LatentShape(8, 16), (64, 64)),
        (128, 4 / 3, LatentShape(8, 16), (144, 112)),
        (256, 16 / 9, LatentShape(16, 16), (336, 192)),
        (32, 1.5, pca_shape(), (40, 28)),
        (28, 0.75, None, (24, 32)),
        (8, 3.0, None, (12, 4)),
        (16, 1.2, LatentShape(16, 16), (16, 16)),  # nothing else is as large
    ],
)
def test_crop_size_of_oblong_pictures_has_their_shape(
    side: int, aspect: float, latents: LatentShape | None, size: tuple[int, int]
) -> None:
    assert crop_size(DatasetSummary(500, 2 * side, 3, aspect=aspect), side, latents) == size


@given(
    count=st.sampled_from([100, 6_000, 60_000]),
    pixels=st.integers(8, 600),
    aspect=st.floats(1 / 3, 3),
    latents=st.sampled_from([None, pca_shape(), pca_shape(3), LatentShape(8, 16), LatentShape(16, 16)]),
)
def test_crop_size_is_valid_and_nearest(count: int, pixels: int, aspect: float, latents: LatentShape | None) -> None:
    pictures = DatasetSummary(count, pixels, 3, aspect=aspect)
    square = largest_multiple(crop_side(pictures, max_side(count)), latents)
    size = height, width = crop_size(pictures, square, latents)
    config = train_config_for(pictures, size, latents, square=square)
    model, whole = config.model, train_config_for(pictures, (square, square), latents).model
    stride = latents.stride if latents else 1
    token = model.patch_size * stride
    assert model.patch_size == whole.patch_size
    assert (model.grid[0] * stride, model.grid[1] * stride) == size
    assert 0.7 <= height * width / square**2 <= 1.3
    assert 0.7 <= model.tokens / whole.tokens <= 1.3
    if size != (square, square):
        assert height <= pixels * max(aspect, 1)
        assert width <= pixels * max(1 / aspect, 1)

    def errors(height: int, width: int) -> tuple[float, float]:
        return abs(math.log(height / width / aspect)), abs(math.log(height * width / square**2))

    own = errors(*size)
    assert own[0] <= errors(square, square)[0] + 1e-9  # never further from the shape than the square
    for rows in range(height // token - 1, height // token + 2):
        for columns in range(width // token - 1, width // token + 2):
            other = rows * token, columns * token
            fits = other[0] <= pixels * max(aspect, 1) and other[1] <= pixels * max(1 / aspect, 1)
            if min(other) > 0 and fits and abs(math.prod(other) / square**2 - 1) <= 0.3:
                aspect_error, area_error = errors(*other)
                assert aspect_error > own[0] - 1e-8 or area_error > own[1] - 1e-8


def test_crop_size_grows_with_the_aspect() -> None:
    pictures = [DatasetSummary(500, 300, 3, aspect=1 + step / 20) for step in range(41)]
    sizes = [crop_size(each, 64, LatentShape(8, 16)) for each in pictures]
    assert all(one[0] / one[1] <= other[0] / other[1] for one, other in pairwise(sizes))
    assert len({*sizes}) > 6


def test_recipes_of_an_oblong_are_those_of_its_square() -> None:
    pictures, latents = DatasetSummary(6_000, 300, 3, KINDS, aspect=4 / 3), LatentShape(8, 16)
    size = crop_size(pictures, 128, latents)
    model = train_config_for(pictures, size, latents, square=128).model
    assert (size, model.grid, model.patch_size) == ((144, 112), (18, 14), 1)
    assert tokenizer_config_for(pictures, size, latents, square=128).width == 32
    # from a cache of it, the square is not known
    assert train_config_for(pictures, (152, 104), latents).model.patch_size == 1
    with pytest.raises(ConfigError, match="image-size: got 152x152, expected multiples of 16"):
        train_config_for(pictures, (152, 152), latents)
