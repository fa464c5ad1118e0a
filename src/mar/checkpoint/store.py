"""Weights to share: one safetensors file with model, tokenizer and settings.

The file's metadata has one entry of ours, `mar`: the header as JSON. Tensors are called `model.<name>` and
`tokenizer.<name>`. A matrix may be stored in 8 bits, each row a multiple of a scale, `<its name>:scale`. The header
holds the CRC-32 of each tensor and its own sha256; files of earlier versions have a sha256 of all tensors, or nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mar.checkpoint import checksums
from mar.checkpoint.contents import foreign, unwrap, unwrap_name
from mar.checkpoint.files import (
    CheckpointError,
    check_regular,
    newer_format,
    parse_json,
    size_text,
    write_atomically,
    write_tensors,
)
from mar.config import ModelConfig, SamplingConfig, from_dict, to_dict
from mar.model.mar import MAR
from mar.nn import init_empty_weights
from mar.tokenizer import build

__all__ = [
    "FORMAT",
    "CheckpointError",
    "Header",
    "check",
    "check_table",
    "load",
    "model_shapes",
    "read_header",
    "save",
    "verify",
]

FORMAT = "mar/1"
_KEY = "mar"
_SCALE = ":scale"
"""End of the name of the scales of a matrix in 8 bits."""
_MIN_8_BIT = 4096
"""Smaller tensors are not stored in 8 bits."""
_CHECKSUMS, _OLD_CHECKSUMS = "checksums", "sha256"
"""Key of the header's checksums, and in files that have one for all tensors."""
_DTYPES = ("F64", "F32", "F16", "BF16")
"""Types of tensors, as safetensors calls them; I8 beside a scale."""
_COUNTER = "num_batches_tracked"
"""End of the names of BatchNorm's counters, which are no weights: not saved, and ignored in earlier files."""
_MAX_HEADER = 100_000_000
_MIN_BOUND = 1_000_000
"""Whole numbers of a header may be so large in any file; larger ones need as many bytes of tensors."""
_MAX_NESTING = 50


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
        if self.weights not in ("ema", "raw", "unknown"):
            raise ValueError(f"weights: got {self.weights!r}, expected ema, raw or unknown")


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
    _check_fit(path, header.model, {name: tensor.shape for name, tensor in unwrap(tensors).items()})
    # One entry alone: safetensors writes several in an order that changes from call to call.
    values = {name: value for name, value in to_dict(header).items() if value or name != "condition"}
    weights = {unwrap_name(name): tensor for name, tensor in tensors.items() if not name.endswith(_COUNTER)}
    stored = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    if bits8:
        stored = {key: value for name, tensor in stored.items() for key, value in to_8_bits(name, tensor).items()}
    content = {"format": FORMAT, **values, _CHECKSUMS: {"crc32": checksums.tensor_checksums(stored)}}
    content[_CHECKSUMS]["header"] = _header_digest(json.loads(json.dumps(content)), _CHECKSUMS)
    metadata = {_KEY: json.dumps(content)}

    def write(temporary: Path) -> None:
        write_tensors(temporary, stored, metadata)

    needed = sum(tensor.numel() * tensor.itemsize for tensor in stored.values()) + len(metadata[_KEY])
    write_atomically(path, write, needed)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[Header, dict[str, Tensor]]:
    """Load the header and tensors of a file that `save` wrote.

    Raises CheckpointError for any other file: empty, truncated, of another kind, of a newer version, or with tensors
    that are not those of its config.
    """
    path = Path(path)
    return _load(path, str(device), checksums.enabled() and not checksums.was_compared(_existing(path)))[:2]


def verify(path: str | os.PathLike[str]) -> bool:
    """Compare a file with its checksums. Returns False for one of an earlier version, without checksums.

    Raises CheckpointError as `load` does.
    """
    _, tensors, has_checksums = _load(Path(path), "cpu", True)
    check_values(Path(path), tensors)
    return has_checksums


