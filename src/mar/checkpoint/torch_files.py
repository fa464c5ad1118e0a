"""PyTorch's own files (.pth, .ckpt), read without running what is in them."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from mar.checkpoint.files import CheckpointError


def read_torch(path: Path) -> dict[str, Any]:
    """The dict in a file of `torch.save`, its tensors mapped from the disk rather than read.

    Tensors, plain values and `argparse.Namespace` are let through. CheckpointError for a file that wants anything else,
    that is truncated, or that is no such file at all.
    """
    _refuse_others(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            holder = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"{path} is damaged ({_line(error)}); copy or download it again") from error
    if not isinstance(holder, dict):
        raise CheckpointError(f"{path} holds a {type(holder).__name__}, not a dict of tensors")
    return holder


def _refuse_others(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty: the copy or download of it failed; get it again")
    if start.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path} is a web page, not weights: the download of it failed; get it again")
    if start.startswith(b"\x80"):
        raise CheckpointError(f"{path} is a bare pickle (or of PyTorch before 1.6), which is not read")
    if not start.startswith(b"PK"):
        raise CheckpointError(f"{path} is not a file of torch.save")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is truncated or damaged: its end is missing; copy or download it again")


def _refusal(path: Path, message: str) -> str:
    wanted = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"type <class '([\w.]+)'>", message)
    if wanted is None:
        return f"{path} is refused: its pickle asks for more than tensors and plain values"
    return (
        f"{path} is refused: its pickle wants to run {wanted[1]}, and weights need nothing but tensors, plain values "
        "and argparse.Namespace; don't trust it, or save it again without that"
    )


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__
