"""Run steps on several devices, or in less memory, with equal results.

With several ranks, DistributedDataParallel replicates the model and averages gradients; `fully_shard` (FSDP2) keeps a
shard of every tensor on each rank and gathers them as needed. Blocks may recompute activations, or be compiled.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mar.backends.cpu.linear import has_onednn
from mar.config import ConfigError, TrainConfig
from mar.model.mar import MAR
from mar.training.loss import DiffusionLoss

_aten = torch.ops.aten
_MATRIX_PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    *([torch.ops.mkldnn._linear_pointwise.default] if has_onednn() else []),
]
"""Operations whose results selective activation checkpointing keeps: they take most of a block's time."""
_CHECKPOINT_OPTIONS: dict[str, dict[str, Any]] = {
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, _MATRIX_PRODUCTS)},
    "full": {},
}


def fsdp_units(model: MAR) -> list[nn.Module]:
    """Return modules whose shards are gathered together.

    The head is one, since it calls layers of its blocks by itself.
    """
    return [*model.encoder, *model.decoder, model.head]


def parallelize(loss: DiffusionLoss, averages: Iterable[Any], config: TrainConfig, device: torch.device) -> nn.Module:
    """Wrap the loss so that its gradients are the global batch's.

    ConfigError if ranks and accumulation do not divide the batch.

    Args:
        loss: changed in place; names of parameters stay.
        averages: EMA models, sharded like the model under FSDP.
        config: strategy, accumulation, activation checkpointing and compilation.
        device: of this rank.

    Returns:
        The module to call in place of `loss`.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    divisor = world * config.accumulate
    if config.batch % divisor:
        raise ConfigError(
            f"batch is {config.batch}, but it must be a multiple of {divisor}: {world} process(es), each with "
            f"{config.accumulate} part(s)"
        )

    # blocks: recomputed, compiled
    if config.activation_checkpointing != "none":
        for block in loss.model.blocks():
            block.forward = _checkpointed(block.forward, _CHECKPOINT_OPTIONS[config.activation_checkpointing])
    if config.compile:
        for block in loss.model.blocks():
            block.compile()

    # one process, DDP, or FSDP
    if not dist.is_initialized():
        return loss
    if config.strategy == "ddp":
        # buffers are tables of constants, equal on all ranks
        device_ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(loss, device_ids=device_ids, broadcast_buffers=False)
    # the head's output is a view of its last product, and nothing writes into it
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped module.* returned a view tensor")
    mesh = init_device_mesh(device.type, (world,))
    for module, model in ((loss, loss.model), *((average, average) for average in averages)):
        for unit in fsdp_units(model):
            fully_shard(unit, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return loss


def _checkpointed(forward: Callable[..., Tensor], options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Wrap the forward pass of a block to recompute it; Dynamo sees a function, but not into a `functools.partial`."""

    def recomputed(*arguments: Any, **keywords: Any) -> Tensor:
        result: Tensor = checkpoint(forward, *arguments, use_reentrant=False, **options, **keywords)
        return result

    return recomputed


@contextlib.contextmanager
def grad_sync(module: nn.Module, last: bool) -> Iterator[None]:
    """Synchronize gradients of ranks after the last accumulated part only."""
    if isinstance(module, DistributedDataParallel):
        with contextlib.nullcontext() if last else module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    yield


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; called by all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, or a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """Gather all tensors of a state dict; called by all ranks."""
    return {name: full_tensor(value) if isinstance(value, Tensor) else value for name, value in state.items()}
