"""Image quality against sampling time: many sampling settings of one model, and their Pareto front.

    python benchmarks/tradeoff.py measure --data PATH --classifier FILE --out runs/tradeoff
    python benchmarks/tradeoff.py measure --data PATH --classifier FILE --out runs/tradeoff --way "K=12 order=halton"
    python benchmarks/tradeoff.py measure --data PATH --classifier FILE --out runs/borrowed --borrowed
    python benchmarks/tradeoff.py time runs/tradeoff
    python benchmarks/tradeoff.py plot runs/tradeoff --out tradeoff.png
    python benchmarks/tradeoff.py table runs/tradeoff

PATH and FILE as in `quality.py`: the model, by default the bundled one, is compared with images of PATH that it was not
trained on. A model of words draws the captions of PATH, and is compared with all images of it. A way is a combination
of `mar evaluate --sweep`, with one value each: fields of SamplingConfig, K, cfg, preset. The default is WAYS: each
setting alone, and some of them together. All ways have the same labels or prompts, and seeds.

Seconds are processor time per image, one thread, without evaluation. They compare only on a machine that was idle for
hours: `time` measures them again, all ways in turn, medians of several rounds.

A measured way is not measured again. A folder is for one model, `--dtype`, data and classifier; data and classifier may
be moved.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from quality_data import evaluation_extractor, fingerprints, open_splits
from quality_notes import read_lines, require_same, write_lines

import mar
from mar.checkpoint.files import write_text
from mar.cli.options import DrawnDtype
from mar.data.captions import captions_of
from mar.data.splits import Subset, subset
from mar.devices import torch_dtype
from mar.evaluation.evaluate import MetricOptions, collect, compare
from mar.evaluation.image_sets import GeneratedImages, ImageBatch, SourceImages
from mar.evaluation.metrics import frechet_distance
from mar.evaluation.session import spread_prompts
from mar.evaluation.sweep import points
from mar.pipeline import Pipeline
from mar.sampling.generate import BrokenLatents
from mar.sampling.plan import Plan

FEW_STEPS = "timestep_spacing=log-snr start_t=0.95"
"""Settings for solvers with few steps."""
WAYS = (
    "preset=exact",
    "preset=balanced",
    "preset=fast",
    "preset=fast uncond_interval=1",
    "preset=fast guidance_from=0.0",
    "preset=fast diffusion_steps_end=5",
    "preset=fast order=halton",
    # reveal steps
    "K=14",
    "K=10",
    "K=7",
    "K=5",
    # diffusion steps and solvers
    "diffusion_steps=15",
    "diffusion_steps=10",
    "diffusion_steps=25 diffusion_steps_end=8",
    "diffusion_steps=10 solver=ddim start_t=0.95",
    f"diffusion_steps=10 solver=dpm++2s {FEW_STEPS}",
    f"diffusion_steps=8 solver=dpm++2m {FEW_STEPS}",
    f"diffusion_steps=8 solver=dpm++2m-sde {FEW_STEPS}",
    f"diffusion_steps=12 solver=dpm++2m-sde {FEW_STEPS}",
    # guidance
    "uncond_interval=2",
    "uncond_interval=3",
    "guidance_from=0.1",
    "guidance_from=0.3",
    # order and mask schedule, with many tokens per step
    "K=10 order=checkerboard",
    "K=10 order=halton",
    "K=10 mask_schedule=exponential",
    # together
    f"K=10 diffusion_steps=8 solver=dpm++2m {FEW_STEPS}",
    f"K=10 diffusion_steps=8 solver=dpm++2m-sde {FEW_STEPS}",
    f"K=7 diffusion_steps=8 solver=dpm++2m-sde {FEW_STEPS}",
    f"K=5 diffusion_steps=8 solver=dpm++2m-sde {FEW_STEPS}",
)
BINOMIAL = "reveal=binomial mask_schedule=exponential"
"""The reveal of eMIGM (arXiv 2503.07197)."""
BORROWED = (
    "preset=exact",
    f"preset=exact {BINOMIAL}",
    "preset=exact guidance_time=0.1,0.3",
    "preset=exact guidance_time=0.0,0.7",
    "preset=exact solver=dpm++3s diffusion_steps=8",
    "preset=exact solver=dpm++3s diffusion_steps=15",
    "preset=balanced",
    f"preset=balanced {BINOMIAL}",
    "preset=balanced guidance_time=0.0,0.7",
    "preset=balanced solver=dpm++3s",
    "preset=fast",
    f"preset=fast {BINOMIAL}",
    "preset=fast guidance_time=0.0,0.7",
    "preset=fast solver=dpm++3s",
)
"""Today's presets, and each with one part of eMIGM's sampler: `--borrowed`."""
RESULTS_FILE, SETTINGS_FILE = "tradeoff.jsonl", "tradeoff.json"


@dataclass
class TimedImages:
    """Generated images, with the processor time of generating them."""

    generated: GeneratedImages
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.generated.name

    @property
    def classes(self) -> tuple[str, ...]:
        return self.generated.classes

    def __len__(self) -> int:
        return len(self.generated)

    def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
        batches = self.generated.batches(batch, first, end)
        while True:
            start = time.process_time()
            images = next(batches, None)
            self.seconds += time.process_time() - start
            if images is None:
                return
            yield images


def draw(pipeline: Pipeline, way: str, count: int, seed: int, prompts: Sequence[str] = ()) -> TimedImages:
    """Return images of all classes or prompts, generated in that way while they are read."""
    plan = Plan.total(count, prompts or range(pipeline.model.config.classes) or [-1], seed=seed)
    return TimedImages(GeneratedImages(pipeline, plan, name=way, **settings(way)))


def settings(way: str) -> dict[str, Any]:
    """Parse the fields of a way; `guidance_time=0.1,0.3` are the two ends of that window."""
    windows = [word for word in way.split() if word.startswith("guidance_time=")]
    combinations = points([word for word in way.split() if word not in windows])
    if len(combinations) != 1:
        raise ValueError(f"--way {way}: got {len(combinations)} combinations, expected one value for each field")
    chosen = combinations[0]
    for window in windows:
        chosen["guidance_time"] = tuple(map(float, window.partition("=")[2].split(",")))
    return chosen


def record_or_check(args: argparse.Namespace, data_fingerprints: dict[str, str | None], prompts: Sequence[str]) -> None:
    """Record the settings of a new folder. Raises ValueError for a folder with other settings."""
    current = {"model": args.model, "data": args.data.name, "count": args.count, "seed": args.seed}
    current |= {"batch": args.batch, "threads": args.threads, "dtype": args.dtype, **data_fingerprints}
    if prompts:
        current["prompts"] = list(prompts)
    file = args.out / SETTINGS_FILE
    if file.is_file():
        recorded = json.loads(file.read_text(encoding="utf-8"))
        require_same(args.out, {"dtype": "fp32", **recorded}, current)  # older versions had no other dtype
    else:
        write_text(file, json.dumps(current))


class Measurement:
    """A model, its reference statistics, and the file of results."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.pipeline: Pipeline = mar.load(args.model, device="cpu", dtype=torch_dtype(args.dtype))
        for way in ways_of(args):
            self.pipeline.sampling_with(**settings(way))  # fails before hours of sampling
        self.count, self.seed, self.batch = args.count, args.seed, args.batch
        parts = open_splits(args.data)
        self.extractor = evaluation_extractor(args.data, args.classifier)
        self.prompts: Sequence[str] = ()
        held_out, size = parts[1], self.pipeline.image_size
        if self.pipeline.captions is not None:
            held_out = parts[0].source if isinstance(parts[0], Subset) else parts[0]  # one picture a caption
            self.prompts = spread_prompts(captions_of(held_out), self.pipeline.captions, None)
        record_or_check(args, fingerprints(args.data, parts, args.classifier), self.prompts)
        self.path = args.out / RESULTS_FILE
        self.reference = collect(SourceImages(held_out, "held out", size=size), self.extractor).statistics
        real = collect(SourceImages(subset(parts[0], self.count), "training images", size=size), self.extractor)
        distance = frechet_distance(real.statistics, self.reference)
        print(f"distance of {self.count:,} training images: {distance:.3f}", flush=True)

    def measure(self, way: str) -> dict[str, Any]:
        """Generate and evaluate images of a way, and record the result."""
        images = draw(self.pipeline, way, self.count, self.seed, self.prompts)
        line: dict[str, Any] = {"way": way}
        try:
            features = collect(images, self.extractor, batch=self.batch)
            report = compare(features, self.reference, self.extractor, MetricOptions())
            line |= {"distance": report.distance, "agreement": report.class_accuracy}
            line |= {"seconds": images.seconds / self.count}
        except BrokenLatents as error:
            line |= {"broken": str(error)}
        write_lines(self.path, [*read_lines(self.path), line])
        return line


