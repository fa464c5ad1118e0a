"""How a step is computed: on one process or many, all at once or in parts, kept or computed again, compiled or not.

Nothing here changes what is learned. Many processes are PyTorch's own: DistributedDataParallel keeps the model on each
and averages gradients; `fully_shard` (FSDP2) keeps a share of every tensor on each and gathers them as they are needed.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
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
_PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    *([torch.ops.mkldnn._linear_pointwise.default] if has_onednn() else []),
]
"""What takes the time of a block, and is kept where recomputing is selective."""
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, _PRODUCTS)},
    "full": {},
}


def fsdp_units(model: MAR) -> list[nn.Module]:
    """Return what is gathered as one: the trunk's blocks, and the head, which calls layers of its blocks by itself."""
    return [*model.encoder, *model.decoder, model.head]


def parallelize(loss: DiffusionLoss, averages: Iterable[Any], config: TrainConfig, device: torch.device) -> nn.Module:
    """What to call for the loss, so that the processes' gradients come out as those of the whole batch.

    Changes `loss` and `averages` in place where their tensors are to be shared out; names of parameters stay. Raises
    ConfigError for a batch that the processes and parts do not divide.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    cuts = world * config.accumulate
    if config.batch % cuts:
        raise ConfigError(
            f"batch is {config.batch}, but it must be a multiple of {cuts}: {world} process(es), each with "
            f"{config.accumulate} part(s)"
        )
    if config.activation_checkpointing != "none":
        options = _RECOMPUTE[config.activation_checkpointing]
        for block in loss.model.blocks():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)
    if config.compile:
        for block in loss.model.blocks():
            block.compile()
    if not dist.is_initialized():
        return loss
    if config.strategy == "ddp":
        return DistributedDataParallel(loss, device_ids=[device.index] if device.type == "cuda" else None)
    # The head's result is a view of its last product; nobody writes into it.
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped module.* returned a view tensor")
    mesh = init_device_mesh(device.type, (world,))
    for module, model in ((loss, loss.model), *((average, average) for average in averages)):
        for unit in fsdp_units(model):
            fully_shard(unit, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return loss


@contextlib.contextmanager
def grad_sync(module: nn.Module, last: bool) -> Iterator[None]:
    """For one of several parts of a batch: processes wait for each other's gradients at the last part only."""
    if isinstance(module, DistributedDataParallel):
        with contextlib.nullcontext() if last else module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    yield


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie in shares on several processes, each of which has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor; the tensor itself where it is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with every tensor whole, on every process."""
    return {name: full_tensor(value) if isinstance(value, Tensor) else value for name, value in state.items()}
