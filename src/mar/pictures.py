"""Sheets of pictures to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image


def grid(images: Sequence[Image.Image], columns: int, scale: int = 1) -> Image.Image:
    """Pictures of one size side by side, row by row, each pixel enlarged to scale x scale."""
    width, height = images[0].width * scale, images[0].height * scale
    sheet = Image.new(images[0].mode, (columns * width, math.ceil(len(images) / columns) * height))
    for place, image in enumerate(images):
        resized = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(resized, (place % columns * width, place // columns * height))
    return sheet