def _load(path: Path, device: str, compare: bool) -> tuple[Header, dict[str, Tensor], bool]:
    """Load header and tensors; returns, too, whether there are checksums."""
    header, written = _read(path)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} can't be read ({_first_line(error)}); copy or download it again") from error
    if compare and written is not None:
        if changed := _changed(tensors, written):
            raise CheckpointError(f"{path} is damaged in {_shorten(changed)}: not as it was written; get it again")
        checksums.note_compared(path)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_COUNTER)}
    for name in [name for name in tensors if name.endswith(_SCALE)]:
        of, scale = name.removesuffix(_SCALE), tensors.pop(name)
        tensors[of] = from_8_bits(tensors[of], scale)
    return header, unwrap(tensors), written is not None


def _changed(tensors: Mapping[str, Tensor], written: str | list[int]) -> list[str]:
    """Return the names of tensors that differ from their checksums."""
    names = sorted(tensors)
    if isinstance(written, str) or len(written) != len(names):
        return [] if checksums.tensors_digest(tensors) == written else ["its tensors"]
    return [name for name, a, b in zip(names, checksums.tensor_checksums(tensors), written, strict=True) if a != b]


def _shorten(names: list[str]) -> str:
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check(path: str | os.PathLike[str]) -> Header:
    """Read the header, and check the whole file, values too."""
    header, tensors = load(path)
    check_values(Path(path), tensors)
    return header


def check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for weights that are not finite, by name."""
    finite = checksums.in_threads(_is_finite, tensors.values())
    if broken := [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]:
        raise CheckpointError(f"{path}: {_shorten(broken)} have values that are not finite; get it again")
    std = tensors.get("tokenizer.std")
    if std is not None and not bool((std > 0).all()):
        raise CheckpointError(f"{path}: tokenizer.std has values that are not positive, so no latents can be scaled")


_INFINITY = {
    torch.float64: (np.int64, np.uint64, 0x7FF << 52),
    torch.float32: (np.int32, np.uint32, 0xFF << 23),
    torch.float16: (np.int16, np.uint16, 0x1F << 10),
    torch.bfloat16: (np.int16, np.uint16, 0xFF << 7),
}
"""Whole numbers as long as a float, and infinity's bits as one of them."""


def _is_finite(tensor: Tensor) -> bool:
    """Tell if all values are finite, by their bits: in one pass, without a copy or PyTorch's threads.

    Those of infinity and NaN are the largest of their sign.
    """
    if not tensor.numel() or tensor.dtype not in _INFINITY:
        return True
    signed, unsigned, infinity = _INFINITY[tensor.dtype]
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().view(signed)
    return bool(values.max() < infinity and values.view(unsigned).max() < (infinity | 1 << (8 * tensor.itemsize - 1)))


def _existing(path: Path) -> Path:
    check_regular(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    return path


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160] or type(error).__name__


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
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[Header, str | list[int] | None]:
    """Read the header, and compare it with the tensors' names, types and shapes.

    Returns, too, the checksums of the tensors; None in a file of an earlier version.
    """
    table = _read_table(path)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or _KEY not in metadata:
        if isinstance(metadata, dict) and set(metadata) == {"sha256"}:
            raise CheckpointError(
                f"{path} is a tokenizer that mar trained; give its folder {path.parent} as --tokenizer"
            )
        raise foreign(path, table)
    header, of_tensors, intact = _parse(path, metadata[_KEY])
    try:
        _check_bounds(header, table, path.stat().st_size)
        shapes = _stored_shapes(table)
        expected = {f"model.{name}": shape for name, shape in model_shapes(header.model).items()}
        expected |= {f"tokenizer.{name}": shape for name, shape in _tokenizer_shapes(header).items()}
        different = shape_differences(shapes, expected)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, TypeError, RuntimeError, OverflowError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header describes no model ({_first_line(error)})") from error
    if different:
        raise CheckpointError(_mismatch_message(path, different))
    try:
        _check_conditions(header)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: its header is not as it was written; get it again")
    return header, of_tensors


