"""Export weights, draw samples and compute the validation loss during a run.

A snapshot gives the full weights to every rank, also where FSDP shards them. `on_snapshot` calls a function with one
every so many images, and logs the metrics it returns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from PIL import Image
from torch import Tensor

from mar import distributed
from mar.data.images import image_grid
from mar.data.loader import load_batch
from mar.data.splits import stratified_indices
from mar.pipeline import Pipeline
from mar.sampling.generate import BrokenLatents
from mar.training.log import Log, save_sheet
from mar.training.loss import DiffusionLoss, sample_randomness
from mar.training.run import make_pipeline, weights_file
from mar.training.trainer import GRID_CLASSES, GRID_ROWS, Callback, Run, autocast, to_latents

# ---- snapshots


@dataclass(frozen=True)
class Snapshot:
    """The current state of a run. Every rank gets one, and all have to make the same calls."""

    images: int
    step: int
    folder: Path
    """The run's."""
    weights: tuple[str, ...]
    """Names of weights: ema, raw, and EMAs of other decays such as ema-0.9999."""
    asks: list[int | str | None]
    """Labels or prompts of the images of a sample grid."""
    pipeline: Callable[[str], Pipeline]
    """Copies weights to a pipeline, on every rank: `pipeline("ema")`, `pipeline("raw")`."""
    dtype: torch.dtype = torch.float32
    """Precision of matrices to draw in: the run's on CUDA, else float32."""

    def drawing_pipeline(self, weights: str) -> Pipeline:
        """Copy weights to a pipeline, in the precision to draw in."""
        return self.pipeline(weights).to(dtype=self.dtype)


SnapshotCallback = Callable[[Snapshot], Mapping[str, float]]
"""Called on all ranks; has to return the same metrics for the log on each."""


def take_snapshot(run: Run) -> Snapshot:
    """Take a snapshot of the current state."""
    progress = run.progress
    return Snapshot(
        progress.images,
        progress.step,
        run.folder,
        tuple(run.weights),
        run.grid_conditions,
        functools.partial(make_pipeline, run),
        torch.bfloat16 if run.config.precision == "bf16" and run.device.type == "cuda" else torch.float32,
    )


def on_snapshot(run: Run, log: Log, every: int, callback: SnapshotCallback) -> None:
    """Call a function with snapshots of a run, and log its metrics.

    If the session is killed meanwhile, the call is repeated when the run resumes.

    Args:
        run: gets the callback.
        log: gets the metrics.
        every: images between calls; 0 never calls.
        callback: called on all ranks.
    """

    def call(run: Run) -> None:
        if metrics := callback(take_snapshot(run)):
            log.write(run.progress.images, **metrics)

    run.callbacks.append(Callback(every, call))


# ---- samples


