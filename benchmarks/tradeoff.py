"""How good pictures are against how long they take: one model, many ways of drawing, and which of them are worth it.

    python benchmarks/tradeoff.py measure --data PATH --classifier FILE --out runs/tradeoff
    python benchmarks/tradeoff.py measure --data PATH --classifier FILE --out runs/tradeoff --way "K=12 order=halton"
    python benchmarks/tradeoff.py time runs/tradeoff
    python benchmarks/tradeoff.py plot runs/tradeoff --out tradeoff.png
    python benchmarks/tradeoff.py table runs/tradeoff

PATH and FILE as in `quality.py`: the model (by default the bundled one) is held against pictures of PATH that it did
not learn from. A way is what `mar evaluate --sweep` takes, one value each: fields of SamplingConfig, K, cfg, preset.
Without `--way`, those of WAYS are drawn, each knob by itself and some of them together. All ways draw the same labels
and seeds. Seconds are of the processor, one thread, the pictures of a batch drawn at once, judging not counted. They
compare where nobody else was at work for hours: `time` takes them anew, all ways in turn, medians of several rounds. A
way that was measured is not measured again. A folder has one model, `--dtype`, data and classifier; these two may be
moved.
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
from quality_data import fingerprints, open_judge, open_parts
from quality_notes import read_lines, require_same, write_lines

import mar
from mar.checkpoint.files import write_text
from mar.cli.options import DrawnDtype, torch_dtype
from mar.data.splits import subset
from mar.evaluation.evaluate import MetricOptions, collect, compare
from mar.evaluation.image_sets import GeneratedImages, ImageBatch, SourceImages
from mar.evaluation.metrics import frechet_distance
from mar.evaluation.sweep import points
from mar.pipeline import Pipeline
from mar.sampling.generate import BrokenLatents
from mar.sampling.plan import Plan

FEW = "timestep_spacing=log-snr start_t=0.95"
"""What belongs to the solvers that need few steps."""
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
    # diffusion steps, and what solves them
    "diffusion_steps=15",
    "diffusion_steps=10",
    "diffusion_steps=25 diffusion_steps_end=8",
    "diffusion_steps=10 solver=ddim start_t=0.95",
    f"diffusion_steps=10 solver=dpm++2s {FEW}",
    f"diffusion_steps=8 solver=dpm++2m {FEW}",
    f"diffusion_steps=8 solver=dpm++2m-sde {FEW}",
    f"diffusion_steps=12 solver=dpm++2m-sde {FEW}",
    # guidance
    "uncond_interval=2",
    "uncond_interval=3",
    "guidance_from=0.1",
    "guidance_from=0.3",
    # order and schedule, where few steps reveal many tokens each
    "K=10 order=checkerboard",
    "K=10 order=halton",
    "K=10 mask_schedule=exponential",
    # together
    f"K=10 diffusion_steps=8 solver=dpm++2m {FEW}",
    f"K=10 diffusion_steps=8 solver=dpm++2m-sde {FEW}",
    f"K=7 diffusion_steps=8 solver=dpm++2m-sde {FEW}",
    f"K=5 diffusion_steps=8 solver=dpm++2m-sde {FEW}",
)
MEASURED, ABOUT = "tradeoff.jsonl", "tradeoff.json"


@dataclass
class Timed:
    """A set of drawn pictures, and how long drawing them took, in seconds of the processor."""

    drawn: GeneratedImages
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.drawn.name

    @property
    def classes(self) -> tuple[str, ...]:
        return self.drawn.classes

    def __len__(self) -> int:
        return len(self.drawn)

    def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
        pictures = self.drawn.batches(batch, first, end)
        while True:
            begun = time.process_time()
            found = next(pictures, None)
            self.seconds += time.process_time() - begun
            if found is None:
                return
            yield found


def draw(pipeline: Pipeline, way: str, count: int, seed: int) -> Timed:
    """Pictures of all classes, drawn in that way when they are asked for."""
    plan = Plan.total(count, list(range(pipeline.model.config.classes)) or [-1], seed=seed)
    return Timed(GeneratedImages(pipeline, plan, name=way, **settings(way)))


def settings(way: str) -> dict[str, Any]:
    """The fields that a way names, and their values."""
    found = points(way.split())
    if len(found) != 1:
        raise ValueError(f"--way {way}: {len(found)} combinations, expected one value for each field")
    return found[0]


def note_or_check(args: argparse.Namespace, judged_by: dict[str, str | None]) -> None:
    """Notes in a new folder what is measured; ValueError for one in which something else was."""
    about = {"model": args.model, "data": args.data.name, "count": args.count, "seed": args.seed}
    about |= {"batch": args.batch, "threads": args.threads, "dtype": args.dtype, **judged_by}
    note = args.out / ABOUT
    if note.is_file():
        noted = json.loads(note.read_text(encoding="utf-8"))
        require_same(args.out, {"dtype": "fp32", **noted}, about)  # older versions knew no other
    else:
        write_text(note, json.dumps(about))


class Measurement:
    """A model, what it is held against, and the file in which the ways are noted."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.pipeline: Pipeline = mar.load(args.model, device="cpu", dtype=torch_dtype(args.dtype))
        for way in args.way or WAYS:
            self.pipeline.sampling_with(**settings(way))  # what is wrong is wrong before hours of drawing
        self.count, self.seed, self.batch = args.count, args.seed, args.batch
        parts = open_parts(args.data)
        self.extractor = open_judge(args.data, args.classifier)
        note_or_check(args, fingerprints(args.data, parts, args.classifier))
        self.path = args.out / MEASURED
        size = self.pipeline.image_size
        self.reference = collect(SourceImages(parts[1], "held out", size=size), self.extractor).statistics
        real = collect(SourceImages(subset(parts[0], self.count), "learned from", size=size), self.extractor)
        distance = frechet_distance(real.statistics, self.reference)
        print(f"{distance:.3f} is the distance of {self.count:,} training pictures", flush=True)

    def measure(self, way: str) -> dict[str, Any]:
        """Draws and judges, and notes what came out."""
        pictures = draw(self.pipeline, way, self.count, self.seed)
        line: dict[str, Any] = {"way": way}
        try:
            found = collect(pictures, self.extractor, batch=self.batch)
            report = compare(found, self.reference, self.extractor, MetricOptions())
            line |= {"distance": report.distance, "agreement": report.class_accuracy}
            line |= {"seconds": pictures.seconds / self.count}
        except BrokenLatents as error:
            line |= {"broken": str(error)}
        write_lines(self.path, [*read_lines(self.path), line])
        return line


