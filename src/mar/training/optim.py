"""The optimizers: AdamW with the reference's groups, Muon where asked for; the learning rate by images seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mar.config import TrainConfig
from mar.training.muon import Muon


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to the trunk's matrices and embeddings, not to biases, norms and the head."""
    return not name.startswith("head.") and (parameter.ndim > 1 or name == "mask_token")


def hidden(name: str, parameter: Tensor) -> bool:
    """Whether it is a matrix inside a block, of the trunk or the head: what Muon is for."""
    return parameter.ndim == 2 and name.startswith(("encoder.", "decoder.", "head.blocks."))


def make_optimizers(model: nn.Module, config: TrainConfig) -> tuple[torch.optim.Optimizer, ...]:
    """AdamW over the parameters of a MAR, in two groups; where asked for, Muon over the matrices in its blocks."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return (_adamw(named, config),)
    inside = [(name, p) for name, p in named if hidden(name, p)]
    return _adamw([(name, p) for name, p in named if not hidden(name, p)], config), _muon(inside, config)


def _adamw(named: Sequence[tuple[str, Tensor]], config: TrainConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.weight_decay},
    ]
    return ready_adamw(groups, config.scaled_lr, (config.beta1, config.beta2))


def ready_adamw(groups: Sequence[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW whose state is there before its first step, to be saved and filled."""
    on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
    # In one pass over the memory: a tenth of the time there. What GPUs take by themselves is as good.
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True if on_cpu else None)
    for p in (p for group in groups for p in group["params"]):
        # What AdamW makes at its first step. PyTorch's functions that read and write an optimizer's state take one that
        # has none through a step with gradients of zero, and that step would count in the correction of the moments.
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def _muon(named: Sequence[tuple[str, Tensor]], config: TrainConfig) -> Muon:
    def parts(name: str) -> int:
        """Queries, keys and values are three matrices in one; shift, scale and gate, too."""
        return 3 if name.endswith(("qkv.weight", "modulation.weight")) else 1

    groups = [
        {
            "params": [p for name, p in named if parts(name) == count and decays(name, p) == decay],
            "parts": count,
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for count in (1, 3)
        for decay in (True, False)
    ]
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    groups = [group for group in groups if group["params"]]  # whose state could not be read back
    return Muon(groups, config.scaled_lr, factor=config.muon_factor, dtype=dtype)


@runtime_checkable
class Pace(Protocol):
    """The settings by which a learning rate follows the images seen (`TrainConfig` tells what they are)."""

    @property
    def images(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def decay(self) -> int: ...
    @property
    def scaled_lr(self) -> float: ...


def learning_rate(config: Pace, images: int) -> float:
    """The rate of the step that begins after `images`: linear warm-up, constant, linear decay."""
    rise = (images + config.batch) / config.warmup if config.warmup else 1.0
    fall = (config.images - images) / config.decay if config.decay else 1.0
    return config.scaled_lr * max(0.0, min(1.0, rise, fall))
