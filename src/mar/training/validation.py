"""The loss of pictures that a run does not learn from, by how noisy the tokens are.

It is the training loss (`mar.training.loss`) of the EMA weights, without dropout: every picture with its class, not
mirrored, and always with the same draws. So a value differs from the one before it by the weights alone, and shows
progress where the training loss, whose draws are new at each step, looks flat. Letters as in `loss`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mar import runtime
from mar.data.heldout import choose
from mar.data.loader import read_plain
from mar.training.log import Log
from mar.training.loop import Run, autocast, to_latents
from mar.training.loss import DiffusionLoss, draw_step
from mar.training.snapshot import Snapshot

BINS = 10
"""Equal parts of the timesteps, from the least noise to the most."""
GROUP = 32
"""Pictures that are computed at once and share a mask ratio; the same ones however many processes there are."""
SEED = 0x7E57
"""Of all draws, whatever the seed of the run, so that runs can be compared."""


@dataclass(frozen=True)
class _Group:
    """Held-out pictures as they are kept, on the CPU."""

    number: int
    latents: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    """Their numbers in the source, by which draws are keyed."""


class Validation:
    """The loss of a run's held-out pictures, as a look at its snapshots (`mar.training.snapshot.on_snapshot`).

    Every process computes its share of the groups; latents are encoded the first time, and kept.
    """

    def __init__(self, run: Run, log: Log) -> None:
        assert run.held_out is not None
        self.run, self.log, self.source = run, log, run.held_out
        self.model_config = dataclasses.replace(run.config.model, label_drop=0.0)
        self.kept: list[_Group] | None = None

    @torch.no_grad()
    def __call__(self, snapshot: Snapshot) -> Mapping[str, float]:
        """`val_loss` and `val_loss_00` to `val_loss_09`; NaN for a bin that no draw falls into. On every process."""
        if self.kept is None:
            self.kept = self._encode()
        model = snapshot.pipeline("ema").model
        loss = DiffusionLoss(model).to(self.run.device).eval()
        mine = [(group.number, self._sums(loss, group)) for group in self.kept]
        every = [sums for share in runtime.gather(mine) for sums in share]
        # in the order of the groups, so that the sum does not depend on how they are shared out
        found = numbers([sums for _, sums in sorted(every)])
        pictures = sum(runtime.gather(sum(len(group.labels) for group in self.kept)))
        self.log.note(f"validation loss {found['val_loss']:.4f} ({pictures:,} held-out pictures)")
        return found

    def _sums(self, loss: DiffusionLoss, group: _Group) -> tuple[list[float], list[int]]:
        """Of every bin, the sum of its losses and their count."""
        config, device = self.model_config, self.run.device
        draws = draw_step(config, SEED, group.number, group.positions.tolist()).to(device)
        with autocast(device, self.run.config.precision):
            rows = loss.rows(group.latents.to(device), group.labels.to(device), draws)
        bins = (draws.timestep.flatten() * BINS // config.head.diffusion_steps).cpu()
        sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, rows.double().cpu())
        return sums.tolist(), bins.bincount(minlength=BINS).tolist()

    def _encode(self) -> list[_Group]:
        """This process's groups; pictures that can't be read are left out, with a warning."""
        chosen = choose(len(self.source), self.run.config.validate_count).tolist()
        groups = []
        for number in range(runtime.rank(), math.ceil(len(chosen) / GROUP), runtime.world_size()):
            found = read_plain(self.source, self.run.transform, chosen[number * GROUP : (number + 1) * GROUP])
            if found is not None:
                latents = to_latents(self.run.tokenizer, found, SEED, self.run.device).cpu()
                groups.append(_Group(number, latents, found.labels, found.positions))
        return groups


def numbers(groups: list[tuple[list[float], list[int]]]) -> dict[str, float]:
    """The mean over all and over each bin, of the bins' sums and counts of every group."""
    sums = [math.fsum(sums[k] for sums, _ in groups) for k in range(BINS)]
    counts = [sum(counts[k] for _, counts in groups) for k in range(BINS)]
    means = {f"val_loss_{k:02d}": _mean(sums[k], counts[k]) for k in range(BINS)}
    return {"val_loss": _mean(math.fsum(sums), sum(counts)), **means}


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan
