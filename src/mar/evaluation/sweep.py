"""Sweeps over sampling settings: their points, a resumable table of reports, and its plot."""

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

from mar.checkpoint import checksums
from mar.checkpoint.files import write_atomically, write_text
from mar.config import ConfigError, SamplingConfig, to_dict
from mar.config.fields import later_defaults, log_new_names, renamed_fields
from mar.evaluation.evaluate import Report

ALIASES = {"cfg": "guidance_scale", "K": "steps"}
"""Short names of axes."""
RENAMED = {old: new for old, new in renamed_fields(SamplingConfig).items() if not new.endswith("]")}
"""Old names of fields, in commands and in tables."""
ENDS = {old: new[:-1].split("[") for old, new in renamed_fields(SamplingConfig).items() if new.endswith("]")}
"""Axes for one number of a field with two: name -> field and index."""
NEW_SETTINGS = ("reference_digest", "held_out_digest")
"""Settings that older tables lack: these go on as if they had the same."""
MAX_POINTS = 10_000
"""Points of a sweep; more are a typing error."""

Point = dict[str, Any]
"""Sampling settings by axis: a field of SamplingConfig, the preset, or one end of an interval."""


# ---- Points


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Parses `guidance_scale=1:5:0.5` (both ends included) or `steps=10,25,50` into name and values.

    Names are those of SamplingConfig, `cfg` for guidance_scale, `K` for steps, `guidance_from` and `guidance_until` for
    the ends of guidance_interval, and `preset`. Raises ConfigError for anything else.
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
        kind = kinds[name]
        parsed = _parse_range(values, kind) if ":" in values else [_parse_value(v, kind) for v in values.split(",")]
        return name, list(dict.fromkeys(parsed))
    except (ValueError, OverflowError):  # 1:inf:1
        raise ConfigError(f"sweep: got {values!r} in {text!r}, expected FIRST:LAST:STEP or values of {name}") from None


def _parse_range(text: str, kind: str) -> list[int | float]:
    first, last, step = (float(part) for part in text.split(":"))
    count = math.floor((last - first) / step + 1e-9) + 1 if step else 0
    if not 1 <= count <= MAX_POINTS:
        raise ValueError
    values = [round(first + i * step, 10) for i in range(count)]
    if all(value == int(value) for value in values):
        return [int(value) for value in values]
    if not kind.startswith("float"):
        raise ValueError
    return list(values)


def _parse_value(text: str, kind: str) -> Any:
    if text == "none" and "None" in kind:
        return None
    if kind.startswith("int"):
        return int(text)
    return float(text) if kind.startswith("float") else text


def points(axes: Sequence[str]) -> list[Point]:
    """Returns every combination of the axes' values, the last axis fastest."""
    parsed = [parse_axis(axis) for axis in axes]
    names = [name for name, _ in parsed]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"sweep: got {', '.join(twice)} twice; give all of its values at once")
    total = math.prod(len(values) for _, values in parsed)
    if total > MAX_POINTS:
        raise ConfigError(f"sweep: got {total:,} combinations, expected at most {MAX_POINTS:,}")
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(v for _, v in parsed))]


