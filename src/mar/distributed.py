"""Joins the processes that torchrun started: rank, process group, barriers, gathered objects, shared errors."""

from __future__ import annotations

import contextlib
import gc
import itertools
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
"""How long a process waits for another one that is still drawing; one that ends is noticed at once."""

Result = TypeVar("Result")


def rank() -> int:
    """This process's number under torchrun; 0 without."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun started; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class _StoreBarrier:
    """Barriers by the processes' store. One of gloo's is deaf to Ctrl-C, and can't be left before all have come."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def meet(self) -> None:
        number = next(_NUMBERS)
        self._wait(f"mar/come/{number}")
        # The first one may hold the store: it stays until all have seen that all are here.
        self._wait(f"mar/seen/{number}", waits=rank() == 0)

    def _wait(self, key: str, waits: bool = True) -> None:
        here = self.store.add(key, 1)
        while waits and here < world_size():
            if self.store.check(["mar/ended"]):
                raise ConfigError(
                    f"process {rank()} can't go on without process {self.store.get('mar/ended').decode()}"
                )
            time.sleep(0.02)
            here = self.store.add(key, 0)

    def end(self) -> None:
        """Lets those who wait know that this process will not come."""
        with contextlib.suppress(RuntimeError):  # the store may have gone with its process
            self.store.set("mar/ended", str(rank()))


_BARRIERS: list[_StoreBarrier] = []
_NUMBERS = itertools.count()  # of all groups that this process joins, since they may have one store


@contextlib.contextmanager
def process_group(device: str | None = None) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, for as long as the block lasts; yields this one's device.

    `device` as `choose_device` takes it; of several GPUs each process takes its own, by LOCAL_RANK. Tensors on the CPU
    go by gloo, those on GPUs by NCCL. A group that is there already is used and left alone; one process needs none.
    Raises ConfigError for a device that the processes can't share.
    """
    chosen = _own_device(choose_device(device))
    if world_size() == 1 or in_group():
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
            gc.collect()  # a DDP that outlived its group would end it while gloo's thread waits for Python: for ever
            dist.destroy_process_group()


def _own_device(device: torch.device) -> torch.device:
    if device.type != "cuda" or world_size() == 1:
        return device
    if ":" in str(device):
        raise ConfigError(f"device {device}: {world_size()} processes can't share one GPU; ask for cuda without number")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ConfigError(f"this machine has {count} CUDA devices, but process {local} of it (from 0) needs its own")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def in_group() -> bool:
    """Whether this process and others are joined in a group."""
    return dist.is_available() and dist.is_initialized()


def run_collective(collective: Callable[[], Result]) -> Result:
    """Runs what all processes have to take part in; ConfigError where another one has ended meanwhile."""
    try:
        return collective()
    except RuntimeError as error:  # gloo and NCCL have no class of their own for it
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"process {rank()} lost the others, one of which has ended ({reason})") from error


def barrier() -> None:
    """Waits until every process is here; nothing where there is but one. A signal still ends the wait."""
    if not in_group():
        return
    run_collective(_BARRIERS[-1].meet if _BARRIERS else dist.barrier)


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any process, the same answer for all of them."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(int(flag))
    run_collective(lambda: dist.all_reduce(votes, dist.ReduceOp.MAX))
    return bool(votes)


def all_gather_object(value: Any) -> list[Any]:
    """What every process hands in (anything that can be pickled), by rank, the same list for all of them."""
    if not in_group():
        return [value]
    barrier()  # there one hears Ctrl-C while the others are still busy
    values = [None] * dist.get_world_size()
    run_collective(lambda: dist.all_gather_object(values, value))
    return values


def sum_over_ranks(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Returns the sum of all ranks' tensors of one shape; `tensor` itself without a process group."""
    if not in_group():
        return tensor
    total = tensor.to(_collective_device(), copy=True).contiguous()
    run_collective(lambda: dist.all_reduce(total))
    return total.to(tensor.device)


def gather_rows(tensor: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "m d"]:
    """Concatenates the rows of all ranks, in the order of ranks; returns `tensor` itself without a process group.

    Ranks may have different n, 0 too, but the same d and dtype.
    """
    if not in_group():
        return tensor
    sizes = all_gather_object(len(tensor))
    # all_gather wants equal shapes: short shares are padded
    padded = torch.zeros(max(sizes), tensor.shape[1], dtype=tensor.dtype, device=_collective_device())
    padded[: len(tensor)] = tensor
    shares = [torch.empty_like(padded) for _ in sizes]
    run_collective(lambda: dist.all_gather(shares, padded))
    return torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)]).to(tensor.device)


def _collective_device() -> torch.device:
    """Returns the device of tensors that the process group can carry."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


class OtherRankFailed(Exception):
    """Ends a rank whose work can't go on: another rank raises the error itself."""


@contextlib.contextmanager
def collective_errors() -> Iterator[None]:
    """Ends the block on all ranks as soon as one of them raises ValueError or OSError in it.

    The first failing rank raises its own error, all others raise OtherRankFailed: one message for people. Every rank
    has to run through the block. Outside a process group all ranks are assumed to fail alike, and rank 0 speaks.
    """
    error: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    messages = all_gather_object(None if error is None else str(error))
    failed = [number for number, message in enumerate(messages) if message is not None]
    if not failed:
        return
    speaker = failed[0] if in_group() else 0
    if error is not None and rank() == speaker:
        raise error
    raise OtherRankFailed(f"rank {speaker} failed: {messages[failed[0]]}")
