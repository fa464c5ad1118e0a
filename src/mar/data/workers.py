"""Processes that read ahead: begun without threads, watched, and waited for with an end.

Their batches come in anonymous memory of Linux (memfd), which `/dev/shm` does not bound: Docker gives that 64 MB.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import mmap
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, reduction, resource_tracker
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mar.checkpoint.files import size_text
from mar.config import ConfigError

START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
"""Never fork: a child of a process with threads may hang. The server of forkserver has none, and imports once."""
SHARED_MEMORY = "/dev/shm"
"""Folder of PyTorch's shared tensors, used without memfd."""
POLL_S = 2.0
"""Seconds between looks whether the workers live."""
PREFETCH = 2
"""Batches that a worker reads ahead."""

_PRELOADED = ("mar.data.parquet", "mar.data.hub", "mar.data.webdataset", "mar.training.trainer")
"""Modules that workers need where this process has them."""
_ALIGNMENT = 64


class WorkerDied(ValueError):
    """A process that reads ahead has ended."""


class WaitEnded(Exception):
    """A signal ended the wait for a batch."""


def make_dataloader(
    data: Dataset[Any],
    *,
    workers: int,
    batches: Iterable[list[Any]] | None,
    collate: Callable[[Any], Any],
    pin: bool = False,
    batch_bytes: int = 0,
) -> Iterator[Any]:
    """Iterate over a data set with worker processes.

    No global random state is used. Raises WorkerDied if a worker ends, and ConfigError if they can't be started.

    Args:
        data: map-style; or iterable-style if `batches` is None.
        workers: number of processes; 0 reads in this one.
        batches: keys of each batch; None: every item of `data` is a batch.
        collate: makes a batch of the items of its keys.
        pin: copy batches to pinned memory.
        batch_bytes: size of a worker's batch, for systems without memfd.
    """
    if workers and not has_memfd():
        check_shared_memory(batch_bytes, workers)
    options: dict[str, Any] = {}
    if workers:
        options = {"multiprocessing_context": START_METHOD, "timeout": POLL_S, "prefetch_factor": PREFETCH}
    try:
        with warnings.catch_warnings():  # more workers than cores may be meant: of a slow disk they wait
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                data,
                batch_size=None if batches is None else 1,
                batch_sampler=batches,
                num_workers=workers,
                collate_fn=_Packing(collate) if workers and has_memfd() else collate,
                pin_memory=pin,
                worker_init_fn=_begin_worker,
                generator=torch.Generator(),  # else it would draw from the global one
                **options,
            )
            with _without_signals() if workers else contextlib.nullcontext():
                iterator = iter(loader)
    except OSError as error:
        raise ConfigError(
            f"workers: {workers} processes that read ahead can't be started ({error}); take --workers 0, which reads "
            "in this process"
        ) from error
    for worker in getattr(iterator, "_workers", ()):
        worker.terminate = worker.kill  # since workers ignore SIGTERM
        _open_iterators.add(iterator)
    return _Batches(iterator)


_open_iterators: WeakSet[Any] = WeakSet()
"""Iterators with workers."""


@atexit.register
def _end_workers() -> None:
    """End the workers of iterators that nobody closed: the process would wait for them without end."""
    for iterator in [*_open_iterators]:
        iterator._shutdown_workers()


# ---- waiting

_waiting = False
"""The process waits for a batch now."""


def end_wait() -> None:
    """Raise WaitEnded if the process waits for a batch; for handlers of signals."""
    if _waiting:
        raise WaitEnded


