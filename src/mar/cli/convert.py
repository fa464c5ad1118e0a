"""`mar convert`, `mar download` and `mar info`: weights on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mar.cli.options import Dtype, parse, torch_dtype


@dataclass(frozen=True)
class ConvertOptions:
    """Official checkpoint-last.pth -> one file of ours (.safetensors); ours -> the official format (.pth)."""

    source: Annotated[Path, tyro.conf.Positional]
    """checkpoint-last.pth, or a file or run folder of ours."""
    target: Annotated[Path, tyro.conf.Positional]
    """The file to write: .safetensors, or .pth for the official format."""
    weights: Literal["ema", "raw"] | None = None
    """Weights of an official file or a run to take: by default ema; raw ones draw worse pictures."""
    tokenizer: Path | None = None
    """kl16.ckpt; by default the one beside the source, or that `mar download` fetched."""
    num_heads: int | None = None
    """Attention heads of an official file that is not B, L or H and does not tell."""
    patch_size: int | None = None
    """Its patch size, where it does not tell."""
    dtype: Dtype | None = None
    """Type of the weights in our file, by default fp32; bf16 halves it and rounds them."""


def convert(arguments: Sequence[str]) -> int:
    """Run `mar convert`."""
    options = parse(ConvertOptions, "convert", arguments)
    source, target = options.source, options.target
    if not source.exists():
        raise ValueError(f"{source}: there is no such file")
    if target.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"target {target}: expected a file .safetensors (ours) or .pth (official)")
    if target.resolve() == source.resolve():
        raise ValueError(f"target {target} is the source, which would be lost; take another name")
    ours = source.is_dir() or source.suffix == ".safetensors"
    if target.suffix == ".pth":
        if not ours:
            raise ValueError(f"{source} -> {target}: only files and run folders of ours become official ones")
        _only(options, (), "the official format, which holds raw and EMA weights in float32")
        return _export(source, target)
    from mar import zoo
    from mar.pipeline import WEIGHTS_FILE

    if ours:
        _only(options, ("weights", "dtype") if source.is_dir() else ("dtype",), f"{source}, which is ours")
        pipeline = zoo.load(_raw(source / WEIGHTS_FILE) if options.weights == "raw" else source, device="cpu")
    else:
        pipeline = zoo.import_official(
            source,
            options.tokenizer or zoo.kl16_path(source.parent),
            weights=options.weights or "ema",
            num_heads=options.num_heads,
            patch_size=options.patch_size,
        )
    pipeline.save(target, torch_dtype(options.dtype or "fp32"))
    count = sum(p.numel() for p in pipeline.model.parameters())
    print(f"{target}: {count / 1e6:.1f} million parameters, the {pipeline.weights.upper()} weights")
    return 0


def _only(options: ConvertOptions, fitting: tuple[str, ...], what: str) -> None:
    """ValueError where an option is given that is not among those `fitting` this direction."""
    for name in ("weights", "tokenizer", "num_heads", "patch_size", "dtype"):
        if name not in fitting and getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} says nothing of {what}; leave it out")


def _raw(path: Path) -> Path:
    """Return the path of a run's raw weights."""
    return path.with_name(f"{path.stem}-raw.safetensors")


def _export(source: Path, target: Path) -> int:
    """Ours -> official, with the raw weights that a run keeps beside the EMA's."""
    from mar.checkpoint.official import write_mar
    from mar.pipeline import WEIGHTS_FILE, Pipeline

    path = source / WEIGHTS_FILE if source.is_dir() else source
    pipeline, raw_path = Pipeline.open(path), _raw(path)
    if pipeline.weights != "ema":
        raise ValueError(f"{path} holds raw weights, but an official file needs the EMA's; give the run's folder")
    averaged = pipeline.model
    raw = Pipeline.open(raw_path).model if raw_path.is_file() else averaged
    write_mar(target, averaged.config, raw.state_dict(), averaged.state_dict())
    beside = "" if raw_path.is_file() else f"; there is no {raw_path.name}, so `model` holds the same"
    print(f"{target}: {path.name} as `model_ema`{beside}")
    return 0
