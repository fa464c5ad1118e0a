"""`mar info`: this machine, and the contents of a checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from mar.cli.options import parse
from mar.terminal import print_out


@dataclass(frozen=True)
class InfoOptions:
    """Prints this machine's device and versions, and the contents of a model."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A bundled or published name, a file or a folder."""


def info(arguments: Sequence[str]) -> int:
    """Runs `mar info`."""
    options = parse(InfoOptions, "info", arguments)
    import torch

    from mar import __version__, devices

    device = devices.choose_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print_out(f"mar {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    default = devices.torch_dtype(devices.default_precision(device))
    precision = str(default or torch.float32).removeprefix("torch.")
    print_out(f"device {device} ({name}), {precision} by default, {torch.get_num_threads()} threads")
    if options.model is not None:
        _print_model(options.model)
    return 0


def _print_model(name: str) -> None:
    from mar import zoo
    from mar.checkpoint.store import model_shapes
    from mar.config import to_dict

    header = zoo.describe(name)
    count = sum(shape.numel() for shape in model_shapes(header.model).values())
    print_out(f"{name}: {count / 1e6:.2f} million parameters, the {header.weights.upper()} weights")
    for title, values in (
        ("model", to_dict(header.model)),
        ("sampling", to_dict(header.sampling)),
        ("tokenizer", {key: value for key, value in header.tokenizer.items() if key != "config"}),
        ("notes", header.notes),
    ):
        parts = {key: value for key, value in values.items() if isinstance(value, dict)}
        print_out(f"{title}: {_pairs({key: value for key, value in values.items() if key not in parts})}")
        for part, settings in parts.items():
            print_out(f"  {part}: {_pairs(settings)}")
    if header.classes:
        more = ", ..." if len(header.classes) > 10 else ""
        print_out(f"{len(header.classes)} classes: {', '.join(header.classes[:10])}{more}")
    if header.condition:
        print_out(f"captions: {_describe_captions(header.condition)}")


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _describe_captions(condition: dict[str, Any]) -> str:
    """Formats what a model reads captions by."""
    from mar.data.conditions import WORDS

    if condition.get("kind") == WORDS:
        words = condition["words"]  # the most frequent first
        more = ", ..." if len(words) > 10 else ""
        return f"{len(words):,} words, learned with the model: {', '.join(words[:10])}{more}"
    return _pairs(condition)
