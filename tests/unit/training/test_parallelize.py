"""Activation checkpointing changes neither loss nor gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import compiled_step
import pytest
import tiny
import torch
from torch import Tensor

from mar.backends.cpu import linear as mar_linear
from mar.backends.cpu.linear import has_onednn
from mar.config import ActivationCheckpointing, TrainConfig, from_dict, to_dict
from mar.training.loss import DiffusionLoss, sample_randomness
from mar.training.parallelize import parallelize

MODEL = tiny.tiny_config(attention_dropout=0.2, projection_dropout=0.3)


def gradients(recompute: ActivationCheckpointing) -> dict[str, Tensor]:
    """Of one step, dropout on."""
    loss = DiffusionLoss(tiny.randomize(tiny.MAR(MODEL)).train())
    settings = TrainConfig(model=MODEL, batch=3, activation_checkpointing=recompute)
    forward = parallelize(loss, (), settings, torch.device("cpu"))
    torch.manual_seed(0)
    draws = sample_randomness(MODEL, 0, 1, range(3))
    value = forward(tiny.noise(3, 2, 4, 4), torch.tensor([0, 1, 2]), draws)
    value.backward()
    return {"loss": value.detach(), **{name: p.grad for name, p in loss.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("onednn", [False, True])
def test_activation_checkpointing_gives_the_same_step(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if onednn and not has_onednn():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(mar_linear, "onednn_is_faster", lambda: onednn)
    monkeypatch.setattr(mar_linear, "MIN_MULTIPLICATIONS", 1)
    kept = gradients("none")
    assert kept["model.encoder.0.fc1.weight"].any()
    assert kept["model.head.blocks.0.modulation.weight"].any()
    for mode in ("selective", "full"):
        again = gradients(mode)
        assert set(again) == set(kept)
        assert [name for name in kept if not torch.equal(again[name], kept[name])] == []


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compile_with_checkpointing_compiles_few_graphs(recompute: ActivationCheckpointing) -> None:
    script = Path(compiled_step.__file__)  # shape checks, which pytest adds to every function, can't be compiled
    done = subprocess.run([sys.executable, script, recompute], capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["frames"] > 0
    assert found["frames"] == found["frames_compiled"]
    assert found["graph_breaks"] == {}
    assert 0 < found["graphs"] <= 8
    assert found["plain_losses"] == pytest.approx(found["losses"], rel=1e-5)
    assert found["largest_gradient"] > 0.01
    assert found["largest_difference"] < 1e-4 * found["largest_gradient"]


def test_activation_checkpointing_of_older_runs_is_read() -> None:
    settings = {k: v for k, v in to_dict(TrainConfig()).items() if k != "activation_checkpointing"}
    for noted, meant in ((True, "full"), (False, "none"), ("selective", "selective")):
        assert from_dict(TrainConfig, {**settings, "recompute": noted}).activation_checkpointing == meant
