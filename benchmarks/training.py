"""Cost of training, compared with the reference: loading latents, a step of MAR-B, activation checkpointing.

    python benchmarks/training.py [--only loader step recompute] [--model mar-base] [--batch 8] [--rounds 3]

Both sides are measured in turns, each the median of its rounds, so that a ratio is of one run. Steps run in processes
of their own, since each has its own peak of memory. Weights and latents are random: time does not depend on them. All
steps mask the mean number of tokens, 222 of 256. On a machine that is not idle, compare processor time, not wall time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latent_cache import both_stores
from sampling import PRODUCT, REFERENCE_GFLOPS, product_speed
from steps import Clock, Ours, Theirs, clocked, mean_steps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mar.config import TrainConfig
from mar.data.images import Transform
from mar.data.loader import batches
from mar.published import MODELS

REFERENCE_SECONDS, REFERENCE_PEAK = 32.0, 12.5e9
"""Seconds and peak memory of a step of the reference's MAR-B: batch 8, float32, PRODUCT at REFERENCE_GFLOPS."""
MODES = ("none", "selective", "full")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(measure_steps(options)))
        return
    fp32, bf16 = product_speed(torch.float32), product_speed(torch.bfloat16)
    rows, inputs, outputs = PRODUCT
    print(
        f"product {rows}x{inputs}x{outputs}: {fp32:.0f} GFLOP/s in fp32, {bf16:.0f} in bf16; {options.threads} threads"
    )
    if "loader" in options.only:
        compare_loaders(options.rounds, options.pictures)
    if "step" in options.only:
        compare_steps(options, fp32, bf16)
    if "recompute" in options.only:
        compare_recomputing(options)
    print(f"\nproduct at the end: {product_speed(torch.float32):.0f} GFLOP/s in fp32")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("loader", "step", "recompute"),
                        default=("loader", "step", "recompute"))  # fmt: skip
    parser.add_argument("--model", choices=MODELS, default="mar-base", help="model whose step is measured")
    parser.add_argument("--large", choices=MODELS, default="mar-large", help="model for activation checkpointing")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps of a round, after one warm-up step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=1024, help="number of latents to read")
    parser.add_argument("--bf16", choices=("auto", "yes", "no"), default="auto", help="auto: if it is not slower")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


