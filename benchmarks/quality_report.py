"""What `quality.py` says of trials that were judged: a table of all their marks, and a plot."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from quality_notes import read_lines

from mar.config import SamplingConfig, rename_old_keys

TRIAL, MARKED = "trial.json", "quality.jsonl"
"""What a trial is, and what was said of it at its marks: files of its folder."""


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a trial was, and its lines."""
    try:
        kept = json.loads((folder / TRIAL).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no run that was judged: {error.filename} is not there") from error
    if not (lines := read_lines(folder / MARKED)):
        raise ValueError(f"{folder} holds no run that was judged: {folder / MARKED} is not there, or empty")
    return kept, lines


def shown(value: float | None, form: str) -> str:
    """A cell of the table."""
    return "-" if value is None else format(value, form)


def run_table(args: argparse.Namespace) -> None:
    print("| run | minutes | pictures | a second | validation loss | weights | guidance | distance | of the class |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for folder in args.folders:
        kept, lines = read(folder)
        sampling = rename_old_keys(SamplingConfig, kept["config"]["sampling"])
        for line in lines:
            guidance = line.get("guidance_scale", sampling["guidance_scale"])
            rate = line["images"] / line["minutes"] / 60
            loss, distance = shown(line.get("val_loss"), ".4f"), shown(line.get("distance"), ".2f")
            print(
                f"| {folder.name} | {line['minutes']:.1f} | {line['images']:,} | {rate:.0f} | {loss} | "
                f"{line.get('weights', 'ema')} | {guidance:g} | {distance} | {shown(line.get('agreement'), '.1%')} |"
            )


def run_plot(args: argparse.Namespace) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for folder in args.folders:
        kept, lines = read(folder)
        usual = [line for line in lines if "distance" in line and not {"guidance_scale", "weights"} & {*line}]
        points = [(line["minutes"], line["distance"]) for line in usual]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"{folder.name} ({kept['recipe']})")
    axes.set(xlabel="minutes of learning", ylabel="Fréchet distance", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(args.out, dpi=110)
    print(args.out)
