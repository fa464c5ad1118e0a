"""A small run of the reference, as its checkpoint-last.pth."""

from __future__ import annotations

from pathlib import Path

import torch

from mar.checkpoint.official import to_official
from mar.config import HeadConfig, ModelConfig, TrunkConfig
from mar.model.mar import MAR

TRUNK = TrunkConfig(width=16, depth=1, num_heads=2)
CONFIG = ModelConfig(
    channels=3, grid=(4, 4), encoder=TRUNK, decoder=TRUNK, head=HeadConfig(16, 1, batch_mul=1), buffer_size=2, classes=2
)


def official_file(path: Path, steps: int = 3) -> tuple[MAR, dict[str, torch.Tensor]]:
    """A checkpoint-last.pth of a run of the reference; returns its model, and its weights after one more step."""
    torch.manual_seed(1)
    model = MAR(CONFIG)
    named = {name: torch.nn.Parameter(tensor) for name, tensor in to_official(model.state_dict()).items()}
    still = [p for n, p in named.items() if p.ndim == 1 or n.endswith(".bias") or "diffloss" in n]
    decayed = [p for p in named.values() if not any(p is other for other in still)]
    groups = [{"params": still, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.02}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    gradients = {name: torch.randn_like(p) for name, p in named.items()}
    for step in range(steps + 1):
        before = {name: p.detach().clone() for name, p in named.items()}
        state = {"model": before, "model_ema": before, "optimizer": optimizer.state_dict(), "epoch": 4}
        if step == steps:
            torch.save(state, path)
        for name, p in named.items():
            p.grad = gradients[name]
        optimizer.step()
    return model, {name: p.detach() for name, p in named.items()}
