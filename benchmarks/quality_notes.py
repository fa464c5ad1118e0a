"""What the benchmarks of quality keep in their folders: lines of what was measured, and of what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mar.checkpoint.files import write_text
from mar.config import SamplingConfig, rename_old_keys


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What was noted line by line; nothing where there is no file. A last line that was cut off counts as not written:
    older versions left one when they were killed. ValueError for any other that is not JSON."""
    texts = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(rename_old_keys(SamplingConfig, json.loads(text)))
        except json.JSONDecodeError as error:
            if text.endswith("\n"):
                raise ValueError(f"{path}, line {number} is not JSON ({error}); take it out") from error
    return lines


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Writes all lines, or leaves what was there."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def require_same(folder: Path, noted: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ValueError where `folder` was begun otherwise than is wanted now, by what was noted then: an older version noted
    less. The name of the data counts only where the pictures themselves were not noted: a folder may be moved."""
    free = {"data"} if "pictures" in noted else set()
    different = [name for name in wanted if name in noted and name not in free and noted[name] != wanted[name]]
    if different:
        told = "; ".join(f"{name} {noted[name]}, here {wanted[name]}" for name in different)
        raise ValueError(f"{folder} was begun otherwise ({told}); go on with it as it was, or choose another folder")
