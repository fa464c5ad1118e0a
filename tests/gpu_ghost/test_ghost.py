"""What a GPU would refuse or wait for, seen without one: no operation on two devices, few waits, clean captures.

`guard.cpp` makes a device for a PyTorch without CUDA, `ghost.py` its tensors, and `scenarios.py` runs the package on
them, in a process of its own. Nothing here says that a kernel is right on a GPU, or how fast it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WAITS_OF_REVEAL_STEP = 2
"""Points of a reveal step where the host waits, at most; the first step uploads what a batch needs."""
WAITS_OF_TRAINING_STEP = 10
"""The same of a training step."""
SAMPLING = {
    "sampling": 1e-4, "sampling of residuals": 1e-4, "sampling by dpm++": 1e-4,
    "sampling of fewer diffusion steps": 1e-4, "sampling in bf16": 0.2,
}  # fmt: skip
"""Largest difference between tokens on the CPU and on the ghost; operations are fused in other ways."""
TRAINING = {"training": 1e-5, "training in bf16": 0.05, "training with checkpointing": 1e-5, "training by muon": 1e-3}
OTHERS = {"pipeline": 1e-4, "cache": 1e-3, "tokenizer": 1e-3}

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the device is loaded as a Linux library"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler, c++"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs a PyTorch without CUDA"),
]


@cache
def library() -> Path:
    """Build the device, once for each version of PyTorch and of the source."""
    source = HERE / "guard.cpp"
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    path = ROOT / "build" / "gpu_ghost" / f"guard-{key}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        include = Path(torch.__file__).parent / "include"
        folders = [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
        part = path.with_suffix(f".{os.getpid()}")
        command = ["c++", "-O1", "-w", "-shared", "-fPIC", "-std=c++17", str(source), "-o", str(part), *folders]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"the device can't be built: {done.stderr.strip().splitlines()[-1][:200]}")
        part.replace(path)
    return path


@cache
def run(*names: str) -> dict[str, dict[str, Any]]:
    """Run scenarios; return what each recorded."""
    folders = [str(ROOT / "src"), str(ROOT / "tests"), str(HERE)]
    environment = {**os.environ, "GHOST_LIBRARY": str(library()), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    command = [sys.executable, str(HERE / "scenarios.py"), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


def found(name: str) -> dict[str, Any]:
    """Return what a scenario recorded; scenarios of a kind share a process."""
    group = next(group for group in (SAMPLING, TRAINING, OTHERS) if name in group)
    return run(*group)[name]


@pytest.mark.parametrize("name", [*SAMPLING, *TRAINING, *OTHERS])
def test_ghost_finds_no_operation_on_two_devices(name: str) -> None:
    recorded = found(name)
    assert recorded["mixed"] == {}
    assert recorded["kernels"] > 100


@pytest.mark.parametrize(("name", "most"), [*SAMPLING.items(), *TRAINING.items(), *OTHERS.items()])
def test_ghost_computes_what_the_cpu_computes(name: str, most: float) -> None:
    assert found(name)["difference"] <= most


@pytest.mark.parametrize("name", [*SAMPLING, "pipeline"])
def test_ghost_captures_nothing_forbidden_in_graphs(name: str) -> None:
    recorded = found(name)
    assert recorded["forbidden"] == {}
    assert recorded["replays"] > 0


@pytest.mark.parametrize("name", SAMPLING)
def test_ghost_reveal_step_waits_at_most_twice(name: str) -> None:
    recorded = found(name)
    assert len(recorded["waits_of_steps"]) > 4
    assert max(recorded["waits_of_steps"][1:]) <= WAITS_OF_REVEAL_STEP, recorded["waits"]


@pytest.mark.parametrize("name", ["training", "training in bf16", "training with checkpointing"])
def test_ghost_training_step_waits_a_fixed_number_of_times(name: str) -> None:
    recorded = found(name)
    assert max(recorded["waits_of_steps"][1:]) <= WAITS_OF_TRAINING_STEP, recorded["waits"]


def test_ghost_records_each_kind_of_fault() -> None:
    """Code with a wait, two devices and a copy within a capture, to see that all of them would be found."""
    recorded = run("faults")["faults"]
    assert any("add" in key for key in recorded["mixed"])
    assert any("_local_scalar_dense" in key for key in recorded["waits"])
    assert any("mask as an index" in key for key in recorded["waits"])
    assert any("copy to the device" in key for key in recorded["forbidden"])
    assert recorded["waits_of_pinned_copies"] == 0
