"""`mar stats`: statistics of real images' features, and the flags of a feature network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mar.cli.options import interruptible, parse
from mar.config import ConfigError
from mar.terminal import print_err, print_out

if TYPE_CHECKING:
    import torch

    from mar.evaluation.evaluate import Collected
    from mar.evaluation.features import Extractor
    from mar.evaluation.statistics import FeatureStats

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class FeatureFlags:
    """The feature network, for every verb that compares images."""

    features: str = "inception"
    """inception (FID; the `fid` extra), efficientnet-lite0 (the `eval` extra), FILE.py:function or module:function."""
    weights: Path | None = None
    """A file of weights for it; by default its own."""
    image_size: int | None = None
    """Bring pictures of a folder or data set to this height and width, by ADM's center crop."""
    upright: bool = False
    """Turn pictures of a folder or data set upright by their EXIF orientation, as `mar train folder` does."""
    batch: int = 64
    """Pictures at a time; changes memory and speed, not the numbers."""

    def extractor(self, device: torch.device) -> Extractor:
        """Opens the network on `device`."""
        from mar.evaluation.features import open_extractor

        if self.batch < 1:
            raise ConfigError(f"batch: got {self.batch}, expected at least 1")
        return open_extractor(self.features, self.weights).to(device)

    def size(self) -> tuple[int, int] | None:
        """Returns height and width; None for pictures as they are."""
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"image-size: got {self.image_size}, expected at least 1")
        return None if self.image_size is None else (self.image_size, self.image_size)


@dataclass(frozen=True)
class StatsOptions(FeatureFlags):
    """Measures mean and covariance of the features of real pictures."""

    pictures: Annotated[str, tyro.conf.Positional]
    """A folder, a Parquet file, fashion (bundled), or an .npz of pictures or of ADM's statistics."""
    out: Path
    """The .npz to write: mu, sigma, count, and how they were made."""
    split: Split = "train"
    """The part of a data set that has several."""
    count: int | None = None
    """Only so many pictures, spread evenly over the set."""
    keep_features: bool = False
    """Keep the features themselves too, as KID, precision, recall and neighbors need."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def stats(arguments: Sequence[str]) -> int:
    """Runs `mar stats`."""
    return interruptible("nothing was written", lambda check: _stats(arguments, check))


def _stats(arguments: Sequence[str], check: Callable[[], None]) -> int:
    from mar import devices, distributed
    from mar.backends import configure
    from mar.checkpoint.files import check_writable

    with distributed.collective_errors():
        options = parse(StatsOptions, "stats", arguments)
        devices.choose_device(options.device)
        if options.out.suffix != ".npz":
            raise ConfigError(f"out: got {options.out}, expected a file .npz")
        check_out(options.out, pictures=options.pictures, weights=options.weights)
        check_count(options.count)
        options.size()  # before anything is opened
        if distributed.rank() == 0:
            check_writable(options.out, is_file=True)
    with distributed.process_group(options.device) as device:
        configure(device)
        collected = _measure(options, device, check)
        with distributed.collective_errors():
            if distributed.rank() == 0:
                collected.statistics.save(options.out)
                for line in collected.warnings:
                    print_err(f"mar: warning: {line}")
                _print_summary(options.out, collected.statistics)
    return 0


def _measure(options: StatsOptions, device: torch.device, check: Callable[[], None]) -> Collected:
    from mar import distributed
    from mar.evaluation.evaluate import Collected, MetricOptions, collect, print_feature_memory
    from mar.evaluation.image_sets import is_statistics, open_images, rank_share
    from mar.evaluation.statistics import FeatureStats
    from mar.sampling.progress import rank_meter

    with distributed.collective_errors():
        if is_statistics(options.pictures):
            for name in ("image_size", "upright", "count", "keep_features"):
                if getattr(options, name):
                    name = name.replace("_", "-")
                    raise ConfigError(f"{name} needs pictures, but {options.pictures} has only their statistics")
            return Collected(FeatureStats.load(Path(options.pictures)))
        extractor, metrics = options.extractor(device), MetricOptions(kid=options.keep_features)
        images = open_images(
            options.pictures, split=options.split, size=options.size(), limit=options.count, upright=options.upright
        )
        if options.keep_features:
            print_feature_memory(len(images), extractor)
    first, end = rank_share(len(images), distributed.rank(), distributed.world_size())
    with distributed.collective_errors(), rank_meter(end - first, len(images), check=check) as advance:
        return collect(images, extractor, options=metrics, batch=options.batch, advance=advance)


def _print_summary(out: Path, measured: FeatureStats) -> None:
    count = "an unknown number of" if measured.count is None else f"{measured.count:,}"
    kept = "" if measured.features is None else ", with the features"
    print_out(f"{out}: {len(measured.mean)} features of {count} pictures{kept}")


def check_count(count: int | None) -> None:
    """Raises ConfigError for too few pictures for a covariance."""
    if count is not None and count < 2:
        raise ConfigError(f"count: got {count}, expected at least 2")


def check_out(out: Path, **inputs: str | Path | None) -> None:
    """Raises ConfigError for an output that would overwrite one of the inputs."""
    for name, path in inputs.items():
        if path is not None and out.resolve() == Path(path).resolve():
            raise ConfigError(f"out is {out}, and so is {name.replace('_', '-')}; take another --out")
