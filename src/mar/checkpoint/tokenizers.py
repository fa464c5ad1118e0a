"""Save and load tokenizers as folders.

A folder of ours has a config.json with a `kind` of `mar.tokenizer.TOKENIZERS`, and tokenizer.safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mar.checkpoint import checksums
from mar.checkpoint.contents import unwrap
from mar.checkpoint.files import (
    CheckpointError,
    check_regular,
    parse_json,
    tensor_bytes,
    write_tensors,
    write_together,
)
from mar.tokenizer import TOKENIZERS, Tokenizer, build

CONFIG_FILE, WEIGHTS_FILE = "config.json", "tokenizer.safetensors"
"""Names of the files of a tokenizer of ours."""
STATISTICS_FILE = "mar_statistics.json"
"""Name of the file with a tokenizer's mean and standard deviation."""


def load_tokenizer(path: str | Path, subfolder: str | None = None, *, local_files_only: bool = False) -> Tokenizer:
    """Load a tokenizer of ours, or an autoencoder in diffusers' format.

    Ours are folders, autoencoders folders or repositories of the Hub. Their statistics are those that `save_tokenizer`
    left in a folder. Without them the tokenizer has none: the scaling_factor of diffusers is not read, since its
    default is another model's. `subfolder` is "vae" by default for a pipeline. Raises ValueError if there is neither.
    """
    folder = Path(path)
    subfolder = _subfolder(folder) if subfolder is None else subfolder
    own = _load_own(folder)
    if own is not None:
        return own
    _check_folder(folder / (subfolder or ""))
    tokenizer = _load_autoencoder(path, subfolder, local_files_only)
    statistics = folder / (subfolder or "") / STATISTICS_FILE
    if statistics.is_file():
        _read_statistics(statistics, tokenizer)
    return tokenizer


def _subfolder(folder: Path) -> str | None:
    """Return where the autoencoder of a pipeline's folder is; None: there is no such part."""
    is_part = not (folder / CONFIG_FILE).is_file() and (folder / "vae" / CONFIG_FILE).is_file()
    return "vae" if is_part else None


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a tokenizer to a folder; autoencoders in diffusers' format.

    Raises CheckpointError if the disk refuses: a tokenizer that is there stays.
    """
    autoencoder: Any = getattr(tokenizer, "autoencoder", None)
    if autoencoder is None:
        _save_own(tokenizer, Path(folder))
        return

    def write(temporary: Path) -> None:
        try:
            autoencoder.save_pretrained(temporary)
        except SafetensorError as error:  # what its Rust code makes of a full disk
            raise OSError(str(error)) from error
        written = [temporary / CONFIG_FILE, *temporary.glob("diffusion_pytorch_model*")]
        checksums.write_folder(temporary, checksums.file_digests(written))
        if tokenizer.has_stats:
            checksums.write_json(temporary / STATISTICS_FILE, _statistics(tokenizer))

    write_together(Path(folder), write, checksums.CHECKSUMS, tensor_bytes(autoencoder.state_dict()))


def save_statistics(tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Write the statistics with a tokenizer's files, for `load_tokenizer`. Returns the file."""
    if getattr(tokenizer, "autoencoder", None) is None:
        _save_own(tokenizer, Path(folder))
        return Path(folder, WEIGHTS_FILE)
    path = Path(folder, _subfolder(Path(folder)) or "", STATISTICS_FILE)
    checksums.write_json(path, _statistics(tokenizer))
    return path


def _statistics(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"mean": tokenizer.mean.tolist(), "std": tokenizer.std.tolist()}


def _save_own(tokenizer: Tokenizer, folder: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tokenizer.state_dict().items()}
    metadata = {"sha256": _own_digest(tokenizer.config(), tensors)}

    def write(temporary: Path) -> None:
        write_tensors(temporary / WEIGHTS_FILE, tensors, metadata)
        (temporary / CONFIG_FILE).write_text(json.dumps(tokenizer.config(), indent=1) + "\n", encoding="utf-8")

    write_together(folder, write, CONFIG_FILE, tensor_bytes(tensors))


def _own_digest(config: dict[str, Any], tensors: dict[str, Any]) -> str:
    """Return the sha256 of config and tensors together."""
    return checksums.json_digest([json.loads(json.dumps(config)), checksums.tensors_digest(tensors)])


def is_saved(folder: Path) -> bool:
    """Return whether a folder holds a whole tokenizer that was trained here."""
    return _own_config(folder) is not None or (folder / STATISTICS_FILE).is_file()


def own_kind(folder: Path) -> str | None:
    """Return the kind of a tokenizer in our own format, as "residual"; None: the folder has none."""
    config = _own_config(folder)
    return None if config is None else str(config["kind"])


def has_checksum(folder: Path) -> bool:
    """Return whether a tokenizer of ours has a checksum; those of earlier versions have none."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return "sha256" in (file.metadata() or {})


def _own_config(folder: Path) -> dict[str, Any] | None:
    """Read the config of a tokenizer of ours, which is written last; None: there is none."""
    try:
        check_regular(folder / CONFIG_FILE)
        config = parse_json((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return None  # for diffusers to judge
    return config if isinstance(config, dict) and "kind" in config else None


def _load_own(folder: Path) -> Tokenizer | None:
    """Load a folder that `_save_own` wrote; None: it is none."""
    config = _own_config(folder)
    if config is None:
        return None
    weights = folder / WEIGHTS_FILE
    try:
        with safe_open(weights, framework="pt") as file:
            digest = (file.metadata() or {}).get("sha256")
        tensors = load_file(weights)
        if digest is not None and checksums.enabled() and digest != _own_digest(config, tensors):
            raise ValueError("they are not as they were written, or the config is not")
        if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
            raise ValueError(f"{broken[0]} has values that are not finite")
        tokenizer = build(config)
        tokenizer.load_state_dict(unwrap(tensors))
        if not bool((tokenizer.std > 0).all()):
            raise ValueError("std has values that are not positive")
    except (OSError, RuntimeError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, OverflowError,
            MemoryError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"tokenizer: can't load the weights of {folder}: {reason}") from error
    return tokenizer.eval()


def _check_folder(folder: Path) -> None:
    """Compare a folder with its checksums, if it has any. ValueError for a damaged one."""
    try:
        checksums.check_folder(folder)
    except CheckpointError as error:
        hint = f"if you changed it yourself, remove its {checksums.CHECKSUMS}"
        raise ValueError(f"tokenizer: {error}; {hint}") from error


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
    except (
        OSError,
        RecursionError,
        AttributeError,
        TypeError,
        LookupError,
        OverflowError,
    ) as error:  # no such folder or repository, files missing, no network
        reason = " ".join(str(error).split())
        raise ValueError(f"tokenizer: can't load a diffusers autoencoder from {path}: {reason}") from error
    wrapper: Any = wrappers[kind].load()
    tokenizer: Tokenizer = wrapper(loaded)
    return tokenizer


def _read_statistics(path: Path, tokenizer: Tokenizer) -> None:
    try:
        values = checksums.read_json(path)
        tokenizer.set_statistics(values["mean"], values["std"])
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"tokenizer: {path} is not what `mar tokenizer stats` writes: {error}") from error
