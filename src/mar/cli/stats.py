"""`mar stats`, and what it shares with `mar evaluate`: the network that looks at pictures, and how far it has come."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mar.cli.options import interruptible, parse
from mar.config import ConfigError

if TYPE_CHECKING:
    import torch

    from mar.evaluation.features import Extractor
    from mar.evaluation.statistics import FeatureStats

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class FeatureFlags:
    """With which network pictures are looked at."""

    features: str = "inception"
    """inception (FID; the `fid` extra), efficientnet-lite0 (the `eval` extra), FILE.py:function or module:function."""
    weights: Path | None = None
    """A file of weights for it; by default its own."""
    image_size: int | None = None
    """Bring pictures of a folder or data set to this height and width, by ADM's centre crop."""
    batch: int = 64
    """Pictures drawn or looked at at once; changes memory and speed, not the numbers."""

    def extractor(self, device: torch.device) -> Extractor:
        """The network on `device`."""
        from mar.evaluation.features import open_extractor

        if self.batch < 1:
            raise ConfigError(f"batch is {self.batch}, but it must be at least 1")
        return open_extractor(self.features, self.weights).to(device)

    def size(self) -> tuple[int, int] | None:
        """The size that was asked for."""
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"image-size is {self.image_size}, but it must be at least 1")
        return None if self.image_size is None else (self.image_size, self.image_size)


@dataclass(frozen=True)
class StatsOptions(FeatureFlags):
    """Measures mean and covariance of the features of real pictures, to hold generated ones against."""

    pictures: Annotated[str, tyro.conf.Positional]
    """A folder, a Parquet file, fashion (bundled), or an .npz of pictures or of ADM's statistics."""
    out: Path
    """The .npz to write: mu, sigma, count, and what made them."""
    split: Split = "train"
    """Which part of a data set that has several."""
    count: int | None = None
    """Only so many, spread evenly over them."""
    keep_features: bool = False
    """Keep the features themselves too, as KID, precision, recall and neighbours need."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def stats(arguments: Sequence[str]) -> int:
    """`mar stats`."""
    return interruptible("nothing was written", lambda check: _stats(arguments, check))


def _stats(arguments: Sequence[str], check: Callable[[], None]) -> int:
    from mar import devices, distributed

    with distributed.collective_errors():
        options = parse(StatsOptions, "stats", arguments)
        devices.choose_device(options.device)
        if options.out.suffix != ".npz":
            raise ConfigError(f"out is {options.out}, expected a file .npz")
        check_out(options.out, pictures=options.pictures, weights=options.weights)
        check_count(options.count)
    from mar.evaluation.evaluate import MetricOptions, collect
    from mar.evaluation.session import is_statistics, open_pictures
    from mar.evaluation.statistics import FeatureStats

    with distributed.process_group(options.device) as device:
        with distributed.collective_errors():
            if is_statistics(options.pictures):
                for name in ("image_size", "count", "keep_features"):
                    if getattr(options, name):
                        name = name.replace("_", "-")
                        raise ConfigError(f"{name} needs pictures, but {options.pictures} has only their statistics")
                return _write(FeatureStats.load(Path(options.pictures)), options.out)
            extractor, wanted = options.extractor(device), MetricOptions(kernel=options.keep_features)
            pictures = open_pictures(options.pictures, split=options.split, size=options.size(), limit=options.count)
            if options.keep_features:
                say_memory(len(pictures), extractor)
        with distributed.collective_errors(), progress(len(pictures), check) as advance:
            found = collect(pictures, extractor, wanted=wanted, batch=options.batch, advance=advance).statistics
        with distributed.collective_errors():
            return _write(found, options.out)


def _write(found: FeatureStats, out: Path) -> int:
    from mar import distributed

    if distributed.rank() == 0:
        found.save(out)
        count = "an unknown number of" if found.count is None else f"{found.count:,}"
        kept = "" if found.features is None else ", with the features"
        print(f"{out}: {len(found.mean)} features of {count} pictures{kept}")
    return 0


def check_count(count: int | None) -> None:
    """ConfigError for fewer pictures than have a covariance."""
    if count is not None and count < 2:
        raise ConfigError(f"count is {count}, but it must be at least 2")


def check_out(out: Path, **others: str | Path | None) -> None:
    """ConfigError where what is to be written is also something else that was named: it would be overwritten."""
    for name, other in others.items():
        if other is not None and out.resolve() == Path(other).resolve():
            raise ConfigError(f"out is {out}, and so is {name.replace('_', '-')}; take another --out")


@contextlib.contextmanager
def progress(pictures: int, check: Callable[[], None]) -> Iterator[Callable[[float], None]]:
    """Progress over all processes' pictures; what it yields takes how many of this one's share are done."""
    from mar import distributed
    from mar.evaluation.image_sets import share
    from mar.sampling.progress import meter

    first, end = share(pictures, distributed.rank(), distributed.world_size())
    with meter(distributed.rank() == 0, pictures) as tell:

        def advance(done: float) -> None:
            check()
            tell(done * pictures / max(end - first, 1))  # the others are taken to be as far

        yield advance


def say_memory(pictures: int, extractor: Extractor) -> None:
    """Says what keeping features will take, before it is taken."""
    from mar import distributed
    from mar.checkpoint.files import size_text

    if distributed.rank() == 0:
        size = size_text(4 * pictures * extractor.width)
        print(f"keeping the features of {pictures:,} pictures takes {size} of memory", file=sys.stderr)
