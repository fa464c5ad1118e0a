"""Seconds that a picture takes on this machine, measured once and kept."""

from __future__ import annotations

import json
import platform
import threading
from pathlib import Path

from mar.checkpoint.download import home
from mar.checkpoint.files import check_regular, write_text

MAX_ENTRIES = 500
"""Entries that the file keeps; the oldest are dropped."""


class Timings:
    """Seconds per picture, by model and preset, in a JSON file.

    A file that is damaged, or can't be written, is as good as none: the numbers are measured again.

    Args:
        path: of the file (None: in the download folder).
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or home() / "app-timings.json"
        self._lock = threading.Lock()
        self._seconds = self._read()

    def get(self, model: str, preset: str) -> float | None:
        """Return the seconds per picture; None: not measured yet."""
        return self._seconds.get(self._key(model, preset))

    def put(self, model: str, preset: str, seconds: float) -> None:
        """Keep a measurement, in place of an earlier one."""
        with self._lock:
            key = self._key(model, preset)
            self._seconds.pop(key, None)
            self._seconds[key] = round(seconds, 4)
            for oldest in list(self._seconds)[:-MAX_ENTRIES]:
                del self._seconds[oldest]
            try:
                write_text(self.path, json.dumps(self._seconds, indent=1))
            except (OSError, ValueError):
                return

    def _read(self) -> dict[str, float]:
        try:
            check_regular(self.path)
            content = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict):
            return {}
        return {key: float(value) for key, value in content.items() if isinstance(value, int | float) and value > 0}

    def _key(self, model: str, preset: str) -> str:
        return f"{platform.node()} {model} {preset}"