def export_and_sample(snapshot: Snapshot, log: Log) -> dict[str, float]:
    """Export the weights of a snapshot, and draw samples with each.

    The grids are samples/IMAGES.png for EMA and samples/IMAGES-raw.png. Each rank draws its share of the images. A
    model that draws broken latents is noted in the log.
    """
    for weights in snapshot.weights:
        pipeline = snapshot.pipeline(weights)
        if distributed.rank() == 0:
            pipeline.save(snapshot.folder / weights_file(weights))
        pipeline.to(dtype=snapshot.dtype)  # the file is in float32
        samples = distributed.all_gather_object(
            sample_share(pipeline, snapshot.asks, distributed.rank(), distributed.world_size())
        )
        if distributed.rank() != 0:
            continue
        if errors := [share for share in samples if isinstance(share, str)]:
            log.note(f"no samples of the {weights} weights yet: {errors[0]}")
            continue
        name = "samples" if weights == "ema" else f"samples-{weights}"
        path = snapshot.folder / "samples" / f"{snapshot.images:012d}{name.removeprefix('samples')}.png"
        columns = min(max(len(snapshot.asks) // GRID_ROWS, 1), GRID_CLASSES)
        grid = image_grid([image for share in samples for image in share], columns)
        if save_sheet(path, grid, log):
            log.note(f"drew {path}")
        log.write_image(snapshot.images, name, grid)
    return {}


def sample_share(
    pipeline: Pipeline, asks: list[int | str | None], rank: int, world: int, *, allow_broken: bool = False
) -> list[Image.Image] | str:
    """Draw this rank's images of a grid, perhaps none; returns the message of an error.

    Args:
        pipeline: draws them.
        asks: labels or prompts of the whole grid.
        rank: of this process.
        world: number of processes.
        allow_broken: draw noise instead of returning the message.
    """
    indices = range(len(asks) * rank // world, len(asks) * (rank + 1) // world)
    try:
        conditions: dict[str, Any] = {pipeline.condition_argument: [asks[i] for i in indices]}
        return pipeline.sample(seeds=list(indices), allow_broken=allow_broken, **conditions)
    except BrokenLatents as error:
        return str(error)


# ---- validation loss

BINS = 10
"""Number of equal ranges of timesteps, from least to most noise, with a loss of their own."""
GROUP_SIZE = 32
"""Held-out images that share a mask ratio, the same ones for any number of ranks."""
VALIDATION_SEED = 0x7E57
"""Keys all random numbers, whatever the run's seed, so that runs can be compared."""


@dataclass(frozen=True)
class _Group:
    """Encoded held-out images, on the CPU."""

    number: int
    latents: Float[Tensor, "n c h w"]
    condition: Shaped[Tensor, "n ..."]
    positions: Int[Tensor, " n"]
    """Indices in the source, which key random numbers."""


class Validation:
    """Snapshot callback: the loss of held-out images, total and by timestep.

    It is the training loss of the EMA weights, without dropout, label dropout and augmentation. Random numbers are the
    same each time, so values differ by the weights alone. Each rank computes its share of the groups. Latents are
    encoded at the first call, and kept.
    """

    def __init__(self, run: Run, log: Log) -> None:
        assert run.held_out is not None
        self.run, self.log, self.source = run, log, run.held_out
        self.model_config = dataclasses.replace(run.config.model, label_drop=0.0)
        self.groups: list[_Group] | None = None

    @torch.no_grad()
    def __call__(self, snapshot: Snapshot) -> Mapping[str, float]:
        """Compute `val_loss`, and `val_loss_00` to `val_loss_09` (NaN for an empty bin)."""
        if self.groups is None:
            self.groups = self._encode_groups()
        loss = DiffusionLoss(snapshot.pipeline("ema").model).to(self.run.device).eval()
        by_group = [(group.number, self._bin_sums(loss, group)) for group in self.groups]
        # sorted by group, so that the total does not depend on the number of ranks
        all_groups = sorted(group for share in distributed.all_gather_object(by_group) for group in share)
        metrics = mean_by_bin([sums for _, sums in all_groups])
        images = sum(distributed.all_gather_object(sum(len(group.latents) for group in self.groups)))
        self.log.note(f"validation loss {metrics['val_loss']:.4f} ({images:,} held-out pictures)")
        return metrics

    def _encode_groups(self) -> list[_Group]:
        """Encode this rank's groups; unreadable images are left out, with a warning."""
        indices = stratified_indices(len(self.source), self.run.config.validate_count).tolist()
        groups = []
        for number in range(distributed.rank(), math.ceil(len(indices) / GROUP_SIZE), distributed.world_size()):
            batch = load_batch(
                self.source, self.run.transform, indices[number * GROUP_SIZE : (number + 1) * GROUP_SIZE]
            )
            if batch is not None:
                latents = to_latents(self.run.tokenizer, batch, VALIDATION_SEED, self.run.device).cpu()
                groups.append(_Group(number, latents, self.run.read_condition(batch), batch.positions))
        return groups

    def _bin_sums(self, loss: DiffusionLoss, group: _Group) -> tuple[list[float], list[int]]:
        """Compute the sum and the number of losses in each bin."""
        config, device = self.model_config, self.run.device
        draws = sample_randomness(config, VALIDATION_SEED, group.number, group.positions.tolist()).to(device)
        with autocast(device, self.run.config.precision):
            losses = loss.per_token_loss(group.latents.to(device), group.condition.to(device), draws)
        bins = (draws.timestep.flatten() * BINS // config.head.diffusion_steps).cpu()
        sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, losses.cpu().double())
        return sums.tolist(), bins.bincount(minlength=BINS).tolist()


def mean_by_bin(groups: list[tuple[list[float], list[int]]]) -> dict[str, float]:
    """Average losses, total and by bin, from sums and counts by group."""
    sums = [math.fsum(sums[k] for sums, _ in groups) for k in range(BINS)]
    counts = [sum(counts[k] for _, counts in groups) for k in range(BINS)]
    means = {f"val_loss_{k:02d}": _mean(sums[k], counts[k]) for k in range(BINS)}
    return {"val_loss": _mean(math.fsum(sums), sum(counts)), **means}


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan
