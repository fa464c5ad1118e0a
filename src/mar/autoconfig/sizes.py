"""Choose crops, tokenizers, models and their training for a data set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mar.config import ConfigError, HeadConfig, ModelConfig, Optimizer, SamplingConfig, TrainConfig, TrunkConfig
from mar.config.fields import positive, require
from mar.config.tokenizer import TokenizerKind, TokenizerTrainConfig
from mar.data.conditions import WORDS
from mar.presets import X0_SAMPLING


@dataclass(frozen=True)
class DatasetSummary:
    """The properties of a data set that choices follow from (`mar.autoconfig.summary`)."""

    count: int
    """Number of images."""
    side: int
    """Median of the images' shorter sides, in pixels."""
    image_channels: int
    """1 for gray images, else 3."""
    classes: tuple[str, ...] = ()
    """Names of the classes; empty for images without labels."""
    max_abs_z: float = 2.5
    """Distance of black or white from the mean of all pixels, the larger one, in standard deviations."""
    aspect: float = 1.0
    """Height by width of most images, upright; 1 where no shape but a square is common."""
    words: int = 0
    """Number of different words in the captions; 0: the images have none."""
    caption_length: int = 0
    """Words of the longest caption."""

    def __post_init__(self) -> None:
        positive(self, "count", "side")
        require(
            self.image_channels in (1, 3), f"image_channels is {self.image_channels!r}, but it must be 1 (gray) or 3"
        )
        names = isinstance(self.classes, tuple) and all(isinstance(name, str) for name in self.classes)
        require(names, f"classes is {self.classes!r}, but it must be their names")
        for name in ("max_abs_z", "aspect"):
            value = getattr(self, name)
            finite = isinstance(value, int | float) and 0 < value < math.inf
            require(finite, f"{name} is {value!r}, but it must be positive and finite")


LatentKind = Literal["pca", "residual", "autoencoder"]
"""Principal components alone, components with a learned residual, or any other network's latents."""


@dataclass(frozen=True)
class LatentShape:
    """The shape of a tokenizer's latents."""

    stride: int
    """Side of a latent cell, in pixels."""
    channels: int
    kind: LatentKind = "autoencoder"
    image_size: tuple[int, int] | None = None
    """The only height and width of images that the tokenizer takes, in pixels; None: multiples of the stride."""

    @property
    def has_components(self) -> bool:
        """True for principal components, alone or with a residual."""
        return self.kind != "autoencoder"

    @property
    def is_cached(self) -> bool:
        """True for latents of a network; components alone are computed in training."""
        return self.kind != "pca"


@dataclass(frozen=True)
class _ModelSize:
    """A size of model and its training."""

    max_count: int
    """Chosen for fewer images than this; 0: only where the time is too short for the next size."""
    trunk: tuple[int, int, int, int]
    """Width, heads, blocks of the encoder and of the decoder."""
    head: tuple[int, int, int]
    """Width for narrow tokens, width for others, depth."""
    buffer_size: int
    batch: int
    optimizer: Optimizer
    rate: float
    """Learning rate of a step."""
    warmup: int
    ema: float
    save_every: int

    @property
    def trunks(self) -> tuple[TrunkConfig, TrunkConfig]:
        """Encoder and decoder."""
        width, heads, *depths = self.trunk
        encoder, decoder = (TrunkConfig(width, depth, heads, rotary=True) for depth in depths)
        return encoder, decoder


