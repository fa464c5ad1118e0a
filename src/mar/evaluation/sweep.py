"""Ways of drawing compared: the points of a sweep, and a table that goes on where it stopped.

A sweep as a picture: distance against what was swept, and against seconds per picture.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mar.checkpoint.files import write_atomically, write_text
from mar.config import ConfigError, SamplingConfig, to_dict
from mar.config.fields import log_new_names, renamed_fields
from mar.evaluation.evaluate import Report

ALIASES = {"cfg": "guidance_scale", "K": "steps"}
RENAMED = {old: new for old, new in renamed_fields(SamplingConfig).items() if not new.endswith("]")}
"""Old names of fields, in commands and in tables."""
ENDS = {old: new[:-1].split("[") for old, new in renamed_fields(SamplingConfig).items() if new.endswith("]")}
"""Axes that are one number of a field with two: name -> field and index."""
SINCE = ("reference_digest", "held_out_digest")
"""Settings that older tables do not have; their sweeps are gone on with as if they had the same."""
MOST = 10_000
"""Points of a sweep; more are a slip of the keyboard."""

Point = dict[str, Any]
"""Fields of SamplingConfig, or the preset, and their values."""


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Parse `guidance_scale=1:5:0.5` (both ends included) or `steps=10,25,50` into a name and values.

    Names are those of SamplingConfig, `cfg` for guidance_scale, `K` for steps, `guidance_from` and `guidance_until` for
    the ends of guidance_interval, and `preset`. ConfigError for what can't be read.
    """
    name, equals, values = text.partition("=")
    name = ALIASES.get(name, name).replace("-", "_")
    log_new_names(SamplingConfig, {name} & {*RENAMED})
    name = RENAMED.get(name, name)
    kinds = {f.name: str(f.type) for f in fields(SamplingConfig) if not str(f.type).startswith("tuple")}
    kinds |= {**dict.fromkeys(ENDS, "float"), "preset": "Preset"}
    if not equals or name not in kinds or not values:
        known = ", ".join(sorted({*kinds, *ALIASES}))
        raise ConfigError(f"sweep: got {text!r}, expected NAME=FIRST:LAST:STEP or NAME=A,B,C with a name of {known}")
    try:
        parsed = _range(values, kinds[name]) if ":" in values else [_value(v, kinds[name]) for v in values.split(",")]
        return name, list(dict.fromkeys(parsed))
    except (ValueError, OverflowError):  # 1:inf:1
        raise ConfigError(f"sweep: {values!r} of {text!r} is neither FIRST:LAST:STEP nor values for {name}") from None


def _range(text: str, kind: str) -> list[int | float]:
    first, last, step = (float(part) for part in text.split(":"))
    count = math.floor((last - first) / step + 1e-9) + 1 if step else 0
    if not 1 <= count <= MOST:
        raise ValueError
    values = [round(first + i * step, 10) for i in range(count)]
    if all(value == int(value) for value in values):
        return [int(value) for value in values]
    if not kind.startswith("float"):
        raise ValueError
    return list(values)


def _value(text: str, kind: str) -> Any:
    if text == "none" and "None" in kind:
        return None
    if kind.startswith("int"):
        return int(text)
    return float(text) if kind.startswith("float") else text


def points(axes: Sequence[str]) -> list[Point]:
    """Combine the values of all axes, the last axis fastest."""
    parsed = [parse_axis(axis) for axis in axes]
    names = [name for name, _ in parsed]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"sweep: got {', '.join(twice)} twice; give all of its values at once")
    total = math.prod(len(values) for _, values in parsed)
    if total > MOST:
        raise ConfigError(f"sweep: {total:,} combinations, expected at most {MOST:,}")
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(v for _, v in parsed))]


