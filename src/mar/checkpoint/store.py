"""Weights to share: one safetensors file with model, tokenizer and settings.

The file's metadata has one entry of ours, `mar`: the header as JSON. Tensors are called `model.<name>` and
`tokenizer.<name>`. A matrix may be stored in 8 bits, each row a multiple of a scale, `<its name>:scale`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Int8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mar.checkpoint.files import CheckpointError, size_text, write_atomically
from mar.config import ModelConfig, SamplingConfig, from_dict, to_dict
from mar.model.mar import MAR
from mar.nn import init_empty_weights

__all__ = ["FORMAT", "CheckpointError", "Header", "load", "model_shapes", "read_header", "save"]

FORMAT = "mar/1"
_KEY = "mar"
_SCALE = ":scale"
"""End of the name of the scales of a matrix in 8 bits."""
_MIN_8_BIT = 4096
"""Smaller tensors are not stored in 8 bits."""


@dataclass(frozen=True)
class Header:
    """The description in a file of weights."""

    model: ModelConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Default settings of sampling."""
    tokenizer: dict[str, Any] = field(default_factory=lambda: {"kind": "pixels"})
    """The config for `mar.tokenizer.build`."""
    classes: tuple[str, ...] = ()
    """Names of the classes; may be empty."""
    weights: str = "ema"
    """`ema` or `raw`."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Their origin: images seen, recipe, source file and the like."""
    condition: dict[str, Any] = field(default_factory=dict)
    """The reader of captions (`mar.data.conditions`); empty for a model without captions."""

    def __post_init__(self) -> None:
        if self.weights not in ("ema", "raw"):
            raise ValueError(f"weights: got {self.weights!r}, expected ema or raw")


def save(path: str | os.PathLike[str], header: Header, tensors: Mapping[str, Tensor], *, bits8: bool = False) -> None:
    """Write a file of weights, complete or not at all.

    Raises CheckpointError if the disk refuses, or the tensors are not those of the config.

    Args:
        path: the file.
        header: its description.
        tensors: by name.
        bits8: round matrices and kernels to 8 bits; `load` returns them in float32.
    """
    path = Path(path)
    _check_fit(path, header.model, {name: tensor.shape for name, tensor in tensors.items()})
    # One entry alone: safetensors writes several in an order that changes from call to call.
    values = {name: value for name, value in to_dict(header).items() if value or name != "condition"}
    metadata = {_KEY: json.dumps({"format": FORMAT, **values})}
    stored = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    if bits8:
        stored = {key: value for name, tensor in stored.items() for key, value in to_8_bits(name, tensor).items()}

    def write(temporary: Path) -> None:
        try:
            save_file(stored, temporary, metadata=metadata)
        except SafetensorError as error:  # what its Rust code makes of a full disk
            raise OSError(str(error)) from error

    needed = sum(tensor.numel() * tensor.itemsize for tensor in stored.values()) + len(metadata[_KEY])
    write_atomically(path, write, needed)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[Header, dict[str, Tensor]]:
    """Load the header and tensors of a file that `save` wrote.

    Raises CheckpointError for any other file: empty, truncated, of another kind, of a newer version, or with tensors
    that are not those of its config.
    """
    path = Path(path)
    header = read_header(path)
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    for name in [name for name in tensors if name.endswith(_SCALE)]:
        of, scale = name.removesuffix(_SCALE), tensors.pop(name)
        if of not in tensors or scale.shape != tensors[of].shape[:1]:
            raise CheckpointError(f"{path}: {name} has no matrix of {len(scale)} rows; was it made by mar?")
        tensors[of] = from_8_bits(tensors[of], scale)
    _check_fit(path, header.model, {name: tensor.shape for name, tensor in tensors.items()})
    return header, tensors


