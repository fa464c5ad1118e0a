"""Two processes share a stream, and one goes on where they stopped: as if it had always been alone."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import processes
import pytest
import torch.distributed as dist
from shard_files import NumberedShards, image_numbers

from mar.data.images import Transform
from mar.data.loader import batches
from mar.data.stream import StreamSource

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
BATCH = 6


def some(source: StreamSource, count: int, start: int, **share: Any) -> list[list[int]]:
    stream = batches(source, Transform(8, 1), batch=BATCH, seed=2, start=start, **share)
    return [image_numbers(batch) for batch in islice(stream, count)]


def read(rank: int, folder: Path) -> None:
    """Read a stream as one of two processes, into a file; the first also writes the saved position."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    source = opened()
    found = some(source, 5, 0, rank=rank, world=2)
    state = source.state_dict()
    (folder / f"{rank}.json").write_text(json.dumps([found, state]), encoding="utf-8")
    dist.destroy_process_group()


def opened() -> StreamSource:
    return StreamSource(NumberedShards((7, 4, 9, 4)), "numbered")


def test_stream_resume_from_two_ranks_to_one(tmp_path: Path) -> None:
    whole = some(opened(), 12, 0)
    processes.spawn_ranks(2, read, tmp_path)
    shares, states = zip(*(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)), strict=True)
    assert states[0] == states[1]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole[:5]
    alone = opened()
    assert "0 pictures are repeated" in alone.load_state_dict(states[0], 5 * BATCH)
    assert some(alone, 7, 5 * BATCH) == whole[5:]
    assert {number for batch in whole for number in batch} == set(range(24)) - {22}
