"""Losses do not depend on how a global batch is cut: by two processes, by DDP or FSDP, in one part or two."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from tiny import open_tiny_run, tiny_train_config, write_images

from mar import distributed
from mar.config import TrainConfig
from mar.tokenizer.base import Posterior

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
STEPS = 20
WAYS = list(product(("ddp", "fsdp"), (1, 2)))
BOUND = {torch.float64: 1e-9, torch.float32: 1e-4}


def settings(data: Path, **changes: Any) -> TrainConfig:
    """Eight pictures a step, without dropout, which processes draw each for itself."""
    config = tiny_train_config(data, images=8 * STEPS, batch=8, lr=0.05, **changes)
    still = {"attention_dropout": 0.0, "projection_dropout": 0.0}
    return TrainConfig(**{**vars(config), "model": type(config.model)(**{**vars(config.model), **still})})


def losses(config: TrainConfig, folder: Path, dtype: torch.dtype) -> list[float]:
    """The loss of each step over the whole batch, all numbers in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        run = open_tiny_run(config, folder)
        assert {p.dtype for p in run.model.parameters()} == {dtype}
        encode = run.tokenizer.encode
        run.tokenizer.encode = lambda images: Posterior(*(part.to(dtype) for part in vars(encode(images)).values()))
        loader = run.batches()
        shares = [run.step(next(loader))[0] for _ in range(STEPS)]
    finally:
        torch.set_default_dtype(before)
    whole = torch.tensor(distributed.all_gather_object(shares), dtype=torch.float64).mean(0)
    return [float(loss) for loss in whole]


def learn(rank: int, folder: Path, data: Path) -> None:
    """All ways by one of two processes; the first leaves what came out."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    found = {}
    for dtype in BOUND:
        for strategy, parts in WAYS:
            config = settings(data, strategy=strategy, accumulate=parts)
            found[f"{dtype} {strategy} {parts}"] = losses(config, folder / f"{rank}-{dtype}-{strategy}-{parts}", dtype)
            gc.collect()  # a DDP that outlives its group may end it while gloo waits for Python
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def by_two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of two processes, started once for all tests."""
    folder = tmp_path_factory.mktemp("two")
    processes.spawn_ranks(2, learn, folder, data)
    found: dict[str, list[float]] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize("dtype", BOUND)
def test_losses_of_ranks_and_parts_match_one_process(
    data: Path, tmp_path: Path, by_two: dict[str, list[float]], dtype: torch.dtype
) -> None:
    alone = losses(settings(data), tmp_path / "alone", dtype)
    assert len(set(alone)) == STEPS
    others = {"one process, 2 parts": losses(settings(data, accumulate=2), tmp_path / "parts", dtype)}
    others |= {f"{s} {parts}": by_two[f"{dtype} {s} {parts}"] for s, parts in WAYS}
    for way, found in others.items():
        furthest = max(abs(a - b) / abs(b) for a, b in zip(found, alone, strict=True))
        assert furthest < BOUND[dtype], way


def test_torchrun_two_nodes_train_by_tcp(data: Path, tmp_path: Path) -> None:
    """Two agents of torchrun at two addresses of this machine, one process each."""
    endpoint = f"127.0.0.1:{processes.free_port()}"
    model = ["--model.encoder.width", "16", "--model.encoder.num-heads", "2", "--model.encoder.depth", "1"]
    model += ["--model.decoder.width", "16", "--model.decoder.num-heads", "2", "--model.decoder.depth", "1"]
    model += ["--model.head.width", "16", "--model.head.depth", "1", "--model.classes", "2", "--model.grid", "8", "8"]
    model += ["--images", "16", "--batch", "4", "--sample-every", "0", "--device", "cpu"]
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "7", "--local-addr", address),
                *("-m", "mar", "train", "fashion", "--data", str(data), "--out", str(tmp_path / "run"), *model),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for address in ("127.0.0.1", "127.0.0.2")
    ]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "state-000000000016").is_dir()
