"""Looking at a run now and then: its weights, whole on every process, for whoever draws or judges them.

The loss of pictures that a run does not learn from, by how noisy the tokens are.

It is the training loss (`mar.training.loss`) of the EMA weights, without dropout: every picture with its class, not
mirrored, and always with the same draws. So a value differs from the one before it by the weights alone, and shows
progress where the training loss, whose draws are new at each step, looks flat. Letters as in `loss`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mar import distributed
from mar.data.images import image_grid
from mar.data.loader import load_batch
from mar.data.splits import stratified_indices
from mar.pipeline import Pipeline
from mar.sampling.generate import BrokenLatents
from mar.training.log import Log
from mar.training.loss import DiffusionLoss, sample_randomness
from mar.training.run import file_of, pipeline
from mar.training.trainer import Callback, Run, autocast, to_latents

CLASSES, ROWS, PLAIN = 10, 4, 16
"""A grid has so many classes, at most, and pictures of each; so many pictures of a model without classes."""


@dataclass(frozen=True)
class Snapshot:
    """A run as it stands after so many images. All processes get it, and have to do the same with it."""

    images: int
    step: int
    folder: Path
    """The run's."""
    weights: tuple[str, ...]
    """What there is to draw with: ema, raw, and averages of other decays, as ema-0.9999."""
    pipeline: Callable[[str], Pipeline]
    """`pipeline("ema")`, `pipeline("raw")`: ready to draw, with the whole weights on every process, also where they
    are shared out; a copy, made when it is asked for, which all processes have to do."""


OnSnapshot = Callable[[Snapshot], Mapping[str, float]]
"""Looks at a run on all of its processes, each its share of the work, and gives all the same numbers for the log."""


def take_snapshot(run: Run) -> Snapshot:
    """The run as it stands."""
    progress = run.progress
    return Snapshot(progress.images, progress.step, run.folder, tuple(run.weights), functools.partial(pipeline, run))


def on_snapshot(run: Run, log: Log, every: int, look: OnSnapshot) -> None:
    """Has `look` called with a snapshot of the run every `every` images (0: never), and its numbers written to the log.

    A look that a killed session did not finish is made again when the run goes on.
    """

    def call(run: Run) -> None:
        if found := look(take_snapshot(run)):
            log.write(run.progress.images, **found)

    run.hooks.append(Callback(every, call))


def export_and_draw(snapshot: Snapshot, log: Log) -> dict[str, float]:
    """Exports EMA and raw weights and draws a grid with each, samples/IMAGES.png and samples/IMAGES-raw.png: four
    pictures of every class (at most ten), of which each process draws its share. A broken grid is reported, not fatal.
    """
    for weights in snapshot.weights:
        drawer = snapshot.pipeline(weights)
        if distributed.rank() == 0:
            drawer.save(snapshot.folder / file_of(weights))
        classes = min(drawer.model.config.classes, CLASSES)
        labels: list[int | None] = [label for _ in range(ROWS) for label in range(classes)] or [None] * PLAIN
        shares = distributed.all_gather_object(_draw(drawer, labels, distributed.rank(), distributed.world_size()))
        if distributed.rank() != 0:
            continue
        if broken := [share for share in shares if isinstance(share, str)]:
            log.note(f"no samples of the {weights} weights yet: {broken[0]}")
            continue
        name = "samples" if weights == "ema" else f"samples-{weights}"
        path = snapshot.folder / "samples" / f"{snapshot.images:012d}{name.removeprefix('samples')}.png"
        path.parent.mkdir(exist_ok=True)
        sheet = image_grid([picture for share in shares for picture in share], classes or ROWS)
        sheet.save(path)
        log.picture(snapshot.images, name, sheet)
        log.note(f"drew {path}")
    return {}


def _draw(drawer: Pipeline, labels: list[int | None], rank: int, world: int) -> list[Image.Image] | str:
    """This process's share of the pictures, which may be none; or why they are none."""
    mine = range(len(labels) * rank // world, len(labels) * (rank + 1) // world)
    try:
        return drawer.sample([labels[i] for i in mine], list(mine))
    except BrokenLatents as error:
        return str(error)


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
    """The loss of a run's held-out pictures, as a look at its snapshots (`mar.training.callbacks.on_snapshot`).

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
        every = [sums for share in distributed.all_gather_object(mine) for sums in share]
        # in the order of the groups, so that the sum does not depend on how they are shared out
        found = validation_numbers([sums for _, sums in sorted(every)])
        pictures = sum(distributed.all_gather_object(sum(len(group.labels) for group in self.kept)))
        self.log.note(f"validation loss {found['val_loss']:.4f} ({pictures:,} held-out pictures)")
        return found

    def _sums(self, loss: DiffusionLoss, group: _Group) -> tuple[list[float], list[int]]:
        """Of every bin, the sum of its losses and their count."""
        config, device = self.model_config, self.run.device
        draws = sample_randomness(config, SEED, group.number, group.positions.tolist()).to(device)
        with autocast(device, self.run.config.precision):
            rows = loss.rows(group.latents.to(device), group.labels.to(device), draws)
        bins = (draws.timestep.flatten() * BINS // config.head.diffusion_steps).cpu()
        sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, rows.double().cpu())
        return sums.tolist(), bins.bincount(minlength=BINS).tolist()

    def _encode(self) -> list[_Group]:
        """This process's groups; pictures that can't be read are left out, with a warning."""
        chosen = stratified_indices(len(self.source), self.run.config.validate_count).tolist()
        groups = []
        for number in range(distributed.rank(), math.ceil(len(chosen) / GROUP), distributed.world_size()):
            found = load_batch(self.source, self.run.transform, chosen[number * GROUP : (number + 1) * GROUP])
            if found is not None:
                latents = to_latents(self.run.tokenizer, found, SEED, self.run.device).cpu()
                groups.append(_Group(number, latents, found.labels, found.positions))
        return groups


def validation_numbers(groups: list[tuple[list[float], list[int]]]) -> dict[str, float]:
    """The mean over all and over each bin, of the bins' sums and counts of every group."""
    sums = [math.fsum(sums[k] for sums, _ in groups) for k in range(BINS)]
    counts = [sum(counts[k] for _, counts in groups) for k in range(BINS)]
    means = {f"val_loss_{k:02d}": _mean_loss(sums[k], counts[k]) for k in range(BINS)}
    return {"val_loss": _mean_loss(math.fsum(sums), sum(counts)), **means}


def _mean_loss(total: float, count: int) -> float:
    return total / count if count else math.nan
