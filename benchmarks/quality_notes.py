"""Files of the quality benchmarks: result lines, and a check of the settings of a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mar.checkpoint.files import write_text
from mar.config import SamplingConfig, rename_old_keys


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; none without a file. Raises ValueError for a line that is not JSON.

    An incomplete last line is ignored: older versions left one when they were killed.
    """
    texts = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(rename_old_keys(SamplingConfig, json.loads(text)))
        except json.JSONDecodeError as error:
            if text.endswith("\n"):
                raise ValueError(f"{path}, line {number} is not JSON ({error}); remove it") from error
    return lines


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write all lines, or leave the old file as it was."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def require_same(folder: Path, recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise ValueError if `folder` was begun with settings other than the current ones.

    Settings that an older version did not record are not compared. Neither is the name of the data if a fingerprint of
    the images is recorded: the data may be moved.
    """
    ignored = {"data"} if "pictures" in recorded else set()
    different = [
        name for name in current if name in recorded and name not in ignored and recorded[name] != current[name]
    ]
    if different:
        differences = "; ".join(f"{name} {recorded[name]}, here {current[name]}" for name in different)
        raise ValueError(f"{folder} was begun with other settings ({differences}); use these, or another folder")
