"""What a source of pictures gives: examples, as they were found. What is done to them is `transforms`' work."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image

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
