"""A CUDA device that is not there: its tensors say cuda:0 and compute on the CPU.

It is imported before torch, in a process that does nothing else. The library of `guard.cpp` registers the device; the
environment names it in GHOST_LIBRARY. Inside `watch`, operations are recorded:

- mixed: operations on two devices, which CUDA refuses;
- waits: points where the host waits for the device, or for a copy from pageable memory;
- forbidden: what may not happen while a graph is captured.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TORCH = Path(str(importlib.util.find_spec("torch").origin)).parent  # type: ignore[union-attr]
for _library in (_TORCH / "lib" / "libc10.so", _TORCH / "lib" / "libtorch_cpu.so", os.environ["GHOST_LIBRARY"]):
    ctypes.CDLL(str(_library), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402 (it looks once for devices)
from torch import Tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

CUDA = torch.device("cuda", 0)
MATH_ATTENTION = 0
"""Attention of plain operations; CUDA's fused kernels are not there."""
WAITING = {
    "_local_scalar_dense", "nonzero", "unique_consecutive", "unique_dim", "_unique2", "masked_select", "equal",
    "repeat_interleave", "is_nonzero",
}  # fmt: skip
"""Operations whose result the host has to know."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass
class Trace:
    """What was recorded."""

    mixed: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    forbidden: Counter[str] = field(default_factory=Counter)
    kernels: int = 0
    replays: int = 0
    capturing: bool = False

    def wait(self, kind: str, operation: str) -> None:
        """Record a point where the host waits."""
        self.waits[f"{kind}: {operation} at {place()}"] += 1
        if self.capturing:
            self.forbidden[f"{kind}: {operation} at {place()}"] += 1


TRACE = Trace()
_recorded: list[tuple[Any, Any, Any, Any]] = []


def install() -> None:
    """Make `torch.cuda` say that there is a device."""
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters become ghosts by Module.to
    cuda: Any = torch.cuda
    for name, value in {
        "_lazy_init": None, "is_available": True, "device_count": 1, "current_device": 0, "_is_in_bad_fork": False,
        "is_bf16_supported": True, "is_current_stream_capturing": False, "get_device_capability": (9, 0),
    }.items():  # fmt: skip
        setattr(cuda, name, lambda *arguments, value=value, **options: value)
    cuda.current_stream = lambda device=None: _Stream()
    cuda.Stream, cuda.Event = _Stream, _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda device=None: TRACE.wait("synchronize", "device")


class _Stream:
    """A stream or an event; only waiting for it counts."""

    cuda_stream = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def synchronize(self) -> None:
        TRACE.wait("synchronize", "stream or event")

    def query(self) -> bool:
        return True

    def record(self, stream: Any = None) -> None:
        pass

    record_event = wait = wait_event = wait_stream = record


@contextlib.contextmanager
def watch() -> Iterator[Trace]:
    """Run on the device that is not there, and record."""
    TRACE.__init__()  # type: ignore[misc]
    with _Functions(), _Operations():
        yield TRACE


def record(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Stand in for a CUDA graph: what was launched is launched again on the same memory, and no Python runs."""
    _recorded.clear()
    TRACE.capturing = True
    try:
        result = work()
    finally:
        TRACE.capturing = False
    launched = [*_recorded]

    def replay() -> None:
        TRACE.replays += 1
        for operation, arguments, options, out in launched:
            again = operation(*arguments, **options)
            for new, old in zip(tree_leaves(again), tree_leaves(out), strict=True):
                if isinstance(new, Tensor) and new is not old and new.data_ptr() != old.data_ptr():
                    old.copy_(new)

    return replay, result


# ---- tensors


class Ghost(Tensor):
    """A tensor on the device: it has the values on the CPU."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> Ghost:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            layout=values.layout, device=CUDA,
        )  # fmt: skip

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __repr__(self, **options: Any) -> str:
        return f"Ghost({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return dispatch(operation, arguments, options or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return dispatch(operation, arguments, options or {})


class _Functions(TorchFunctionMode):
    """Give devices their index, and make tensors of Python's numbers on the CPU first, as PyTorch does."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        if function is Tensor.cuda:
            return arguments[0].to(CUDA)
        if function is Tensor.to:
            arguments = tuple(CUDA if _is_cuda(each) else each for each in arguments)
        if _is_cuda(options.get("device")):
            options["device"] = CUDA
            if function in (torch.tensor, torch.as_tensor):
                del options["device"]
                return function(*arguments, **options).to(CUDA)
        return function(*arguments, **options)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def on_cpu(value: Any) -> Any:
    """Return a ghost's values, or the value itself."""
    return value.values if isinstance(value, Ghost) else value


def as_ghost(value: Any) -> Any:
    """Return a ghost of a CPU tensor, or the value itself."""
    return Ghost(value) if isinstance(value, Tensor) and not isinstance(value, Ghost) else value


