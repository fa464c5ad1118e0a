"""Autoencoders in diffusers' format, with our statistics of their latents beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mar.checkpoint.files import write_text
from mar.tokenizer import TOKENIZERS, Tokenizer

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
    tokenizer = _load_autoencoder(path, subfolder, local_files_only)
    statistics = folder / (subfolder or "") / STATISTICS_FILE
    if statistics.is_file():
        _read_statistics(statistics, tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a tokenizer in diffusers' format, with its statistics, if any."""
    autoencoder: Any = getattr(tokenizer, "autoencoder", None)
    if autoencoder is None:
        raise ValueError(f"tokenizer: got a {type(tokenizer).__name__}, which wraps no autoencoder of diffusers")
    autoencoder.save_pretrained(folder)
    if tokenizer.has_stats:
        save_statistics(tokenizer, folder)


def save_statistics(tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Write the statistics beside an autoencoder's files, for `load_tokenizer`."""
    path = Path(folder, STATISTICS_FILE)
    text = json.dumps({"mean": tokenizer.mean.tolist(), "std": tokenizer.std.tolist()}, indent=1)
    write_text(path, text + "\n")
    return path


def _load_autoencoder(path: str | Path, subfolder: str | None, local_files_only: bool) -> Tokenizer:
    """Load an autoencoder of diffusers into the tokenizer that wraps its class."""
    import diffusers

    where = {"subfolder": subfolder, "local_files_only": local_files_only}
    wrappers = {entry.diffusers_class: entry for entry in TOKENIZERS.values() if entry.diffusers_class}
    try:
        kind = diffusers.AutoencoderKL.load_config(path, **where).get("_class_name")
        if kind not in wrappers:
            raise ValueError(f"tokenizer: {path} holds a diffusers {kind}, expected an {' or '.join(wrappers)}")
        # Without low_cpu_mem_usage diffusers does not ask, in five lines, for a library that it would save memory with.
        loaded = getattr(diffusers, kind).from_pretrained(path, use_safetensors=True, low_cpu_mem_usage=False, **where)
    except OSError as error:  # no such folder or repository, files missing, no network
        reason = " ".join(str(error).split())
        raise ValueError(f"tokenizer: can't load a diffusers autoencoder from {path}: {reason}") from error
    wrapper: Any = wrappers[kind].load()
    tokenizer: Tokenizer = wrapper(loaded)
    return tokenizer


def _read_statistics(path: Path, tokenizer: Tokenizer) -> None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        tokenizer.set_statistics(values["mean"], values["std"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tokenizer: {path} is not what `mar tokenizer stats` writes: {error}") from error
