"""Peak memory of generating one image, tokenizer included, relative to the weights.

    python benchmarks/memory.py [--model mar-huge] [--dtype fp32 bf16 int8]

Weights are random, of the size of the official ones. By default there are few reveal steps with many tokens each, so
that no step of a usual run takes more. `--steps 64` shows what accumulates from step to step, such as oneDNN's kernels.
Each precision is measured in its own process. Linux only: its kernel counts the peak.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from sampling import random_model

from mar.devices import torch_dtype
from mar.pipeline import Pipeline
from mar.published import MODELS
from mar.tokenizer.kl import kl16


def resident(line: str) -> int:
    """Read this process's memory in bytes: VmRSS, now, or VmHWM, the peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(entry for entry in status.splitlines() if entry.startswith(line)).split()[1])


def measure(name: str, dtype: str, steps: int, diffusion_steps: int) -> None:
    program = resident("VmRSS")
    pipeline = Pipeline(random_model(name), kl16()).to("cpu", torch_dtype(dtype))  # type: ignore[arg-type]
    loaded = resident("VmRSS") - program
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    pipeline.sample(
        [0], [0], steps=steps, diffusion_steps=diffusion_steps, guidance_scale=3.0, x0_bound=3.0, allow_broken=True
    )
    peak = resident("VmHWM") - program
    print(
        f"{name} {dtype}: {loaded / 1e9:.2f} GB loaded (model and tokenizer), {peak / 1e9:.2f} GB at the peak of an "
        f"image, {peak / loaded - 1:+.0%}; the program itself {program / 1e9:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="mar-huge")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16", "int8"), default=["fp32", "bf16", "int8"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--diffusion-steps", type=int, default=20)
    options = parser.parse_args()
    settings = ["--steps", str(options.steps), "--diffusion-steps", str(options.diffusion_steps)]
    if len(options.dtype) == 1:
        measure(options.model, options.dtype[0], options.steps, options.diffusion_steps)
        return
    for dtype in options.dtype:
        subprocess.run([sys.executable, __file__, "--model", options.model, "--dtype", dtype, *settings], check=True)


if __name__ == "__main__":
    main()
