"""The names of the reference's tensors and ours, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_BLOCK = [
    ("norm1", "norm1"),
    ("attn.qkv", "attention.qkv"),
    ("attn.proj", "attention.out"),
    ("norm2", "norm2"),
    ("mlp.fc1", "fc1"),
    ("mlp.fc2", "fc2"),
]
_HEAD = "diffloss.net"
_HEAD_BLOCK = [("in_ln", "norm"), ("mlp.0", "fc1"), ("mlp.2", "fc2"), ("adaLN_modulation.1", "modulation")]
# (official, ours), in the order of the reference's parameters; {} stands for a block's number.
_NAMES = [
    ("fake_latent", "null_class"),
    ("encoder_pos_embed_learned", "encoder_position"),
    ("mask_token", "mask_token"),
    ("decoder_pos_embed_learned", "decoder_position"),
    ("diffusion_pos_embed_learned", "diffusion_position"),
    ("class_emb", "class_embed"),
    ("z_proj", "token_embed"),
    ("z_proj_ln", "embed_norm"),
    *((f"encoder_blocks.{{}}.{official}", f"encoder.{{}}.{ours}") for official, ours in _BLOCK),
    ("encoder_norm", "encoder_norm"),
    ("decoder_embed", "decoder_embed"),
    *((f"decoder_blocks.{{}}.{official}", f"decoder.{{}}.{ours}") for official, ours in _BLOCK),
    ("decoder_norm", "decoder_norm"),
    (f"{_HEAD}.time_embed.mlp.0", "head.time_embed.fc1"),
    (f"{_HEAD}.time_embed.mlp.2", "head.time_embed.fc2"),
    (f"{_HEAD}.cond_embed", "head.z_embed"),
    (f"{_HEAD}.input_proj", "head.input"),
    *((f"{_HEAD}.res_blocks.{{}}.{official}", f"head.blocks.{{}}.{ours}") for official, ours in _HEAD_BLOCK),
    (f"{_HEAD}.final_layer.linear", "head.output"),
    (f"{_HEAD}.final_layer.adaLN_modulation.1", "head.final_modulation"),
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
_ORDER = {official: place for place, (official, _) in enumerate(_NAMES)}


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
    """Our MAR state dict under the official names, in the reference's order: the inverse of `from_official`."""
    renamed = {name: _rename(name, _TO_OFFICIAL) for name in state}
    _refuse_unknown([name for name, official in renamed.items() if official is None])
    official = {
        str(renamed[name]): tensor.reshape((1,) * _LEADING.get(name, 0) + tensor.shape)
        for name, tensor in state.items()
    }
    return {name: official[name] for name in sorted(official, key=_place)}


def _place(official: str) -> tuple[int, int, int, int]:
    """Sorts official names as the reference's modules have them: stack, block, layer in it, weight before bias."""
    number = re.search(r"blocks\.(\d+)\.", official)
    layer = re.sub(r"blocks\.\d+\.", "blocks.{}.", official).removesuffix(".weight").removesuffix(".bias")
    place = _ORDER[layer]
    if number is None:
        return place, 0, 0, int(official.endswith(".bias"))
    stack = next(i for i, (name, _) in enumerate(_NAMES) if name.split("{}")[0] == layer.split("{}")[0])
    return stack, int(number[1]), place, int(official.endswith(".bias"))


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
