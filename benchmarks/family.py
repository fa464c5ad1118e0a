"""Whole pictures of published models on this machine: seconds, and peak memory.

    python benchmarks/family.py [--models mar-base mar-base:fast emigm-xs emigm-xs-512] [--repeats 3] [--threads 2]

Weights are random, of the published shapes: neither time nor memory depends on their values. Each model draws one
picture by its published settings, or by a preset after a colon, and decodes it, in a process of its own. Rounds are in
turns; the table has medians, and each model's time in that of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

MODELS = ("mar-base", "mar-base:fast", "emigm-xs", "emigm-xs-512")
X0_BOUND = 3.0
"""Bound of x_0. Without it, random weights would give numbers that are not finite."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME[:PRESET]")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", metavar="NAME[:PRESET]", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(draw(options.one, options.threads)))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in options.models}
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # as `mar` sets it
    for turn in range(options.repeats):
        for name in options.models:
            command = [sys.executable, str(Path(__file__)), "--one", name, "--threads", str(options.threads)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            rounds[name].append(json.loads(answer.splitlines()[-1]))
            print(f"round {turn + 1}: {name} {rounds[name][-1]}", file=sys.stderr, flush=True)
    medians = {
        name: {key: statistics.median(one[key] for one in values) for key in values[0]}
        for name, values in rounds.items()
    }
    first = next(iter(medians.values()))
    heads = ("M parameters", "latents s", "decode s", "of the first", "CPU s", "peak MiB")
    print(f"{'model':20} " + " ".join(f"{head:>12}" for head in heads))
    for name, m in medians.items():
        share = (m["latents"] + m["decode"]) / (first["latents"] + first["decode"])
        figures = (m["parameters"] / 1e6, m["latents"], m["decode"], share, m["cpu"], m["peak"])
        cells = (f"{value:12.{digits}f}" for value, digits in zip(figures, (0, 2, 2, 3, 1, 0), strict=True))
        print(f"{name:20} " + " ".join(cells))


def draw(name: str, threads: int) -> dict[str, float]:
    """Draw and decode one picture of a model with random weights."""
    import torch
    from torch import nn

    from mar.model.mar import MAR
    from mar.presets import apply_preset
    from mar.published import PUBLISHED
    from mar.sampling.generate import generate

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model_name, _, preset = name.partition(":")
    published = PUBLISHED[model_name]
    model = MAR(published.config).eval().requires_grad_(False)
    for parameter in model.head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    tokenizer = random_tokenizer(published.tokenizer)
    sampling = apply_preset(published.sampling, published.config.tokens, preset or "exact")
    sampling = replace(sampling, x0_bound=X0_BOUND)
    start, cpu = time.perf_counter(), time.process_time()
    *_, last = generate(model, [0], [0], sampling, allow_broken=True)
    drawn = time.perf_counter()
    with torch.inference_mode():
        tokenizer.decode(last.latents)
    decoded = time.perf_counter()
    return {
        "cpu": time.process_time() - cpu,
        "latents": drawn - start,
        "decode": decoded - drawn,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def random_tokenizer(name: str) -> Any:
    """Create a published tokenizer with random weights; DC-AE f32c32 is what diffusers builds by default."""
    from diffusers import AutoencoderDC

    from mar.tokenizer.dc import DCTokenizer
    from mar.tokenizer.kl import kl16
    from mar.tokenizer.vit import ViTConfig, ViTTokenizer

    if name == "dc-ae":
        return DCTokenizer(AutoencoderDC(scaling_factor=0.3189))
    return kl16() if name == "kl16" else ViTTokenizer(ViTConfig())


if __name__ == "__main__":
    main()