class _Batches:
    """Iterates over batches, and watches the workers while it waits."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        global _waiting
        _waiting = True
        try:
            return self._next()
        finally:
            _waiting = False

    def _next(self) -> Any:
        while True:
            try:
                item = next(self.iterator)
                return item.unpack() if isinstance(item, _Parcel) else item
            except RuntimeError as error:
                if str(error).startswith("DataLoader timed out"):  # all workers live
                    continue
                if str(error).startswith("DataLoader worker"):
                    raise WorkerDied(self._explain()) from None
                raise
            except (EOFError, ConnectionError, FileNotFoundError):  # of the worker that holds the batch
                if self._ended():
                    raise WorkerDied(self._explain()) from None
                raise

    def _ended(self) -> list[Any]:
        return [worker for worker in getattr(self.iterator, "_workers", ()) if not worker.is_alive()]

    def _explain(self) -> str:
        codes = [worker.exitcode for worker in self._ended()]
        code = next((code for code in codes if code), 0)
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        return (
            f"a process that reads pictures {how}: is there too little memory, or did someone end it? Run the same "
            "command again, with fewer --workers (0 reads in this process)"
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# ---- starting


@contextlib.contextmanager
def _without_signals() -> Iterator[None]:
    """Start workers with Ctrl-C and SIGTERM blocked, from their first instruction on; this process gets them after."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        if START_METHOD == "forkserver":
            _start_server()
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_server() -> None:
    """Start the server of workers, if there is none. Its modules come from the paths of this process."""
    preloaded = [name for name in _PRELOADED if name in sys.modules]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["mar.data.loader", *preloaded])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _begin_worker(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach every process of a group, to the run: it saves before it ends.

    A worker ends with the process that reads its batches, however that ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):  # the server does not, if this program started it for processes of its own
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


# ---- sharing batches


def has_memfd() -> bool:
    """Return whether the system has anonymous shared memory without a file system."""
    try:
        os.close(os.memfd_create("mar"))
    except (AttributeError, OSError):  # another system, or a sandbox
        return False
    return True


def check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Raise ConfigError if /dev/shm is too small for the workers' batches.

    Args:
        batch_bytes: size of a worker's batch.
        workers: processes that read ahead, for each process of this machine.
    """
    try:
        stat = os.statvfs(SHARED_MEMORY)
    except OSError:  # systems that share otherwise
        return
    free = stat.f_bavail * stat.f_frsize
    needed = batch_bytes * (PREFETCH * workers + 2) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if free < needed:
        raise ConfigError(
            f"workers: {workers} processes that read ahead need {size_text(needed)} of shared memory, but "
            f"{SHARED_MEMORY} has {size_text(free)} free; start the container with more (docker run --shm-size "
            f"{2 * needed // 2**20 + 1}m), or take --workers 0"
        )


@dataclass
class _Parcel:
    """A batch on its way: a pickle, and the file of memory with its tensors."""

    pickled: bytes
    sizes: list[int]
    memory: Any
    """Handle of the file; None if there are no tensors."""

    def unpack(self) -> Any:
        """Return the batch; its tensors are in the shared memory."""
        buffers = []
        if self.memory is not None:
            handle = self.memory.detach()
            try:
                view = memoryview(mmap.mmap(handle, sum(map(_aligned, self.sizes))))
            finally:
                os.close(handle)
            begin = 0
            for size in self.sizes:
                buffers.append(view[begin : begin + size])
                begin += _aligned(size)
        return pickle.loads(self.pickled, buffers=buffers)

    def pin_memory(self) -> Any:
        """Return the batch in pinned memory, an error as it is; called by a thread of the loader."""
        item = self.unpack()
        return item.pin_memory() if hasattr(item, "pin_memory") else item


class _Packing:
    """Collates in a worker, and packs the batch."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Any) -> _Parcel:
        return _pack(self.collate(items))


def _pack(batch: Any) -> _Parcel:
    stream, tensors = io.BytesIO(), list[pickle.PickleBuffer]()
    _TensorPickler(stream, protocol=5, buffer_callback=tensors.append).dump(batch)
    views = [tensor.raw() for tensor in tensors]
    sizes = [view.nbytes for view in views]
    if not sum(sizes):
        return _Parcel(stream.getvalue(), sizes, None)
    handle = os.memfd_create("mar-batch")
    try:
        os.ftruncate(handle, sum(map(_aligned, sizes)))
        begin = 0
        for view, size in zip(views, sizes, strict=True):
            _write(handle, view, begin)
            begin += _aligned(size)
        return _Parcel(stream.getvalue(), sizes, reduction.DupFd(handle))
    finally:
        os.close(handle)


def _write(handle: int, view: memoryview, begin: int) -> None:
    done = 0
    while done < view.nbytes:
        done += os.pwrite(handle, view[done:], begin + done)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _TensorPickler(pickle.Pickler):
    """Pickles tensors without their values, which go to the buffers."""

    def reducer_override(self, value: Any) -> Any:
        """Return how to make a tensor of its buffer."""
        if type(value) is not Tensor or value.layout != torch.strided or value.requires_grad:
            return NotImplemented
        content: Any = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(content), value.dtype, tuple(value.shape))


def _tensor(content: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not content.nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).reshape(shape)
