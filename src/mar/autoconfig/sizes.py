"""A recipe for pictures of one's own: sizes chosen from how many there are, how large, and of what colours."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mar.config import ConfigError, HeadConfig, ModelConfig, Optimizer, SamplingConfig, TrainConfig, TrunkConfig
from mar.config.fields import positive, require
from mar.config.tokenizer import TokenizerTrainConfig
from mar.presets import X0_SAMPLING


@dataclass(frozen=True)
class DatasetSummary:
    """What a recipe has to know of pictures (`mar.autoconfig.summary` finds it out)."""

    count: int
    """How many there are."""
    side: int
    """Pixels of the shorter side of a typical one."""
    image_channels: int
    """Channels: 1 where all are grey, else 3."""
    classes: tuple[str, ...] = ()
    """Their names; empty where pictures have none."""
    max_abs_z: float = 2.5
    """How many standard deviations of their pixels black and white are from the mean, whichever is farther."""

    def __post_init__(self) -> None:
        positive(self, "count", "side")
        require(
            self.image_channels in (1, 3), f"image_channels is {self.image_channels!r}, but it must be 1 (gray) or 3"
        )
        names = isinstance(self.classes, tuple) and all(isinstance(name, str) for name in self.classes)
        require(names, f"classes is {self.classes!r}, but it must be their names")
        finite = isinstance(self.max_abs_z, int | float) and 0 < self.max_abs_z < math.inf
        require(finite, f"max_abs_z is {self.max_abs_z!r}, but it must be positive and finite")


@dataclass(frozen=True)
class LatentShape:
    """What a tokenizer makes of pictures."""

    stride: int
    """Pixels of a latent cell's side."""
    channels: int
    components: bool = False
    """They are principal components, which need no cache, rather than an autoencoder's latents."""


@dataclass(frozen=True)
class _Size:
    """A size of model, and how it is trained."""

    pictures: int
    """It is for fewer pictures than that."""
    trunk: tuple[int, int, int, int]
    """Width, heads, blocks of the encoder and of the decoder."""
    head: tuple[int, int, int]
    """Width for tokens of at most 16 values, width for others, depth."""
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


_SIZES = (
    _Size(20_000, (192, 6, 3, 5), (256, 512, 3), buffer_size=8, batch=32,
          optimizer="muon", rate=1.5e-3, warmup=6_000, ema=0.999, save_every=5_000),
    _Size(200_000, (256, 8, 4, 6), (384, 512, 3), buffer_size=16, batch=64,
          optimizer="muon", rate=1e-3, warmup=12_000, ema=0.9995, save_every=10_000),
    _Size(10**18, (768, 12, 12, 12), (1024, 1024, 6), buffer_size=64, batch=256,
          optimizer="adamw", rate=1e-4, warmup=500_000, ema=0.9999, save_every=200_000),
)  # fmt: skip
SIDES = (256, 128, 64, 32)
"""Sides of the square that pictures are cut to, the largest that they have; smaller ones keep multiples of 4 or 2."""
MAX_SIDE_BY_COUNT = ((5_000, 64), (50_000, 128), (10**18, 256))
"""Fewer pictures than the one are cut to no more than the other."""
SMALL_DATASET = 5_000
"""Fewer pictures are moved by a few pixels as they are learned."""
SHIFT = 4
"""Pixels, at most, that they are moved by."""
PIXELS_UP_TO = 32
"""Larger pictures are learned as the latents of a tokenizer of their own."""
PIXELS_BELOW = 16
"""Smaller ones have too few squares of 4 x 4 pixels for their components."""
SMALLEST = 8


def largest_for(count: int) -> int:
    """The largest side that so many pictures are cut to."""
    return next(side for fewer, side in MAX_SIDE_BY_COUNT if count < fewer)


