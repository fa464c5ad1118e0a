"""Points of a sweep, the table that goes on where it stopped, and its picture."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mar.config import ConfigError
from mar.evaluation import sweep
from mar.evaluation.evaluate import Report
from mar.evaluation.sweep import MAX_POINTS, Point, Table, parse_axis, points

REPORT = Report("FD (tiny)", 1.0, 10, 20, inception_score=2.0, inception_score_std=math.nan, seconds=5.0)
SETTINGS = {"weights": "abc", "pictures": 10, "x0_bound": None}


def report(distance: float, seconds: float = 5.0) -> Report:
    return replace(REPORT, distance=distance, seconds=seconds)


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("cfg=1:5:0.5", "guidance_scale", [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]),
        ("guidance_scale=1:2:0.1", "guidance_scale", [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0]),
        ("guidance_scale=1:2:0.4", "guidance_scale", [1.0, 1.4, 1.8]),
        ("temperature=1:0.8:-0.1", "temperature", [1.0, 0.9, 0.8]),
        ("K=8:64:8", "steps", [8, 16, 24, 32, 40, 48, 56, 64]),
        ("steps=10,25,10", "steps", [10, 25]),
        ("diffusion-steps=100", "diffusion_steps", [100]),
        ("guidance_scale=3:3:1", "guidance_scale", [3]),
        ("x0_bound=none,3", "x0_bound", [None, 3.0]),
        ("guidance_schedule=linear,constant", "guidance_schedule", ["linear", "constant"]),
        ("solver=ancestral,dpm++2m", "solver", ["ancestral", "dpm++2m"]),
        ("diffusion-steps-end=none,5", "diffusion_steps_end", [None, 5]),
        ("diffusion_steps_end=5:25:10", "diffusion_steps_end", [5, 15, 25]),
        ("guidance_from=0,0.3", "guidance_from", [0.0, 0.3]),
        ("order=random,halton", "order", ["random", "halton"]),
        ("preset=exact,balanced,fast", "preset", ["exact", "balanced", "fast"]),
    ],
)
def test_sweep_axes_are_parsed(text: str, name: str, values: list[Any]) -> None:
    found = parse_axis(text)
    assert found == (name, values)
    assert [type(value) for value in found[1]] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cgf=1:5:1", "cfg"),
        ("guidance_scale", "NAME=FIRST:LAST:STEP"),
        ("guidance_scale=", "NAME=FIRST:LAST:STEP"),
        ("batch=1,2", "guidance_scale"),
        ("steps=1.5", "1.5"),
        ("K=1:2:0.5", "1:2:0.5"),
        ("diffusion_steps_end=1:2:0.5", "1:2:0.5"),
        ("steps=ten", "ten"),
        ("guidance_scale=1:5", "1:5"),
        ("guidance_scale=1:5:0", "1:5:0"),
        ("guidance_scale=5:1:1", "5:1:1"),
        ("guidance_scale=1:inf:1", "inf"),
        ("guidance_scale=nan:2:1", "nan"),
        ("guidance_scale=0:1e9:1", "1e9"),
        ("guidance_scale=1,,2", "1,,2"),
        ("steps=none", "none"),
        ("diffusion_steps_end=5.5", "5.5"),
    ],
)
def test_sweep_invalid_axes_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match="sweep") as refused:
        parse_axis(text)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_sweep_covers_every_combination_in_order() -> None:
    assert points(["cfg=1,2", "K=4,8"]) == [
        {"guidance_scale": 1.0, "steps": 4}, {"guidance_scale": 1.0, "steps": 8},
        {"guidance_scale": 2.0, "steps": 4}, {"guidance_scale": 2.0, "steps": 8},
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="guidance_scale twice"):
        points(["cfg=1,2", "guidance_scale=3"])
    with pytest.raises(ConfigError, match=f"{MAX_POINTS:,}"):
        points(["cfg=1:101:1", "temperature=1:101:1"])


def fill(folder: Path, rows: list[tuple[Point, float]]) -> Table:
    table = Table(folder, SETTINGS)
    for point, distance in rows:
        table.add(point, report(distance))
    return table


ROWS: list[tuple[Point, float]] = [
    ({"guidance_scale": 1.0, "steps": 4}, 3.0), ({"guidance_scale": 1.0, "steps": 8}, 1.5),
    ({"guidance_scale": 2.0, "steps": 4}, 2.5),
]  # fmt: skip


def test_sweep_resumed_writes_the_same_files(tmp_path: Path) -> None:
    fill(tmp_path / "whole", ROWS)
    fill(tmp_path / "parts", ROWS[:1])
    again = Table(tmp_path / "parts", dict(reversed(SETTINGS.items())))
    assert [again.has(point) for point, _ in ROWS] == [True, False, False]
    assert again.has({"guidance_scale": 1, "steps": 4})  # an int for a float
    again = fill(tmp_path / "parts", ROWS[1:])
    best = again.best()
    assert best is not None
    assert best.point == {"guidance_scale": 1.0, "steps": 8}
    for name in ("sweep.json", "sweep.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_sweep_files_hold_the_measurements(tmp_path: Path) -> None:
    fill(tmp_path, ROWS)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert list(rows[0]) == ["guidance_scale", "steps", "distance", "inception_score", "seconds_per_picture"]
    assert [float(row["distance"]) for row in rows] == [3.0, 1.5, 2.5]
    assert rows[2]["steps"] == "4"
    assert rows[2]["seconds_per_picture"] == "0.5"
    held = json.loads((tmp_path / "sweep.json").read_text())
    assert held["settings"] == SETTINGS
    assert held["rows"][1]["report"]["inception_score_std"] is None


def test_sweep_writes_nothing_before_the_first_row(tmp_path: Path) -> None:
    assert Table(tmp_path / "new", SETTINGS).best() is None
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**SETTINGS, "weights": "xyz"}, "weights abc -> xyz"),
        ({**SETTINGS, "more": 1}, "more None -> 1"),
        ({"weights": "abc", "x0_bound": None}, "pictures 10 -> None"),
    ],
)
def test_sweep_into_another_sweeps_folder_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    fill(tmp_path, ROWS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="holds another sweep") as refused:
        Table(tmp_path, settings)
    assert words in str(refused.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_sweep_without_reference_digest_continues(tmp_path: Path) -> None:
    fill(tmp_path, ROWS[:1])
    table = Table(tmp_path, {**SETTINGS, "reference_digest": "ab"})
    table.add(ROWS[1][0], report(1.5))
    with pytest.raises(ConfigError, match="reference_digest ab -> cd"):
        Table(tmp_path, {**SETTINGS, "reference_digest": "cd"})


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"rows": []}', '{"settings": 3, "rows": []}', '{"settings": {}, "rows": [{"point": {}}]}',
        '{"settings": {}, "rows": [{"point": {}, "report": {"distance": null, "seconds": 1, "count": 2}}]}',
        '{"settings": {}, "rows": [{"point": {}, "report": {"distance": NaN, "seconds": 1, "count": 2}}]}',
    ],
)  # fmt: skip
def test_sweep_damaged_table_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError, match=r"sweep\.json is not the table of a sweep .*; choose another folder"):
        Table(tmp_path, {})
    assert (tmp_path / "sweep.json").read_text() == text


def test_sweep_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match="expected a folder"):
        Table(tmp_path / "report.json", SETTINGS)


# ---- the picture


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [({"steps": 8}, 1.0)],
        [({"x0_bound": None}, 1.0), ({"x0_bound": 3.0}, 2.0)],
        [({"guidance_schedule": "linear", "steps": 4}, 1.0), ({"guidance_schedule": "constant", "steps": 4}, 2.0)],
    ],
    ids=["two fields", "one point", "with none", "words"],
)
def test_sweep_plot_of_any_fields_is_written(rows: list[tuple[Point, float]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep.plot(fill(tmp_path, rows), tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.width > 800
        image.load()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.csv", "sweep.json", "sweep.png"]


def test_sweep_plot_has_lines_and_axes(tmp_path: Path) -> None:
    table = fill(tmp_path, ROWS)
    assert sweep._x_axis(table) == "guidance_scale"
    assert {name: len(rows) for name, rows in sweep._series(table, "guidance_scale").items()} == {
        "steps 4": 2,
        "steps 8": 1,
    }
    assert (
        sweep._x_axis(fill(tmp_path / "b", [({"steps": 1, "temperature": t}, t) for t in (1.0, 2.0)])) == "temperature"
    )


def test_sweep_plot_without_rows_is_empty(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no rows"):
        sweep.plot(Table(tmp_path, SETTINGS), tmp_path / "a.png")


def test_sweep_without_matplotlib_writes_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = fill(tmp_path, ROWS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\.\[eval\]"):
        sweep.plot(table, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
