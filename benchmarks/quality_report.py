"""Table and plot of the results of `quality.py`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from quality_notes import read_lines

from mar.config import SamplingConfig, rename_old_keys

TRIAL_FILE, RESULTS_FILE = "trial.json", "quality.jsonl"
"""Files in the folder of a trial: its settings, and a line per evaluation."""


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the settings and the results of a trial."""
    try:
        trial = json.loads((folder / TRIAL_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no results: {error.filename} is missing") from error
    if not (lines := read_lines(folder / RESULTS_FILE)):
        raise ValueError(f"{folder} has no results: {folder / RESULTS_FILE} is missing or empty")
    return trial, lines


def cell(value: float | None, format_spec: str) -> str:
    """Format a cell of the table; `-` for None."""
    return "-" if value is None else format(value, format_spec)


def run_table(args: argparse.Namespace) -> None:
    print("| run | minutes | images | per second | validation loss | weights | guidance | distance | class accuracy |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for folder in args.folders:
        trial, lines = read(folder)
        sampling = rename_old_keys(SamplingConfig, trial["config"]["sampling"])
        for line in lines:
            guidance = line.get("guidance_scale", sampling["guidance_scale"])
            rate = line["images"] / line["minutes"] / 60
            loss, distance = cell(line.get("val_loss"), ".4f"), cell(line.get("distance"), ".2f")
            print(
                f"| {folder.name} | {line['minutes']:.1f} | {line['images']:,} | {rate:.0f} | {loss} | "
                f"{line.get('weights', 'ema')} | {guidance:g} | {distance} | {cell(line.get('agreement'), '.1%')} |"
            )


def run_plot(args: argparse.Namespace) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for folder in args.folders:
        trial, lines = read(folder)
        default = [line for line in lines if "distance" in line and not {"guidance_scale", "weights"} & {*line}]
        points = [(line["minutes"], line["distance"]) for line in default]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"{folder.name} ({trial['recipe']})")
    axes.set(xlabel="minutes of training", ylabel="Fréchet distance", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(args.out, dpi=110)
    print(args.out)
