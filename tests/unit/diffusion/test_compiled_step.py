"""The compiled guided step: its kernels, its numbers, and what happens if compiling fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import noise, tiny_model

from mar.config import SamplingConfig

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_compiled_step_has_few_kernels_and_the_same_numbers() -> None:
    """In a process of its own: the checks of types would be compiled, too."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["compiled"] <= 30 < 80 <= found["plain"]
    assert found["difference"] < 1e-4


@torch.no_grad()
def test_compiled_step_that_fails_falls_back_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("no compiler\nmore lines")

    head, sampling = tiny_model().head, SamplingConfig(diffusion_steps=5)
    arguments = noise(8, 16), noise(5, 4, 2), torch.full((4, 1), 2.0)
    expected = head.sample(*arguments, 5, sampling)
    monkeypatch.setattr("mar.diffusion.head.compiled_ancestral", refuse)
    head.compile_steps = True
    with pytest.warns(UserWarning, match="can't compile the head, sampling without: no compiler$"):
        assert torch.equal(head.sample(*arguments, 5, sampling), expected)
    assert torch.equal(head.sample(*arguments, 5, sampling), expected)


def test_head_compiles_its_steps_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAR_COMPILE_HEAD", "1")
    assert tiny_model().head.compile_steps
    monkeypatch.delenv("MAR_COMPILE_HEAD")
    assert not tiny_model().head.compile_steps
