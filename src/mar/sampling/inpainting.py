"""Edit part of an image: pixel mask -> token mask, and the result pasted into the original.

A model generates whole tokens, and a person paints pixels. All painted tokens and their neighbors are generated, since
seams show where only painted ones are. Outside the painted pixels the original is pasted back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from mar.data.images import Transform, upright

WHITE = 128
"""A gray value from which on a mask is white."""


def read_masks(
    masks: Sequence[Image.Image], image_size: tuple[int, int], sizes: Sequence[tuple[int, int]] | None
) -> Bool[Tensor, "n H W"]:
    """Convert masks, white where to generate, to flags of pixels.

    They are turned upright and cropped as their images are. Raises ValueError for a mask of another size, for a
    transparent one, and where nothing white is left in the crop.

    Args:
        masks: PIL images.
        image_size: height and width of the result.
        sizes: (width, height) of the upright image of each mask; None: images have `image_size`.
    """
    masks = [upright(mask) for mask in masks]
    expected = sizes or [(image_size[1], image_size[0])] * len(masks)
    for mask, (width, height) in zip(masks, expected, strict=False):
        if mask.size != (width, height):
            raise ValueError(
                f"mask: got {mask.width}x{mask.height} pixels, expected {width}x{height}, the size of its picture"
            )
        if mask.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ValueError("mask: got a transparent picture, expected white where to generate, and black elsewhere")
    transform = Transform(image_size, channels=1)
    flags = [transform(mask).squeeze(0) > 0 for mask in masks]
    for mask, painted in zip(masks, flags, strict=True):
        if not painted.any() and max(mask.convert("L").tobytes()) >= WHITE:
            height, width = image_size
            raise ValueError(
                f"mask: nothing white is left of it where the model looks: the middle, cut to {width}x{height} pixels; "
                "paint there, or a broader part"
            )
    return torch.stack(flags)


def tokens_to_generate(
    pixels: Bool[Tensor, "n H W"], grid: tuple[int, int], grow: int = 1
) -> Bool[Tensor, "n rows columns"]:
    """Mark painted tokens and their neighbors.

    Args:
        pixels: true at painted pixels; height and width are multiples of the grid's.
        grid: rows and columns of tokens.
        grow: how many tokens far neighbors are, diagonal ones included.
    """
    side = (pixels.shape[1] // grid[0], pixels.shape[2] // grid[1])
    tokens = F.max_pool2d(pixels.unsqueeze(1).float(), side)
    for _ in range(min(grow, max(grid))):
        tokens = F.max_pool2d(tokens, 3, stride=1, padding=1)
    return tokens.squeeze(1).bool()


def soft_seam(pixels: Bool[Tensor, "n H W"], width: int) -> Float[Tensor, "n 1 H W"]:
    """Return the opacity of generated pixels: 0 outside the painted ones.

    It rises to 1 over `width` pixels inside. The borders of the image are no seam.
    """
    opacity = inside = pixels.unsqueeze(1).float()
    for _ in range(width):
        inside = -F.max_pool2d(-inside, 3, stride=1, padding=1)  # erosion by one pixel
        opacity = opacity + inside
    return opacity / (width + 1)


@dataclass(frozen=True)
class Paste:
    """Originals, and where generated pixels replace theirs."""

    originals: Float[Tensor, "n c H W"]
    """Images in [-1, 1]."""
    opacity: Float[Tensor, "n 1 H W"]
    """Opacity of generated pixels."""

    def part(self, first: int, end: int) -> Paste:
        """Return the images from `first` up to `end`."""
        return Paste(self.originals[first:end], self.opacity[first:end])

    def __call__(self, images: Float[Tensor, "n c H W"]) -> Float[Tensor, "n c H W"]:
        """Replace the painted pixels of the originals, with a soft seam."""
        blended = torch.lerp(self.originals, images, self.opacity)
        return torch.where(self.opacity == 0, self.originals, blended)
