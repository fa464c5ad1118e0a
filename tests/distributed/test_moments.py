"""Sums over any number of processes, with uneven and empty shares, are those of one process."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mar.distributed import gather_rows, sum_over_ranks
from mar.evaluation.metrics import ScoreSums, inception_score
from mar.evaluation.statistics import Moments

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
ROWS, WIDTH = 1300, 6
# Where each process's share ends: uneven, the last or the first empty, fewer pictures than processes.
CUTS = {2: ((700,), (1300,), (0,)), 3: ((500, 900), (650, 1300), (0, 0), (1299, 1300))}


def values() -> Tensor:
    return 100 + torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5)).double()


def on_each_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for world in CUTS:
        if rank < world:
            run(rank, world, f"file://{folder / str(world)}")


def run(rank: int, world: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    try:
        for cuts in CUTS[world]:
            edges = (0, *cuts, ROWS)
            check_share(torch.arange(edges[rank], edges[rank + 1]), contiguous=True)
        check_share(torch.arange(rank, ROWS, world), contiguous=False)
        check_nothing(rank, world)
    finally:
        dist.destroy_process_group()


def check_share(own: Tensor, contiguous: bool) -> None:
    everything = values()
    moments = Moments(WIDTH)
    for batch in everything[own].split(64):
        moments.update(batch)
    whole = moments.gather()
    assert whole.count == ROWS
    assert moments.count == len(own)  # what was gathered from stays as it was
    torch.testing.assert_close(whole.mean, everything.mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(whole.covariance, torch.cov(everything.T), rtol=1e-9, atol=1e-12)
    covariances = gather_rows(whole.covariance.view(1, -1))
    assert torch.equal(covariances, covariances[:1].expand_as(covariances))  # every process has the same bits

    scores = ScoreSums(3, WIDTH, ROWS)
    scores.update(everything[own], own)
    assert scores.gather().score() == pytest.approx(inception_score(everything, 3), rel=1e-9)
    assert scores.count == len(own)

    rows = gather_rows(everything[own].float())
    assert rows.dtype == torch.float32
    assert rows.shape == (ROWS, WIDTH)
    if contiguous:
        assert torch.equal(rows, everything.float())
    numbers = gather_rows(own[:, None])
    assert sorted(numbers.flatten().tolist()) == list(range(ROWS))


def check_nothing(rank: int, world: int) -> None:
    assert Moments(WIDTH).gather().count == 0
    assert gather_rows(torch.zeros(0, WIDTH)).shape == (0, WIDTH)
    own = torch.tensor(float(rank))
    assert sum_over_ranks(own) == world * (world - 1) / 2
    assert own == rank


def test_moments_of_ranks_match_one_process(tmp_path: Path) -> None:
    processes.spawn_ranks(max(CUTS), on_each_rank, tmp_path)
