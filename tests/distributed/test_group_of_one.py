"""A process group of one process, on request."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from tiny import open_tiny_run, tiny_train_config, write_images
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from mar import distributed
from mar.cli import main
from mar.config import ConfigError, TrainConfig
from mar.training.log import Log
from mar.training.parallelize import full_state_dict
from mar.training.trainer import train

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp": FSDPModule}


def learn(rank: int, port: int, folder: Path, config: TrainConfig, of_one: bool) -> None:
    """Train in a process that torchrun would start, and leave the weights in a file."""
    torch.set_num_threads(1)
    monkeypatch = pytest.MonkeyPatch()
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    with distributed.process_group("cpu", of_one=of_one):
        assert distributed.in_group() == of_one
        train_and_save(folder, config, of_one)
    assert not distributed.in_group()


def train_and_save(folder: Path, config: TrainConfig, of_one: bool) -> None:
    run = open_tiny_run(config, folder / "run")
    assert isinstance(run.loss, WRAPPERS[config.strategy]) == of_one
    assert train(run, Log())
    torch.save(full_state_dict(run.model.state_dict()), folder / "weights.pt")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_group_of_one_trains_the_same_weights(strategy: str, tmp_path: Path) -> None:
    data = write_images(tmp_path / "pictures")
    config = tiny_train_config(data, strategy=strategy, accumulate=2)
    weights = []
    for of_one in (False, True):
        folder = tmp_path / str(of_one)
        folder.mkdir()
        processes.spawn_ranks(1, learn, processes.free_port(), folder, config, of_one)
        weights.append(torch.load(folder / "weights.pt", weights_only=True))
    alone, in_group = weights
    assert set(alone) == set(in_group)
    for name, value in alone.items():
        torch.testing.assert_close(in_group[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_group_of_one_without_torchrun_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(ConfigError, match="expected `torchrun --nproc-per-node 1"),
        distributed.process_group(of_one=True),
    ):
        pass
    assert main(["train", "fashion", "--group-of-one", "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mar: --group-of-one: got no torchrun")
    assert said.count("\n") == 1
