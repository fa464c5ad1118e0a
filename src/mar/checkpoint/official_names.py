"""The names of the reference's tensors and ours, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# (official, ours); {} stands for a block's number.
_NAMES = [
    ("fake_latent", "null_class"),
    ("class_emb.weight", "class_embed.weight"),
    ("encoder_pos_embed_learned", "encoder_position"),
    ("decoder_pos_embed_learned", "decoder_position"),
    ("diffusion_pos_embed_learned", "diffusion_position"),
    ("mask_token", "mask_token"),
    ("z_proj_ln", "embed_norm"),
    ("z_proj", "token_embed"),
    ("encoder_norm", "encoder_norm"),
    ("decoder_norm", "decoder_norm"),
    ("decoder_embed", "decoder_embed"),
    *(
        (f"{stack}_blocks.{{}}.{official}", f"{stack}.{{}}.{ours}")
        for stack in ("encoder", "decoder")
        for official, ours in [
            ("norm1", "norm1"),
            ("attn.qkv", "attention.qkv"),
            ("attn.proj", "attention.out"),
            ("norm2", "norm2"),
            ("mlp.fc1", "fc1"),
            ("mlp.fc2", "fc2"),
        ]
    ),
    ("diffloss.net.time_embed.mlp.0", "head.time_embed.fc1"),
    ("diffloss.net.time_embed.mlp.2", "head.time_embed.fc2"),
    ("diffloss.net.cond_embed", "head.z_embed"),
    ("diffloss.net.input_proj", "head.input"),
    ("diffloss.net.res_blocks.{}.in_ln", "head.blocks.{}.norm"),
    ("diffloss.net.res_blocks.{}.mlp.0", "head.blocks.{}.fc1"),
    ("diffloss.net.res_blocks.{}.mlp.2", "head.blocks.{}.fc2"),
    ("diffloss.net.res_blocks.{}.adaLN_modulation.1", "head.blocks.{}.modulation"),
    ("diffloss.net.final_layer.adaLN_modulation.1", "head.final_modulation"),
    ("diffloss.net.final_layer.linear", "head.output"),
]
# Ours have no leading axes of length 1; the number says how many the official tensor has.
_LEADING = {"encoder_position": 1, "decoder_position": 1, "diffusion_position": 1, "mask_token": 2}


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)") + r"(\.weight|\.bias)?")


def _rename(name: str, table: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in table:
        if match := pattern.fullmatch(name):
            *numbers, suffix = match.groups()
            return template.format(*numbers) + (suffix or "")
    return None


_TO_OURS = [(_pattern(official), ours) for official, ours in _NAMES]
_TO_OFFICIAL = [(_pattern(ours), official) for official, ours in _NAMES]


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official MAR state dict under our names. ValueError where a tensor is not MAR's."""
    renamed = {name: _rename(name, _TO_OURS) for name in state}
    _refuse_unknown([name for name, ours in renamed.items() if ours is None])
    ours = {str(renamed[name]): tensor for name, tensor in state.items()}
    for name, axes in _LEADING.items():
        if name in ours:
            ours[name] = ours[name].reshape(ours[name].shape[axes:])
    return ours


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our MAR state dict under the official names: the inverse of `from_official`."""
    renamed = {name: _rename(name, _TO_OFFICIAL) for name in state}
    _refuse_unknown([name for name, official in renamed.items() if official is None])
    shaped = {name: tensor.reshape((1,) * _LEADING.get(name, 0) + tensor.shape) for name, tensor in state.items()}
    return {str(renamed[name]): tensor for name, tensor in shaped.items()}


def _refuse_unknown(names: list[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5])
        raise ValueError(f"{len(names)} tensors are not those of a MAR: {shown}{', ...' if len(names) > 5 else ''}")


def shape_differences(shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> list[str]:
    """Lines that say where two sets of tensors differ in name or shape; none if they don't."""
    lines = [
        f"{name} is {tuple(shapes[name])}, expected {tuple(expected[name])}"
        for name in sorted(set(shapes) & set(expected))
        if shapes[name] != expected[name]
    ]
    lines += [f"{name} is missing" for name in sorted(set(expected) - set(shapes))]
    return lines + [f"{name} is not expected" for name in sorted(set(shapes) - set(expected))]
