"""What a source of pictures gives: examples, as they were found. What is done to them is `transforms`' work.

From a picture as it was found to a tensor of a given size: colours, ADM's centre crop, scale to [-1, 1].

The orientation that a camera notes in EXIF is not applied: neither does the reference, whose numbers are compared with.

Sheets of pictures to look at.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

# What Pillow raises over damaged files, by format.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    RuntimeError,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Example:
    """A picture as it was found: any size, any colour mode."""

    image: Image.Image
    label: int
    """Number of its class; -1 where it has none."""
    name: str
    """Its path, or what else identifies it in a message."""


class UnreadableImage(ValueError):
    """A picture that can't be decoded. `name` says which, `why` what is wrong with it."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"can't read the picture {name}: {why}")
        self.name, self.why = name, why


@runtime_checkable
class Source(Protocol):
    """A sequence of examples, picklable, so that workers can have a copy."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number; empty where pictures have no classes."""

    @property
    def flips(self) -> bool:
        """Whether a mirror image is as good a picture as the original."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Example number `index`; raises UnreadableImage for a broken one."""


def decode_image(file: Path | BytesIO, name: str) -> Image.Image:
    """The picture in a file, its pixels read; raises UnreadableImage with this `name`."""
    try:
        with Image.open(file) as image:
            image.load()
    except _DAMAGE as error:
        raise UnreadableImage(name, str(error) or type(error).__name__) from error
    if image.mode == "LAB":
        raise UnreadableImage(name, "Pillow can't convert its colours, CIELAB, to RGB")
    return image


def to_colours(image: Image.Image, channels: int) -> Image.Image:
    """The picture in mode L (`channels` 1) or RGB (3), whatever its mode was.

    Transparent pictures are laid on white; grey ones become RGB by repetition; 16 bits are scaled to 8, not clipped.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels: got {channels}, expected 1 (grey) or 3 (colour)")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa"):
        layer = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(layer)
        image = image.convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of mode I;16, or of mode I, in which older Pillows open 16-bit files, as L."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    if image.mode != "I" or values.max() > 255:
        values = (values * 255 + 32767) // 65535
    return Image.fromarray(values.astype(np.uint8))


def adm_center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """ADM's centre crop to a square of `size` pixels, or to `size` = (height, width).

    Halved by BOX while still twice as large on both sides, brought to cover the size by BICUBIC, cut out of the middle
    (Dhariwal and Nichol, arXiv 2105.05233; the same as theirs for squares).
    """
    height, width = (size, size) if isinstance(size, int) else size
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    covering = (round(image.width * scale), round(image.height * scale))
    image = image.resize(covering, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image, channels: int) -> Float[Tensor, "c h w"]:
    """The picture's pixels in [-1, 1], float32, with 1 (grey) or 3 (colour) channels."""
    pixels = np.array(to_colours(image, channels), dtype=np.float32)
    pixels = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels)) / 127.5 - 1


@dataclass(frozen=True)
class Transform:
    """Example's picture -> tensor (channels, height, width) in [-1, 1]."""

    size: int | tuple[int, int]
    """Side of a square, or (height, width), in pixels."""
    channels: int = 3

    def __post_init__(self) -> None:
        sides = (self.size,) if isinstance(self.size, int) else self.size
        if min(sides) < 1:
            raise ValueError(f"size: got {self.size}, expected at least 1 pixel")

    def __call__(self, image: Image.Image) -> Float[Tensor, "c h w"]:
        """The transformed picture."""
        return to_tensor(adm_center_crop(to_colours(image, self.channels), self.size), self.channels)


def image_grid(images: Sequence[Image.Image], columns: int, scale: int = 1) -> Image.Image:
    """Pictures of one size side by side, row by row, each pixel enlarged to scale x scale."""
    width, height = images[0].width * scale, images[0].height * scale
    sheet = Image.new(images[0].mode, (columns * width, math.ceil(len(images) / columns) * height))
    for place, image in enumerate(images):
        resized = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(resized, (place % columns * width, place // columns * height))
    return sheet
