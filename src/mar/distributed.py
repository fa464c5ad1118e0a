"""Ranks of torchrun: process group, barriers, collectives, shared errors."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from mar.config import ConfigError
from mar.devices import choose_device

PROCESS_GROUP_TIMEOUT = timedelta(days=7)
"""Timeout of collectives; long, since ranks work at different speeds. A rank that ends is noticed at once."""

ERROR_WAIT_S = 20.0
"""Seconds that a rank with an error waits for the others: they may fail too, or wait for it."""

Result = TypeVar("Result")


def rank() -> int:
    """Return this process's rank; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of ranks; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class _StoreBarrier:
    """Barrier by counters in the ranks' key-value store.

    Unlike gloo's barrier, Ctrl-C interrupts it, and it ends when another rank does.
    """

    def __init__(self, store: Any) -> None:
        self.store = store

    def wait(self, seconds: float = math.inf) -> None:
        """Wait for all ranks. Raises TimeoutError if some don't come in so many seconds."""
        number = next(_BARRIER_NUMBERS)
        self._count(f"mar/come/{number}", deadline=time.monotonic() + seconds)
        # Rank 0 may host the store, so it waits until all ranks have read the first counter.
        self._count(f"mar/seen/{number}", wait_for_all=rank() == 0)

    def _count(self, key: str, wait_for_all: bool = True, deadline: float = math.inf) -> None:
        """Add 1 to a counter, and wait until every rank has, or raise TimeoutError."""
        count = self.store.add(key, 1)
        while wait_for_all and count < world_size():
            if self.store.check(["mar/ended"]):
                raise ConfigError(f"rank {rank()} stops, since rank {self.store.get('mar/ended').decode()} has ended")
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.02)
            count = self.store.add(key, 0)

    def end(self) -> None:
        """Tell waiting ranks that this one has ended."""
        with contextlib.suppress(RuntimeError):  # the store's own process may have ended
            self.store.set("mar/ended", str(rank()))


_BARRIERS: list[_StoreBarrier] = []
_BARRIER_NUMBERS = itertools.count()  # never reset: process groups may share a store


@contextlib.contextmanager
def process_group(device: str | None = None, *, of_one: bool = False) -> Iterator[torch.device]:
    """Join the ranks' process group inside the block; yield this rank's device.

    `device` is an argument of `choose_device`; with several GPUs, each rank gets its own by LOCAL_RANK. CPU tensors are
    sent by gloo, those on GPUs by NCCL. An existing group is used and left alone; a single process gets none, but
    `of_one`, which needs torchrun. Raises ConfigError for a device that the ranks can't share.
    """
    if of_one and "MASTER_ADDR" not in os.environ:
        raise ConfigError("group-of-one: got no torchrun, expected `torchrun --nproc-per-node 1 -m mar train ...`")
    chosen = _own_device(choose_device(device), of_one)
    if (world_size() == 1 and not of_one) or in_group():
        yield chosen
        return
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    store, number, world = next(rendezvous("env://"))
    dist.init_process_group(backend, timeout=PROCESS_GROUP_TIMEOUT, store=store, rank=number, world_size=world)
    _BARRIERS.append(_StoreBarrier(store))
    try:
        yield chosen
    except BaseException:
        _BARRIERS[-1].end()
        raise
    finally:
        _BARRIERS.pop()
        if in_group():
            gc.collect()  # a DDP that outlives its group would destroy it in a deadlock with gloo's thread
            dist.destroy_process_group()


def _own_device(device: torch.device, of_one: bool = False) -> torch.device:
    if device.type != "cuda" or (world_size() == 1 and not (of_one and device.index is None)):
        return device
    if ":" in str(device):
        raise ConfigError(f"device: got {device} for {world_size()} processes, expected cuda, for a GPU each")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ConfigError(f"CUDA devices: got {count}, expected one per process, at least {local + 1}; start fewer")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def in_group() -> bool:
    """Return whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def run_collective(collective: Callable[[], Result]) -> Result:
    """Run a collective operation; raise ConfigError if another rank has ended."""
    try:
        return collective()
    except RuntimeError as error:  # gloo and NCCL have no error class for it
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"rank {rank()} stops, since another rank has ended ({reason})") from error


@contextlib.contextmanager
def explain_lost_rank() -> Iterator[None]:
    """Raise ConfigError for an error of gloo or NCCL inside the block; others stay as they are."""
    try:
        yield
    except RuntimeError as error:
        if not (in_group() and ("gloo" in str(error) or "NCCL" in str(error))):
            raise
        raise ConfigError(f"rank {rank()} stops, since another rank has ended") from error


def barrier(wait_s: float = math.inf) -> None:
    """Wait for all ranks; TimeoutError if some don't come in so many seconds. Signals interrupt the wait."""
    if not in_group():
        return
    run_collective((lambda: _BARRIERS[-1].wait(wait_s)) if _BARRIERS else dist.barrier)


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is true on any rank, on all ranks."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(int(flag))
    run_collective(lambda: dist.all_reduce(votes, dist.ReduceOp.MAX))
    return bool(votes)


def all_gather_object(value: Any, *, wait_s: float = math.inf) -> list[Any]:
    """Gather a picklable value of each rank, by rank, on all ranks.

    Raises TimeoutError if some don't come in `wait_s` seconds.
    """
    if not in_group():
        return [value]
    barrier(wait_s)  # which Ctrl-C can interrupt, unlike gloo
    values = [None] * dist.get_world_size()
    run_collective(lambda: dist.all_gather_object(values, value))
    return values


def sum_over_ranks(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Sum the ranks' tensors, of one shape; alone, return `tensor`."""
    if not in_group():
        return tensor
    total = tensor.to(_collective_device(), copy=True).contiguous()
    run_collective(lambda: dist.all_reduce(total))
    return total.to(tensor.device)


def gather_rows(tensor: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "m d"]:
    """Concatenate the rows of all ranks; without a process group, return `tensor`.

    Ranks may have different n, even 0, but the same d and dtype.
    """
    if not in_group():
        return tensor
    sizes = all_gather_object(len(tensor))
    # all_gather needs equal shapes, so short shares are padded
    padded = torch.zeros(max(sizes), tensor.shape[1], dtype=tensor.dtype, device=_collective_device())
    padded[: len(tensor)] = tensor
    shares = [torch.empty_like(padded) for _ in sizes]
    run_collective(lambda: dist.all_gather(shares, padded))
    return torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)]).to(tensor.device)


def _collective_device() -> torch.device:
    """Return the device of tensors that the process group can send."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


class OtherRankFailed(Exception):
    """Ends this rank, since another rank failed and raises the error."""


@contextlib.contextmanager
def collective_errors() -> Iterator[None]:
    """Raise on all ranks if one raises ValueError or OSError inside.

    The first failing rank raises its own error, all others raise OtherRankFailed: one message for people. Every rank
    has to run the block. If others wait in a collective of the block, a failing rank raises its own error after
    `ERROR_WAIT_S`, and leaving the process group ends them. Outside a process group all ranks are assumed to fail
    alike, and rank 0 raises the error.
    """
    error: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    try:
        messages = all_gather_object(
            None if error is None else str(error), wait_s=math.inf if error is None else ERROR_WAIT_S
        )
    except (TimeoutError, ConfigError):
        if error is None:
            raise
        raise error from None
    failed = [index for index, message in enumerate(messages) if message is not None]
    if not failed:
        return
    raising_rank = failed[0] if in_group() else 0
    if error is not None and rank() == raising_rank:
        raise error
    raise OtherRankFailed(f"rank {raising_rank} failed: {messages[failed[0]]}")
