"""A sweep as a picture: distance against what was swept, and against seconds per picture."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

from mar.checkpoint.files import write_atomically
from mar.evaluation.sweep import Row, Table

MISSING = 'plots need matplotlib: pip install ".[eval]" in the clone of mar'


def require_matplotlib() -> None:
    """ValueError, in one line, without matplotlib (the `eval` extra)."""
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
    """The field on the horizontal axis: guidance where it was swept, else that with the most values."""
    names = list(table.rows[0].point)
    if "guidance" in names:
        return "guidance"
    return max(names, key=lambda name: len({str(row.point[name]) for row in table.rows}))


def _series(table: Table, across: str) -> dict[str, list[Row]]:
    """A line for each combination of the other fields."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in table.rows:
        others = (f"{name.replace('_', ' ')} {value}" for name, value in row.point.items() if name != across)
        lines[", ".join(others)].append(row)
    return lines


def _worded(table: Table, name: str) -> bool:
    """Whether a field's values are no numbers."""
    return any(not isinstance(row.point[name], int | float) for row in table.rows)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
