"""The API reference's extension: one entry for each argument."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def test_split_shared_entries_repeats_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    split = importlib.import_module("griffe_args").split_shared_entries
    assert split("Add.\n\nArgs:\n    a, *b: numbers\n        to add.\n    c: one, d: none.\n") == (
        "Add.\n\nArgs:\n    a: numbers\n        to add.\n    *b: numbers\n        to add.\n    c: one, d: none.\n"
    )