def side_for(pictures: DatasetSummary, largest: int) -> int:
    """The side of the square that pictures are cut to: what they have, up to `largest`. ConfigError below 8 pixels."""
    found = min(pictures.side, largest)
    if found < SMALLEST:
        raise ConfigError(
            f"the pictures are only {pictures.side} pixels wide or high: expected at least {SMALLEST}; --image-size "
            f"{SMALLEST} enlarges them"
        )
    largest_multiple = 4 if found >= 16 else 2
    return next((side for side in SIDES if side <= found), found // largest_multiple * largest_multiple)


def larger_from(pictures: DatasetSummary) -> int | None:
    """So many of these pictures, at least, would be cut to larger squares; None where more of them would not."""
    side = side_for(pictures, largest_for(pictures.count))
    return next(
        (
            count
            for count, _ in MAX_SIDE_BY_COUNT[:-1]
            if pictures.count < count and side < side_for(pictures, largest_for(count))
        ),
        None,
    )


def largest_multiple(side: int, cells: LatentShape | None) -> int:
    """The side of the largest square within one of `side` pixels that can be cut into tokens; of one cell at least."""
    step = (cells.stride if cells else 1) * _patch((side, side), cells)
    return max(side // step, 1) * step


def latent_shape_for(size: tuple[int, int]) -> LatentShape:
    """The tokenizer to train for pictures of `size` (height, width): 64 to 256 cells for squares of 32 to 256 pixels,
    each of no more values than a narrow head is enough for."""
    if max(size) <= PIXELS_UP_TO:
        return LatentShape(stride=4, channels=4)
    return LatentShape(stride=8 if max(size) < 256 else 16, channels=16)


def default_latent_shape(pictures: DatasetSummary, size: tuple[int, int]) -> LatentShape | None:
    """What makes tokens of pictures cut to `size` (height, width) where nothing is asked for: a tokenizer to be trained
    for large ones, principal components for small ones, and None, their pixels, for the smallest and for grey ones."""
    if max(size) > PIXELS_UP_TO:
        return latent_shape_for(size)
    return None if pictures.image_channels == 1 or min(size) < PIXELS_BELOW else components()


def components(stride: int = 4) -> LatentShape:
    """The principal components to keep of squares of `stride` pixels: a third of the values that they have in colour,
    and what is left of CIFAR-10's variance without them is 0.3%; all that they have in grey, where nothing is so much
    alike as colours are (a third of them brings Fashion-MNIST back at 22 dB)."""
    return LatentShape(stride, stride**2, components=True)


def recipe_for(
    pictures: DatasetSummary, size: tuple[int, int], cells: LatentShape | None = None, *, images: int | None = None
) -> TrainConfig:
    """A recipe for pictures of one's own, cut to `size` (height, width), as pixels or as a tokenizer's `cells`; where
    data and tokenizer are is still to be said.

    The model grows with the number of pictures, the head with the width of tokens. Each picture is seen 40 times,
    and 100,000 at least are seen in all, unless `images` says how many. The model predicts v, or x0 of principal
    components, has rotary positions, and is bounded when it draws: pixels by black and white, latents by 4 standard
    deviations, components, whose rare values are far out, by 10. Fewer than 5,000 pictures are moved by up to a
    sixteenth of their shorter side, and by 4 pixels at most, but not where latents are cached of them as they are.
    Whether pictures are mirrored is left to the data.

    What to expect of small colour pictures, by minutes of one core (docs/quality.md): of 50,000 what `CIFAR10` says,
    which is no better; of 500, after 14 minutes colours and layouts, and few copies. Of large
    pictures, the tokenizer's training comes first. ConfigError for a size that can't be cut into cells or patches.
    """
    if min(size) < 1:
        raise ConfigError(f"image-size: got {size[0]}x{size[1]}, expected a height and a width of at least 1 pixel")
    chosen = next(size for size in _SIZES if pictures.count < size.pictures)
    stride, channels = (cells.stride, cells.channels) if cells else (1, pictures.image_channels)
    patch = _patch(size, cells)
    if any(side % (stride * patch) for side in size):
        raise ConfigError(f"image-size: got {size[0]}x{size[1]}, expected multiples of {stride * patch}")
    taken = cells is not None and cells.components
    bound = 10.0 if taken else 4.0 if cells else math.ceil(10 * pictures.max_abs_z) / 10
    narrow, wide, depth = chosen.head
    encoder, decoder = chosen.trunks
    total = images or max(40 * pictures.count, 100_000)
    now_and_then = max(total // 10, 1)
    return TrainConfig(
        model=ModelConfig(
            channels=channels,
            grid=(size[0] // stride, size[1] // stride),
            patch_size=patch,
            encoder=encoder,
            decoder=decoder,
            head=HeadConfig(
                narrow if channels * patch**2 <= 16 else wide, depth, prediction="x0" if taken else "v", batch_mul=2
            ),
            buffer_size=chosen.buffer_size,
            classes=len(pictures.classes),
            attention_dropout=0.0,
            projection_dropout=0.0,
        ),
        sampling=SamplingConfig(
            **(X0_SAMPLING if taken else {"diffusion_steps": 50}),
            steps=32,
            guidance_scale=3.0 if len(pictures.classes) > 1 else 1.0,
            x0_bound=bound,
        ),
        images=total,
        batch=chosen.batch,
        lr=chosen.rate * 256 / chosen.batch,
        warmup=chosen.warmup,  # not a share of the run, which may be made longer later
        decay=total // 3,
        optimizer=chosen.optimizer,
        ema=chosen.ema,
        shift=min(min(size) // 16, SHIFT) if (cells is None or taken) and pictures.count < SMALL_DATASET else 0,
        save_every=min(chosen.save_every, now_and_then),
        sample_every=now_and_then,
        validate_every=now_and_then,
    )


def tokenizer_for(
    pictures: DatasetSummary, size: tuple[int, int], stride: int, channels: int, images: int | None = None
) -> TokenizerTrainConfig:
    """A tokenizer for pictures of one's own, cut to `size`; the data is still to be named. Each is seen 10 times, and
    60,000 at least are seen in all, unless `images` says how many."""
    total = images or max(10 * pictures.count, 60_000)
    return TokenizerTrainConfig(
        image_size=size,
        image_channels=pictures.image_channels,
        stride=stride,  # type: ignore[arg-type]  # checked there
        channels=channels,
        width=16 if max(size) <= 64 else 32 if max(size) <= 128 else 64,
        images=total,
        decay=total // 4,
        save_every=min(5_000, max(total // 10, 1)),
        sample_every=total // 4 + 1,  # the end is judged anyway
    )


def _patch(size: tuple[int, int], cells: LatentShape | None) -> int:
    """The side of a token in cells or pixels: not more than 16 tokens along a picture's longer side."""
    least = 1 if cells else 2 if min(size) < 16 else 4
    side = max(size) / (cells.stride if cells else 1)
    return max(least, 2 ** math.ceil(math.log2(side / 16)))
