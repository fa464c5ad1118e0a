"""What the parity tests share: golden tensors, weights drawn from their names, configs from golden headers."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mar.checkpoint.official import from_official
from mar.config import HeadConfig, ModelConfig, TrunkConfig
from mar.model.mar import MAR

GOLDEN = Path(__file__).parent / "golden"


@cache
def golden(name: str) -> dict[str, Tensor]:
    """The tensors of a golden file."""
    return load_file(GOLDEN / f"{name}.safetensors")


@cache
def meta(name: str) -> dict[str, Any]:
    """The `meta` of a golden file's header."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["meta"])


@cache
def official_shapes(model: str) -> dict[str, list[int]]:
    """Official names and shapes of `mar_base`, `mar_large`, `mar_huge` or `kl16`, in the reference's order."""
    return json.loads((GOLDEN / "official_keys.json").read_text(encoding="utf-8"))[model]


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def drawn(name: str, shape: Sequence[int]) -> Tensor:
    """The tensor that the golden files' recipe draws from a name."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if not name.endswith(".weight"):
        return 0.02 * values
    return 1 + 0.02 * values if len(shape) == 1 else values / values[0].numel() ** 0.5


def drawn_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """An official state dict without a file."""
    return {name: drawn(name, shape) for name, shape in shapes.items()}


def config_of(golden_config: Mapping[str, int], *, tied: bool = False) -> ModelConfig:
    """The config of a golden file's header as ours; eMIGM's are `tied`."""
    side = golden_config["image_size"] // golden_config["stride"]
    width, heads = golden_config["width"], golden_config["heads"]
    return ModelConfig(
        channels=golden_config["latent_channels"],
        grid=(side, side),
        patch_size=golden_config["patch_size"],
        encoder=TrunkConfig(width, golden_config["encoder_depth"], heads),
        decoder=TrunkConfig(width, golden_config["decoder_depth"], heads),
        head=HeadConfig(
            golden_config["head_width"], golden_config["head_depth"], batch_mul=golden_config["diffusion_batch_mul"]
        ),
        buffer_size=golden_config["buffer"],
        classes=golden_config["classes"],
        tie_null=tied,
        mask_schedule="exp" if tied else "normal",
    )


def model_with(config: ModelConfig, official: Mapping[str, Tensor]) -> MAR:
    """A model with converted official weights, ready for inference."""
    with torch.device("meta"):
        model = MAR(config)
    model.load_state_dict(from_official(official), assign=True)
    return model.eval().requires_grad_(True)


def trained_tiny() -> MAR:
    """The trained tiny model of the sampling cases."""
    config = config_of(meta("mar_tiny_trained_samples")["config"])
    return model_with(config, golden("mar_tiny_trained_weights"))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a fraction of the largest value of the reference."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())
