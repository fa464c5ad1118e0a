"""Optimizers and learning rate: AdamW, and Muon for matrices inside blocks.

Source of Muon: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). Its updates are made
as large as AdamW's by section 2.2 of Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982). PyTorch's own
Muon always multiplies in bfloat16, which most CPUs only emulate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from mar.config import TrainConfig
from mar.config.tokenizer import TokenizerTrainConfig
from mar.model.mar import MAR
from mar.nn import Linear
from mar.training.parallelize import full_tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration of `orthogonalize`."""
_ITERATIONS = 5
_ADAMW_RMS = 0.2
"""Root mean square of a typical AdamW update, in units of its learning rate."""


def decays(model: MAR, name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies to a parameter.

    It does to matrices and embeddings; to those of the head only if `Head.weight_decay`.
    """
    if name.startswith("head.") and not model.head.weight_decay:
        return False
    return parameter.ndim > 1 or name == "mask_token"


def make_optimizers(model: MAR, config: TrainConfig) -> tuple[torch.optim.Optimizer, ...]:
    """Create AdamW; with `muon`, also Muon for the matrices inside blocks."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for_muon: set[int] = set()
    if config.optimizer == "muon":
        for_muon = {id(p) for block in model.blocks() for p in block.parameters() if p.ndim == 2}
    others = [(name, p) for name, p in named if id(p) not in for_muon]
    adamw = make_adamw(
        [
            {"params": [p for name, p in others if not decays(model, name, p)], "weight_decay": 0.0},
            {"params": [p for name, p in others if decays(model, name, p)], "weight_decay": config.weight_decay},
        ],
        config.scaled_lr,
        (config.beta1, config.beta2),
    )
    if not for_muon:
        return (adamw,)
    return adamw, _make_muon(model, [(name, p) for name, p in named if id(p) in for_muon], config)


def make_tokenizer_optimizers(
    module: nn.Module, hidden: Sequence[Tensor], config: TokenizerTrainConfig
) -> tuple[torch.optim.Optimizer, ...]:
    """Create AdamW for a module; with `muon`, also Muon for its `hidden` kernels. No weight decay."""
    config = config.resolved()
    lr, betas = config.scaled_lr, (config.beta1, config.beta2)
    for_muon = {id(p) for p in hidden} if config.optimizer == "muon" else set()
    groups = [{"params": [p for p in module.parameters() if id(p) not in for_muon], "weight_decay": 0.0}]
    adamw = make_adamw(groups, lr, betas)
    if not for_muon:
        return (adamw,)
    return adamw, Muon([{"params": list(hidden)}], lr, dtype=_muon_dtype(config))


def make_adamw(groups: Sequence[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Create AdamW with its state, which can be saved before a step."""
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    # fused: one pass over memory, ten times as fast on CPUs
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True if fused else None)
    for p in (p for group in groups for p in group["params"]):
        # AdamW would make this at its first step. But PyTorch's get_optimizer_state_dict initializes a missing state by
        # a step with zero gradients, which would count in the bias correction of the moments.
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.tensor(0.0, device=p.device if fused else None), **moments}
    return optimizer


def _make_muon(model: MAR, named: Sequence[tuple[str, Tensor]], config: TrainConfig) -> Muon:
    splits = {id(module.weight): module.splits for module in model.modules() if isinstance(module, Linear)}
    groups = [
        {
            "params": [p for name, p in named if splits[id(p)] == count and decays(model, name, p) == decay],
            "parts": count,
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for count in (1, 3)
        for decay in (True, False)
    ]
    groups = [group for group in groups if group["params"]]  # the state of an empty group can't be loaded
    return Muon(groups, config.scaled_lr, factor=config.muon_factor, dtype=_muon_dtype(config))


def _muon_dtype(config: TrainConfig | TokenizerTrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def learning_rate(config: TrainConfig | TokenizerTrainConfig, images: int) -> float:
    """Compute the rate after `images` images: linear warm-up, constant, linear decay."""
    rise = (images + config.batch) / config.warmup if config.warmup else 1.0
    fall = (config.images - images) / config.decay if config.decay else 1.0
    return config.scaled_lr * max(0.0, min(1.0, rise, fall))


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, for matrices (rows, columns), with decoupled weight decay.

    A parameter may be several matrices stacked along rows, `parts` of its group: a fused projection of queries, keys
    and values is three. The weight of a convolution (out, in, height, width) is the matrix (out, in * height * width).

    Args:
        groups: parameter groups; each may override the options.
        lr: learning rate of an AdamW that would make updates of the same size.
        factor: the rate used is `factor * lr`.
        momentum: decay of the gradient's average.
        weight_decay: per step, times the rate.
        dtype: of the products in `orthogonalize`.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, *, factor: float = 1.0, momentum: float = 0.95,
        weight_decay: float = 0.0, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "factor": factor, "momentum": momentum, "weight_decay": weight_decay, "parts": 1}
        super().__init__(groups, defaults)
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2 or p.shape[0] % group["parts"]:
                    raise ValueError(
                        f"Muon: got a parameter of shape {tuple(p.shape)}, expected {group['parts']} matrices"
                    )
                # made now for the reason given in `make_adamw`
                self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            rate = group["lr"] * group["factor"]
            parameters = [p for p in group["params"] if p.grad is not None]
            for p, update in zip(parameters, self._updates(parameters, group), strict=True):
                height, width = p.shape[0] // group["parts"], p.shape[1:].numel()
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(_shard_like(update.to(p.dtype), p), alpha=-rate * _ADAMW_RMS * max(height, width) ** 0.5)

    def _updates(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Compute orthogonal updates, one batch for all matrices of a shape; every rank computes sharded ones whole."""
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for i, p in enumerate(parameters):
            by_shape[p.shape].append(i)
        updates: dict[int, Tensor] = {}
        for shape, indices in by_shape.items():
            directions = []
            for i in indices:
                momentum, gradient = self.state[parameters[i]]["momentum"], parameters[i].grad
                assert gradient is not None
                momentum.lerp_(gradient, 1 - group["momentum"])
                directions.append(full_tensor(gradient.lerp(momentum, group["momentum"])))
            stacked = torch.stack(directions).view(-1, shape[0] // group["parts"], shape[1:].numel())
            updates |= dict(zip(indices, orthogonalize(stacked.to(self.dtype)).reshape(-1, *shape), strict=True))
        return [updates[i] for i in range(len(parameters))]


def _shard_like(update: Tensor, p: Tensor) -> Tensor:
    """Shard a full update like `p`; every rank has all of it, so nothing is communicated."""
    if not isinstance(p, DTensor):
        return update
    return DTensor.from_local(update, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False).redistribute(
        placements=p.placements
    )


def orthogonalize(matrices: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n rows columns"]:
    """Move singular values to about 1 (0.7 to 1.2) by Newton-Schulz iterations."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
