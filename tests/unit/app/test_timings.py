"""Seconds per picture: kept from session to session, whatever happened to the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mar.app import timings
from mar.app.timings import Timings


def test_timings_are_there_in_the_next_session(tmp_path: Path) -> None:
    first = Timings(tmp_path / "t.json")
    assert first.get("m", "fast") is None
    first.put("m", "fast", 0.25)
    first.put("m", "fast", 0.5)
    first.put("m", "exact", 2)
    again = Timings(tmp_path / "t.json")
    assert (again.get("m", "fast"), again.get("m", "exact"), again.get("n", "fast")) == (0.5, 2, None)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": "b"}', '{"a": -1}', "\x00\xff"])
def test_timings_of_a_damaged_file_are_measured_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content, encoding="latin-1")
    kept = Timings(tmp_path / "t.json")
    assert kept.get("a", "fast") is None
    kept.put("a", "fast", 1)
    assert Timings(tmp_path / "t.json").get("a", "fast") == 1


def test_timings_where_nothing_can_be_written_live_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = Timings(tmp_path / "file" / "t.json")
    kept.put("a", "fast", 1)
    assert kept.get("a", "fast") == 1


def test_timings_drop_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "MAX_ENTRIES", 2)
    kept = Timings(tmp_path / "t.json")
    for name in ("a", "b", "a", "c"):
        kept.put(name, "fast", 1)
    assert [kept.get(name, "fast") for name in ("a", "b", "c")] == [1, None, 1]
