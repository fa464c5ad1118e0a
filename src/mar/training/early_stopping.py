"""Stop a run when its validation loss stalls; keep the best weights.

All losses are kept in the run's folder. A run that resumes, even with another patience, decides by all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from mar import distributed
from mar.checkpoint import checksums
from mar.training.callbacks import Snapshot, SnapshotCallback
from mar.training.log import Log
from mar.training.trainer import Run

BEST_FILE = "model-best.safetensors"
"""File in a run's folder: the EMA weights with the lowest validation loss."""
HISTORY_FILE = "validation.json"
"""File in a run's folder: the losses by images seen (null: not finite), and the held-out images they are of."""


class EarlyStopping:
    """Snapshot callback: ends the run after `patience` validations without a lower loss.

    All ranks decide the same; rank 0 writes the files. Losses after the state that a run resumes from are dropped: they
    will be measured again. So are losses of other held-out images.

    Args:
        run: ended by its `should_stop`.
        log: gets a message when the run ends.
        validate: returns `val_loss`.
    """

    def __init__(self, run: Run, log: Log, validate: SnapshotCallback) -> None:
        self.run, self.log, self.validate = run, log, validate
        config = run.config
        self.held_out = {"hold_out": config.hold_out, "validate_on": config.validate_on, "count": config.validate_count}
        saved = distributed.all_gather_object(read_history(run.folder / HISTORY_FILE, self.held_out))[0]
        self.losses = {images: loss for images, loss in saved.items() if images <= run.progress.images}
        self._stop_if_due()

    def __call__(self, snapshot: Snapshot) -> Mapping[str, float]:
        """Return the metrics of `validate`."""
        metrics = self.validate(snapshot)
        self.losses[snapshot.images] = metrics["val_loss"]
        if best_step(self.losses) == snapshot.images:
            # the weights first: whatever the history calls the best has been saved
            pipeline = snapshot.pipeline("ema")
            if distributed.rank() == 0:
                pipeline.save(snapshot.folder / BEST_FILE)
        if distributed.rank() == 0:
            write_history(snapshot.folder / HISTORY_FILE, self.held_out, self.losses)
        self._stop_if_due()
        return metrics

    def _stop_if_due(self) -> None:
        count = evals_since_best(self.losses)
        if self.run.should_stop or count < self.run.config.patience:
            return
        self.run.should_stop = True
        best = best_step(self.losses)
        if best is None:
            where = "it was never finite"
        else:
            where = f"the lowest, {self.losses[best]:.4f}, was at image {best:,}, "
            where += f"whose weights are {self.run.folder / BEST_FILE}"
        self.log.note(
            f"the loss of held-out pictures has not fallen for {count} validations, and the run ends: {where}; "
            "a larger --patience goes on"
        )


def best_step(losses: Mapping[int, float]) -> int | None:
    """Return the images of the lowest loss; None without a finite one."""
    finite = {images: loss for images, loss in losses.items() if math.isfinite(loss)}
    return min(sorted(finite), key=finite.__getitem__, default=None)


def evals_since_best(losses: Mapping[int, float]) -> int:
    """Count the evaluations since the best, or else since the first."""
    order = sorted(losses)
    best = best_step(losses)
    return len(order) - 1 - order.index(best) if best is not None else max(len(order) - 1, 0)


def read_history(path: Path, held_out: Mapping[str, object]) -> dict[int, float]:
    """Read the values by images seen. ValueError for a damaged file.

    There are none if there is no file, or if it is about other held-out images.
    """
    if not path.is_file():
        return {}
    try:
        history = checksums.read_json(path)
        losses = {int(n): math.nan if loss is None else float(loss) for n, loss in history["losses"].items()}
        return losses if history["of"] == dict(held_out) else {}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} can't be read ({error}); remove it to wait anew") from error


def write_history(path: Path, held_out: Mapping[str, object], losses: Mapping[int, float]) -> None:
    """Write the losses, and which images were held out."""
    values = {str(images): losses[images] if math.isfinite(losses[images]) else None for images in sorted(losses)}
    checksums.write_json(path, {"of": dict(held_out), "losses": values})
