"""l-DeTok's files: the tokenizer's weights, and the statistics of its latents."""

from __future__ import annotations

import io
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mar.checkpoint.contents import foreign, only_state
from mar.checkpoint.files import CheckpointError, check_regular
from mar.checkpoint.official import read_any
from mar.nn import init_empty_weights
from mar.tokenizer.vit import ViTConfig, ViTSize, ViTTokenizer

PATCH_EMBED = "encoder.patch_embed.0.weight"
"""A tensor of every such tokenizer."""
STATISTICS_FILE = "stats.pkl"
STATISTICS_KEY = "detok-BB-gamm3.0-m0.7"
"""Entry of the published statistics, which are those of both published decoders."""
BASELINE = "vitok"
"""Beginning of the published tokenizers without denoising, whose tensors are the same and whose latents are not."""
_PARTS = ("encoder.", "decoder.")
_HEADS_BY_WIDTH = {512: 8, 768: 12, 1024: 16, 1152: 16}
_REBUILD = ("torch._utils", "_rebuild_tensor_v2")
_LIMIT = 2**20
"""The most bytes of a statistics file: two vectors of them have a few thousand."""


def read_vit(path: str | os.PathLike[str], holder: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Read the tokenizer's tensors under the authors' names, in float32.

    They are the EMA's, else those of `model`, else of a bare state dict. What only training needs is left out.
    `holder` is the file's dict, if it has been read.
    """
    path = Path(path)
    holder = read_any(path) if holder is None else holder
    try:
        tensors = vit_tensors(holder)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if tensors is None:
        raise foreign(path, holder)
    return {name: tensor.detach().float() for name, tensor in tensors.items()}


def vit_tensors(holder: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Return the tokenizer's tensors in a file's dict; None: it holds something else."""
    only = only_state(holder, PATCH_EMBED, ["model_ema", "model"])
    return None if only is None else {n: t for n, t in only[1].items() if n.startswith(_PARTS)}


def is_vit(holder: Mapping[str, Any]) -> bool:
    """Return whether a file's dict holds l-DeTok's tokenizer."""
    return vit_tensors(holder) is not None


def infer_vit_config(state: Mapping[str, Tensor], heads: tuple[int, int] | None = None) -> ViTConfig:
    """Infer the architecture from the tensors. Raises ValueError if some are missing.

    `heads` of encoder and decoder are known by default for the widths of S, B, L and XL.
    """
    try:
        side = round(state["encoder.positional_embedding"].shape[1] ** 0.5)
        sizes = []
        for part, given in zip(("encoder", "decoder"), heads or (None, None), strict=True):
            width = state[f"{part}.positional_embedding"].shape[2]
            number = given or _HEADS_BY_WIDTH.get(width)
            if number is None:
                raise ValueError(f"got a {part} {width} wide, expected {', '.join(map(str, _HEADS_BY_WIDTH))}")
            pattern = re.compile(rf"{part}\.transformer\.(\d+)\.")
            depth = len({match[1] for name in state if (match := pattern.match(name))})
            sizes.append(ViTSize(width, depth, number))
        patch = state[PATCH_EMBED].shape[2]
        return ViTConfig(side * patch, patch, state["decoder.decoder_embed.weight"].shape[1], *sizes)
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from None
    except IndexError:
        raise ValueError("its tensors have other axes") from None


def vit_from_state(state: Mapping[str, Tensor], heads: tuple[int, int] | None = None) -> ViTTokenizer:
    """Create the tokenizer of the authors' tensors, without statistics.

    Raises ValueError for missing or unknown tensors and other shapes.
    """
    config = infer_vit_config(state, heads)
    with init_empty_weights():
        tokenizer = ViTTokenizer(config)
    statistics = {"mean": torch.zeros(1), "std": torch.ones(1)}
    try:
        tokenizer.load_state_dict({**state, **statistics}, assign=True)
    except RuntimeError as error:  # names or shapes, a line for each kind
        raise ValueError(" ".join(str(error).splitlines()[1].split())[:200]) from None
    return tokenizer.requires_grad_(False)


def vit_state(tokenizer: ViTTokenizer) -> dict[str, Tensor]:
    """Invert `vit_from_state`."""
    return {name: tensor for name, tensor in tokenizer.state_dict().items() if name.startswith(_PARTS)}


def load_vit(
    path: str | os.PathLike[str],
    statistics: str | os.PathLike[str] | None = None,
    holder: Mapping[str, Any] | None = None,
) -> ViTTokenizer:
    """Load l-DeTok's tokenizer with its statistics.

    `statistics` is stats.pkl, by default the one beside the file; without any the tokenizer has none. `holder` is the
    file's dict, if it has been read. Raises CheckpointError for files that do not fit.
    """
    path = Path(path)
    try:
        tokenizer = vit_from_state(read_vit(path, holder))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} is not a whole l-DeTok tokenizer: {error}") from None
    beside = path.with_name(STATISTICS_FILE)
    if statistics is None and beside.is_file():
        statistics = beside
    if statistics is not None:
        mean, std = read_statistics(statistics, _statistics_key(path.stem))
        if len(mean) != 2 * tokenizer.channels:
            raise CheckpointError(
                f"{statistics}: got statistics of {len(mean)} values, expected {2 * tokenizer.channels}, twice the "
                f"channels of {path.name}; give the file of this tokenizer"
            )
        try:
            tokenizer.set_statistics(mean[: tokenizer.channels], std[: tokenizer.channels])
        except ValueError as error:
            raise CheckpointError(f"{statistics}: {error}") from None
    return tokenizer


