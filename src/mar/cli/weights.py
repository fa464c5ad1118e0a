"""`mar convert`, `mar download` and `mar info`: weights on the disk."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mar.cli.options import Dtype, parse, torch_dtype

OfficialName = Literal["kl16", "mar-base", "mar-large", "mar-huge"]


@dataclass(frozen=True)
class ConvertOptions:
    """Official checkpoint-last.pth -> one file of ours (.safetensors); ours -> the official format (.pth)."""

    source: Annotated[Path, tyro.conf.Positional]
    """checkpoint-last.pth, or a file or run folder of ours."""
    target: Annotated[Path, tyro.conf.Positional]
    """The file to write: .safetensors, or .pth for the official format."""
    weights: Literal["ema", "raw"] = "ema"
    """Which of an official file's weights to take; raw ones draw worse pictures."""
    tokenizer: Path | None = None
    """kl16.ckpt; by default the one beside the source, or that `mar download` fetched."""
    heads: int | None = None
    """Attention heads of an official file that is not B, L or H and does not tell."""
    patch: int | None = None
    """Its patch size, where it does not tell."""
    dtype: Dtype = "fp32"
    """bf16 halves a file of ours; its weights are rounded."""


def convert(arguments: Sequence[str]) -> int:
    """`mar convert`."""
    options = parse(ConvertOptions, "convert", arguments)
    if not options.source.exists():
        raise ValueError(f"{options.source}: there is no such file")
    if options.target.suffix == ".pth":
        return _export(options.source, options.target)
    if options.target.suffix != ".safetensors":
        raise ValueError(f"target {options.target}: expected a file .safetensors (ours) or .pth (official)")
    from mar import zoo

    if options.source.is_dir() or options.source.suffix == ".safetensors":
        pipeline = zoo.load(options.source, device="cpu")
    else:
        pipeline = zoo.import_official(
            options.source,
            options.tokenizer or zoo.kl16_path(options.source.parent),
            weights=options.weights,
            heads=options.heads,
            patch=options.patch,
        )
    pipeline.save(options.target, torch_dtype(options.dtype))
    count = sum(p.numel() for p in pipeline.model.parameters())
    print(f"{options.target}: {count / 1e6:.1f} million parameters, the {pipeline.weights.upper()} weights")
    return 0


def _export(source: Path, target: Path) -> int:
    """Ours -> official, with the raw weights that a run keeps beside the EMA's."""
    from mar.checkpoint.official import write_mar
    from mar.pipeline import WEIGHTS_FILE, Pipeline

    path = source / WEIGHTS_FILE if source.is_dir() else source
    averaged = Pipeline.open(path).model
    raw_path = path.with_name(f"{path.stem}-raw.safetensors")
    raw = Pipeline.open(raw_path).model if raw_path.is_file() else averaged
    write_mar(target, averaged.config, raw.state_dict(), averaged.state_dict())
    beside = "" if raw_path.is_file() else f"; there is no {raw_path.name}, so `model` holds the same"
    print(f"{target}: {path.name} as `model_ema`{beside}")
    return 0


@dataclass(frozen=True)
class DownloadOptions:
    """Fetches official files; goes on where it stopped; checks size and sha256."""

    names: Annotated[tuple[OfficialName | Literal["all"], ...], tyro.conf.Positional]
    """all, or some of kl16 (254 MiB), mar-base (1.6 GiB), mar-large (3.6 GiB), mar-huge (7.0 GiB)."""
    to: Path | None = None
    """Folder; by default MAR_HOME or ~/.cache/mar, where `mar sample mar-base` looks."""


def download(arguments: Sequence[str]) -> int:
    """`mar download`."""
    options = parse(DownloadOptions, "download", arguments)
    from mar.checkpoint.download import OFFICIAL, fetch, progress_bar

    if not options.names:
        raise ValueError(f"nothing to download: name some of {', '.join(OFFICIAL)}")
    for name in OFFICIAL if "all" in options.names else options.names:
        with progress_bar(name) as progress:
            path = fetch(OFFICIAL[name], options.to, progress=progress)
        print(path)
    return 0


@dataclass(frozen=True)
class InfoOptions:
    """Says what this machine offers, and what a model holds."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A bundled name, a file or a folder of ours."""


def info(arguments: Sequence[str]) -> int:
    """`mar info`."""
    options = parse(InfoOptions, "info", arguments)
    import torch

    from mar import __version__, runtime

    device = runtime.choose_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"mar {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"device {device} ({name}), float32 by default, {torch.get_num_threads()} threads")
    if options.model is not None:
        _describe(options.model)
    return 0


def _describe(name: str) -> None:
    from mar import zoo
    from mar.assets import asset
    from mar.checkpoint.store import model_shapes
    from mar.config import to_dict

    header = zoo.describe(asset(f"{name}.safetensors") if name in zoo.BUNDLED else Path(name))
    count = sum(shape.numel() for shape in model_shapes(header.model).values())
    print(f"{name}: {count / 1e6:.2f} million parameters, the {header.weights.upper()} weights")
    for title, values in (
        ("model", to_dict(header.model)),
        ("sampling", to_dict(header.sampling)),
        ("tokenizer", {key: value for key, value in header.tokenizer.items() if key != "config"}),
        ("notes", header.notes),
    ):
        print(f"{title}: {', '.join(f'{key}={value}' for key, value in values.items())}")
    if header.classes:
        more = ", ..." if len(header.classes) > 10 else ""
        print(f"{len(header.classes)} classes: {', '.join(header.classes[:10])}{more}")
