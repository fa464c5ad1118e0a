"""The optimizer: AdamW with the reference's parameter groups, and the learning rate by images seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mar.config import TrainConfig


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to the trunk's matrices and embeddings, not to biases, norms and the head."""
    return not name.startswith("head.") and (parameter.ndim > 1 or name == "mask_token")


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters of a MAR, in two groups."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.scaled_lr, betas=(config.beta1, config.beta2))
    for _, p in named:
        # What AdamW makes at its first step. PyTorch's functions that read and write an optimizer's state take one that
        # has none through a step with gradients of zero, and that step would count in the correction of the moments.
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def learning_rate(config: TrainConfig, images: int) -> float:
    """The rate of the step that begins after `images`: linear warm-up, constant, linear decay."""
    rise = (images + config.batch) / config.warmup if config.warmup else 1.0
    fall = (config.images - images) / config.decay if config.decay else 1.0
    return config.scaled_lr * max(0.0, min(1.0, rise, fall))
