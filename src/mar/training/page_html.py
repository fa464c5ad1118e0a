"""Make the HTML of a run's page from records of its stages."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from mar.autoconfig.timing import duration
from mar.terminal import printable_html
from mar.training.curves import Chart, Curve, Series, draw_chart

RELOAD_INTERVAL_S = 10
"""A browser loads the page again so often while the run is alive."""
SHEET_WIDTH, SHEET_HEIGHT, THUMBNAIL_HEIGHT = 990, 520, 66
"""Largest sizes of the newest sheet and of earlier ones, in CSS pixels."""

StageKind = Literal["tokenizer", "latents", "model"]
"""A step on the way to a model."""
StageState = Literal["waiting", "opening", "running", "stopped", "finished"]
_DOING = {"tokenizer": "training", "latents": "caching", "model": "training"}


# ---- records


@dataclass(frozen=True)
class Sheet:
    """A PNG with samples or reconstructions."""

    path: str
    """Relative to the page's folder."""
    images: int
    """Images seen when it was made."""
    width: int
    height: int


@dataclass(frozen=True)
class Stage:
    """A step as the page shows it."""

    kind: StageKind
    folder: Path
    """With its `log.jsonl` and `samples/`."""
    total: int = 0
    """Its length in images; 0: not known yet."""
    state: StageState = "waiting"
    images: int = 0
    images_per_second: float | None = None
    seconds_left: float | None = None
    seconds_expected: float | None = None
    """Time for all of it, if known before it begins."""
    classes: tuple[str, ...] = ()
    """Names of the columns of a sample sheet."""
    sample_every: int = 0
    """Images between sheets; 0: there are none."""
    sheets: tuple[Sheet, ...] = ()
    """The newest last, after some earlier ones."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Numbers of the log by name, over the images seen."""

    def last(self, name: str) -> float | None:
        """Return the latest value of a curve."""
        return self.curves[name].latest if name in self.curves else None


@dataclass(frozen=True)
class Command:
    """A command for people to type."""

    purpose: str
    words: tuple[str, ...]


def draw_commands(folder: Path) -> tuple[Command, ...]:
    """Return the commands that draw from a run's model."""
    return Command("Draw pictures", ("mar", "sample", str(folder))), Command(
        "Open the studio", ("mar", "app", str(folder))
    )


def render(root: Path, stages: Sequence[Stage], commands: Sequence[Command], now: datetime) -> str:
    """Make the page's HTML.

    Args:
        root: folder of the page; its name is the run's.
        stages: in order. The first that is not finished is the current one.
        commands: uses of the result.
        now: time of writing.
    """
    name = printable_html(root.resolve().name)
    current = next((stage for stage in stages if stage.state != "finished"), stages[-1])
    alive = current.state not in ("finished", "stopped")
    reload = f'<meta http-equiv="refresh" content="{RELOAD_INTERVAL_S}">\n' if alive else ""
    tab = f"{_percent(current):.0f}% {current.kind}" if alive else current.state
    hint = "Renewed while the run is alive. Where its time stands still, the run was killed: the same command goes on."
    sheets = [_sheets(stage, strip=stage.state != "finished" or stage is stages[-1]) for stage in reversed(stages)]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{reload}<title>{tab} · {name}</title>
<style>
{_css()}</style>
</head>
<body>
<main>
<header><h1>{name}</h1><time>as of {now:%H:%M:%S}</time></header>
<section class="card stages {current.state}">
<p class="status">{status(stages, now)}</p>
{"".join(map(_bar, stages))}</section>
{"".join(sheets)}<div class="columns">
{"".join(map(draw_chart, charts(stages)))}{_commands(stages[-1], commands)}</div>
{f"<footer>{hint}</footer>" if alive else ""}
</main>
</body>
</html>
"""


@functools.cache
def _css() -> str:
    return resources.files("mar.training").joinpath("page.css").read_text(encoding="utf-8")


def _percent(stage: Stage) -> float:
    if stage.state == "finished":
        return 100.0
    return min(100.0 * stage.images / stage.total, 100.0) if stage.total else 0.0


def status(stages: Sequence[Stage], now: datetime) -> str:
    """Return HTML that tells how long it takes, and what happens."""
    unfinished = [stage for stage in stages if stage.state != "finished"]
    if not unfinished:
        return f"<b>Finished</b> {stages[-1].images:,} images seen"
    stage, *later = unfinished
    if stage.state == "stopped":
        return f"<b>Stopped</b> at {now:%H:%M}; the same command goes on"
    then = f"; then the {' and the '.join(other.kind for other in later)}" if later else ""
    doing = f"{_DOING[stage.kind]} the {stage.kind}"
    if stage.state != "running":
        return f"<b>Getting ready</b> for {doing}{then}"
    if stage.seconds_left is None:
        return f"<b>Begun</b> {doing}; its speed is measured{then}"
    seconds, own = stage.seconds_left, ""
    if later and later[-1].seconds_expected is None:
        own = f"{stage.kind.capitalize()}: "
    elif later:
        then = f"; now the {stage.kind}, {then.removeprefix('; ')}"
    seconds += sum(other.seconds_expected or 0.0 for other in later)
    until = clock(now + timedelta(seconds=seconds), now)
    return f"<b>{own}{duration(seconds)} left</b> until about {until}{then}"


def clock(when: datetime, now: datetime) -> str:
    """Format a time of the clock, and the day unless today."""
    days = (when.date() - now.date()).days
    if days == 0:
        return f"{when:%H:%M}"
    return f"tomorrow {when:%H:%M}" if days == 1 else f"{when:%a %d %b %H:%M}"


def _bar(stage: Stage) -> str:
    about = {"waiting": "waiting", "opening": "getting ready", "finished": "finished"}.get(stage.state, "")
    if stage.state in ("running", "stopped"):
        about = f"{stage.images:,} of {stage.total:,} images"
        if stage.images_per_second is not None:
            about += f", {stage.images_per_second:.3g} a second"
    return (
        f'<div class="stage {stage.state}"><span>{stage.kind.capitalize()}</span>'
        f'<progress max="100" value="{_percent(stage):.1f}"></progress><small>{about}</small></div>\n'
    )


def _sheets(stage: Stage, strip: bool) -> str:
    """Make the card of a stage's newest sheet, with a strip of earlier ones."""
    title, about, classes = "Samples", "", stage.classes
    if stage.kind == "tokenizer":
        title, about, classes = "Reconstructions", "held-out pictures above, brought back below", ()
        if (psnr := stage.last("psnr")) is not None:
            about += f", {psnr:.1f} dB"
    if not stage.sheets:
        due = _next_sheet(stage)
        if due is None:
            return ""
        return f'<section class="card"><h2>{title} <small>the first come at {due:,} images</small></h2></section>\n'
    *earlier, newest = stage.sheets
    box = min(SHEET_WIDTH, SHEET_HEIGHT * newest.width / newest.height)
    scale = box / newest.width
    is_small = scale >= 2  # pixels stay squares of one size
    width = math.floor(scale) * newest.width if is_small else box
    height = THUMBNAIL_HEIGHT if width > SHEET_WIDTH / 2 else 2 * THUMBNAIL_HEIGHT  # below the sheet, or beside it
    labels = "".join(f'<span title="{printable_html(name)}">{printable_html(name)}</span>' for name in classes)
    small = "".join(_thumbnail(sheet, title, height) for sheet in earlier) if strip else ""
    return f"""<section class="card">
<h2>{title} <small>after {newest.images:,} images{"; " if about else ""}{about}</small></h2>
<div class="sheets"><div style="width:{width:.0f}px">
<div class="labels" style="grid-template-columns:repeat({max(len(classes), 1)},minmax(0,1fr))">{labels}</div>
<a href="{_url(newest)}"><img class="{"pixels" if is_small else ""}" src="{_url(newest)}" \
width="{newest.width}" height="{newest.height}" alt="{title}"></a></div>
<div class="strip">{small}</div></div>
</section>
"""


def _next_sheet(stage: Stage) -> int | None:
    """Return when the next sheet is due; None: there is none."""
    if not stage.sample_every or stage.state != "running":
        return None
    due = (stage.images // stage.sample_every + 1) * stage.sample_every
    if due > stage.total:
        return stage.total if stage.kind == "tokenizer" else None
    return due


def _thumbnail(sheet: Sheet, title: str, height: int) -> str:
    width = height * sheet.width / sheet.height
    return (
        f'<a href="{_url(sheet)}" style="flex-basis:{width:.0f}px"><img src="{_url(sheet)}" width="{sheet.width}" '
        f'height="{sheet.height}" alt="{title} after {sheet.images:,} images"><small>{sheet.images:,}</small></a>\n'
    )


def _url(sheet: Sheet) -> str:
    return printable_html(quote(sheet.path))


def charts(stages: Sequence[Stage]) -> list[Chart]:
    """Choose the curves to show: those of the model, and the tokenizer's PSNR."""
    shown = []
    model_learns = any(stage.kind == "model" and "loss" in stage.curves for stage in stages)
    for stage in reversed(stages):
        own = " of the tokenizer" if stage.kind == "tokenizer" and len(stages) > 1 else ""
        if stage.kind == "model" or not model_learns:
            shown.append(Chart(f"Loss{own}", "", _series(stage, loss="training", val_loss="held-out"), log=True))
        shown.append(Chart(f"PSNR{own}", " dB", _series(stage, psnr="held-out")))
        distances = _series(stage, ema_distance="EMA", raw_distance="raw")
        shown.append(Chart("Fréchet distance", "", distances, log=True))
    return [chart for chart in shown if chart.series]


def _series(stage: Stage, **names: str) -> tuple[Series, ...]:
    drawn = ((label, stage.curves[name]) for name, label in names.items() if name in stage.curves)
    return tuple(Series(label, curve.points, curve.latest) for label, curve in drawn)


def _commands(stage: Stage, commands: Sequence[Command]) -> str:
    if not commands:
        return ""
    hint = "" if stage.state == "finished" else "This works once the run is finished."
    due = _next_sheet(stage)
    if hint and stage.kind == "model" and (stage.sheets or due):
        hint = "model.safetensors is written with each sample sheet, so this works while it trains"
        hint += "." if stage.sheets else f", from {due:,} images on."
    elif hint and stage.sample_every and stage.state in ("waiting", "opening"):  # its length may not be settled
        hint = "model.safetensors is written with each sample sheet, so this works before the run is finished."
    lines = "".join(
        f"<dt>{printable_html(command.purpose)}</dt><dd><code>{printable_html(shlex.join(command.words))}</code></dd>\n"
        for command in commands
    )
    return f'<section class="card commands">\n<dl>{lines}</dl>\n<p class="hint">{hint}</p>\n</section>\n'
