"""`mar tokenizer stats`: the mean and standard deviation of a tokenizer's latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mar.cli.options import parse


@dataclass(frozen=True)
class TokenizerOptions:
    """Measures a tokenizer on pictures, in one pass, and keeps the result beside it."""

    action: Annotated[Literal["stats"], tyro.conf.Positional]
    tokenizer: Annotated[str, tyro.conf.Positional]
    """pixels, or a folder or Hub repository in diffusers' format."""
    data: str
    """fashion, a folder of pictures, or a parquet file or folder."""
    image_size: int
    """Pictures are cut to squares of so many pixels."""
    per_channel: bool = False
    """One mean and standard deviation for each channel, instead of one for all."""
    limit: int | None = None
    """Measure on so many pictures only."""


def tokenizer(arguments: Sequence[str]) -> int:
    """`mar tokenizer stats`."""
    options = parse(TokenizerOptions, "tokenizer", arguments)
    from mar import zoo
    from mar.checkpoint.tokenizers import save_statistics
    from mar.data.loader import in_order
    from mar.data.sources import open_source
    from mar.data.transforms import Transform
    from mar.tokenizer import PixelTokenizer
    from mar.tokenizer.statistics import measure

    source = open_source(options.data)
    channels = 1 if options.data == "fashion" else 3
    found = PixelTokenizer(channels) if options.tokenizer == "pixels" else zoo.load_tokenizer(options.tokenizer)
    transform = Transform(options.image_size, found.image_channels)
    statistics = measure(found, in_order(source, transform, limit=options.limit), per_channel=options.per_channel)
    for name, values in (("mean", statistics.mean), ("std", statistics.std)):
        print(f"{name} {' '.join(f'{value:.6g}' for value in values)}")
    print(f"measured on {statistics.images:,} pictures")
    if Path(options.tokenizer).is_dir():
        found.set_statistics(statistics.mean, statistics.std)
        print(f"kept in {save_statistics(found, options.tokenizer)}")
    return 0
