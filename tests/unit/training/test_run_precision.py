"""What a run's precision sets on CUDA: TF32, and what snapshots are drawn in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import open_tiny_run, tiny_train_config, write_images

from mar.nn import Linear
from mar.pipeline import Pipeline
from mar.training import callbacks, trainer
from mar.training.callbacks import export_and_sample, take_snapshot
from mar.training.log import Log


@pytest.mark.parametrize("tf32", [False, True])
def test_run_sets_tf32_explicitly(tf32: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(trainer, "configure", lambda device, tf32: calls.append((device, tf32)))
    open_tiny_run(tiny_train_config(write_images(tmp_path), tf32=tf32), tmp_path / "run")
    assert calls == [(torch.device("cpu"), tf32)]


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cpu", "bf16", torch.float32), ("cuda", "bf16", torch.bfloat16), ("cuda", "fp32", torch.float32)],
)
def test_snapshot_is_drawn_in_the_precision_of_a_run_on_cuda(
    device: str, precision: str, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_tiny_run(tiny_train_config(write_images(tmp_path), precision=precision), tmp_path / "run")
    made = callbacks.make_pipeline(run)
    monkeypatch.setattr(callbacks, "make_pipeline", lambda run, weights: made)
    run.device = torch.device(device)  # named only: everything stays on the CPU
    snapshot = take_snapshot(run)
    drawn: list[set[torch.dtype]] = []

    def share(pipeline: Pipeline, *arguments: Any) -> list[Any]:
        drawn.append({m.weight.dtype for m in pipeline.model.modules() if isinstance(m, Linear)})
        return pipeline.sample(labels=[0] * 8, seeds=range(8))

    monkeypatch.setattr(callbacks, "sample_share", share)
    export_and_sample(snapshot, Log())
    assert drawn[0] == {expected}
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    assert {t.dtype for name, t in tensors.items() if name.startswith("model.")} == {torch.float32}