MODEL_SIZES = (
    _ModelSize(0, (128, 4, 2, 4), (192, 384, 3), buffer_size=8, batch=32,
               optimizer="muon", rate=1.5e-3, warmup=6_000, ema=0.999, save_every=5_000),
    _ModelSize(20_000, (192, 6, 3, 5), (256, 512, 3), buffer_size=8, batch=32,
               optimizer="muon", rate=1.5e-3, warmup=6_000, ema=0.999, save_every=5_000),
    _ModelSize(200_000, (256, 8, 4, 6), (384, 512, 3), buffer_size=16, batch=64,
               optimizer="muon", rate=1e-3, warmup=12_000, ema=0.9995, save_every=10_000),
    _ModelSize(10**18, (768, 12, 12, 12), (1024, 1024, 6), buffer_size=64, batch=256,
               optimizer="adamw", rate=1e-4, warmup=500_000, ema=0.9999, save_every=200_000),
)  # fmt: skip
"""Model sizes by number of images, ascending."""
SIDES = (256, 128, 64, 32)
"""Sides of crops, for images as large as that; smaller images keep a multiple of 4 or 2."""
MAX_SIDE_BY_COUNT = ((5_000, 64), (50_000, 128), (10**18, 256))
"""Number of images and side: crops of fewer images are no larger."""
MIN_SIDE = 8
"""Smaller images are refused."""
MAX_SIDE_WITHOUT_TOKENIZER = 32
"""Larger crops get a tokenizer of their own."""
MIN_SIDE_FOR_PCA = 16
"""Smaller crops are learned as pixels: they have too few squares of 4 x 4 pixels for principal components."""
AREA_TOLERANCE = 0.3
"""Crops of another shape have the area of the square that would be chosen, to this share of it."""
MAX_CAPTION_WORDS = 32
"""Longer captions are cut."""
ENCODER_TOKENS = 32
"""Buffer tokens for a text encoder: it cuts rare words to pieces, and adds one or two tokens of its own."""
MAX_TOKENS_PER_SIDE = 16
MAX_NARROW_TOKEN = 16
"""Tokens of more values get a wide head."""
MAX_COUNT_FOR_SHIFT = 5_000
"""Fewer images are shifted at random in training."""
MAX_SHIFT = 4
"""Largest shift, in pixels."""
BALANCE = 0.5
"""Images of small classes are shown more often: a class in proportion to the square root of its number of images."""
EPOCHS, MIN_IMAGES = 40, 100_000
"""Length of a model's training: so many times each image, and at least so many in all."""
VALIDATIONS = 10
"""Validations of a model's training."""
NOISE_IMAGES = 6_000
"""Shorter trainings of a tokenizer get less noise: they would end below its principal components (docs/quality.md)."""
TOKENIZER_EVALUATIONS = 10
"""Evaluations of a residual tokenizer's training."""
TOKENIZER_EPOCHS, TOKENIZER_MIN_IMAGES = 10, 60_000
"""Length of a tokenizer's training."""
TOKENIZER_WARMUP = 3_000
"""Images over which a tokenizer's learning rate rises; a tenth of a short training."""


# ---- crops


def max_side(count: int) -> int:
    """Returns the largest side of crops for `count` images."""
    return next(side for max_count, side in MAX_SIDE_BY_COUNT if count < max_count)