def results_by_way(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the last result of each way, also of those whose images were noise."""
    return {line["way"]: line for line in read_lines(folder / RESULTS_FILE)}


def successful_results(folder: Path) -> list[dict[str, Any]]:
    """Return the result of each way whose images were not noise."""
    return [line for line in results_by_way(folder).values() if "distance" in line]


def pareto_front(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results that no other beats in both time and distance, fastest first."""
    best: list[dict[str, Any]] = []
    for line in sorted(lines, key=lambda line: (line["seconds"], line["distance"])):
        if not best or line["distance"] < best[-1]["distance"]:
            best.append(line)
    return best


def ways_of(args: argparse.Namespace) -> list[str]:
    """Return the ways that are asked for."""
    return args.way or list(BORROWED if args.borrowed else WAYS)


def run_measure(args: argparse.Namespace) -> None:
    ways = ways_of(args)
    measurement = Measurement(args)
    done = results_by_way(args.out)
    for way in ways:
        if way not in done:
            print(json.dumps(measurement.measure(way)), flush=True)


def run_time(args: argparse.Namespace) -> None:
    lines = results_by_way(args.folder)
    ways = [way for way, line in lines.items() if "distance" in line]
    if not ways:
        raise ValueError(f"{args.folder} has no measurements")
    recorded = json.loads((args.folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    torch.set_num_threads(recorded["threads"])
    pipeline = mar.load(recorded["model"], device="cpu", dtype=torch_dtype(recorded.get("dtype", "fp32")))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(1, args.rounds + 1):
        for way in ways:
            images = draw(pipeline, way, args.count, recorded["seed"], recorded.get("prompts", ()))
            for _ in images.batches(recorded["batch"], 0, args.count):
                pass
            seconds[way].append(images.seconds / args.count)
        print(f"round {number} of {args.rounds}", flush=True)
    for way, rounds in seconds.items():
        lines[way]["seconds"] = median(rounds)
    write_lines(args.folder / RESULTS_FILE, list(lines.values()))


def run_table(args: argparse.Namespace) -> None:
    lines = successful_results(args.folder)
    best = pareto_front(lines)
    print("| way | distance | class accuracy | seconds |")
    print("| --- | --- | --- | --- |")
    for line in lines:
        way = f"**`{line['way']}`**" if line in best else f"`{line['way']}`"
        agreement = "-" if line["agreement"] is None else f"{line['agreement']:.1%}"
        print(f"| {way} | {line['distance']:.2f} | {agreement} | {line['seconds']:.3f} |")


def run_plot(args: argparse.Namespace) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    lines = successful_results(args.folder)
    if not lines:
        raise ValueError(f"{args.folder} has no measurements")
    recorded = json.loads((args.folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    best = pareto_front(lines)
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([p["seconds"] for p in best], [p["distance"] for p in best], color="0.6", zorder=1)
    for line in lines:
        optimal = line in best
        axes.scatter(line["seconds"], line["distance"], s=40 if optimal else 16, color="tab:red" if optimal else "0.5")
        label = line["way"].replace(FEW_STEPS, "").replace("diffusion_steps", "steps").replace("solver=", "")
        axes.annotate(
            " ".join(label.split()),
            (line["seconds"], line["distance"]),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7 if optimal else 5.5,
            color="black" if optimal else "0.5",
        )
    axes.set(xlabel="processor seconds per image", ylabel="Fréchet distance", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{recorded['model']}: {recorded['count']:,} images per way; Pareto front in red")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(args.out, dpi=120)
    print(args.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("measure", help="generate and evaluate images in all ways")
    verb.add_argument("--model", default="fashion")
    verb.add_argument("--data", type=Path, required=True)
    verb.add_argument("--classifier", type=Path, help="for Fashion-MNIST: a file of `fashion_judge.py train`")
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--way", action="append", help="fields and values, separated by spaces; may be repeated")
    verb.add_argument("--borrowed", action="store_true", help="presets with and without parts of eMIGM's sampler")
    verb.add_argument("--count", type=int, default=5000, help="images of each way")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--batch", type=int, default=100)
    verb.add_argument("--threads", type=int, default=1)
    verb.add_argument("--dtype", choices=get_args(DrawnDtype), default="fp32", help="dtype of the model's matrices")
    verb.set_defaults(run=run_measure)
    verb = verbs.add_parser("time", help="measure the seconds of all ways again, in turn")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--count", type=int, default=100, help="images of each way and round")
    verb.add_argument("--rounds", type=int, default=3)
    verb.set_defaults(run=run_time)
    verb = verbs.add_parser("table", help="all ways, as Markdown; the Pareto front in bold")
    verb.add_argument("folder", type=Path)
    verb.set_defaults(run=run_table)
    verb = verbs.add_parser("plot", help="plot of distance against seconds")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--out", type=Path, default=Path("tradeoff.png"))
    verb.set_defaults(run=run_plot)
    args = parser.parse_args()
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"tradeoff: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