def place() -> str:
    """Return file, line and function of the innermost frame of the package."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        if "/mar/" in frame.filename:
            return f"{frame.filename.rpartition('/mar/')[2]}:{frame.lineno} {frame.name}"
    return "?"


# ---- operations


def dispatch(operation: Any, arguments: Any, options: Any) -> Any:
    """Run an operation on the CPU, and record it if it is the device's."""
    tensors = [each for each in tree_leaves((arguments, options)) if isinstance(each, Tensor)]
    ghosts = [each for each in tensors if isinstance(each, Ghost)]
    others = [each for each in tensors if not isinstance(each, Ghost)]
    device = options.get("device")
    if not ghosts and not _is_cuda(device):
        return operation(*arguments, **options)
    name = operation.overloadpacket.__name__
    if name == "_fused_sdp_choice":
        return MATH_ATTENTION
    if name == "_to_copy" or (name == "copy_" and others):
        return _copy(operation, name, arguments, options)
    _check(name, arguments, options, others)

    on_device = device is None or _is_cuda(device)
    options = {key: torch.device("cpu") if key == "device" and value else value for key, value in options.items()}
    cpu_arguments, cpu_options = tree_map(on_cpu, (arguments, options))
    result = operation(*cpu_arguments, **cpu_options)
    if not _is_view(operation):
        _launched(operation, cpu_arguments, cpu_options, result)
    written = _written_argument(operation, arguments, options)
    if written is not None:
        return written
    return tree_map(as_ghost, result) if on_device else result


def _check(name: str, arguments: Any, options: Any, others: list[Tensor]) -> None:
    """Record operations on two devices and waits."""
    if name in WAITING:
        TRACE.wait("result", name)
    if options.get("generator") is not None:
        TRACE.mixed[f"{name} with a CPU generator at {place()}"] += 1
    if name in INDEXING:
        indices = [each for each in arguments[1] if each is not None]
        for index in indices:
            if not isinstance(index, Ghost):
                TRACE.wait("index from the CPU", name)
            elif index.dtype in (torch.bool, torch.uint8):
                TRACE.wait("mask as an index", name)
        others = [each for each in others if not any(each is index for index in indices)]
    if any(each.dim() for each in others):
        TRACE.mixed[f"{name} at {place()}"] += 1


def _copy(operation: Any, name: str, arguments: Any, options: Any) -> Any:
    """Copy between devices, or change the type on one."""
    destination, source = (arguments[0], arguments[1]) if name == "copy_" else (None, arguments[0])
    without_wait = bool(options.get("non_blocking") or (name == "copy_" and len(arguments) > 2 and arguments[2]))
    device = options.get("device")
    to_device = isinstance(destination, Ghost) if name == "copy_" else _is_cuda(device or source.device)
    on_host = destination if isinstance(source, Ghost) else source
    waits = on_host is None or not (without_wait and on_host.is_pinned())
    if isinstance(source, Ghost) and not to_device and waits:
        TRACE.wait("copy to the CPU", name)
    elif not isinstance(source, Ghost) and to_device and waits:
        TRACE.wait("copy to the device", name)
    elif to_device and TRACE.capturing and not isinstance(source, Ghost):
        TRACE.forbidden[f"copy to the device: {name} at {place()}"] += 1
    if destination is not None:
        on_cpu(destination).copy_(on_cpu(source))
        return destination
    rest = {key: value for key, value in options.items() if key not in ("device", "non_blocking", "pin_memory")}
    if isinstance(source, Ghost) and to_device:
        copied = operation(source.values, **rest)
        _launched(operation, (source.values,), rest, copied)
        return Ghost(copied)
    copied = operation(on_cpu(source), **rest, device=torch.device("cpu")).clone()
    return Ghost(copied) if to_device else copied


def _launched(operation: Any, arguments: Any, options: Any, result: Any) -> None:
    TRACE.kernels += 1
    if TRACE.capturing:
        _recorded.append((operation, arguments, options, result))


def _is_view(operation: Any) -> bool:
    """Return whether a result shares memory with an argument that is not written, or nothing is computed."""
    name = operation.overloadpacket.__name__
    if name.startswith(("empty", "new_empty")) or name in ("_unsafe_view", "set_"):
        return True
    return any(each.alias_info is not None and not each.alias_info.is_write for each in operation._schema.returns)


def _written_argument(operation: Any, arguments: Any, options: Any) -> Any:
    """Return the argument that an operation in place returns; None for others."""
    schema = operation._schema
    if len(schema.returns) != 1 or schema.returns[0].alias_info is None or not schema.returns[0].alias_info.is_write:
        return None
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return arguments[index] if index < len(arguments) else options.get(argument.name)
    return None
