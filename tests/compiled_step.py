"""A script: count what Dynamo compiles of training steps, and compare with plain ones.

python tests/compiled_step.py {none,selective,full}
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from typing import Any

import tiny
import torch
import torch._dynamo
from torch import Tensor, nn

from mar.config import TrainConfig
from mar.training.loss import DiffusionLoss, sample_randomness
from mar.training.parallelize import parallelize

MODEL = tiny.tiny_config(grid=(8, 8), attention_dropout=0.0, projection_dropout=0.0)
MASKED = range(24, 60, 3)
"""Numbers of masked tokens of twelve steps."""


def run_steps(checkpointing: Any, compiled: bool) -> tuple[list[float], list[Tensor]]:
    """Return the loss of a step for each of `MASKED`, and the sum of their gradients."""
    loss = DiffusionLoss(tiny.randomize(tiny.MAR(MODEL)).train())
    settings = TrainConfig(model=MODEL, batch=3, activation_checkpointing=checkpointing, compile=compiled)
    forward = parallelize(loss, (), settings, torch.device("cpu"))
    losses = []
    for masked in MASKED:
        draws = dataclasses.replace(
            sample_randomness(MODEL, 0, 1, range(3)),
            masked=masked,
            timestep=torch.randint(1000, (2, 3, masked), generator=torch.Generator().manual_seed(masked)),
            noise=tiny.noise(2, 3, masked, 2, seed=masked),
        )
        value = forward(tiny.noise(3, 2, 8, 8), torch.tensor([0, 1, 2]), draws)
        value.backward()
        losses.append(value.item())
    return losses, [p.grad for p in loss.parameters() if p.grad is not None]


def main(checkpointing: str) -> None:
    """Print the counts, losses and differences as JSON."""
    # another backend than Inductor: no compiler is needed, and Dynamo's part is the same
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[assignment]
    plain_losses, plain = run_steps("none", compiled=False)
    counters = torch._dynamo.utils.counters
    assert not counters["frames"], "the plain steps were compiled"
    losses, gradients = run_steps(checkpointing, compiled=True)
    found = {
        "frames": counters["frames"]["total"],
        "frames_compiled": counters["frames"]["ok"],
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": dict(counters["graph_break"]),
        "plain_losses": plain_losses,
        "losses": losses,
        "largest_gradient": max(float(g.abs().max()) for g in plain),
        "largest_difference": max(float((a - b).abs().max()) for a, b in zip(plain, gradients, strict=True)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
