"""Thin out curves, and draw them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_POINTS = 400
"""A curve is drawn by fewer points."""
MARKED_POINTS = 40
"""Curves of at most so many points have them marked."""
WIDTH, HEIGHT = 470, 210
"""Size of a chart, in CSS pixels where there is room."""
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 36
"""Margins around its plot."""
WARM_UP = 0.05
"""Values of so large a first part of a curve may lie above the plot."""

Point = tuple[float, float]


class Curve:
    """Points (x, y) in order. Where they are too many, each stands for the mean of several."""

    def __init__(self, most: int = MAX_POINTS) -> None:
        self.most, self.group_size = most, 1
        self.latest: float | None = None
        """The y of the last point."""
        self._means: list[Point] = []
        self._group: list[Point] = []

    def add(self, x: float, y: float) -> None:
        """Add a point."""
        self.latest = y
        self._group.append((x, y))
        if len(self._group) == self.group_size:
            self._means.append(_mean(self._group))
            self._group = []
        if len(self._means) == self.most:
            self._means = [_mean(self._means[i : i + 2]) for i in range(0, self.most, 2)]
            self.group_size *= 2

    @property
    def points(self) -> tuple[Point, ...]:
        """The points to draw."""
        return (*self._means, *([_mean(self._group)] if self._group else []))


def _mean(points: Sequence[Point]) -> Point:
    return math.fsum(x for x, _ in points) / len(points), math.fsum(y for _, y in points) / len(points)


@dataclass(frozen=True)
class Series:
    """A curve of a chart."""

    label: str
    points: tuple[Point, ...]
    latest: float | None
    """The value shown beside the label."""


@dataclass(frozen=True)
class Chart:
    """Curves over the images seen."""

    title: str
    unit: str
    """Written behind the latest values."""
    series: tuple[Series, ...]
    log: bool = False
    """The y axis is logarithmic, where all values are positive."""


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` to pixels from 0 to `length`."""

    low: float
    high: float
    length: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value)  # fmt: skip
        return self.length * (value - low) / (high - low)

    @property
    def ticks(self) -> list[float]:
        """Round values on the axis, about four."""
        if self.log and self.high > 5 * self.low:
            return self._decades()
        step = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(step))
        step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= 0.999 * step)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _decades(self) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        mantissas = (1, 2, 5) if self.high < 100 * self.low else (1,)
        ticks = [m * 10.0**power for power in powers[:: math.ceil(len(powers) / 6)] for m in mantissas]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def y_axis(series: Sequence[Series], log: bool) -> Axis:
    """Choose the range of values: all of them, but for the first fall of a loss."""
    last = max(x for one in series for x, _ in one.points)
    settled = [y for one in series for x, y in one.points if not log or x >= WARM_UP * last]
    low, high = min(settled), max(settled)
    log = log and all(y > 0 for one in series for _, y in one.points)
    if low == high:
        low, high = (low / 1.1, high * 1.1) if log else (low - 0.5, high + 0.5)
    if log:
        margin = (high / low) ** 0.06
        return Axis(low / margin, high * margin, HEIGHT - TOP - BOTTOM, log=True)
    margin = 0.06 * (high - low)
    return Axis(low - margin, high + margin, HEIGHT - TOP - BOTTOM)


def short(number: float) -> str:
    """Format a count for an axis: `400`, `20k`, `1.5M`."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def draw_chart(chart: Chart) -> str:
    """Draw a chart as a card of HTML."""
    y = y_axis(chart.series, chart.log)
    x = Axis(0, max(1, *(x for one in chart.series for x, _ in one.points)), WIDTH - LEFT - RIGHT)
    bottom = HEIGHT - BOTTOM
    marks = []
    for tick in y.ticks:
        at = bottom - y(tick)
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks:
        marks.append(f'<text x="{LEFT + x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{short(tick)}</text>')
    lines = "".join(_line(number, one.points, x, y) for number, one in enumerate(chart.series))
    keys = "".join(
        f'<span class="key series{number}">{one.label} <b>{one.latest:.4g}{chart.unit}</b></span>'
        for number, one in enumerate(chart.series)
    )
    return f"""<section class="card chart">
<h2>{chart.title}</h2>
<p class="hint">{keys}</p>
<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{chart.title}">
{"".join(marks)}<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">images seen</text>
<svg y="{TOP}" width="{WIDTH}" height="{y.length + 4}">{lines}</svg>
</svg>
</section>
"""


def _line(number: int, points: Sequence[Point], x: Axis, y: Axis) -> str:
    places = [f"{LEFT + x(at):.1f},{y.length - y(value):.1f}" for at, value in points]
    line = f'<polyline class="series{number}" points="{" ".join(places)}"/>'
    if len(places) > MARKED_POINTS:
        return line
    dots = (place.split(",") for place in places)
    return line + "".join(f'<circle class="series{number}" cx="{cx}" cy="{cy}" r="2.5"/>' for cx, cy in dots)
