"""Images: the examples of a source, decoded, turned upright, cropped, as tensors, in grids.

EXIF orientation is applied where `Transform.upright` says so. The reference does not, and its recipes stay comparable.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from mar.checkpoint.files import check_regular
from mar.data.accounts import shown

PILLOW_ERRORS = (
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
"""Errors that Pillow raises over damaged files, by format."""
MAX_COVERING_PIXELS = 2**25
"""Pixels that a whole image may be enlarged to before it is cropped."""
_UPRIGHT_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientations and their opposites; 1 is upright."""


@dataclass(frozen=True)
class Example:
    """An image of a source, in any size and color mode."""

    image: Image.Image
    label: int
    """Class number; -1: none."""
    name: str
    """Identifies it in messages: its path, or shard and member."""
    captions: tuple[str, ...] = ()
    """Descriptions in words, each of the whole image."""


class UnreadableImage(ValueError):
    """An image can't be decoded; has its `name` and the reason, `why`."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"can't read the picture {name}: {why}")
        self.name, self.why = name, why


@runtime_checkable
class Source(Protocol):
    """A sequence of examples, picklable, so that workers can have a copy."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number; empty: images have no classes."""

    @property
    def flips(self) -> bool:
        """True if images may be mirrored in training."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Return example number `index`. Raises UnreadableImage for a broken one."""


@runtime_checkable
class Listed(Protocol):
    """A source that lists its images without reading them."""

    def listing(self) -> Iterator[bytes]:
        """Yield the names, sizes and labels of its images, in order."""


@runtime_checkable
class QuicklyListed(Protocol):
    """A source with a listing that asks few files for their sizes."""

    def quick_listing(self) -> Iterator[bytes]:
        """Yield names and labels of its images, and sizes of some."""


def quick_digest(source: Source) -> str:
    """Return a sha256 like `source_digest`, of a quick listing if possible."""
    digest = hashlib.sha256(json.dumps([len(source), list(source.classes)]).encode())
    if isinstance(source, QuicklyListed):
        entries = source.quick_listing()
    else:
        entries = source.listing() if isinstance(source, Listed) else iter(())
    for entry in entries:
        digest.update(entry)
    return digest.hexdigest()


def source_digest(source: Source) -> str:
    """Return a sha256, in hex, of length, class names and listing.

    Images are not read. A source without a listing is known by number and classes alone.
    """
    digest = hashlib.sha256(json.dumps([len(source), list(source.classes)]).encode())
    for entry in source.listing() if isinstance(source, Listed) else ():
        digest.update(entry)
    return digest.hexdigest()


def decode_image(
    file: Path | BytesIO, name: str, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Decode an image file, all its pixels.

    Args:
        file: is told by its contents, not by its name.
        name: for UnreadableImage, which is raised for a file that can't be decoded.
        formats: Pillow's names of the formats to accept (None: all).
        max_pixels: refuse larger images before they are decoded.
    """
    try:
        if isinstance(file, Path):
            check_regular(file)
        with Image.open(file, formats=formats) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise UnreadableImage(name, f"got {image.width}x{image.height}, expected at most {max_pixels:,} pixels")
            image.load()
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        size = file.stat().st_size if isinstance(file, Path) else len(file.getvalue())
        raise UnreadableImage(name, "it is no picture of a known kind" if size else "it is empty") from error
    except PILLOW_ERRORS as error:
        raise UnreadableImage(name, shown(str(error) or type(error).__name__, 300)) from error
    if image.mode in ("F", "I") and (why := _check_range(image)):
        raise UnreadableImage(name, why)
    if image.mode == "LAB":
        raise UnreadableImage(name, "Pillow can't convert its colors, CIELAB, to RGB")
    return image


def _check_range(image: Image.Image) -> str | None:
    """Return why values of 32 bits have no meaning as grays; None if they have one."""
    low, high = np.asarray(image).min(), np.asarray(image).max()
    if image.mode == "I":
        return None if low >= 0 and high <= 65535 else f"got values from {low} to {high}, expected 0 to 65535"
    in_range = bool(np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= 255)
    return None if in_range else f"got values from {low:g} to {high:g}, expected 0 to 1 or 0 to 255"


def upright(image: Image.Image) -> Image.Image:
    """Turn an image upright by its EXIF orientation.

    An image without one, or with damaged EXIF, stays as it is. `ImageOps.exif_transpose` fails over damage in other
    tags than the orientation, since it writes them all again. Here the result has no EXIF: it is turned once.
    """
    image.load()  # Pillow turns TIFFs itself
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except (*PILLOW_ERRORS, TypeError, Warning):
        return image
    if orientation not in _UPRIGHT_BY_ORIENTATION:
        return image
    result = image.transpose(_UPRIGHT_BY_ORIENTATION[orientation])
    for name in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        result.info.pop(name, None)
    return result


def convert_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to L (`channels` 1) or RGB (3).

    Transparent images are laid on white; gray ones become RGB by repetition; 16 bits are scaled to 8, not clipped.
    So are floats, if all of an image are in [0, 1].
    """
    if channels not in (1, 3):
        raise ValueError(f"channels: got {channels}, expected 1 (gray) or 3 (RGB)")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.mode == "F" and np.asarray(image).max() <= 1:
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 1) * 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa"):
        layer = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(layer)
        image = image.convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert mode I;16 to L; and mode I, in which older Pillows open 16-bit files."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    if image.mode != "I" or values.max() > 255:
        values = (values * 255 + 32767) // 65535
    return Image.fromarray(values.astype(np.uint8))


