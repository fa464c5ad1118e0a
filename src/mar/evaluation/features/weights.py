"""Weights of networks that are not ours, read without running what is in the file."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mar.checkpoint.torch_files import read_torch


def read_weights(path: Path) -> dict[str, Shaped[Tensor, "..."]]:
    """The tensors of a .safetensors file or of one by `torch.save`, also from before PyTorch 1.6.

    Raises ValueError, one line, for anything else.
    """
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({_line(error)})") from error
    holder = read_torch(path) if _is_zip(path) else _read_old(path)
    if not all(isinstance(tensor, Tensor) for tensor in holder.values()):
        raise ValueError(f"{path}: expected tensors by name, as of a module's state_dict()")
    return holder


def load_weights(module: nn.Module, weights: dict[str, Shaped[Tensor, "..."]], source: str) -> None:
    """Puts weights into a module; ValueError, one line, where names or shapes are not the module's."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{source}: not the weights of {type(module).__name__} ({_line(error)})") from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _read_old(path: Path) -> dict[str, Tensor]:
    try:
        holder = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: not a file of weights, or a damaged one; copy or download it again") from error
    if not isinstance(holder, dict):
        raise ValueError(f"{path}: holds a {type(holder).__name__}, expected tensors by name")
    return dict(holder)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2])[:160]
