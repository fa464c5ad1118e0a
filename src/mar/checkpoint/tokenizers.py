"""Autoencoders in diffusers' format, with our statistics of their latents beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mar.checkpoint.files import write_text
from mar.tokenizer import Tokenizer

STATISTICS_FILE = "mar_statistics.json"
"""Name of the file with a tokenizer's mean and standard deviation."""


def load_tokenizer(path: str | Path, subfolder: str | None = None, *, local_files_only: bool = False) -> Tokenizer:
    """Load an autoencoder in diffusers' format, from a folder or the Hub.

    Statistics are those that `save_tokenizer` left in a folder. Without them the tokenizer has none: the scaling_factor
    of diffusers is not read, since its default is another model's. `subfolder` is "vae" by default for a pipeline.
    Raises ValueError if there is no AutoencoderKL.
    """
    folder = Path(path)
    if subfolder is None and not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        subfolder = "vae"
    from mar.tokenizer.kl import KLTokenizer

    tokenizer = KLTokenizer(_load_autoencoder(path, subfolder, local_files_only))
    statistics = folder / (subfolder or "") / STATISTICS_FILE
    if statistics.is_file():
        _read_statistics(statistics, tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a tokenizer in diffusers' format, with its statistics, if any."""
    from mar.tokenizer.kl import KLTokenizer

    if not isinstance(tokenizer, KLTokenizer):
        raise ValueError(f"tokenizer: got a {type(tokenizer).__name__}, but only a KLTokenizer has a diffusers format")
    tokenizer.autoencoder.save_pretrained(folder)
    if tokenizer.has_stats:
        save_statistics(tokenizer, folder)


def save_statistics(tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Write the statistics beside an autoencoder's files, for `load_tokenizer`."""
    path = Path(folder, STATISTICS_FILE)
    text = json.dumps({"mean": tokenizer.mean.tolist(), "std": tokenizer.std.tolist()}, indent=1)
    write_text(path, text + "\n")
    return path


def _load_autoencoder(path: str | Path, subfolder: str | None, local_files_only: bool) -> Any:
    from diffusers import AutoencoderKL

    where = {"subfolder": subfolder, "local_files_only": local_files_only}
    try:
        config = AutoencoderKL.load_config(path, **where)
        kind = config.get("_class_name")
        if kind != "AutoencoderKL":
            raise ValueError(f"tokenizer: {path} holds a diffusers {kind}, expected an AutoencoderKL")
        # Without low_cpu_mem_usage diffusers does not ask, in five lines, for a library that it would save memory with.
        return AutoencoderKL.from_pretrained(path, use_safetensors=True, low_cpu_mem_usage=False, **where)
    except OSError as error:  # no such folder or repository, files missing, no network
        reason = " ".join(str(error).split())
        raise ValueError(f"tokenizer: can't load a diffusers autoencoder from {path}: {reason}") from error


def _read_statistics(path: Path, tokenizer: Tokenizer) -> None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        tokenizer.set_statistics(values["mean"], values["std"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tokenizer: {path} is not what `mar tokenizer stats` writes: {error}") from error
