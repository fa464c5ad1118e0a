"""Cost of evaluation: time relative to the bare feature network, and memory over the number of images.

    python benchmarks/evaluation.py [--pictures 512] [--repeats 3] [--threads 1] [--features efficientnet-lite0]

Images are random, 32x32: neither time nor memory depends on their content. Three runs are measured in turns, so that a
ratio is of one run: the network alone on tensors in memory, an .npz, and a folder of PNGs. Each is the median of
`--repeats`. On a machine that is not idle, compare processor seconds.

Memory is the peak of processes that evaluate 5,000 and 50,000 images (FD and Inception Score) with a small network. One
of them keeps all features, as KID needs them, to show that growth would be visible. (Linux only: reads /proc.)
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mar.data.sources import open_source
from mar.evaluation.evaluate import MetricOptions, collect
from mar.evaluation.features import ModuleExtractor, open_extractor
from mar.evaluation.image_sets import ImageBatch, ImageSet, NpzImages, SourceImages

SIDE, BATCH = 32, 64
FEW_IMAGES, MANY_IMAGES = 5_000, 50_000
WIDTH = 512
"""Features of the small network; those of 45,000 images would take 88 MiB."""
TIME_LIMIT, MEMORY_LIMIT = 1.10, 1.05
"""Highest ratios of time and memory that pass."""


class RandomImages:
    """Random images, created when they are read."""

    name, classes = "random", ()

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
        """Yield noise; a batch depends on its first number alone."""
        for start in range(first, end, batch):
            numbers = torch.arange(start, min(start + batch, end))
            generator = torch.Generator().manual_seed(start)
            images = torch.randint(0, 256, (len(numbers), 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
            yield ImageBatch(images, numbers, torch.full_like(numbers, -1))


class SmallNetwork(nn.Module):
    """512 features and 10 logits of 4x4 means."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.classes = nn.Linear(48, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, h, w) -> (n, 512), (n, 10)."""
        values = self.features(nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)).relu()
        return values, self.classes(values)


def peak(pictures: int, keep: bool) -> None:
    """Print the peak memory of this process, in KiB, after evaluating `pictures` images."""
    torch.manual_seed(0)
    extractor = ModuleExtractor(SmallNetwork(), "small", scores=True)
    collected = collect(RandomImages(pictures), extractor, options=MetricOptions(kid=keep), batch=BATCH)
    assert collected.inception_score is not None
    assert collected.statistics.count == pictures
    # not getrusage, in which a process inherits the peak of its parent
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    print(next(line for line in status if line.startswith("VmHWM:")).split()[1])


def memory() -> bool:
    """Measure the peaks for few and many images; return whether their ratio is within the limit."""
    peaks = []
    for pictures, keep in ((FEW_IMAGES, False), (MANY_IMAGES, False), (MANY_IMAGES, True)):
        command = [sys.executable, __file__, "--peak", str(pictures), *(["--keep"] if keep else [])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout))
        note = ", features kept" if keep else ""
        print(f"{pictures:>7,} images: peak {peaks[-1] / 1024:.1f} MiB{note}", flush=True)
    ratio = peaks[1] / peaks[0]
    print(f"memory: {ratio:.3f} times (at most {MEMORY_LIMIT})")
    return ratio <= MEMORY_LIMIT


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return wall and processor seconds of a run."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def write_images(folder: Path, count: int) -> dict[str, ImageSet]:
    """Write the same images as an .npz and as PNGs."""
    values = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(folder / "pictures.npz", arr_0=values)
    (folder / "pictures").mkdir()
    for i, picture in enumerate(values):
        Image.fromarray(picture).save(folder / "pictures" / f"{i}.png")
    return {
        "npz": NpzImages(folder / "pictures.npz"),
        "folder of PNGs": SourceImages(open_source(folder / "pictures"), "PNGs"),
    }


def overhead(args: argparse.Namespace) -> bool:
    """Measure network and evaluation; return whether the ratios of time are within the limit."""
    torch.set_num_threads(args.threads)
    extractor = open_extractor(args.features)
    with tempfile.TemporaryDirectory() as folder:
        sets = write_images(Path(folder), args.pictures)
        tensors = [part.images for part in sets["npz"].batches(BATCH, 0, args.pictures)]
        runs: dict[str, Callable[[], object]] = {"network alone": lambda: [extractor(images) for images in tensors]}
        for name, pictures in sets.items():
            runs[name] = lambda pictures=pictures: collect(pictures, extractor, batch=BATCH)  # type: ignore[misc]
        extractor(tensors[0])
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                times[name].append(timed(run))
    medians = {
        name: [statistics.median(column) for column in zip(*rounds, strict=True)] for name, rounds in times.items()
    }
    alone, passed = medians["network alone"], True
    for name, (clock, processor) in medians.items():
        ratios = clock / alone[0], processor / alone[1]
        passed &= min(ratios) <= TIME_LIMIT
        print(
            f"{name:<16} {clock:6.2f} s ({args.pictures / clock:5.1f} images per second), {processor:6.2f} processor "
            f"seconds: {ratios[0]:.3f} and {ratios[1]:.3f} times (at most {TIME_LIMIT})"
        )
    return passed


def main() -> int:
    """Return 0 if both are within their limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--features", default="efficientnet-lite0")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        peak(args.peak, args.keep)
        return 0
    print(f"{args.features}, {args.pictures} images of {SIDE}x{SIDE}, {BATCH} at a time, {args.threads} threads")
    passed = [overhead(args), memory()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
