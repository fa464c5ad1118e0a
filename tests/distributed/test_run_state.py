"""A run's state with a process group: written once, read by all, and a failure on rank 0 is everybody's."""

from __future__ import annotations

import errno
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mar.checkpoint import run_state
from mar.checkpoint.files import CheckpointError
from mar.checkpoint.run_state import RunState

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
FULL = torch.arange(12.0).view(4, 3)


def on_two_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        run = RunState(folder / "run")
        state = {"sharded": distribute_tensor(FULL, mesh, [Shard(0)]), "same": torch.ones(3), "step": 7}
        for images in (1, 2, 3):
            run.save(images, state, keep=2)
        assert [path.name[-1] for path in run.states()] == ["2", "3"]

        loaded = {"sharded": distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)]), "same": torch.zeros(3), "step": 0}
        assert run.load(loaded)
        assert isinstance(loaded["sharded"], DTensor)
        assert torch.equal(loaded["sharded"].to_local(), FULL[2 * rank : 2 * rank + 2])
        assert torch.equal(loaded["same"], torch.ones(3))
        assert loaded["step"] == 7

        if rank == 0:  # only the first rank touches the folder's names
            run_state._move = no_room  # type: ignore[assignment]
        with pytest.raises(CheckpointError, match="No space left"):
            run.save(4, state)
        dist.barrier()
        assert sorted(path.name for path in run.folder.iterdir()) == [
            "latest",
            "state-000000000002",
            "state-000000000003",
        ]
    finally:
        dist.destroy_process_group()


def no_room(temporary: Path, final: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_run_state_two_ranks_share_a_folder(tmp_path: Path) -> None:
    processes.spawn_ranks(2, on_two_ranks, tmp_path)
    # what two ranks wrote, one process reads whole
    state = {"sharded": torch.zeros(4, 3), "same": torch.zeros(3), "step": 0}
    assert RunState(tmp_path / "run").load(state)
    assert torch.equal(state["sharded"], FULL)