def _statistics_key(name: str) -> str | None:
    """Return the entry of a published tokenizer, told by its file's name; None: it is none."""
    return STATISTICS_KEY if name.startswith(STATISTICS_KEY) else name if name.startswith(BASELINE) else None


def read_statistics(path: str | os.PathLike[str], key: str | None = None) -> tuple[Tensor, Tensor]:
    """Read mean and std per channel, on the CPU; runs nothing that the file asks for.

    They have one entry for each mean and one for each log-variance. `key` is by default that of the published
    tokenizer, or the file's only one. Raises CheckpointError for any other file.
    """
    path = Path(path)
    check_regular(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.stat().st_size > _LIMIT:
        raise CheckpointError(f"{path}: got {path.stat().st_size:,} bytes, expected statistics of a few thousand")
    try:
        held = _TensorUnpickler(io.BytesIO(path.read_bytes())).load()
    except _Refused as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        AssertionError,
    ) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise CheckpointError(f"{path} is damaged or no stats.pkl ({type(error).__name__}: {reason})") from None
    if not isinstance(held, dict):
        raise CheckpointError(f"{path}: got a {type(held).__name__}, expected the dict of l-DeTok's stats.pkl")
    if key is None:
        key = next(iter(held)) if len(held) == 1 else STATISTICS_KEY
    entry = held.get(key)
    if entry is None:
        raise CheckpointError(f"{path}: got statistics of {', '.join(map(str, held))[:120]}, expected those of {key}")
    values = entry.get("channel") if isinstance(entry, dict) else None
    if not (isinstance(values, tuple | list) and len(values) == 2 and all(isinstance(v, Tensor) for v in values)):
        raise CheckpointError(f"{path}: {key} has no pair `channel` of mean and std")
    mean, std = (value.detach().float().reshape(-1) for value in values)
    if mean.shape != std.shape:
        raise CheckpointError(f"{path}: got {len(mean)} means and {len(std)} stds, expected as many")
    return mean, std


class _Refused(pickle.UnpicklingError):
    """The file asks for more than tensors."""


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors and plain values only; storages come to the CPU."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _REBUILD:
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise _Refused(f"it wants to run {module}.{name}, and statistics need nothing but tensors; don't trust it")


def _load_storage(data: bytes) -> Any:
    # torch's own would run what these bytes ask for
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise _Refused("a storage in it asks for more than numbers; don't trust it") from None