class Archives(Dataset[tuple[Tensor, int]]):
    """One .npz per image, flipped at random, as the reference reads them."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with np.load(self.files[index]) as file:
            return torch.from_numpy(file["moments" if torch.rand(1) < 0.5 else "moments_flip"]), 0


def compare_loaders(rounds: int, count: int, batch: int = 64) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, folder = both_stores(Path(name), count)

        def cache() -> None:
            loader = batches(source, Transform(source.manifest.size), batch=batch, seed=0)
            for _ in range(count // batch):
                next(loader)

        def archives() -> None:
            for _ in DataLoader(Archives(folder), batch, shuffle=True):
                pass

        times: dict[str, list[Clock]] = {"cache": [], "npz": []}
        for _ in range(rounds + 1):
            times["npz"].append(clocked(archives))
            times["cache"].append(clocked(cache))
    seconds = {name: median(clocks[1:]) for name, clocks in times.items()}
    print(f"\nloading batches of {batch} latents, {count} in all: microseconds per image (wall, processor)")
    for name, clock in seconds.items():
        print(f"  {name:<6} {1e6 * clock['wall'] / count:8.1f} {1e6 * clock['cpu'] / count:8.1f}")
    ratios = [seconds["npz"][kind] / seconds["cache"][kind] for kind in ("wall", "cpu")]
    print(f"the cached loader is {ratios[0]:.1f} times as fast by wall time, {ratios[1]:.1f} by processor time")


def compare_steps(options: argparse.Namespace, fp32: float, bf16: float) -> None:
    kinds = ["reference", "none"]
    if options.bf16 == "yes" or (options.bf16 == "auto" and bf16 >= fp32):
        kinds.append("bf16")
    else:
        print("\nbf16 is emulated on this processor, slower than fp32: not measured")
    reports = in_turns(options, options.model, kinds)
    print(f"\na training step of {options.model}, batch {options.batch}; seconds (wall, processor), and the peak")
    for kind, one in reports.items():
        name = {"reference": "the reference's step", "none": "ours", "bf16": "ours in bf16"}[kind]
        print(f"  {name:<20}{one['wall']:8.1f}{one['cpu']:8.1f}{one['peak'] / 1e9:8.2f} GB")
    theirs, ours = reports["reference"], reports["none"]
    for kind in kinds[1:]:
        ratios = [theirs[clock] / reports[kind][clock] for clock in ("wall", "cpu")]
        name = "fp32" if kind == "none" else kind
        print(f"{name}: {ratios[0]:.2f} times as fast by wall time, {ratios[1]:.2f} by processor time")
    print(f"peak: {ours['peak'] / theirs['peak']:.2f} of the reference's step")
    print("parts: processor seconds (wall seconds)")
    for part in ours["parts"]:
        cells = [f"{one['parts'][part]['cpu']:8.2f} ({one['parts'][part]['wall']:6.2f})" for one in (theirs, ours)]
        print(f"  {part:<12} reference {cells[0]}, ours {cells[1]}")
    print(
        f"the reference itself took {REFERENCE_SECONDS:.0f} s and {REFERENCE_PEAK / 1e9:.1f} GB on a machine with "
        f"{REFERENCE_GFLOPS:.0f} GFLOP/s; at this machine's speed {REFERENCE_SECONDS * REFERENCE_GFLOPS / fp32:.0f} s"
    )


def compare_recomputing(options: argparse.Namespace) -> None:
    reports = in_turns(options, options.large, MODES)
    print(
        f"\nactivation checkpointing, {options.large}, batch {options.batch}: seconds (wall, processor), peak, and the "
        "part of it that is neither weights, gradients, optimizer state, EMA nor program"
    )
    base = reports["none"]
    for mode, one in reports.items():
        less, longer = 1 - one["rest"] / base["rest"], one["cpu"] / base["cpu"] - 1
        print(
            f"  {mode:<10}{one['wall']:8.1f}{one['cpu']:8.1f}{one['peak'] / 1e9:8.2f} GB{one['rest'] / 1e9:8.2f} GB, "
            f"{less:4.0%} less, {longer:+4.0%} processor time"
        )


def in_turns(options: argparse.Namespace, model: str, kinds: Any) -> dict[str, Any]:
    """Run the processes of each kind in turns; return medians of times and parts, and the highest peak."""
    reports: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind in kinds:
            settings = {"model": model, **{n: getattr(options, n) for n in ("batch", "steps", "threads")}}
            flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
            command = [sys.executable, __file__, "--child", kind, *flags]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            reports[kind].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        kind: {
            **median([step for one in rounds for step in one["steps"]]),
            "parts": {part: median([one["parts"][part] for one in rounds]) for part in rounds[0]["parts"]},
            **{name: max(one[name] for one in rounds) for name in ("peak", "rest")},
        }
        for kind, rounds in reports.items()
    }


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the steps of one kind, in this process."""
    before = peak()
    config = TrainConfig(model=MODELS[options.model], batch=options.batch)
    if options.child in MODES:
        config = replace(config, activation_checkpointing=options.child)
    elif options.child == "bf16":
        config = replace(config, precision="bf16")
    torch.manual_seed(0)
    latents, labels = torch.randn(options.batch, 16, 16, 16), torch.zeros(options.batch, dtype=torch.long)
    kind: Callable[..., Any] = Theirs if options.child == "reference" else Ours
    side = kind(config, latents, labels)
    numbers = mean_steps(config.model, options.steps + 2)
    side.step(numbers[0])
    steps = [clocked(lambda number=number: side.step(number)) for number in numbers[1:-1]]
    highest = peak()
    state = 5 * 4 * sum(p.numel() for p in side.model.parameters())
    return {"steps": steps, "peak": highest, "rest": highest - before - state, "parts": side.parts(numbers[-1])}


def median(clocks: list[Clock]) -> Clock:
    return {kind: statistics.median(clock[kind] for clock in clocks) for kind in ("wall", "cpu")}


def peak() -> float:
    """Return the peak memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
