"""`mar convert`: official weights to ours, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mar.cli.options import DrawnDtype, parse
from mar.terminal import print_out


@dataclass(frozen=True)
class ConvertOptions:
    """Official checkpoint-last.pth -> one file of ours (.safetensors); ours -> the official format (.pth)."""

    source: Annotated[Path, tyro.conf.Positional]
    """checkpoint-last.pth, or a file or run folder of ours."""
    target: Annotated[Path, tyro.conf.Positional]
    """The file to write: .safetensors, or .pth for the official format."""
    weights: Literal["ema", "raw"] | None = None
    """Weights of an official file or a run to take: by default ema; raw ones draw worse pictures."""
    family: Literal["mar", "emigm", "detok"] | None = None
    """Project that trained an official file, if it does not tell: l-DeTok's MAR has the tensors of MAR."""
    tokenizer: Path | None = None
    """Tokenizer's file, folder or Hub id; by default its family's, beside the source or of `mar download`."""
    num_heads: int | None = None
    """Attention heads of an official file that does not tell, and is not B, L or H."""
    patch_size: int | None = None
    """Its patch size, if it does not tell."""
    dtype: DrawnDtype | None = None
    """Precision of our file, by default fp32; bf16 halves it by rounding its weights, int8 quarters it."""


def convert(arguments: Sequence[str]) -> int:
    """Runs `mar convert`."""
    options = parse(ConvertOptions, "convert", arguments)
    from mar.checkpoint.files import check_regular, check_writable
    from mar.checkpoint.official import is_flat_official, is_torch_file

    source, target = options.source, options.target
    check_regular(source)
    if not source.exists():
        raise ValueError(f"{source}: there is no such file")
    if target.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"target: got {target}, expected a file .safetensors (ours) or .pth (official)")
    if target.resolve() == source.resolve():
        raise ValueError(f"target {target} is the source, which would be lost; take another name")
    check_writable(target, is_file=True)
    ours = source.is_dir() or not (is_torch_file(source) or is_flat_official(source))
    if target.suffix == ".pth":
        if not ours:
            raise ValueError(f"{source} -> {target}: only files and run folders of ours become official ones")
        _check_options(options, (), "the official format, which holds raw and EMA weights in float32")
        return _export(source, target)
    from mar import zoo
    from mar.devices import torch_dtype
    from mar.pipeline import WEIGHTS_FILE

    if ours:
        _check_options(options, ("weights", "dtype") if source.is_dir() else ("dtype",), f"{source}, which is ours")
        pipeline = zoo.load(_raw_path(source / WEIGHTS_FILE) if options.weights == "raw" else source, device="cpu")
    else:
        for name in ("num_heads", "patch_size"):
            if (value := getattr(options, name)) is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        pipeline = zoo.import_official(
            source,
            options.tokenizer,
            weights=options.weights,
            family=options.family,
            num_heads=options.num_heads,
            patch_size=options.patch_size,
        )
    pipeline.save(target, torch_dtype(options.dtype or "fp32"))
    if not ours and options.family is None:
        same = ", whose tensors l-DeTok's MAR has as well (--family detok)" if pipeline.notes["family"] == "mar" else ""
        print_out(f"{source}: recognized as {pipeline.notes['family']}{same}")
    count = sum(p.numel() for p in pipeline.model.parameters())
    print_out(f"{target}: {count / 1e6:.1f} million parameters, the {pipeline.weights.upper()} weights")
    return 0


def _check_options(options: ConvertOptions, valid: tuple[str, ...], direction: str) -> None:
    """Raises ValueError for an option that is not among the `valid` ones of this direction."""
    for name in ("weights", "family", "tokenizer", "num_heads", "patch_size", "dtype"):
        if name not in valid and getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} says nothing of {direction}; leave it out")


def _raw_path(path: Path) -> Path:
    """Returns the file of a run's raw weights, beside the EMA's."""
    return path.with_name(f"{path.stem}-raw.safetensors")


def _export(source: Path, target: Path) -> int:
    """Writes an official file of ours, with the raw weights of a run beside its EMA."""
    from mar.checkpoint.official import write_mar
    from mar.pipeline import WEIGHTS_FILE, Pipeline

    path = source / WEIGHTS_FILE if source.is_dir() else source
    pipeline, raw_file = Pipeline.open(path), _raw_path(path)
    if pipeline.weights != "ema":
        raise ValueError(
            f"{path} holds {pipeline.weights} weights, but an official file needs the EMA's; give the run's folder"
        )
    ema = pipeline.model
    raw = Pipeline.open(raw_file).model if raw_file.is_file() else ema
    write_mar(target, ema.config, raw.state_dict(), ema.state_dict())
    note = "" if raw_file.is_file() else f"; there is no {raw_file.name}, so `model` holds the same"
    print_out(f"{target}: {path.name} as `model_ema`{note}")
    return 0