def noted(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by ways; also of those that drew no pictures."""
    return {line["way"]: line for line in read_lines(folder / MEASURED)}


def read(folder: Path) -> list[dict[str, Any]]:
    """What was measured, each way once; those that drew no pictures are left out."""
    return [line for line in noted(folder).values() if "distance" in line]


def front(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ways of which no other is both sooner and better, the quickest first."""
    found: list[dict[str, Any]] = []
    for line in sorted(lines, key=lambda line: (line["seconds"], line["distance"])):
        if not found or line["distance"] < found[-1]["distance"]:
            found.append(line)
    return found


def run_measure(args: argparse.Namespace) -> None:
    ways = args.way or list(WAYS)
    measurement = Measurement(args)
    done = noted(args.out)
    for way in ways:
        if way not in done:
            print(json.dumps(measurement.measure(way)), flush=True)


def run_time(args: argparse.Namespace) -> None:
    lines = noted(args.folder)
    ways = [way for way, line in lines.items() if "distance" in line]
    if not ways:
        raise ValueError(f"{args.folder} holds no measurement")
    about = json.loads((args.folder / ABOUT).read_text(encoding="utf-8"))
    torch.set_num_threads(about["threads"])
    pipeline = mar.load(about["model"], device="cpu", dtype=torch_dtype(about.get("dtype", "fp32")))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(1, args.rounds + 1):
        for way in ways:
            pictures = draw(pipeline, way, args.count, about["seed"])
            for _ in pictures.batches(about["batch"], 0, args.count):
                pass
            seconds[way].append(pictures.seconds / args.count)
        print(f"round {number} of {args.rounds}", flush=True)
    for way, found in seconds.items():
        lines[way]["seconds"] = median(found)
    write_lines(args.folder / MEASURED, list(lines.values()))


def run_table(args: argparse.Namespace) -> None:
    lines = read(args.folder)
    best = front(lines)
    print("| way | distance | of its class | seconds |")
    print("| --- | --- | --- | --- |")
    for line in lines:
        way = f"**`{line['way']}`**" if line in best else f"`{line['way']}`"
        agreement = "-" if line["agreement"] is None else f"{line['agreement']:.1%}"
        print(f"| {way} | {line['distance']:.2f} | {agreement} | {line['seconds']:.3f} |")


def run_plot(args: argparse.Namespace) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    lines = read(args.folder)
    if not lines:
        raise ValueError(f"{args.folder} holds no measurement")
    about = json.loads((args.folder / ABOUT).read_text(encoding="utf-8"))
    best = front(lines)
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([p["seconds"] for p in best], [p["distance"] for p in best], color="0.6", zorder=1)
    for line in lines:
        on_it = line in best
        axes.scatter(line["seconds"], line["distance"], s=40 if on_it else 16, color="tab:red" if on_it else "0.5")
        said = line["way"].replace(FEW, "").replace("diffusion_steps", "steps").replace("solver=", "")
        axes.annotate(
            " ".join(said.split()),
            (line["seconds"], line["distance"]),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7 if on_it else 5.5,
            color="black" if on_it else "0.5",
        )
    axes.set(xlabel="seconds of the processor per picture", ylabel="Fréchet distance", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{about['model']}: {about['count']:,} pictures a way; in red: none is both sooner and better")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(args.out, dpi=120)
    print(args.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("measure", help="draw in all ways and judge")
    verb.add_argument("--model", default="fashion")
    verb.add_argument("--data", type=Path, required=True)
    verb.add_argument("--classifier", type=Path, help="for Fashion-MNIST: what `fashion_judge.py train` made")
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--way", action="append", help="fields and values, separated by spaces; may be repeated")
    verb.add_argument("--count", type=int, default=5000, help="pictures of each way")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--batch", type=int, default=100)
    verb.add_argument("--threads", type=int, default=1)
    verb.add_argument("--dtype", choices=get_args(DrawnDtype), default="fp32", help="of the model's matrices")
    verb.set_defaults(run=run_measure)
    verb = verbs.add_parser("time", help="take the seconds of all ways anew, in turn")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--count", type=int, default=100, help="pictures of each way and round")
    verb.add_argument("--rounds", type=int, default=3)
    verb.set_defaults(run=run_time)
    verb = verbs.add_parser("table", help="all ways, as Markdown; those worth it in bold")
    verb.add_argument("folder", type=Path)
    verb.set_defaults(run=run_table)
    verb = verbs.add_parser("plot", help="distance against seconds")
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
