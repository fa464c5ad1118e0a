"""The training time of a trial of `quality.py`, over all its interruptions."""

from __future__ import annotations

import json
import time

from mar.checkpoint.files import write_text
from mar.training.trainer import Run

MINUTES = "minutes.json"


class Clock:
    """Minutes of training: processor time over threads, evaluations not counted."""

    def __init__(self, minutes: float, threads: int) -> None:
        self.minutes, self.threads = minutes, threads
        self.go()

    def go(self) -> None:
        """Start, or continue after `stop`."""
        self.started = time.process_time()

    def now(self) -> float:
        """Return the minutes so far."""
        return self.minutes + (time.process_time() - self.started) / self.threads / 60

    def stop(self) -> float:
        """Pause the clock; return the minutes so far."""
        self.minutes = self.now()
        return self.minutes


class TimedRun(Run):
    """A run that records its training minutes with every saved state."""

    clock: Clock | None = None

    def save(self) -> None:
        """Save the minutes, then the state; minutes without a state are never read."""
        if self.clock is not None:
            minutes = {**self._recorded(), str(self.progress.images): self.clock.now()}
            write_text(self.folder / MINUTES, json.dumps(minutes, indent=1))
        super().save()

    def saved_minutes(self) -> float | None:
        """Return the minutes of the resumed state; None if not recorded."""
        return self._recorded().get(str(self.progress.images))

    def _recorded(self) -> dict[str, float]:
        path = self.folder / MINUTES
        recorded: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return recorded
