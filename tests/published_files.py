"""Files in the layouts that MAR, eMIGM and l-DeTok publish, with tiny random weights."""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mar.checkpoint import download, official, official_kl16, official_vit
from mar.checkpoint.official import to_official
from mar.checkpoint.official_vit import STATISTICS_KEY, vit_state
from mar.config import HeadConfig, ModelConfig, TrunkConfig
from mar.model.mar import MAR
from mar.published import PUBLISHED
from mar.tokenizer import kl
from mar.tokenizer.vit import ViTConfig, ViTSize, ViTTokenizer

WIDTH = 16
TRUNK = TrunkConfig(width=WIDTH, depth=1, num_heads=2)
NAMES = ("mar-base", "emigm-xs", "emigm-xs-512", "detok-base")
"""One model of each family, and one of the tokenizer of 512 pixels."""
SIDES = {"mar-base": 64, "emigm-xs": 64, "emigm-xs-512": 8, "detok-base": 64}
"""Pixels of their tiny versions' pictures."""
DC_CONFIG: dict[str, Any] = {
    "latent_channels": 32,
    "attention_head_dim": 4,
    "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [32, 32],
    "decoder_block_out_channels": [32, 32],
    "encoder_layers_per_block": [0, 1],
    "decoder_layers_per_block": [1, 1],
    "encoder_qkv_multiscales": [[], []],
    "decoder_qkv_multiscales": [[], []],
    "decoder_norm_types": ["batch_norm", "rms_norm"],
    "decoder_act_fns": ["relu", "silu"],
    "scaling_factor": 0.3189,
}
"""A DC-AE of stride 2 with the channels of the published one."""


def tiny_model(name: str) -> ModelConfig:
    """A published model's config, tiny: 4x4 tokens, three classes."""
    return replace(
        PUBLISHED[name].config,
        grid=(4, 4),
        encoder=TRUNK,
        decoder=TRUNK,
        head=HeadConfig(16, 1),
        buffer_size=2,
        classes=3,
    )


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the names of published models stand for tiny ones, all of whose files are on the Hub."""
    for name in NAMES:
        monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], config=tiny_model(name)))
    for name in ("mar-base", "kl16"):
        [remote] = download.OFFICIAL[name]
        hub = download.RemoteFile(remote.name, remote.others[0])
        monkeypatch.setitem(download.OFFICIAL, name, (hub,))
    monkeypatch.setattr(official, "_HEADS_BY_WIDTH", {WIDTH: 2})
    monkeypatch.setattr(official_vit, "_HEADS_BY_WIDTH", {32: 2})
    monkeypatch.setattr(kl, "KL16_CONFIG", {**kl.KL16_CONFIG, "block_out_channels": [32] * 5, "layers_per_block": 2})


def saved(holder: Mapping[str, Any]) -> bytes:
    memory = io.BytesIO()
    torch.save(dict(holder), memory)
    return memory.getvalue()


def model_weights(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the authors' names; eMIGM's one vector has two values, as in its EMA."""
    config = tiny_model(name)
    torch.manual_seed(seed)
    model = MAR(config)
    torch.nn.init.normal_(model.head.output.weight, std=0.02)
    state = {n: t.detach().clone() for n, t in to_official(model.state_dict(), tied=config.tie_null).items()}
    if config.tie_null:
        state["fake_latent"] = state["fake_latent"] + 1
    return state


def adamw_state(name: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The optimizer's state after a step, in the reference's two groups."""
    own = {n: torch.nn.Parameter(t.clone()) for n, t in weights.items()
           if not (tiny_model(name).tie_null and n == "mask_token")}  # fmt: skip
    still = [n for n, p in own.items() if p.ndim == 1 or n.endswith(".bias") or "diffloss" in n]
    groups = [
        {"params": [own[n] for n in still], "weight_decay": 0.0},
        {"params": [p for n, p in own.items() if n not in set(still)], "weight_decay": 0.02},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for parameter in own.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def model_file(name: str) -> tuple[bytes, dict[str, Tensor]]:
    """A checkpoint as its authors write it, and its EMA."""
    raw, ema = model_weights(name), model_weights(name, 1)
    optimizer = adamw_state(name, raw)
    args = argparse.Namespace(model="tiny", diffusion_batch_mul=4, attn_dropout=0.1, lr=1e-4, data=None)
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
              "_growth_tracker": 2}  # fmt: skip
    beside: dict[str, dict[str, Any]] = {
        "mar": {"optimizer": optimizer, "epoch": 799, "args": args},
        "emigm": {"optimizer": optimizer, "epoch": 799, "scaler": scaler, "args": args},
        "detok": {"optimizer": optimizer, "loss_scaler": scaler, "epoch": 799, "last_elapsed_time": 12.5},
    }
    return saved({"model": raw, "model_ema": ema, **beside[PUBLISHED[name].family]}), ema


def kl16_file() -> bytes:
    """kl16.ckpt with the authors' names, narrow; call it after `shrink`."""
    torch.manual_seed(2)
    state = official_kl16.to_official(kl.kl16().autoencoder.state_dict())
    return saved({"model": {**state, "loss.logvar": torch.zeros(())}})


def detok_config() -> ViTConfig:
    return ViTConfig(64, 16, 16, ViTSize(32, 1, 2), ViTSize(32, 1, 2))


def detok_file() -> tuple[bytes, dict[str, Tensor]]:
    """l-DeTok's tokenizer as its training leaves it, and its EMA."""
    states = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        states.append({n: t.detach().clone() for n, t in vit_state(ViTTokenizer(detok_config())).items()})
    loss = {"loss_module.discriminator.weight": torch.ones(2, 2)}
    scaler = {"scale": 1.0, "_growth_tracker": 0}
    return saved({"model": {**states[0], **loss}, "model_ema": states[1], "loss_scaler": scaler, "epoch": 199}), states[
        1
    ]


def stats_file(channels: int = 16, key: str = STATISTICS_KEY) -> bytes:
    """stats.pkl: means and stds of mean and log-variance."""
    mean, std = torch.linspace(-1, 1, 2 * channels), torch.linspace(1, 2, 2 * channels)
    return pickle.dumps({key: {"single": (mean.mean(), std.mean()), "channel": (mean, std)}})


def dc_files(folder: Path, **changes: Any) -> dict[str, bytes]:
    """A DC-AE in diffusers' format: contents by name."""
    from diffusers import AutoencoderDC

    torch.manual_seed(5)
    AutoencoderDC(**{**DC_CONFIG, **changes}).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def publish(name: str, put: Any, folder: Path) -> dict[str, Tensor]:
    """Put a model's and its tokenizer's files at their addresses. Returns the model's EMA."""
    content, ema = model_file(name)
    put(download.OFFICIAL[name][0].url, content)
    tokenizer = PUBLISHED[name].tokenizer
    contents = {
        "kl16": lambda: {"kl16.ckpt": kl16_file()},
        "dc-ae": lambda: dc_files(folder),
        "detok": lambda: {Path(download.OFFICIAL["detok"][0].name).name: detok_file()[0], "stats.pkl": stats_file()},
    }[tokenizer]()
    for remote in download.OFFICIAL[tokenizer]:
        put(remote.url, contents[Path(remote.name).name])
    return ema
