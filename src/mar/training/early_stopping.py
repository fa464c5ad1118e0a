"""Stopping a run where the loss of held-out pictures no longer falls, and keeping the weights of where it was lowest.

What was measured is kept in the run's folder, so that a run that was killed, or is begun with another patience, decides
by all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from mar import distributed
from mar.checkpoint.files import write_text
from mar.training.callbacks import OnSnapshot, Snapshot
from mar.training.log import Log
from mar.training.trainer import Run

BEST = "model-best.safetensors"
"""The averaged weights of where the loss was lowest, in a run's folder."""
HISTORY = "validation.json"
"""The losses, by images seen, and what they are of; what is not finite is null."""


class EarlyStopping:
    """A look at a run by `look`, whose `val_loss` ends the run (`Run.enough`) once its last `patience` values are not
    lower than the lowest before them. Every process decides the same; the first writes.

    Losses after the state that a run goes on from are forgotten: it will measure them again. So are those of other
    held-out pictures, which say nothing about these.
    """

    def __init__(self, run: Run, log: Log, look: OnSnapshot) -> None:
        self.run, self.log, self.look = run, log, look
        config = run.config
        self.of = {"hold_out": config.hold_out, "validate_on": config.validate_on, "count": config.validate_count}
        known = distributed.all_gather_object(read_history(run.folder / HISTORY, self.of))[0]
        self.losses = {images: loss for images, loss in known.items() if images <= run.progress.images}
        self._decide()

    def __call__(self, snapshot: Snapshot) -> Mapping[str, float]:
        """What `look` found."""
        found = self.look(snapshot)
        self.losses[snapshot.images] = found["val_loss"]
        if best_step(self.losses) == snapshot.images:
            # before the loss is noted: whatever is noted as the best has been kept
            best = snapshot.pipeline("ema")
            if distributed.rank() == 0:
                best.save(snapshot.folder / BEST)
        if distributed.rank() == 0:
            write_history(snapshot.folder / HISTORY, self.of, self.losses)
        self._decide()
        return found

    def _decide(self) -> None:
        if self.run.enough or evals_since_best(self.losses) < self.run.config.patience:
            return
        self.run.enough = True
        best = best_step(self.losses)
        where = "it was never finite" if best is None else f"the lowest, {self.losses[best]:.4f}, was at image {best:,}"
        kept = "" if best is None else f", whose weights are {self.run.folder / BEST}"
        self.log.note(
            f"the loss of held-out pictures has not fallen for {evals_since_best(self.losses)} validations, and the "
            f"run ends: {where}{kept}; a larger --patience goes on"
        )


def best_step(losses: Mapping[int, float]) -> int | None:
    """The images at which the loss was lowest, the first time; None where none is finite."""
    numbers = {images: loss for images, loss in losses.items() if math.isfinite(loss)}
    return min(sorted(numbers), key=numbers.__getitem__, default=None)


def evals_since_best(losses: Mapping[int, float]) -> int:
    """How many of the last losses, in a row, are not lower than the lowest before them; what is not finite is not."""
    order = sorted(losses)
    best = best_step(losses)
    return len(order) - 1 - order.index(best) if best is not None else max(len(order) - 1, 0)


def read_history(path: Path, of: Mapping[str, object]) -> dict[int, float]:
    """The losses kept in a file, by images seen; none where there is no such file, or they are of other pictures.

    ValueError for a file that can't be read as one.
    """
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        losses = {int(n): math.nan if loss is None else float(loss) for n, loss in kept["losses"].items()}
        return losses if kept["of"] == dict(of) else {}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} can't be read ({error}); remove it to wait anew") from error


def write_history(path: Path, of: Mapping[str, object], losses: Mapping[int, float]) -> None:
    """Keeps the losses in a file."""
    kept = {str(images): losses[images] if math.isfinite(losses[images]) else None for images in sorted(losses)}
    write_text(path, json.dumps({"of": dict(of), "losses": kept}, indent=1))