def fixed_settings(sampling: SamplingConfig, point: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sampling settings outside of `point`, by axis."""
    values = to_dict(sampling)
    ends = {name: values[field][int(index)] for name, (field, index) in ENDS.items()}
    for field, _ in ENDS.values():
        values.pop(field, None)
    return {name: value for name, value in {**values, **ends}.items() if name not in point}


@dataclass(frozen=True)
class Row:
    """A point that was measured."""

    point: Point
    report: Mapping[str, Any]

    @property
    def distance(self) -> float:
        return float(self.report["distance"])

    @property
    def seconds_per_picture(self) -> float:
        """Seconds of sampling and evaluating together."""
        return float(self.report["seconds"]) / int(self.report["count"])


class Table:
    """The rows of a sweep, in FOLDER/sweep.json; written anew, whole, after each, with sweep.csv beside it.

    `settings` is all that the numbers depend on beside the point: ConfigError where the folder has rows of others,
    and nothing is written then. Nor is anything written before the first row.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.rows: list[Row] = []
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file, but a sweep needs a folder")
        path = folder / "sweep.json"
        if path.is_file():
            theirs, self.rows = self._read(path)
            self._require_same(theirs)

    @staticmethod
    def _read(path: Path) -> tuple[dict[str, Any], list[Row]]:
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row(_renamed(dict(row["point"])), dict(row["report"])) for row in held["rows"]]
            if all(math.isfinite(row.distance) and math.isfinite(row.seconds_per_picture) for row in rows):
                settings = _renamed(dict(held["settings"]))
                if isinstance(swept := settings.get("swept"), str):
                    settings["swept"] = ", ".join(sorted(_renamed(dict.fromkeys(swept.split(", ")))))
                return settings, rows
            why = "a row is no measurement"
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path} is not the table of a sweep ({why}); choose another folder")

    def _require_same(self, theirs: Mapping[str, Any]) -> None:
        names = [name for name in dict.fromkeys([*theirs, *self.settings]) if name in theirs or name not in SINCE]
        different = [name for name in names if theirs.get(name) != self.settings.get(name)]
        if different:
            changes = "; ".join(f"{name} {theirs.get(name)} -> {self.settings.get(name)}" for name in different)
            raise ConfigError(f"{self.folder} holds another sweep ({changes}); choose another folder")

    def has(self, point: Point) -> bool:
        """Return whether this point was measured."""
        return any(row.point == point for row in self.rows)

    def add(self, point: Point, report: Report) -> None:
        """Adds a row, and writes the files."""
        self.rows.append(Row(point, report.to_dict()))
        self.write()

    def write(self) -> None:
        """Writes the files."""
        rows = [{"point": row.point, "report": row.report} for row in self.rows]
        held = {"settings": self.settings, "rows": rows}
        write_text(self.folder / "sweep.json", json.dumps(held, indent=1, allow_nan=False) + "\n")
        write_text(self.folder / "sweep.csv", self.csv())

    def best(self) -> Row | None:
        """Return the row with the smallest distance; None without rows."""
        return min(self.rows, key=lambda row: row.distance, default=None)

    def columns(self) -> list[str]:
        """List swept fields, then the metrics of any row, then seconds a picture."""
        swept = list(dict.fromkeys(name for row in self.rows for name in row.point))
        left_out = {"metric", "seconds", "warnings", "count", "reference_count", "pairs"}
        names = dict.fromkeys(
            name for row in self.rows for name, v in row.report.items() if v is not None and name not in left_out
        )
        return [*swept, *names, "seconds_per_picture"]

    def cells(self, row: Row) -> list[Any]:
        """Return the row's values in the order of `columns`."""
        values = {**row.report, **row.point, "seconds_per_picture": round(row.seconds_per_picture, 4)}
        return [values.get(name) for name in self.columns()]

    def csv(self) -> str:
        """Format the table as comma-separated values."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns())
        writer.writerows(self.cells(row) for row in self.rows)
        return text.getvalue()


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values of a table under the new names of fields."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


MISSING = 'plots need matplotlib: pip install ".[eval]" in the clone of mar'


def require_matplotlib() -> None:
    """Raise ValueError, in one line, without matplotlib (the `eval` extra)."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(MISSING)


def plot(table: Table, path: Path) -> None:
    """Writes a PNG of the table's rows, the best marked. ValueError without rows, or without matplotlib."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best = table.best()
    if best is None:
        raise ValueError("there is nothing to plot: the sweep has no rows yet")
    across = _across(table)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for name, rows in _series(table, across).items():
        ordered = sorted(rows, key=lambda row: _number(row.point[across]))
        left.plot([str(r.point[across]) if _worded(table, across) else r.point[across] for r in ordered],
                  [r.distance for r in ordered], marker="o", markersize=4, label=name)  # fmt: skip
        right.plot([r.seconds_per_picture for r in ordered], [r.distance for r in ordered], "o", markersize=5)
    there = best.point[across]
    left.plot(
        str(there) if _worded(table, across) else there, best.distance, "*", markersize=16, color="black", zorder=3
    )
    right.plot(best.seconds_per_picture, best.distance, "*", markersize=16, color="black", zorder=3)
    left.set_xlabel(across.replace("_", " "))
    left.set_ylabel(str(best.report["metric"]))
    right.set_xlabel("seconds per picture")
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in best.point.items())
    figure.suptitle(f"{best.report['count']:,} pictures a point; best (star): {said}: {best.distance:.2f}", fontsize=10)
    if any(name for name in _series(table, across)):
        left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _across(table: Table) -> str:
    """The field on the horizontal axis: guidance_scale where it was swept, else that with the most values."""
    names = list(table.rows[0].point)
    if "guidance_scale" in names:
        return "guidance_scale"
    return max(names, key=lambda name: len({str(row.point[name]) for row in table.rows}))


def _series(table: Table, across: str) -> dict[str, list[Row]]:
    """A line for each combination of the other fields."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in table.rows:
        others = (f"{name.replace('_', ' ')} {value}" for name, value in row.point.items() if name != across)
        lines[", ".join(others)].append(row)
    return lines


def _worded(table: Table, name: str) -> bool:
    """Return whether a field's values are no numbers."""
    return any(not isinstance(row.point[name], int | float) for row in table.rows)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