def adm_center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Crop as ADM does, to a square or to (height, width).

    Halves by BOX while both sides are twice too large, resizes by BICUBIC to cover `size`, and cuts out the middle
    (Dhariwal and Nichol, arXiv 2105.05233; for squares, theirs).
    """
    height, width = (size, size) if isinstance(size, int) else size
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    covering = (round(image.width * scale), round(image.height * scale))
    if covering[0] * covering[1] > MAX_COVERING_PIXELS:  # a thin image: only the middle is enlarged
        across, down = min(width / scale, image.width), min(height / scale, image.height)
        left, top = (image.width - across) / 2, (image.height - down) / 2
        return image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + across, top + down))
    image = image.resize(covering, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image, channels: int) -> Float[Tensor, "c h w"]:
    """Convert an image to float32 in [-1, 1], with 1 (gray) or 3 (RGB) channels."""
    return pixels_to_tensor(np.asarray(convert_channels(image, channels)))


def pixels_to_tensor(pixels: np.ndarray) -> Float[Tensor, "c h w"]:
    """Convert 8-bit pixels, (h, w) or (h, w, c), to float32 in [-1, 1]."""
    values = pixels.astype(np.float32)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(values)) / 127.5 - 1


@dataclass(frozen=True)
class Transform:
    """Crops an image and converts it to a tensor in [-1, 1]."""

    size: int | tuple[int, int]
    """Side of a square, or (height, width), in pixels."""
    channels: int = 3
    upright: bool = False
    """Turn images upright first, by their EXIF orientation."""

    def __post_init__(self) -> None:
        sides = (self.size,) if isinstance(self.size, int) else self.size
        if min(sides) < 1:
            raise ValueError(f"size: got {self.size}, expected at least 1 pixel")

    @property
    def nbytes(self) -> int:
        """Bytes of an image's tensor."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return 4 * self.channels * height * width

    def __call__(self, image: Image.Image) -> Float[Tensor, "c h w"]:
        """Return the cropped image as a tensor."""
        return pixels_to_tensor(self.crop(image))

    def crop(self, image: Image.Image) -> np.ndarray:
        """Return the 8-bit pixels of the crop, (h, w) or (h, w, c)."""
        image = upright(image) if self.upright else image
        return np.asarray(adm_center_crop(convert_channels(image, self.channels), self.size))


def image_grid(images: Sequence[Image.Image], columns: int, scale: int = 1) -> Image.Image:
    """Put images of one size in rows. Each pixel becomes scale x scale pixels."""
    width, height = images[0].width * scale, images[0].height * scale
    grid = Image.new(images[0].mode, (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        resized = image.resize((width, height), Image.Resampling.NEAREST)
        grid.paste(resized, (i % columns * width, i // columns * height))
    return grid
