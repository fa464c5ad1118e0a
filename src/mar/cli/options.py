"""What verbs share: parsing by tyro, device and precision, and writing pictures."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro

if TYPE_CHECKING:
    import torch
    from PIL import Image

Options = TypeVar("Options")
Dtype = Literal["fp32", "bf16"]


def parse(kind: type[Options], verb: str, arguments: Sequence[str], default: Options | None = None) -> Options:
    """The options of a verb. Prints help and exits 0 where it is asked for; ValueError for options that can't be."""
    given = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options: Options = tyro.cli(
                kind,
                prog=f"mar {verb}",
                args=list(arguments),
                description=kind.__doc__,
                **given,  # type: ignore[call-overload]
            )
            return options
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise ValueError(_one_line(said.getvalue(), verb)) from None


def _one_line(box: str, verb: str) -> str:
    """What tyro frames in a box of several lines, as one."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in box.splitlines()]
    words = [line for line in lines if line and not line.startswith("For full helptext")]
    return f"{' '.join(words) or 'these options can not be understood'}; see `mar {verb} --help`"


def torch_dtype(name: Dtype) -> torch.dtype:
    """torch's name of a precision."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def save_png(image: Image.Image, path: Path, **facts: Any) -> None:
    """Writes a PNG, whole or not at all, with `facts` (settings, seeds) as JSON in its metadata under `mar`."""
    from PIL.PngImagePlugin import PngInfo

    from mar.checkpoint.files import write_atomically

    info = PngInfo()
    info.add_text("mar", json.dumps(facts))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))
