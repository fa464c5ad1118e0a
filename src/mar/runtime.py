"""What the machine and the numbers are: devices, the dtype policy, seeds, and the process group.

bf16 here means: the matrices of `Linear` and their inputs in bfloat16; norms, residual streams, softmax, noise, the
diffusion state and its coefficients in float32. Never float16.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mar.config import ConfigError

LARGE = 2**22
"""Multiplications from which on a product may be oneDNN's: it prepares for each new shape."""
PATIENCE = timedelta(days=7)
"""How long a process waits for another one that is still drawing; one that ends is noticed at once."""

Result = TypeVar("Result")


class Linear(nn.Linear):
    """A linear layer that takes its input to its own dtype, so that only matrix products run in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dtype is torch.bfloat16:
            input = input.bfloat16()
        return product(input, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias: PyTorch's, or oneDNN's where that is twice as fast."""
    large = x.numel() * len(weight) >= LARGE
    if not (large and onednn_is_faster()) or x.dtype is not torch.float32 or weight.dtype is not torch.float32:
        return functional.linear(x, weight, bias)
    plain = type(weight) in (nn.Parameter, Tensor) and x.device.type == weight.device.type == "cpu"
    if not plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        learned: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return learned
    return _by_onednn(x, weight, bias)


class _Product(torch.autograd.Function):
    """oneDNN's product with its gradients, which are products, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, len(weight))
        return (
            _by_onednn(gradient, weight.T) if for_x else None,
            _by_onednn(rows.T, x.reshape(-1, weight.shape[1]).T) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's products in float32 are taken for PyTorch's own, which are MKL's: on processors with AVX-512.

    They are twice as fast where MKL leaves that unused, as on AMD's. On Intel's, where both take it, and with AVX2 the
    two are alike (measured)."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_onednn() and torch.backends.mkl.is_available() and wide


def has_onednn(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this PyTorch has oneDNN's product, which has no public name, and the processor such numbers."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products in bfloat16; others imitate them, which is slow."""
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every PyTorch
    return any(getattr(torch.cpu, name, bool)() for name in known)


def widen(x: Tensor) -> Tensor:
    """bfloat16 -> float32, in which all but matrix products is computed; other dtypes stay."""
    return x.float() if x.dtype is torch.bfloat16 else x


def set_matrix_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Turns the matrices of every `Linear` of a model to `dtype`, in place, for sampling."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: got {dtype}, expected float32 or bfloat16 (float16 overflows in this model)")
    for module in model.modules():
        if isinstance(module, Linear):
            module.to(dtype)


class _NothingIsFilled(TorchFunctionMode):
    """Lets initialisers of tensors do nothing."""

    fillers = frozenset(function for name, function in vars(nn.init).items() if name.endswith("_") and name[0] != "_")
    fillers |= {Tensor.normal_, Tensor.uniform_}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.fillers:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Modules made within have tensors without memory, on the meta device, for weights that are there already.

    Nothing is initialised: on that device, drawing from a normal distribution takes PyTorch's compiler and sympy, whose
    import alone is a third of what it takes to load a small model.
    """
    with torch.device("meta"), _NothingIsFilled():
        yield


def give_back_memory() -> None:
    """Hands what is free in the middle of the heap back to the system, where its C library can (glibc: on Linux).

    Where tensors grow from step to step, none fits into the hole that the last one left, if anything was kept behind
    it: such as the programs that oneDNN writes for each new shape."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def choose_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the best there is: CUDA, MPS, CPU. ConfigError where it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name is None or name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda", "mps")
    except RuntimeError:
        known = False
    if not known:  # torch has more: meta, xpu, ...
        raise ConfigError(f"device: got {name!r}, expected auto, cpu, cuda, cuda:N or mps")
    if (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise ConfigError(f"device {name!r} is not on this machine; leave it out to take the best there is")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on all the numbers of `key`, and on nothing else."""
    return torch.Generator().manual_seed(mixed(*key))


def mixed(*key: int) -> int:
    """64 bits that look random, each of which depends on all the numbers of `key`."""
    state = 0x9E3779B97F4A7C15
    for number in key:  # splitmix64 over the key, so that (1, 2) and (2, 1), or 12 and (1, 2), differ
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 31)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    return state


@contextlib.contextmanager
def lone_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads of Python as torch would take, in each of which torch takes one.

    Torch shares some products and convolutions out among its threads, and how many there are then shows in the last
    bits. What is computed here does not depend on it.
    """
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            yield threads
    finally:
        torch.set_num_threads(count)


def rank() -> int:
    """This process's number under torchrun; 0 without."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun started; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class _Meetings:
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


_MEETINGS: list[_Meetings] = []
_NUMBERS = itertools.count()  # of all groups that this process joins, since they may have one store


@contextlib.contextmanager
def process_group(device: str | None = None) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, for as long as the block lasts; yields this one's device.

    `device` as `choose_device` takes it; of several GPUs each process takes its own, by LOCAL_RANK. Tensors on the CPU
    go by gloo, those on GPUs by NCCL. A group that is there already is used and left alone; one process needs none.
    Raises ConfigError for a device that the processes can't share.
    """
    chosen = _own_device(choose_device(device))
    if world_size() == 1 or joined():
        yield chosen
        return
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    store, number, world = next(rendezvous("env://"))
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=number, world_size=world)
    _MEETINGS.append(_Meetings(store))
    try:
        yield chosen
    except BaseException:
        _MEETINGS[-1].end()
        raise
    finally:
        _MEETINGS.pop()
        if joined():
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


def joined() -> bool:
    """Whether this process and others are joined in a group."""
    return dist.is_available() and dist.is_initialized()


def together(collective: Callable[[], Result]) -> Result:
    """Runs what all processes have to take part in; ConfigError where another one has ended meanwhile."""
    try:
        return collective()
    except RuntimeError as error:  # gloo and NCCL have no class of their own for it
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"process {rank()} lost the others, one of which has ended ({reason})") from error


def barrier() -> None:
    """Waits until every process is here; nothing where there is but one. A signal still ends the wait."""
    if not joined():
        return
    together(_MEETINGS[-1].meet if _MEETINGS else dist.barrier)


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true on any process, the same answer for all of them."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(int(flag))
    together(lambda: dist.all_reduce(votes, dist.ReduceOp.MAX))
    return bool(votes)


def gather(value: Any) -> list[Any]:
    """What every process hands in (anything that can be pickled), by rank, the same list for all of them."""
    if not joined():
        return [value]
    barrier()  # there one hears Ctrl-C while the others are still busy
    values = [None] * dist.get_world_size()
    together(lambda: dist.all_gather_object(values, value))
    return values


def allow_tf32() -> None:
    """Lets GPUs round the inputs of float32 products to TF32's 10 bits of mantissa; CPUs compute as before."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