def fixed_settings(sampling: SamplingConfig, point: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sampling settings, by axis, that a sweep does not change."""
    values = to_dict(sampling)
    ends = {name: values[field][int(index)] for name, (field, index) in ENDS.items()}
    for field, _ in ENDS.values():
        values.pop(field, None)
    return {name: value for name, value in {**values, **ends}.items() if name not in point}


# ---- The table


@dataclass(frozen=True)
class Row:
    """A point and its report."""

    point: Point
    report: Mapping[str, Any]

    @property
    def distance(self) -> float:
        """Returns the Fréchet distance."""
        return float(self.report["distance"])

    @property
    def seconds_per_picture(self) -> float:
        """Returns the seconds for drawing and evaluating a picture."""
        return float(self.report["seconds"]) / int(self.report["count"])


class Table:
    """The rows of a sweep, in FOLDER/sweep.json and sweep.csv.

    Both are written anew after each row, atomically, and not before the first one. `settings` is everything that the
    reports depend on beside the point: ConfigError, before anything is written, if the folder has rows of others.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.rows: list[Row] = []
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file, expected a folder for the sweep; take another --out")
        path = folder / "sweep.json"
        if path.is_file():
            saved, self.rows = self._read(path)
            self._check_same(saved)

    @staticmethod
    def _read(path: Path) -> tuple[dict[str, Any], list[Row]]:
        try:
            saved = checksums.read_json(path)
            rows = [Row(_rename(dict(row["point"])), dict(row["report"])) for row in saved["rows"]]
            if all(math.isfinite(row.distance) and math.isfinite(row.seconds_per_picture) for row in rows):
                settings = _rename(dict(saved["settings"]))
                if isinstance(swept := settings.get("swept"), str):
                    settings["swept"] = ", ".join(sorted(_rename(dict.fromkeys(swept.split(", ")))))
                return settings, rows
            reason = "a row has no finite distance or time"
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path} is not the table of a sweep ({reason}); choose another folder")

    def _check_same(self, saved: Mapping[str, Any]) -> None:
        later = later_defaults(SamplingConfig).items()
        saved = {name: value for name, value in later if name in self.settings} | dict(saved)
        names = [name for name in dict.fromkeys([*saved, *self.settings]) if name in saved or name not in NEW_SETTINGS]
        different = [name for name in names if saved.get(name) != self.settings.get(name)]
        if different:
            pairs = {name: f"{saved.get(name)} -> {self.settings.get(name)}" for name in different}
            if "swept" in pairs:  # axes, which are no options
                pairs["swept"] = pairs["swept"].replace("_", " ")
            changes = "; ".join(f"{name} {pair}" for name, pair in pairs.items())
            raise ConfigError(f"{self.folder} holds another sweep ({changes}); choose another folder")

    def has(self, point: Point) -> bool:
        """Tells whether the table has a row of this point."""
        return any(row.point == point for row in self.rows)

    def add(self, point: Point, report: Report) -> None:
        """Adds a row, and writes the files."""
        self.rows.append(Row(point, report.to_dict()))
        self.write()

    def write(self) -> None:
        """Writes the files."""
        rows = [{"point": row.point, "report": row.report} for row in self.rows]
        content = {"settings": self.settings, "rows": rows}
        write_text(self.folder / "sweep.json", json.dumps(checksums.seal(content), indent=1, allow_nan=False) + "\n")
        write_text(self.folder / "sweep.csv", self.csv())

    def best(self) -> Row | None:
        """Returns the row with the smallest distance; None without rows."""
        return min(self.rows, key=lambda row: row.distance, default=None)

    def columns(self) -> list[str]:
        """Returns names of columns: swept fields, metrics of any row, seconds per picture."""
        swept = list(dict.fromkeys(name for row in self.rows for name in row.point))
        omitted = {"metric", "seconds", "warnings", "count", "reference_count", "pairs"}
        names = dict.fromkeys(
            name for row in self.rows for name, v in row.report.items() if v is not None and name not in omitted
        )
        return [*swept, *names, "seconds_per_picture"]

    def cells(self, row: Row) -> list[Any]:
        """Returns the row's values in the order of `columns`."""
        values = {**row.report, **row.point, "seconds_per_picture": round(row.seconds_per_picture, 4)}
        return [values.get(name) for name in self.columns()]

    def csv(self) -> str:
        """Formats the table as comma-separated values."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns())
        writer.writerows(self.cells(row) for row in self.rows)
        return text.getvalue()


def _rename(values: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the old names of fields in a table."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


# ---- The plot


def require_matplotlib() -> None:
    """Raises ValueError without matplotlib (the `eval` extra)."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('plots need matplotlib: pip install ".[eval]" in the clone of mar')


def plot(table: Table, path: Path) -> None:
    """Writes a PNG of the table's rows, the best marked.

    On the left is distance over a swept field, on the right distance over seconds per picture. Raises ValueError
    without rows or matplotlib.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best = table.best()
    if best is None:
        raise ValueError("there is nothing to plot: the sweep has no rows yet")
    x_name = _x_axis(table)
    is_numeric = all(isinstance(row.point[x_name], int | float) for row in table.rows)

    def x(row: Row) -> Any:
        return row.point[x_name] if is_numeric else str(row.point[x_name])

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    series = _series(table, x_name)
    for name, rows in series.items():
        ordered = sorted(rows, key=lambda row: _number(row.point[x_name]))
        distances = [row.distance for row in ordered]
        left.plot([x(row) for row in ordered], distances, marker="o", markersize=4, label=name)
        right.plot([row.seconds_per_picture for row in ordered], distances, "o", markersize=5)
    star = {"marker": "*", "markersize": 16, "color": "black", "zorder": 3}
    left.plot(x(best), best.distance, **star)
    right.plot(best.seconds_per_picture, best.distance, **star)
    left.set_xlabel(x_name.replace("_", " "))
    left.set_ylabel(str(best.report["metric"]))
    right.set_xlabel("seconds per picture")
    title = f"{best.report['count']:,} pictures a point; best (star): {point_text(best.point)}: {best.distance:.2f}"
    figure.suptitle(title, fontsize=10)
    if any(series):
        left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def point_text(point: Mapping[str, Any]) -> str:
    """Formats a point for people."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in point.items())


def _x_axis(table: Table) -> str:
    """Returns the field of the horizontal axis: guidance_scale if swept, else that with the most values."""
    names = list(table.rows[0].point)
    if "guidance_scale" in names:
        return "guidance_scale"
    return max(names, key=lambda name: len({str(row.point[name]) for row in table.rows}))


def _series(table: Table, x_name: str) -> dict[str, list[Row]]:
    """Groups the rows into a line for each combination of the other fields."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in table.rows:
        lines[point_text({name: value for name, value in row.point.items() if name != x_name})].append(row)
    return lines


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
