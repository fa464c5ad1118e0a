"""Cost of checksums: opening a model, a state of a run and a latent cache, with and without them.

    python benchmarks/checksums.py [--folder PATH] [--rounds 5] [--state-gb 1.6] [--latents 10000] [--only model ...]

Weights are random: time does not depend on them. "off" is `MAR_CHECKSUMS=off`. Both are measured in turns, so that a
ratio is of one machine's moment, and each figure is the median of its rounds. CPU seconds are of all threads, and vary
less where others use the cores. "warm" finds its files in the page cache, "cold" does not; "read" is what a round
reads from the disk then. Saving always computes checksums: their seconds are measured within it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mar.checkpoint import checksums
from mar.checkpoint.run_state import RunState
from mar.data.latent_cache import CacheManifest, LatentSource, empty_shard, write_index, write_manifest, write_shard
from mar.model.mar import MAR
from mar.pipeline import Pipeline
from mar.published import MODELS
from mar.tokenizer.kl import kl16

TENSORS = 100  # of the state
SHARD = 1000  # latents
PARTS = ("hashes", "model", "state", "cache")


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if "hashes" in options.only:
            time_hashes(options.rounds)
        print(f"{'':28} {'off s':>8} {'on s':>8} {'ratio':>6} {'off CPU s':>10} {'on CPU s':>9} {'read':>9}")
        if "model" in options.only:
            time_model(folder, options.rounds)
        if "state" in options.only:
            time_state(folder / "run", options.rounds, options.state_gb)
        if "cache" in options.only:
            time_cache(folder / "cache", options.rounds, options.latents)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="for the files; default: of temporary files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--state-gb", type=float, default=1.6)
    parser.add_argument("--latents", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    return parser.parse_args()


def time_hashes(rounds: int) -> None:
    """Print the speed of hashes, by one thread and by all."""
    data = memoryview(bytearray(os.urandom(2**20) * 128))
    threads = min(8, os.cpu_count() or 1)
    print(f"{'':12} {'1 thread':>12} {f'{threads} threads':>12}")
    hashes: dict[str, Callable[[Any], Any]] = {
        "crc32": zlib.crc32, "sha256": hashlib.sha256, "blake2b": hashlib.blake2b,
    }  # fmt: skip
    for name, function in hashes.items():
        speeds = []
        for count in (1, threads):
            seconds = []
            for _ in range(rounds):
                with ThreadPoolExecutor(count) as pool:
                    begun = time.perf_counter()
                    list(pool.map(function, [data] * count))
                    seconds.append(time.perf_counter() - begun)
            speeds.append(count * len(data) / statistics.median(seconds) / 1e9)
        print(f"{name:12} {speeds[0]:7.2f} GB/s {speeds[1]:7.2f} GB/s")
    print()


def time_model(folder: Path, rounds: int) -> None:
    """Time opening MAR-B with KL-16."""
    path = folder / "model.safetensors"
    Pipeline(MAR(MODELS["mar-base"]), kl16()).save(path)
    compare("open a model", path, lambda: Pipeline.open(path), rounds)
    path.unlink()


def time_state(folder: Path, rounds: int, size: float) -> None:
    """Time saving and loading a run's state of so many GB."""
    count = int(size * 1e9 / 4 / TENSORS)
    state: dict[str, Any] = {"model": {str(i): torch.randn(count) for i in range(TENSORS)}}
    run, totals, shares = RunState(folder), [], []
    digests = checksums.file_digests
    for number in range(3):
        within = 0.0

        def timed(paths: Any) -> dict[str, str]:
            nonlocal within
            begun = time.perf_counter()
            result = digests(paths)
            within += time.perf_counter() - begun
            return result

        begun = time.perf_counter()
        with mock.patch.object(checksums, "file_digests", timed):
            run.save(number, state, keep=1)
        totals.append(time.perf_counter() - begun)
        shares.append(within)
    total, share = statistics.median(totals), statistics.median(shares)
    print(f"{'save a state':28} {total - share:8.2f} {total:8.2f} {total / (total - share):6.2f}")
    compare("load a state", folder, lambda: run.load(state), rounds)
    shutil.rmtree(folder)


def time_cache(folder: Path, rounds: int, count: int) -> None:
    """Time reading all latents of a cache of KL-16's moments, once."""
    manifest = CacheManifest(
        data="random", source="", pictures=count, size=(256, 256), flips=True, dtype="fp16", shard=SHARD,
        tokenizer="kl16", fingerprint="", parts=2, shape=(16, 16, 16), classes=(),
    )  # fmt: skip
    folder.mkdir()
    write_manifest(folder, manifest)
    for number in range(manifest.shards):
        moments, labels = empty_shard(manifest, len(manifest.span(number)))
        write_shard(folder / manifest.file(number), moments.normal_(), labels, {})
    write_index(folder, manifest)

    def read() -> None:
        source = LatentSource(folder)
        for index in range(count):
            source.read(index, index % 2 == 0)

    compare("open a cache", folder, lambda: LatentSource(folder), rounds)
    compare(f"read {count:,} latents", folder, read, rounds)
    shutil.rmtree(folder)


def compare(what: str, path: Path, action: Callable[[], object], rounds: int) -> None:
    """Print an action's seconds without and with checksums, in turns."""
    for kind in ("warm", "cold"):
        seconds: dict[str, list[tuple[float, float, float]]] = {"off": [], "on": []}
        action()
        for _ in range(rounds if kind == "warm" else max(rounds // 2, 1)):
            for switch, values in seconds.items():
                checksums._compared.clear()
                if kind == "cold":
                    drop_pages(path)
                with mock.patch.dict(os.environ, {"MAR_CHECKSUMS": switch}):
                    begun, cpu, disk = time.perf_counter(), time.process_time(), bytes_read()
                    action()
                    values.append((time.perf_counter() - begun, time.process_time() - cpu, float(bytes_read() - disk)))
        off, on = ([statistics.median(column) for column in zip(*seconds[switch], strict=True)] for switch in seconds)
        print(
            f"{f'{what}, {kind}':28} {off[0]:8.2f} {on[0]:8.2f} {on[0] / off[0]:6.2f} {off[1]:10.2f} {on[1]:9.2f} "
            f"{on[2] / 1e9:6.2f} GB"
        )


def drop_pages(path: Path) -> None:
    """Drop a file, or those of a folder, from the page cache."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """Return the bytes read from disks by this process; 0 if they are unknown."""
    facts = Path("/proc/self/io")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


if __name__ == "__main__":
    main()