def to_8_bits(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Round a matrix or kernel to 8 bits, each row scaled.

    Returns what is stored, by name: other tensors as they are.
    """
    if tensor.ndim < 2 or tensor.numel() < _MIN_8_BIT or not tensor.is_floating_point():
        return {name: tensor}
    scale = tensor.float().flatten(1).abs().amax(1) / 127
    rows = tensor.float() / scale.clamp(min=torch.finfo(torch.float32).tiny).view(-1, *[1] * (tensor.ndim - 1))
    return {name: rows.round().to(torch.int8), name + _SCALE: scale}


def from_8_bits(rounded: Int8[Tensor, "rows ..."], scale: Float32[Tensor, " rows"]) -> Float32[Tensor, "rows ..."]:
    """Multiply the rows of an 8-bit matrix by their scales."""
    return rounded.float() * scale.view(-1, *[1] * (rounded.ndim - 1))


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header alone. Raises CheckpointError as `load` does."""
    path = Path(path)
    _check_kind(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if _KEY not in metadata:
        shown = ", ".join(names[:3])
        raise CheckpointError(
            f"{path} is a safetensors file, but says nothing of mar's format (it holds {shown}, ...); "
            "weights of other programs have to be imported with `mar convert`"
        )
    return _parse(path, metadata[_KEY])


def model_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return name and shape of every tensor, without creating the model."""
    with init_empty_weights():
        return {name: tensor.shape for name, tensor in MAR(config).state_dict().items()}


def shape_differences(shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> list[str]:
    """Describe each difference in name or shape between two sets of tensors."""
    lines = [
        f"{name} is {tuple(shapes[name])}, expected {tuple(expected[name])}"
        for name in sorted(set(shapes) & set(expected))
        if shapes[name] != expected[name]
    ]
    lines += [f"{name} is missing" for name in sorted(set(expected) - set(shapes))]
    return lines + [f"{name} is not expected" for name in sorted(set(shapes) - set(expected))]


def _parse(path: Path, text: str) -> Header:
    try:
        values = json.loads(text)
        written = values.pop("format")
        family, _, version = written.partition("/")
        newer = family == "mar" and version.isdigit() and int(version) > int(FORMAT.partition("/")[2])
        if not newer and written == FORMAT:
            return _header(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header can't be understood ({error}); was it made by mar?") from error
    if newer:
        raise CheckpointError(f"{path} is of format {written}, newer than this mar reads ({FORMAT}); update mar")
    raise CheckpointError(f"{path} is of format {written!r}, which this mar does not know (it reads {FORMAT})")


def _header(values: dict[str, Any]) -> Header:
    values["model"] = from_dict(ModelConfig, values["model"])
    values["sampling"] = from_dict(SamplingConfig, values["sampling"])
    values["classes"] = tuple(values["classes"])
    return Header(**values)


def _check_fit(path: Path, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> None:
    prefix = "model."
    model = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    if different := shape_differences(model, model_shapes(config)):
        more = f"; {len(different)} differences in all" if len(different) > 3 else ""
        raise CheckpointError(f"{path}: the tensors are not those of its config: {'; '.join(different[:3])}{more}")


def _check_kind(path: Path) -> None:
    """Raise CheckpointError for a file of another kind: safetensors would say less."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start, first = file.read(8), file.read(1)
        length = int.from_bytes(start, "little")
        if size < 8 or length > 100_000_000 or first not in (b"{", b""):
            raise CheckpointError(_other_kind(path, start))
        expected = 8 + length
        if first and size >= expected:
            expected += _data_length(path, first + file.read(length - 1))
    if size < expected:
        raise CheckpointError(
            f"{path} is truncated: {size_text(size)} of at least {size_text(expected)}; copy or download it again"
        )


def _other_kind(path: Path, start: bytes) -> str:
    if not start:
        return f"{path} is empty: the copy or download of it failed; get it again"
    if start.startswith((b"PK", b"\x80")):
        return f"{path} is a PyTorch file, not safetensors; import it with `mar convert`"
    if start.lstrip().startswith(b"<"):
        return f"{path} is a web page, not weights: the download of it failed; get it again"
    return f"{path} is not a safetensors file"


def _data_length(path: Path, header: bytes) -> int:
    try:
        entries = json.loads(header)
        return max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header can't be read") from error