def _check_bounds(header: Header, table: Mapping[str, Any], size: int) -> None:
    """Raise CheckpointError for what can't be the description of these tensors, before anything is built."""
    depths = {
        "model.encoder.depth": header.model.encoder.depth,
        "model.decoder.depth": header.model.decoder.depth,
        "model.head.depth": header.model.head.depth,
        "tokenizer.depth": header.tokenizer.get("depth", 0),
    }
    config = header.tokenizer.get("config")
    if isinstance(config, dict):
        depths["tokenizer.config.layers_per_block"] = config.get("layers_per_block", 0)
    for name, depth in depths.items():
        if not isinstance(depth, int) or depth > len(table):
            raise CheckpointError(f"{name} is {depth!r}, but the file has {len(table):,} tensors")
    for name, value in _numbers({"model": to_dict(header.model), "tokenizer": header.tokenizer}):
        if not math.isfinite(value) or abs(value) > max(size, _MIN_BOUND):
            raise CheckpointError(f"{name} is {value:.6g}, too large for a file of {size_text(size)}")
    model = header.model
    if math.prod(model.grid) * model.channels > max(size, _MIN_BOUND):
        raise CheckpointError(f"model.grid is {model.grid}, too large for a file of {size_text(size)}")


def _check_conditions(header: Header) -> None:
    """Raise CheckpointError unless classes and words are as many as the model has."""
    model = header.model
    if len(header.classes) not in (0, model.classes):
        raise CheckpointError(f"it names {len(header.classes)} classes, but the model has {model.classes}")
    words = header.condition.get("words", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or len(words) != model.words:
        raise CheckpointError(f"its captions have no list of {model.words} words, as the model does")


def _numbers(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, int | float]]:
    """Yield the numbers in plain values, by name."""
    if depth > _MAX_NESTING:
        raise CheckpointError(f"{name[:60]} is nested too deeply")
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}".lstrip("."), depth + 1)
    elif isinstance(value, list | tuple):
        if len(value) > 1000:
            raise CheckpointError(f"{name} has {len(value):,} values, too many for a model")
        for item in value:
            yield from _numbers(item, name, depth + 1)
    elif isinstance(value, int | float):
        yield name, value


def _stored_shapes(table: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Return name and shape of every tensor of a file. Raises CheckpointError for types that hold no weights."""
    table = {name: entry for name, entry in table.items() if not name.endswith(_COUNTER)}
    for name, entry in table.items():
        of = name.removesuffix(_SCALE)
        if of != name:
            if of not in table or entry["dtype"] != "F32" or entry["shape"] != table[of]["shape"][:1]:
                raise CheckpointError(f"{name} is no scale of the rows of a matrix; was it made by mar?")
        elif entry["dtype"] not in _DTYPES and not (entry["dtype"] == "I8" and name + _SCALE in table):
            raise CheckpointError(f"{name} is stored as {entry['dtype']}, expected {', '.join(_DTYPES)}")
    return unwrap({name: torch.Size(entry["shape"]) for name, entry in table.items() if not name.endswith(_SCALE)})


def _tokenizer_shapes(header: Header) -> dict[str, torch.Size]:
    """Return name and shape of the tokenizer's tensors, without creating them."""
    try:
        with init_empty_weights():
            state = build(header.tokenizer).state_dict()
            return {name: tensor.shape for name, tensor in state.items() if not name.endswith(_COUNTER)}
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"its tokenizer can't be built ({type(error).__name__}: {_first_line(error)}); was it made by mar?"
        ) from error


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


