"""The authors' `kl16.ckpt`, and its tensors under the names of diffusers' `AutoencoderKL`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mar.checkpoint.contents import foreign, only_state
from mar.checkpoint.files import CheckpointError
from mar.checkpoint.official import read_any

_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
KL16_BLOCK = "encoder.down.0.block.0.norm1.weight"
"""A tensor of every autoencoder of latent diffusion under its authors' names."""
_TOP = 4
"""The last of five resolutions. In the decoder the reference counts from the output, diffusers from the latents."""

# (official, diffusers); {} stands for a number.
_RESNET = [("nin_shortcut", "conv_shortcut"), *((name, name) for name in ("norm1", "conv1", "norm2", "conv2"))]
_ATTENTION = [("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")]
_BOTH = [
    ("conv_in", "conv_in"),
    *((f"mid.block_1.{a}", f"mid_block.resnets.0.{b}") for a, b in _RESNET),
    *((f"mid.attn_1.{a}", f"mid_block.attentions.0.{b}") for a, b in _ATTENTION),
    *((f"mid.block_2.{a}", f"mid_block.resnets.1.{b}") for a, b in _RESNET),
    ("norm_out", "conv_norm_out"),
    ("conv_out", "conv_out"),
]
_NAMES = [
    *((f"{part}.{a}", f"{part}.{b}") for part in ("encoder", "decoder") for a, b in _BOTH),
    *((f"encoder.down.{{}}.block.{{}}.{a}", f"encoder.down_blocks.{{}}.resnets.{{}}.{b}") for a, b in _RESNET),
    *((f"encoder.down.{{}}.attn.{{}}.{a}", f"encoder.down_blocks.{{}}.attentions.{{}}.{b}") for a, b in _ATTENTION),
    ("encoder.down.{}.downsample.conv", "encoder.down_blocks.{}.downsamplers.0.conv"),
    *((f"decoder.up.{{}}.block.{{}}.{a}", f"decoder.up_blocks.{{}}.resnets.{{}}.{b}") for a, b in _RESNET),
    ("decoder.up.{}.upsample.conv", "decoder.up_blocks.{}.upsamplers.0.conv"),
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
]
# Parts of the tokenizer's training in its file: discriminator, perceptual loss, moving averages.
_TRAINING_ONLY = ("loss.", "model_ema.", "perceptual_loss.", "discriminator.")

_Table = list[tuple[re.Pattern[str], str]]


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)") + r"\.(weight|bias)")


_TO_DIFFUSERS: _Table = [(_pattern(official), diffusers) for official, diffusers in _NAMES]
_TO_OFFICIAL: _Table = [(_pattern(diffusers), official) for official, diffusers in _NAMES]


def _rename(name: str, table: _Table) -> str | None:
    for pattern, template in table:
        if match := pattern.fullmatch(name):
            *numbers, kind = match.groups()
            if name.startswith("decoder.up") and numbers:
                numbers[0] = str(_TOP - int(numbers[0]))
            return f"{template.format(*numbers)}.{kind}"
    return None


def _convert(state: Mapping[str, Tensor], table: _Table, direction: str) -> dict[str, Tensor]:
    renamed = {name: _rename(name, table) for name in state}
    unknown = sorted(name for name, other in renamed.items() if other is None)
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(f"{len(unknown)} tensors are not of a {direction} KL-16: {shown}")
    return {other: state[name] for name, other in renamed.items() if other is not None}


def read_kl16(path: str | os.PathLike[str], holder: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Read the tokenizer's tensors in `kl16.ckpt` under their names there, in float32.

    `holder` is the file's dict, if it has been read.
    """
    path = Path(path)
    holder = read_any(path) if holder is None else holder
    try:
        only = only_state(holder, "encoder.conv_in.weight", ["model"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    stored = {} if only is None else only[1]
    tensors = {name: tensor.detach().float() for name, tensor in stored.items() if name.startswith(_PARTS)}
    diffusers = any(name.startswith("encoder.down_blocks.") for name in tensors)
    if diffusers or any(
        name not in tensors for name in ("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight")
    ):
        raise foreign(path, holder)
    return tensors


def training_only(state: Mapping[str, Tensor]) -> list[str]:
    """List the names of tensors that only the tokenizer's training needs."""
    return [name for name in state if name.startswith(_TRAINING_ONLY)]


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename official KL-16 tensors as diffusers does.

    1x1 convolutions of attention become matrices. Tensors of the training (`training_only`) are left out. Raises
    ValueError for any other unknown name.
    """
    left_out = set(training_only(state))
    converted = _convert({n: t for n, t in state.items() if n not in left_out}, _TO_DIFFUSERS, "reference")
    return {name: tensor.flatten(1) if _is_matrix(name) else tensor for name, tensor in converted.items()}


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert `to_diffusers`. Raises ValueError for names unknown to diffusers' KL-16."""
    shaped = {name: tensor[:, :, None, None] if _is_matrix(name) else tensor for name, tensor in state.items()}
    return _convert(shaped, _TO_OFFICIAL, "diffusers")


def _is_matrix(diffusers_name: str) -> bool:
    """Tell if the tensor is a matrix in diffusers, a 1x1 convolution in the reference."""
    return re.search(r"\.attentions\.\d+\.to_\w+(\.0)?\.weight$", diffusers_name) is not None
