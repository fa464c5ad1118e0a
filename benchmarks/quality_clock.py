"""How long a trial of `quality.py` has learned, over all its stops."""

from __future__ import annotations

import json
import time

from mar.checkpoint.files import write_text
from mar.training.trainer import Run

MINUTES = "minutes.json"


class Clock:
    """Minutes of learning: processor time over threads."""

    def __init__(self, minutes: float, threads: int) -> None:
        self.minutes, self.threads = minutes, threads
        self.go()

    def go(self) -> None:
        """Goes on after a stop."""
        self.begun = time.process_time()

    def now(self) -> float:
        """Minutes until now, going on."""
        return self.minutes + (time.process_time() - self.begun) / self.threads / 60

    def stop(self) -> float:
        """Minutes until now; what follows is not counted."""
        self.minutes = self.now()
        return self.minutes


class TimedRun(Run):
    """A run that keeps in its folder, for each state it saves, the minutes that a clock shows then."""

    clock: Clock | None = None

    def save(self) -> None:
        """The minutes first: those of a state that was not saved in the end are never asked for."""
        if self.clock is not None:
            kept = {**self._kept(), str(self.progress.images): self.clock.now()}
            write_text(self.folder / MINUTES, json.dumps(kept, indent=1))
        super().save()

    def saved_minutes(self) -> float | None:
        """Those of the state that it has gone on from; None where none were kept."""
        return self._kept().get(str(self.progress.images))

    def _kept(self) -> dict[str, float]:
        path = self.folder / MINUTES
        kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return kept
