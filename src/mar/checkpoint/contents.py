"""Names of tensors in files of other programs: wrappers removed, well-known kinds recognized, contents described."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mar.checkpoint.files import CheckpointError

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that DDP, torch.compile, FSDP and activation checkpointing put before a module's own."""
READABLE = (
    "mar reads its own files, checkpoints of MAR, eMIGM and l-DeTok, and with --tokenizer KL-16, l-DeTok's, a DC-AE or "
    "a folder of diffusers"
)
Value = TypeVar("Value")


def unwrap(state: Mapping[str, Value]) -> dict[str, Value]:
    """Remove what DDP, torch.compile, FSDP and checkpointing add to names.

    Raises CheckpointError for names that become one, since either could be meant.
    """
    plain: dict[str, Value] = {}
    origin: dict[str, str] = {}
    for name, value in state.items():
        own = unwrap_name(name) if isinstance(name, str) else name
        if own in plain:
            raise CheckpointError(f"{origin[own]} and {name} are both the tensor {own}; keep one of them")
        plain[own], origin[own] = value, name
    return plain


def unwrap_name(name: str) -> str:
    """Return a tensor's name without the parts of wrappers, wherever they stand."""
    *parents, last = name.split(".")
    return ".".join([*(parent for parent in parents if parent not in _WRAPPERS), last])


def _has(*beginnings: str) -> Callable[[frozenset[str]], bool]:
    return lambda names: all(any(name.startswith(beginning) for name in names) for beginning in beginnings)


def _part_of_name(*parts: str) -> Callable[[frozenset[str]], bool]:
    return lambda names: any(part in name for name in names for part in parts)


_KINDS: list[tuple[str, Callable[[frozenset[str]], bool]]] = [
    ("a MAR", _has("encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffloss.net.")),
    ("a model of mar whose header is lost: copy the whole file again",
     _has("model.encoder_position", "model.decoder_position", "model.head.")),
    ("a LoRA, which changes another model",
     _part_of_name(".lora_up.", ".lora_down.", ".lora_A.", ".lora_B.", "lora_unet_", "lora_te_")),
    ("a whole Stable Diffusion checkpoint", _has("model.diffusion_model.input_blocks.", "first_stage_model.")),
    ("the UNet of a latent diffusion model",
     lambda names: _has("input_blocks.0.", "middle_block.", "output_blocks.")(names)
     or _has("model.diffusion_model.input_blocks.")(names)),
    ("a UNet of diffusers", _has("conv_in.", "down_blocks.", "mid_block.", "up_blocks.", "time_embedding.")),
    ("a FLUX transformer", _has("double_blocks.0.img_attn.", "single_blocks.0.")),
    ("a DiT or SiT", _has("x_embedder.proj.", "t_embedder.mlp.", "blocks.0.adaLN_modulation.")),
    ("a text and image encoder as CLIP's", _has("text_model.", "vision_model.")),
    ("a text encoder as CLIP's", _has("text_model.embeddings.token_embedding.")),
    ("OpenAI's CLIP", _has("token_embedding.weight", "visual.", "transformer.resblocks.")),
    ("a T5 text encoder", _has("shared.weight", "encoder.block.0.layer.0.SelfAttention.")),
    ("a language model as Llama",
     lambda names: _has("model.embed_tokens.", "model.layers.0.self_attn.q_proj.", "model.layers.0.mlp.")(names)),
    ("a language model as GPT-2",
     lambda names: _has("h.0.attn.c_attn.")(names) or _has("transformer.h.0.attn.c_attn.")(names)),
    ("l-DeTok's tokenizer, for --tokenizer", _has("encoder.patch_embed.0.weight", "decoder.decoder_embed.")),
    ("a DC-AE, for --tokenizer",
     lambda names: _has("encoder.project_in.", "decoder.stages.")(names)
     or _has("encoder.conv_in.", "decoder.up_blocks.0.0.")(names)),
    ("an autoencoder of diffusers: give its folder, with config.json, as --tokenizer",
     _has("encoder.conv_in.", "encoder.down_blocks.0.resnets.", "decoder.up_blocks.0.resnets.", "quant_conv.")),
    ("an autoencoder of latent diffusion; KL-16 is read as --tokenizer",
     _has("encoder.conv_in.", "encoder.down.0.block.", "decoder.up.0.block.", "quant_conv.")),
]  # fmt: skip
"""Well-known kinds, with tensors that no other has; the first that fits counts."""


