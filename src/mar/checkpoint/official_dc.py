"""DC-AE's files of weights: AutoencoderDC's tensors, or the same ones under their authors' names."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mar.checkpoint.contents import unwrap, unwrap_name
from mar.checkpoint.files import CheckpointError, parse_json
from mar.nn import init_empty_weights
from mar.published import TOKENIZERS
from mar.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
CONFIG_FILE = "config.json"
_OURS, _AUTHORS = "encoder.conv_in.", "encoder.project_in."
"""Beginnings of names of every DC-AE: as diffusers has them, and as its authors."""


def is_dc(path: Path) -> bool:
    """Return whether a safetensors file holds the tensors of a DC-AE."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(map(unwrap_name, file.keys()))
    except (SafetensorError, OSError):
        return False
    blocks = any(re.match(r"decoder\.(up_blocks\.\d+|stages)\.\d+\.", name) for name in names)
    return blocks and any(name.startswith((_OURS, _AUTHORS)) for name in names)


def load_dc(path: str | os.PathLike[str], scale: float | None = None) -> Tokenizer:
    """Load a DC-AE from its file of weights.

    Its architecture is that of the config.json beside it, else of dc-ae-f32c32-in-1.0. Raises CheckpointError for other
    tensors.

    Args:
        path: the safetensors file.
        scale: factor of the latents, if its config has none.
    """
    path = Path(path)
    config = _config_beside(path)
    from diffusers import AutoencoderDC

    from mar.tokenizer.dc import DC_AE_CONFIG, DCTokenizer
    from mar.tokenizer.kl import plain_config

    if config is None:
        config = DC_AE_CONFIG
        if scale is None:
            logger.warning(
                "%s has no %s: it is taken for dc-ae-f32c32-in-1.0, with the scale %s; mix-1.0 has the same tensors",
                path, CONFIG_FILE, config["scaling_factor"],
            )  # fmt: skip
    try:
        tensors = unwrap(load_file(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({str(error).splitlines()[0]})") from None
    if any(name.startswith(_AUTHORS) for name in tensors):
        tensors = _from_authors(path, tensors)
    try:
        with init_empty_weights():
            autoencoder = AutoencoderDC.from_config(plain_config(config))
        floats = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
        autoencoder.load_state_dict(floats, assign=True)
    except (RuntimeError, TypeError, ValueError, LookupError) as error:  # names or shapes, a line for each kind
        lines = str(error).splitlines()
        raise CheckpointError(f"{path} is not the DC-AE of its config: {' '.join(lines[-1].split())[:200]}") from None
    tokenizer = DCTokenizer(autoencoder.requires_grad_(False))
    if scale is not None and not tokenizer.has_stats:
        tokenizer.set_statistics(0.0, 1 / scale)
    return tokenizer


def load_published_dc(path: str | os.PathLike[str]) -> Tokenizer:
    """Load the DC-AE of eMIGM, whose scale is known."""
    return load_dc(path, TOKENIZERS["dc-ae"].scale)


def _config_beside(path: Path) -> dict[str, Any] | None:
    """Read diffusers' config.json beside the weights; None: there is none of an AutoencoderDC."""
    try:
        config = parse_json(path.with_name(CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and config.get("_class_name") == "AutoencoderDC" else None


def _from_authors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' tensors as diffusers does."""
    from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers

    try:
        renamed: dict[str, Tensor] = convert_autoencoder_dc_checkpoint_to_diffusers(dict(tensors))
    except (RuntimeError, LookupError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole DC-AE: {str(error).splitlines()[0][:200]}") from None
    return {name: torch.as_tensor(tensor) for name, tensor in renamed.items()}