def _parse(path: Path, text: Any) -> tuple[Header, str | list[int] | None, bool]:
    """Return the header, the tensors' checksums if it has any, and whether the header is as it was written."""
    try:
        values = parse_json(text)
        written = values["format"]
        family, _, version = written.partition("/")
        newer = family == "mar" and version.isdigit() and int(version) > int(FORMAT.partition("/")[2])
        if not newer and written == FORMAT:
            of_tensors, intact = None, True
            key = _CHECKSUMS if _CHECKSUMS in values else _OLD_CHECKSUMS
            if key in values:
                sums = values[key]
                of_tensors = [int(n) for n in sums["crc32"]] if key == _CHECKSUMS else str(sums["tensors"])
                intact = not checksums.enabled() or _header_digest(values, key) == sums["header"]
            kept = {name: value for name, value in values.items() if name not in ("format", key)}
            return from_dict(Header, kept), of_tensors, intact
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: its header can't be understood ({_first_line(error)}); was it made by mar?"
        ) from error
    if newer:
        raise newer_format(path, written, FORMAT)
    raise CheckpointError(f"{path} is of format {written!r}, which this mar does not know (it reads {FORMAT})")


def _header_digest(values: dict[str, Any], key: str) -> str:
    """Return the sha256 of a header, but for this very value among its checksums."""
    kept = {name: digest for name, digest in values[key].items() if name != "header"}
    return checksums.json_digest({**values, key: kept})


def _check_fit(path: Path, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> None:
    prefix = "model."
    model = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    if different := shape_differences(model, model_shapes(config)):
        raise CheckpointError(_mismatch_message(path, different))


def _mismatch_message(path: Path, different: list[str]) -> str:
    more = f"; {len(different)} differences in all" if len(different) > 3 else ""
    return f"{path}: the tensors are not those of its config: {'; '.join(different[:3])}{more}"


def check_table(path: Path) -> None:
    """Raise CheckpointError unless a file is a whole one of safetensors."""
    _read_table(path)


def _read_table(path: Path) -> dict[str, Any]:
    """Read what a safetensors file says of its tensors, and its metadata. CheckpointError for a file of another kind.

    safetensors would say less.
    """
    size = _existing(path).stat().st_size
    with path.open("rb") as file:
        start, first = file.read(8), file.read(1)
        length = int.from_bytes(start, "little")
        if size < 8 or length > _MAX_HEADER or first not in (b"{", b""):
            raise CheckpointError(_other_kind(path, start))
        if size < 8 + length:
            raise _truncated(path, size, 8 + length)
        header = first + file.read(length - 1)
    try:
        table = parse_json(header)
        ends = []
        for name, entry in table.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if not all(type(value) is int and 0 <= value < 2**63 for value in (begin, end, *entry["shape"])):
                raise ValueError(f"{name} has shape {entry['shape']}")
            ends.append(end)
    except (ValueError, KeyError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header can't be read") from error
    if size < (expected := 8 + length + max(ends, default=0)):
        raise _truncated(path, size, expected)
    try:
        with safe_open(path, framework="pt"):  # looks at the offsets
            return dict(table)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {_first_line(error)}") from error


_MAGICS = {b"GGUF": "a GGUF file", b"\x89HDF": "an HDF5 file", b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture"}
"""Beginnings of files that people take for weights."""


def _truncated(path: Path, size: int, expected: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated: {size_text(size)} of at least {size_text(expected)}; copy or download it again"
    )


def _other_kind(path: Path, start: bytes) -> str:
    if not start:
        return f"{path} is empty: the copy or download of it failed; get it again"
    if start.startswith((b"PK", b"\x80")):
        return f"{path} is a PyTorch file, not safetensors; `mar convert` reads it if it is a MAR, eMIGM or l-DeTok"
    if name := next((name for magic, name in _MAGICS.items() if start.startswith(magic)), None):
        return f"{path} is {name}, not safetensors"
    if start.lstrip().startswith(b"<"):
        return f"{path} is a web page, not weights: the download of it failed; get it again"
    return f"{path} is not a safetensors file"