def kind_of(names: Iterable[str]) -> str | None:
    """Return the kind of a file by its tensors' names; None: uncertain."""
    every = frozenset(map(unwrap_name, names))
    return next((kind for kind, fits in _KINDS if fits(every)), None)


def foreign(path: Path, holder: Mapping[Any, Any]) -> CheckpointError:
    """Return the error for a file that mar does not read.

    It says what the file holds, and what is read. `holder` has tensors, or anything, by name, as the file has them.
    """
    return CheckpointError(f"{path} {_describe(holder)}; {READABLE}")


def _describe(holder: Mapping[Any, Any]) -> str:
    if not holder:
        return "holds no tensors"
    if {"state", "param_groups"} <= set(holder):
        return "holds the state of an optimizer, and no weights"
    names, where = _tensors_of(holder), ""
    if not names:
        inner = {key: _tensors_of(value) for key, value in holder.items() if isinstance(value, Mapping)}
        key = max(inner, key=lambda each: len(inner[each]), default=None)
        names = inner[key] if key is not None else []
        if not names:
            return f"holds no tensors, but {_few(holder)}"
        where = f" under `{key}`" + (f", and {_few([k for k in holder if k != key])}" if len(holder) > 1 else "")
    kind = kind_of(names)
    count = f"{len(names):,} tensor{'s' if len(names) > 1 else ''}"
    return f"holds {count}{where} ({_few(names)})" + (f": {kind}" if kind else "")


def _tensors_of(holder: Mapping[Any, Any]) -> list[str]:
    """Return the names of tensors, or of safetensors' records of them."""
    return [str(n) for n, v in holder.items() if hasattr(v, "shape") or (isinstance(v, dict) and "data_offsets" in v)]


def _few(names: Iterable[Any]) -> str:
    listed = [str(name) for name in names]
    return ", ".join(name if len(name) <= 60 else f"{name[:57]}..." for name in listed[:3]) + (
        ", ..." if len(listed) > 3 else ""
    )


def find_states(holder: Mapping[Any, Any], anchor: str) -> dict[str, dict[str, Any]]:
    """Return the state dicts that have the tensor `anchor`, by their key.

    A bare state dict has the key "". Wrappers are removed, and so is a beginning that all names share. Raises
    CheckpointError for names that become one.
    """
    states = {}
    for key, value in [("", holder), *holder.items()]:
        if isinstance(value, Mapping) and (state := _state_of(value, anchor)) is not None:
            states[str(key)] = state
    return states


def only_state(holder: Mapping[Any, Any], anchor: str, keys: Iterable[str]) -> tuple[str, dict[str, Any]] | None:
    """Return the first of `keys` with its state, else the only.

    None: there is none. Raises CheckpointError for several, of which either could be meant.
    """
    states = find_states(holder, anchor)
    key = next((key for key in (*keys, "") if key in states), None)
    if key is not None:
        return key, states[key]
    if len(states) > 1:
        raise CheckpointError(f"it holds {anchor} under {' and '.join(map(repr, states))}; keep one of them")
    return next(iter(states.items()), None)


def _state_of(values: Mapping[Any, Any], anchor: str) -> dict[str, Any] | None:
    """Return the tensors of a state dict under their own names; None: `anchor` is not among them."""
    tensors = {str(name): value for name, value in values.items() if hasattr(value, "shape")}
    if not any(name.endswith(anchor) for name in map(unwrap_name, tensors)):
        return None
    state = unwrap(tensors)
    if anchor in state:
        return state
    prefixes = {name.removesuffix(anchor) for name in state if name.endswith(f".{anchor}")}
    prefix = next(iter(prefixes), "")
    if len(prefixes) != 1 or not all(name.startswith(prefix) for name in state):
        return None
    return {name.removeprefix(prefix): value for name, value in state.items()}
