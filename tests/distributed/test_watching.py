"""Two processes look at a run as one does, the model on each or in shares: samples, validation loss, evaluation."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tiny import open_tiny_run, tiny_config, tiny_train_config, write_images
from tiny import tiny_pipeline as tiny_pipeline
from torch import nn

from mar.config import SamplingConfig, TrainConfig
from mar.evaluation.features import ModuleExtractor
from mar.evaluation.session import OnlineEvaluator
from mar.training import callbacks
from mar.training.callbacks import Snapshot, Validation, export_and_sample, on_snapshot
from mar.training.log import open_log
from mar.training.trainer import Run, train

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
MODEL = tiny_config(channels=1, grid=(8, 8), patch_size=2, classes=2, attention_dropout=0.0, projection_dropout=0.0)
STRATEGIES = ("ddp", "fsdp")
COUNT = 6
"""Pictures of an evaluation; their reference has 20."""


def settings(data: Path, strategy: str) -> TrainConfig:
    """Return the settings of a run whose weights hardly move.

    Rounding apart, its EMA and raw weights are the initial ones.
    """
    return tiny_train_config(
        data, model=MODEL, strategy=strategy, batch=8, images=8, lr=1e-30, weight_decay=0.0, hold_out=3, init="awake",
        sampling=SamplingConfig(3, 4, x0_bound=1.0),
    )  # fmt: skip


def seen(run: Run, data: Path) -> dict[str, Any]:
    """What this process finds, and how many pictures it judged."""
    judged: list[int] = []
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    judge = OnlineEvaluator(ModuleExtractor(network, "means", recipe="2 x 2"), str(data), COUNT, batch=4)
    network.register_forward_hook(lambda module, inputs, output: judged.append(len(output)))
    found: dict[str, Any] = {}

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        return {f"{weights}_distance": judge(snapshot.pipeline(weights)).distance for weights in snapshot.weights}

    def both(snapshot: Snapshot) -> dict[str, float]:
        found.update(look(snapshot), **evaluate(snapshot))
        return found

    log = open_log(run)
    look = Validation(run, log)
    on_snapshot(run, log, 8, lambda snapshot: export_and_sample(snapshot, log))
    on_snapshot(run, log, 8, both)
    try:
        assert train(run, log)
    finally:
        log.close()
    return {**found, "judged": sum(judged), "groups": len(look.groups or ())}


def opened(data: Path, folder: Path, strategy: str = "ddp") -> Run:
    whole = tiny_pipeline(**{name: getattr(MODEL, name) for name in ("grid", "patch_size", "classes")})
    return open_tiny_run(settings(data, strategy), folder, lambda name: whole)


def one_of_two(rank: int, folder: Path, data: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    callbacks.GROUP_SIZE = 2
    for strategy in STRATEGIES:
        meet = f"file://{folder / f'meet-{strategy}'}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
        try:
            found = seen(opened(data, folder / strategy, strategy), data)
            (folder / f"{strategy}-{rank}.json").write_text(json.dumps(found))
        finally:
            gc.collect()
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, by each strategy, and one alone."""
    folder = tmp_path_factory.mktemp("watching")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "GROUP_SIZE", 2)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the two have: their number shows in the last bits
        (folder / "alone.json").write_text(json.dumps(seen(opened(data, folder / "alone"), data)))
        torch.set_num_threads(threads)
    processes.spawn_ranks(2, one_of_two, folder, data)
    return folder


def results(folder: Path, strategy: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{strategy}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validation_loss_of_two_ranks_is_bitwise_that_of_one(folder: Path, strategy: str) -> None:
    alone = json.loads((folder / "alone.json").read_text())
    for found in results(folder, strategy):
        names = [name for name in alone if name.startswith("val_loss")]
        assert len(names) == 11
        assert [found[name] for name in names] == [alone[name] for name in names]  # to the bit
    assert [found["groups"] for found in results(folder, strategy)] == [2, 1]
    assert alone["groups"] == 3
    logged = [json.loads(line) for line in (folder / strategy / "log.jsonl").read_text().splitlines()]
    (line,) = [line for line in logged if "val_loss" in line]
    assert (line["images"], line["val_loss"]) == (8, alone["val_loss"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_samples_of_two_ranks_match_one(folder: Path, strategy: str) -> None:
    for name in ("000000000008.png", "000000000008-raw.png"):
        one, two = (np.asarray(Image.open(folder / run / "samples" / name), int) for run in ("alone", strategy))
        assert one.shape == two.shape == (32, 16)
        assert one.std() > 10
        assert np.abs(one - two).max() <= 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluation_is_shared_by_ranks(folder: Path, strategy: str) -> None:
    alone = json.loads((folder / "alone.json").read_text())
    both = results(folder, strategy)
    for weights in ("ema", "raw"):
        name = f"{weights}_distance"
        assert both[0][name] == both[1][name] == pytest.approx(alone[name], rel=1e-3)
    assert alone["judged"] == 20 + 2 * COUNT
    assert [found["judged"] for found in both] == [10 + COUNT, 10 + COUNT]
