"""Preflight: estimates of memory and disk, and warnings about settings."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from shard_files import write_tar_shards
from tiny import tiny_train_config, write_images
from torch.profiler import ProfilerActivity, profile

from mar import devices
from mar.checkpoint.files import CheckpointError
from mar.config import ActivationCheckpointing, HeadConfig, ModelConfig, TrainConfig, TrunkConfig
from mar.data.sources import open_data, open_source
from mar.data.splits import train_val_split
from mar.model.mar import MAR
from mar.presets import FASHION, recipe
from mar.published import MODELS
from mar.training import preflight
from mar.training.loss import DiffusionLoss, sample_randomness
from mar.training.parallelize import parallelize
from mar.training.preflight import (
    activation_floats,
    estimate,
    learning_rate_warning,
    memorization_warning,
    precision_hint,
)

SMALL = TrunkConfig(width=96, depth=2, num_heads=6)
CONFIGS = {
    "fashion": FASHION.model,
    "latents": ModelConfig(
        grid=(8, 8),
        encoder=SMALL,
        decoder=SMALL,
        head=HeadConfig(128, 2),
        buffer_size=16,
        classes=5,
        mask_ratio_min=0.7,
    ),
    "deep head": ModelConfig(
        grid=(4, 4), encoder=SMALL, decoder=SMALL, head=HeadConfig(160, 6), buffer_size=4, classes=5, mask_ratio_min=0.9
    ),
}


def most(config: ModelConfig, images: int, recompute: ActivationCheckpointing) -> int:
    """Bytes that forward and backward pass of one step hold at once, at most; weights and gradients apart."""
    run = TrainConfig(model=config, batch=images, activation_checkpointing=recompute)
    forward = parallelize(DiffusionLoss(MAR(config).train()), (), run, torch.device("cpu"))
    draws = sample_randomness(config, 0, 1, range(images))
    latents, labels = torch.randn(images, config.channels, *config.grid), torch.zeros(images, dtype=torch.long)
    forward(latents, labels, draws).backward()  # the gradients are there now
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward(latents, labels, draws).backward()
    held = highest = 0
    for event in profiled.profiler.kineto_results.events():  # in the order of time
        held += event.nbytes() if event.name() == "[memory]" else 0
        highest = max(highest, held)
    return highest


@pytest.mark.parametrize("recompute", get_args(ActivationCheckpointing))
@pytest.mark.parametrize("name", CONFIGS)
def test_estimate_of_activations_is_within_a_third(name: str, recompute: ActivationCheckpointing) -> None:
    said = 4 * activation_floats(CONFIGS[name], 4, recompute)
    assert said == pytest.approx(most(CONFIGS[name], 4, recompute), rel=1 / 3)


@pytest.mark.parametrize(
    ("name", "batch", "counted"),
    [("mar-base", 8, 2.90), ("mar-large", 64, 34.8), ("mar-base", 256, 80.0)],
)
def test_estimate_of_bf16_is_within_a_tenth_of_what_was_counted(name: str, batch: int, counted: float) -> None:
    """Bytes kept for the backward pass, counted operation by operation on CUDA tensors without memory."""
    run = TrainConfig(model=MODELS[name], batch=batch, precision="bf16")
    assert estimate(run).activations / 1e9 == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(("checkpointing", "peak"), [("none", 3.00), ("selective", 1.98), ("full", 0.94)])
def test_estimate_of_bf16_with_checkpointing_is_within_a_third(checkpointing: str, peak: float) -> None:
    """The peak of a step of MAR-B with batch 8, counted in the same way."""
    run = TrainConfig(model=MODELS["mar-base"], batch=8, precision="bf16", activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    assert estimate(run).activations / 1e9 == pytest.approx(peak, rel=1 / 3)


def test_estimate_with_accumulation_is_smaller() -> None:
    whole, parts = (estimate(replace(FASHION, accumulate=count)).activations for count in (1, 4))
    assert parts == pytest.approx(whole / 4, rel=0.01)


def test_estimate_of_mar_base_state() -> None:
    needs = estimate(TrainConfig(model=MODELS["mar-base"], batch=8))
    assert needs.parameters == pytest.approx(208e6, rel=0.01)
    assert needs.weights == 20 * needs.parameters
    assert "208" in needs.text() or "207" in needs.text()


def test_estimate_with_fsdp_is_smaller_per_process() -> None:
    assert estimate(FASHION, processes=2).activations == pytest.approx(estimate(FASHION).activations / 2, rel=0.01)


def test_too_little_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mar.checkpoint.files.shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(CheckpointError, match="make room"):
        estimate(FASHION).check_disk(tmp_path / "run")


def test_resumed_run_needs_less_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs, disk = estimate(replace(FASHION, keep=2)), SimpleNamespace(free=0)
    weights = 4 * needs.parameters
    monkeypatch.setattr("mar.checkpoint.files.shutil.disk_usage", lambda path: disk)

    def write(name: str, size: int) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)

    def enough(free: int) -> bool:
        disk.free = free
        try:
            needs.check_disk(tmp_path)
        except CheckpointError:
            return False
        return True

    def exactly(free: int) -> bool:
        return enough(free) and not enough(free - 1)

    assert needs.disk == 3 * needs.state + 2 * weights
    assert exactly(needs.disk)
    write("pictures.bin", needs.disk)  # not of what it keeps
    write("state-000000000010/__0_0.distcp", needs.state)
    assert exactly(2 * needs.state + 2 * weights)
    write("model.safetensors", weights)
    assert exactly(2 * needs.state + weights)
    write("state-000000000020/__0_0.distcp", needs.state)
    write("model-raw.safetensors", weights)
    assert exactly(needs.state + weights)  # the next of each, beside those


def test_more_emas_need_memory_and_disk() -> None:
    one, three = (estimate(TrainConfig(ema_others=others)) for others in ((), (0.9, 0.99)))
    assert three.weights - one.weights == 2 * 4 * one.parameters
    assert three.state - one.state == 2 * 4 * one.parameters
    assert three.disk - one.disk == 3 * (three.state - one.state) + 2 * 4 * one.parameters


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"lr": 4 * FASHION.lr}, None),
        ({"batch": 8}, None),
        ({"batch": 128, "lr": 2e-3}, None),
        (
            {"lr": 4.1 * FASHION.lr},
            r"rate is 0.00615 for 32 pictures .*, 4.1 times above the 0.0015 .*; --lr 0.012 ",
        ),
        ({"batch": 4}, r"rate is 0.000188 for 4 pictures a step .*, 8 times below the 0.0015 .*; --lr 0.096 "),
    ],
)
def test_unusual_learning_rate_warns(changes: dict[str, float], words: str | None) -> None:
    warning = learning_rate_warning(replace(FASHION, **changes), FASHION, "fashion")  # type: ignore[arg-type]
    if words is None:
        assert warning is None
        return
    assert warning is not None
    assert warning.startswith("warning: ")
    assert "\n" not in warning
    assert re.search(words, warning)


def test_small_batch_of_an_official_recipe_warns() -> None:
    usual = recipe("imagenet-base")
    warning = learning_rate_warning(replace(usual, batch=64), usual, "imagenet-base")
    assert warning is not None
    assert "32 times below the 0.0008 of the recipe imagenet-base; --lr 0.0032 would be its rate" in warning


@pytest.mark.parametrize("has_it", [False, True])
def test_float32_run_on_a_bfloat16_cpu_is_advised(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "multiplies_bf16", lambda: has_it)
    said = precision_hint(FASHION, torch.device("cpu"))
    assert (said is not None) == has_it
    assert said is None or "--precision bf16" in said
    assert precision_hint(replace(FASHION, precision="bf16"), torch.device("cpu")) is None
    assert precision_hint(FASHION, torch.device("cuda")) is None


def test_few_images_seen_often_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_images(tmp_path, 20))
    config = tiny_train_config(tmp_path, images=2_000)
    warning = memorization_warning(config, source)
    assert warning is not None
    assert warning.startswith("warning: 20 pictures will be seen 100 times each, and a model may memorize them: ")
    assert warning.endswith("(--hold-out 10 --patience 3, and another --out)")
    assert "\n" not in warning
    assert memorization_warning(replace(config, images=1_999), source) is None
    assert memorization_warning(replace(config, patience=3), source) is None
    assert memorization_warning(config, source, warned_length=1_999) == warning
    assert memorization_warning(config, source, warned_length=2_000) is None  # it was said
    learned, _ = train_val_split(source, 5)
    assert "16 pictures will be seen 124 times" in (memorization_warning(replace(config, images=1_999), learned) or "")
    monkeypatch.setattr(preflight, "SMALL_DATASET", 20)
    assert memorization_warning(config, source) is None


def test_stream_length_is_not_checked(tmp_path: Path) -> None:
    stream = open_data(f"stream:{write_tar_shards(tmp_path, (2, 2))}", classes=3)
    assert memorization_warning(FASHION, stream) is None
