"""What a run's precision sets on CUDA: TF32, and what snapshots are drawn in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import open_tiny_run, tiny_train_config, write_images

from mar.cli.train import names_precision
from mar.nn import Linear
from mar.pipeline import Pipeline
from mar.training import callbacks, trainer
from mar.training.callbacks import export_and_sample, take_snapshot
from mar.training.log import Log
from mar.training.run import precision_by_default, save_config


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


def test_precision_by_default_is_the_saved_runs_then_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    plain, half = (tiny_train_config(tmp_path, precision=name) for name in ("fp32", "bf16"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert precision_by_default(plain, tmp_path / "new", cuda) == "bf16"
    assert precision_by_default(plain, tmp_path / "new", cpu) == "fp32"
    assert precision_by_default(half, tmp_path / "new", cpu) == "bf16"  # the recipe's
    save_config(half, tmp_path / "begun")
    assert precision_by_default(plain, tmp_path / "begun", cpu) == "bf16"  # begun on a GPU
    save_config(plain, tmp_path / "begun")  # by a version that had fp32 as the default
    assert precision_by_default(plain, tmp_path / "begun", cuda) == "fp32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert precision_by_default(plain, tmp_path / "new", cuda) == "fp32"


def test_precision_is_named_by_its_option() -> None:
    assert names_precision(["fashion", "--precision", "fp32"])
    assert names_precision(["--precision=bf16"])
    assert not names_precision(["fashion", "--images", "8"])
