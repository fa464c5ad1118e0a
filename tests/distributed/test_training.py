"""Two processes learn what one does: by DDP and by FSDP, whole or in parts, and each goes on with the other's state."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from encoders import save_encoder
from official_run import CONFIG, official_file
from safetensors.torch import load_file
from tiny import caption_images, open_tiny_run, tiny_train_config, write_images
from torch.distributed.tensor import DTensor

from mar.checkpoint import official
from mar.config import ConfigError, TrainConfig
from mar.training.callbacks import export_and_sample, take_snapshot
from mar.training.log import Log, RunLog
from mar.training.parallelize import full_state_dict
from mar.training.run import open_run, resume_official, with_captions
from mar.training.trainer import Callback, Run, train

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
STILL = {"attention_dropout": 0.0, "projection_dropout": 0.0}


def settings(data: Path, **changes: Any) -> TrainConfig:
    """Eight pictures a step for four steps, without dropout, which processes draw each for itself."""
    config = tiny_train_config(data, images=32, batch=8, lr=0.05, **changes)
    model = {**vars(config.model), **STILL}
    return TrainConfig(**{**vars(config), "model": type(config.model)(**model)})


def go(config: TrainConfig, folder: Path, watch: Callable[[Run], None] | None = None) -> Run:
    run = open_tiny_run(config, folder)
    first = not dist.is_initialized() or dist.get_rank() == 0
    log = RunLog(folder, config.images, run.progress.images) if first else Log()
    if watch is not None:
        run.callbacks.append(Callback(8, watch))
    try:
        train(run, log)
    finally:
        log.close()
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {
        f"{which}.{name}": t for which, m in run.weights.items() for name, t in full_state_dict(m.state_dict()).items()
    }


@contextmanager
def joined(rank: int, world: int, folder: Path) -> Iterator[None]:
    """Join a gloo group. The body must keep no run: a DDP outliving its group may deadlock with gloo."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()


def learn(rank: int, world: int, folder: Path, config: TrainConfig) -> None:
    """What one of `world` processes does; the first leaves the weights in a file."""
    with joined(rank, world, folder):
        watched(rank, folder, config)


def watched(rank: int, folder: Path, config: TrainConfig) -> None:
    run = go(config, folder / "run")
    shared = config.strategy == "fsdp"
    assert all(isinstance(p, DTensor) == shared for p in run.model.parameters())
    held = weights(run)
    if rank == 0:
        torch.save(held, folder / "weights.pt")
    export_and_sample(take_snapshot(run), Log())  # in which every process takes part, and which exports


def together(folder: Path, config: TrainConfig, world: int = 2) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    processes.spawn_ranks(world, learn, world, folder, config)
    held: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return held


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert set(a) == set(b)
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-3)) for name in a)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What one process learns."""
    return weights(go(settings(data), tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize(("strategy", "optimizer"), [("ddp", "adamw"), ("fsdp", "muon")])
def test_training_two_ranks_match_one(data: Path, tmp_path: Path, strategy: str, optimizer: str) -> None:
    expected = weights(go(settings(data, optimizer=optimizer), tmp_path / "alone"))
    config = settings(data, strategy=strategy, optimizer=optimizer)
    assert furthest(together(tmp_path / "two", config), expected) < 2e-4
    folder = tmp_path / "two" / "run"
    exported = load_file(folder / "model.safetensors")
    assert all(torch.equal(exported[f"model.{n[4:]}"], t)
               for n, t in torch.load(tmp_path / "two/weights.pt", weights_only=True).items()
               if n.startswith("ema."))  # fmt: skip
    samples = sorted(path.name for path in (folder / "samples").iterdir())
    assert samples == ["000000000032-raw.png", "000000000032.png"]


def test_training_accumulation_and_checkpointing_change_nothing(
    data: Path, tmp_path: Path, alone: dict[str, torch.Tensor]
) -> None:
    for changes in ({"accumulate": 4}, {"recompute": "full"}):
        got = weights(go(settings(data, **changes), tmp_path / next(iter(changes))))
        assert furthest(got, alone) < 1e-4, changes
    changed = settings(data, strategy="fsdp", accumulate=2, activation_checkpointing="selective", ema_others=(0.1,))
    parts = together(tmp_path / "two", changed)
    assert furthest({name: tensor for name, tensor in parts.items() if "ema-" not in name}, alone) < 2e-4
    shorter, usual, raw = (parts[f"{which}.mask_token"] for which in ("ema-0.1", "ema", "raw"))
    assert 0 < (shorter - raw).norm() < (usual - raw).norm()


def test_training_resumes_with_other_ranks_and_strategy(
    data: Path, tmp_path: Path, alone: dict[str, torch.Tensor]
) -> None:
    half = TrainConfig(**{**vars(settings(data)), "images": 16})
    go(half, tmp_path / "run")
    for strategy, images in (("fsdp", 24), ("ddp", 32)):
        changes = {**vars(half), "strategy": strategy, "images": images}
        got = together(tmp_path, TrainConfig(**changes))
    assert furthest(got, alone) < 2e-4


@pytest.mark.parametrize("text", ["words", "encoder"])
def test_training_captions_two_ranks_match_one(tmp_path: Path, text: str) -> None:
    pictures = caption_images(write_images(tmp_path / "pictures"))
    if text == "encoder":
        text = str(save_encoder(tmp_path / "encoder"))
    config = settings(pictures, text=text)
    config = with_captions(replace(config, model=replace(config.model, buffer_size=8)))
    expected = weights(go(config, tmp_path / "alone"))
    assert furthest(together(tmp_path / "two", config), expected) < 2e-4


def test_training_indivisible_batch_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch is 8, but it must be a multiple of 3: 1 process"):
        open_tiny_run(settings(data, accumulate=3), tmp_path)


def interrupted(rank: int, folder: Path, config: TrainConfig) -> None:
    def stop(run: Run) -> None:
        if rank == 1 and run.progress.images == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    with joined(rank, 2, folder):
        assert go(config, folder / "run", stop).progress.images == 16  # both stop, though one alone was told to


def test_training_signal_to_one_rank_saves_all(data: Path, tmp_path: Path) -> None:
    processes.spawn_ranks(2, interrupted, tmp_path, settings(data))
    assert (tmp_path / "run/state-000000000016").is_dir()


def official_step(folder: Path, data: Path, strategy: str) -> dict[str, torch.Tensor]:
    """The weights of a reference's run after a step more."""
    official._HEADS_BY_WIDTH = {16: 2}
    config = TrainConfig(model=replace(CONFIG, **STILL), data=str(data), batch=8, lr=0.05, strategy=strategy, ema=0.5)
    run = open_run(config, folder / strategy, device=torch.device("cpu"))
    resume_official(run, folder / "checkpoint-last.pth")
    run.step(next(run.batches()))
    return weights(run)


def go_on_with_the_reference(rank: int, folder: Path, data: Path) -> None:
    with joined(rank, 2, folder):
        held = official_step(folder, data, "fsdp")
        if rank == 0:
            torch.save(held, folder / "weights.pt")


def test_training_goes_on_with_a_run_of_the_reference_in_shares(data: Path, tmp_path: Path) -> None:
    official_file(tmp_path / "checkpoint-last.pth")
    processes.spawn_ranks(2, go_on_with_the_reference, tmp_path, data)
    held = torch.load(tmp_path / "weights.pt", weights_only=True)
    heads = official._HEADS_BY_WIDTH
    alone = official_step(tmp_path, data, "ddp")
    official._HEADS_BY_WIDTH = heads
    assert furthest(held, alone) < 1e-4
