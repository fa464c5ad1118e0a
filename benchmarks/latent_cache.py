"""Speedup by a latent cache: training steps against images, reading against one .npz per image.

    python benchmarks/latent_cache.py [--data PATH] [--steps 8] [--batch 16] [--threads 2]

Steps are those of a small KL autoencoder (stride 8, 4 channels, 64x64 pixels) and a small MAR, with random weights:
time does not depend on them. Without --data, images are JPEGs of random pixels. Reading is measured at KL-16's sizes,
16x16x16, against the reference's format: one .npz per image with two float32 arrays of moments, plain and flipped. Both
sides are measured in turns, each the median of its rounds, so that a ratio is of one run.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mar.config import HeadConfig, ModelConfig, TrainConfig, TrunkConfig
from mar.data.cache_writer import describe_cache, finish_cache, prepare_cache, write_shards
from mar.data.latent_cache import CacheManifest, LatentSource, empty_shard, write_index, write_manifest, write_shard
from mar.data.sources import open_source
from mar.tokenizer.kl import KLTokenizer, from_config
from mar.training.run import open_run
from mar.training.trainer import Run

SIDE = 64
AUTOENCODER = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32, 32, 64, 64],
    "layers_per_block": 1,
}
ROUNDS = 3


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = Path(options.data) if options.data else random_pictures(folder / "pictures", 4 * options.batch)
        train_side_by_side(folder, data, options.steps, options.batch)
        read_side_by_side(folder, options.pictures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="a folder of images")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=256, help="number of latents to read")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def random_pictures(folder: Path, count: int) -> Path:
    generator = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (25, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 400)).save(path)
    return folder


def train_side_by_side(folder: Path, data: Path, steps: int, batch: int) -> None:
    tokenizer, source = from_config(AUTOENCODER).requires_grad_(False), open_source(data)
    manifest = describe_cache(source, tokenizer, data=str(data), tokenizer_name="small", size=(SIDE, SIDE))
    start = time.perf_counter()
    shards = prepare_cache(folder / "cache", manifest)
    assert shards is not None
    write_shards(folder / "cache", manifest, source, tokenizer, shards, device=torch.device("cpu"), batch=batch)
    finish_cache(folder / "cache", manifest)
    print(f"cached {len(source)} images, plain and flipped, in {time.perf_counter() - start:.1f} s")
    tokenizer.set_statistics(0.0, 1.0)
    runs = {
        "pictures": open_training(data, folder / "a", tokenizer, len(source.classes), batch),
        "cache": open_training(folder / "cache", folder / "b", tokenizer, len(source.classes), batch),
    }
    seconds = in_turns({name: lambda run=run: train_steps(*run, steps) for name, run in runs.items()})
    for name, value in seconds.items():
        print(f"a step from {name:<9} {1000 * value / steps:8.1f} ms")
    print(f"training from the cache is {seconds['pictures'] / seconds['cache']:.1f} times as fast")


def open_training(
    data: Path, out: Path, tokenizer: KLTokenizer, classes: int, batch: int
) -> tuple[Run, Iterator[object]]:
    trunk = TrunkConfig(width=128, depth=3, num_heads=4)
    model = ModelConfig(
        channels=4, grid=(SIDE // 8, SIDE // 8), encoder=trunk, decoder=trunk, buffer_size=8, classes=classes,
        head=HeadConfig(width=128, depth=2),
    )  # fmt: skip
    config = TrainConfig(model=model, data=str(data), tokenizer="small", batch=batch, images=10**6)

    def no_model(name: str) -> object:
        raise AssertionError(name)

    run = open_run(
        config, out, device=torch.device("cpu"), load_tokenizer=lambda name: copy.deepcopy(tokenizer),
        load_model=no_model,  # type: ignore[arg-type]
    )  # fmt: skip
    return run, run.batches()


def train_steps(run: Run, batches: Iterator[object], steps: int) -> None:
    for _ in range(steps):
        run.step(next(batches))  # type: ignore[arg-type]


def both_stores(folder: Path, count: int) -> tuple[LatentSource, Path]:
    """Write random latents of KL-16's sizes as a cache, and as the reference does."""
    manifest = CacheManifest("kl16", "", "random", "", count, (), (256, 256), (16, 16, 16), 2, True, "fp16", 64)
    generator = torch.Generator().manual_seed(0)
    cache, archives = folder / "kl16", folder / "npz"
    archives.mkdir()
    write_manifest(cache, manifest)
    for k in range(manifest.shards):
        moments, labels = empty_shard(manifest, len(manifest.span(k)))
        moments.copy_(torch.randn(moments.shape, generator=generator))
        write_shard(cache / manifest.file(k), moments, labels, {})
        for i, one in zip(manifest.span(k), moments.float().reshape(len(moments), 2, 32, 16, 16), strict=True):
            np.savez(archives / f"{i}.npz", moments=one[0].numpy(), moments_flip=one[1].numpy())
    write_index(cache, manifest)
    return LatentSource(cache), archives


def read_side_by_side(folder: Path, count: int) -> None:
    source, archives = both_stores(folder, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()

    def from_cache() -> None:
        for i in order:
            source.read(i, i % 2 == 0)

    def from_archives() -> None:
        for i in order:
            with np.load(archives / f"{i}.npz") as file:
                torch.from_numpy(file["moments_flip" if i % 2 == 0 else "moments"])

    seconds = in_turns({"npz": from_archives, "cache": from_cache})
    stored = {
        "npz": sum(path.stat().st_size for path in archives.iterdir()),
        "cache": sum(path.stat().st_size for path in source.folder.iterdir()),
    }
    for name in ("npz", "cache"):
        print(
            f"{name:<6} {stored[name] / count:9,.1f} bytes per image, {1e6 * seconds[name] / count:8.1f} us to read one"
        )
    print(f"reading from the cache is {seconds['npz'] / seconds['cache']:.1f} times as fast, ", end="")
    print(f"and takes {stored['cache'] / stored['npz']:.4f} of the bytes")


def in_turns(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Measure calls in turns; return the median seconds of each, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


if __name__ == "__main__":
    main()