def crop_side(summary: DatasetSummary, largest: int) -> int:
    """Returns the side of square crops, at most `largest`.

    ConfigError for images below 8 pixels.
    """
    side = min(summary.side, largest)
    if side < MIN_SIDE:
        raise ConfigError(
            f"the pictures are only {summary.side} pixels wide or high: expected at least {MIN_SIDE}; --image-size "
            f"{MIN_SIDE} enlarges them"
        )
    if side == largest:
        return side
    multiple = 4 if side >= 16 else 2
    return next((usual for usual in SIDES if usual <= side), side // multiple * multiple)


def next_larger_count(summary: DatasetSummary) -> int | None:
    """Returns the next number of images with larger crops, or None."""
    side = crop_side(summary, max_side(summary.count))
    for count, _ in MAX_SIDE_BY_COUNT[:-1]:
        if summary.count < count and side < crop_side(summary, max_side(count)):
            return count
    return None


def largest_multiple(side: int, latents: LatentShape | None) -> int:
    """Returns the largest side up to `side` that tokens divide."""
    step = token_side((side, side), latents)
    return max(side // step, 1) * step


def crop_size(summary: DatasetSummary, side: int, latents: LatentShape | None) -> tuple[int, int]:
    """Returns height and width of crops in the images' shape.

    They replace a square of `side` pixels, with about its area. Both are multiples of a token's side, and no larger
    than the images are. Errors of aspect and area, as logarithms, have the smallest sum; of equal ones, the aspect is
    the nearest.
    """
    if summary.aspect == 1:
        return side, side
    step = token_side((side, side), latents)
    heights = range(step, int(summary.side * max(summary.aspect, 1)) + 1, step)
    widths = range(step, int(summary.side * max(1 / summary.aspect, 1)) + 1, step)

    def error(size: tuple[int, int]) -> tuple[float, float]:
        height, width = size
        of_aspect = abs(math.log(height / width / summary.aspect))
        return round(of_aspect + abs(math.log(height * width / side**2)), 9), of_aspect

    sizes = [(height, width) for height in heights for width in widths]
    similar = [(h, w) for h, w in sizes if abs(h * w / side**2 - 1) <= AREA_TOLERANCE]
    return min([(side, side), *similar], key=error)


def token_side(size: tuple[int, int], latents: LatentShape | None) -> int:
    """Returns the side of a token of crops of `size` (height, width), in pixels."""
    return (latents.stride if latents else 1) * _patch_size(size, latents)


# ---- tokens


def own_shape(size: tuple[int, int], kind: TokenizerKind = "residual") -> LatentShape:
    """Returns the latents of a run's own tokenizer.

    `size` is height and width of crops. Squares of 32 to 256 pixels get 64 to 256 cells, few enough values for a narrow
    head.
    """
    latent_kind: LatentKind = "residual" if kind == "residual" else "autoencoder"
    if max(size) <= MAX_SIDE_WITHOUT_TOKENIZER:
        return LatentShape(4, 4 if kind == "kl" else 16, latent_kind)
    return LatentShape(8 if max(size) < 256 else 16, 16, latent_kind)


def pca_shape(stride: int = 4) -> LatentShape:
    """Returns the principal components to keep of squares of `stride` pixels.

    They are a third of the values of a color image; the others hold 0.3% of CIFAR-10's variance. Of a
    gray image they are all values: a third of them brings Fashion-MNIST back at 22 dB only.
    """
    return LatentShape(stride, stride**2, "pca")


def default_latent_shape(
    summary: DatasetSummary, size: tuple[int, int], kind: TokenizerKind = "residual"
) -> LatentShape | None:
    """Returns the latents for crops of `size`; None: pixels.

    `size` is height and width. Large crops get a tokenizer of their own, small ones principal components. The smallest
    and gray ones stay pixels.
    """
    if max(size) > MAX_SIDE_WITHOUT_TOKENIZER:
        return own_shape(size, kind)
    return None if summary.image_channels == 1 or min(size) < MIN_SIDE_FOR_PCA else pca_shape()


def _patch_size(size: tuple[int, int], latents: LatentShape | None) -> int:
    """Returns the side of a token in cells, or in pixels without latents."""
    smallest = 1 if latents else 2 if min(size) < 16 else 4
    stride = latents.stride if latents else 1
    patch_size = max(smallest, 2 ** math.ceil(math.log2(max(size) / stride / MAX_TOKENS_PER_SIDE)))
    if size[0] == size[1] or all(side % (stride * patch_size) == 0 for side in size):
        return patch_size
    # a latent cache of `crop_size`, such as 14 x 19 cells, has about as many tokens as a square may have
    half = max(patch_size // 2, smallest)
    few = math.prod(size) / (stride * half) ** 2 <= MAX_TOKENS_PER_SIDE**2 * (1 + AREA_TOLERANCE)
    return half if few and all(side % (stride * half) == 0 for side in size) else patch_size


# ---- training


def sizes_below(count: int) -> int:
    """Returns the number of model sizes below that for `count` images."""
    return next(index for index, size in enumerate(MODEL_SIZES) if count < size.max_count)


def train_config_for(
    summary: DatasetSummary,
    size: tuple[int, int],
    latents: LatentShape | None = None,
    *,
    images: int | None = None,
    grids: int = 10,
    square: int | None = None,
    text: str | None = None,
    text_width: int = 0,
    smaller: int = 0,
) -> TrainConfig:
    """Returns a training run, without its `data` and `tokenizer`.

    The model grows with the number of images, the head with the width of tokens. The model predicts v, or x0 of
    principal components, with rotary positions. Samples are bounded: pixels by black and white, latents by 4 standard
    deviations, principal components by 10, since their rare values are far out. Fewer than 5,000 images are shifted
    by up to a sixteenth of the shorter side and 4 pixels, except cached latents. `flip` is left to the data.

    Captions replace classes. By default their words are learned with the model, with as many buffer tokens as the
    longest caption has words; a text encoder gets 32 of them.

    Images of small classes are shown more often (`BALANCE`). Guidance is 1.5 for captions and 3 for classes, 5 with a
    residual tokenizer.

    Results of small color images on one core (docs/quality.md): those of `CIFAR10` for 50,000 images; after 14 minutes
    colors and layouts, and few copies, for 500.

    Args:
        summary: Properties of the data set.
        size: Height and width of crops.
        latents: Latents of the tokenizer; None: pixels.
        images: Length of the run; by default 40 times each image, and 100,000 at least.
        grids: Number of sample grids.
        square: Side of the square that `size` replaces (`crop_size`). The side of tokens follows from it, or by default
            from `size`.
        text: Reader of captions; by default `words`, if there are captions. "" leaves them unused.
        text_width: Features of a text encoder's tokens, if `text` is one.
        smaller: Sizes of model to go down from that for the number of images, for little time.

    Raises:
        ConfigError: `size` can't be cut into cells or tokens.
    """
    if min(size) < 1:
        raise ConfigError(f"image-size: got {size[0]}x{size[1]}, expected a height and a width of at least 1 pixel")
    chosen = MODEL_SIZES[max(sizes_below(summary.count) - smaller, 0)]
    stride, channels = (latents.stride, latents.channels) if latents else (1, summary.image_channels)
    patch_size = _patch_size((square, square) if square else size, latents)
    if any(side % (stride * patch_size) for side in size):
        raise ConfigError(f"image-size: got {size[0]}x{size[1]}, expected multiples of {stride * patch_size}")
    has_components = latents is not None and latents.has_components
    x0_bound = 10.0 if has_components else 4.0 if latents else math.ceil(10 * summary.max_abs_z) / 10
    narrow, wide, depth = chosen.head
    encoder, decoder = chosen.trunks
    total = images or max(EPOCHS * summary.count, MIN_IMAGES)
    tenth = max(total // 10, 1)
    text = text if text is not None else WORDS if summary.words else ""
    length = ENCODER_TOKENS if text_width else min(summary.caption_length, MAX_CAPTION_WORDS) if text else 0
    is_shifted = (latents is None or not latents.is_cached) and summary.count < MAX_COUNT_FOR_SHIFT
    return TrainConfig(
        text=text,
        model=ModelConfig(
            channels=channels,
            grid=(size[0] // stride, size[1] // stride),
            patch_size=patch_size,
            encoder=encoder,
            decoder=decoder,
            head=HeadConfig(
                narrow if channels * patch_size**2 <= MAX_NARROW_TOKEN else wide,
                depth,
                prediction="x0" if has_components else "v",
                batch_mul=2,
            ),
            buffer_size=max(chosen.buffer_size, length),
            classes=0 if text else len(summary.classes),
            words=summary.words if text == WORDS else 0,
            text_width=text_width,
            attention_dropout=0.0,
            projection_dropout=0.0,
        ),
        sampling=SamplingConfig(
            **(X0_SAMPLING if has_components else {"diffusion_steps": 50}),
            steps=32,
            guidance_scale=_guidance_scale(summary, latents, text),
            x0_bound=x0_bound,
        ),
        images=total,
        batch=chosen.batch,
        lr=chosen.rate * 256 / chosen.batch,
        warmup=min(chosen.warmup, tenth),  # not a share of a long run, which may be made longer later
        decay=total // 3,
        optimizer=chosen.optimizer,
        ema=chosen.ema,
        shift=min(min(size) // 16, MAX_SHIFT) if is_shifted else 0,
        balance=BALANCE if len(summary.classes) > 1 and not text else 0.0,
        upright=True,
        save_every=min(chosen.save_every, tenth),
        sample_every=max(total // grids, 1),
        validate_every=max(total // VALIDATIONS, 1),
    )


def _guidance_scale(summary: DatasetSummary, latents: LatentShape | None, text: str) -> float:
    """Returns the guidance of drawing: more with a residual tokenizer, where it was measured."""
    if text:
        return 1.5
    if len(summary.classes) < 2:
        return 1.0
    return 5.0 if latents is not None and latents.kind == "residual" else 3.0


def tokenizer_config_for(
    summary: DatasetSummary,
    size: tuple[int, int],
    latents: LatentShape,
    images: int | None = None,
    square: int | None = None,
) -> TokenizerTrainConfig:
    """Returns the training of a tokenizer, without its `data`.

    Args:
        summary: Properties of the data set.
        size: Height and width of crops.
        latents: Latents of the tokenizer.
        images: Length of the run; by default 10 times each image, and 60,000 at least.
        square: Side of the square that `size` replaces. The width follows from it, or by default from `size`.
    """
    is_residual, side = latents.kind == "residual", square or max(size)
    total = images or max(TOKENIZER_EPOCHS * summary.count, TOKENIZER_MIN_IMAGES)
    noise = TokenizerTrainConfig.noise
    return TokenizerTrainConfig(
        image_size=size,
        image_channels=summary.image_channels,
        stride=latents.stride,  # type: ignore[arg-type]  # checked there
        channels=latents.channels,
        kind="residual" if is_residual else "kl",
        width=None if is_residual else 16 if side <= 64 else 32 if side <= 128 else 64,
        noise=round(noise * min(total / NOISE_IMAGES, 1.0), 3) if is_residual else noise,
        upright=True,
        images=total,
        warmup=min(TOKENIZER_WARMUP, total // 10),
        decay=total if is_residual else total // 4,
        save_every=min(5_000, max(total // 10, 1)),
        sample_every=total // (TOKENIZER_EVALUATIONS if is_residual else 4) + 1,  # the end is evaluated anyway
    )
