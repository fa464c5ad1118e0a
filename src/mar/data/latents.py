"""A latent cache as data to train on: moments of any picture by its number, mapped to memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mar.config import ConfigError
from mar.data.examples import UnreadableImage
from mar.data.shards import DamagedCache, Shard, check_shard, read_about, read_index, remake
from mar.tokenizer.moments import LatentMoments


class LatentSource:
    """The latents that `mar cache` made, in the order of the pictures; picklable, so that workers can have a copy.

    Opening reads the index and looks at the size of every shard. Raises ConfigError where the cache is not finished,
    DamagedCache where a shard is missing, cut short, or not what the index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.about = read_about(self.folder)
        self.index = read_index(self.folder, self.about)
        self.classes = self.about.classes
        self.flips = self.about.flips
        self.rows = np.arange(self.about.pictures)
        self._shards: dict[int, Shard] = {}
        for file, size in zip(self.index.files, self.index.sizes, strict=True):
            path = self.folder / file
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
                raise DamagedCache(f"{path} {what}{remake(self.about)}")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": {}}  # each process maps files itself

    def part(self, rows: np.ndarray) -> LatentSource:
        """The same cache with these of its pictures only, numbered anew."""
        chosen = copy.copy(self)
        chosen.rows = self.rows[rows]
        return chosen

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int, flip: bool) -> tuple[Float[Tensor, "m c h w"], int]:
        """Mean and log-variance (means alone where m is 1) of the raw latents of picture `index`, plain or flipped, in
        float32; and its class number, -1 where it has none.

        Raises UnreadableImage for a picture that could not be read when the cache was made; ConfigError for a flipped
        one where there are only plain ones; DamagedCache.
        """
        index = int(self.rows[index])
        if index in self.index.skipped:
            raise UnreadableImage(self.index.skipped[index], "it could not be read when the cache was made")
        if flip and not self.flips:
            raise ConfigError(
                f"{self.folder} holds no flipped pictures; train with --flip False, or cache them anew with --flip True"
            )
        shard, row = divmod(index, self.about.shard)
        if shard not in self._shards:
            self._shards[shard] = check_shard(self.folder, self.about, self.index, shard)
        found = self._shards[shard]
        return found.moments[row, int(flip)].float(), int(found.labels[row])

    def in_order(self, limit: int | None = None) -> Iterator[LatentMoments]:
        """The plain moments of every picture that could be read, once, by shards; of the first `limit` pictures."""
        wanted = np.zeros(self.about.pictures, dtype=bool)
        wanted[self.rows[:limit]] = True
        wanted[list(self.index.skipped)] = False
        for number in range(self.about.shards):
            span = self.about.span(number)
            rows = np.flatnonzero(wanted[span.start : span.stop]).tolist()
            if rows:
                shard = check_shard(self.folder, self.about, self.index, number)
                yield unpack(shard.moments[rows, 0].float())


def unpack(moments: Float[Tensor, "n m c h w"]) -> LatentMoments:
    """The two of an axis of mean and log-variance, or of means alone, by name."""
    return LatentMoments(moments[:, 0], moments[:, 1] if moments.shape[1] == 2 else None)


def verify(folder: str | Path, advance: Callable[[float], None] = lambda pictures: None) -> LatentSource:
    """Holds every byte of a finished cache against its checksums; tells `advance` how many pictures are done.

    Raises DamagedCache, in one line, for the shards that are not what was written; ConfigError for no cache at all.
    """
    folder = Path(folder)
    about = read_about(folder)
    index = read_index(folder, about)
    damaged: list[str] = []
    for number in range(about.shards):
        try:
            intact = check_shard(folder, about, index, number).intact()
        except DamagedCache:
            intact = False
        if not intact:
            damaged.append(index.files[number])
        advance(about.span(number).stop)
    if damaged:
        which = ", ".join(damaged[:8]) + (", ..." if len(damaged) > 8 else "")
        raise DamagedCache(f"{folder}: {len(damaged)} of {about.shards} shards are damaged: {which}{remake(about)}")
    return LatentSource(folder)
