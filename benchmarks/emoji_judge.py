"""Judge pictures of emoji drawn from words, without a network: which real emoji is each one nearest to?

    python benchmarks/emoji_judge.py split --data PATH --out FOLDER [--count 100]
    python benchmarks/emoji_judge.py judge MODEL --data PATH [--held-back FOLDER/held-back.json] [--sheet FILE.png]

PATH is a folder of emoji with a `metadata.jsonl`: `file_name`, `text`, and for people and hands `base` and `skin_tone`.
`split` makes a folder of links to them, without `--count` combinations of a base and a skin tone, one a base, whose
other four tones stay. Train on that folder; `judge` then asks for the combinations that were held back.

The judge: pictures of 64 pixels become 32x32 by averages of 2x2, then of 3x3 neighbors (softened). The distance of two
is the root mean square difference in gray levels, the least over 25 shifts by up to 2 pixels each way. Moved, blurred
or noisy real emoji are nearest to themselves in 97 to 100 of 100. Figures:

- named: the nearest of all real emoji is the one that was asked for;
- base: the nearest is one of the same base, in whichever tone;
- tone: of the real emoji of its base, the nearest is in the tone that was asked for;
- corner: the median of all corner pixels, of 255;
- copy: of held back combinations, the distance to the nearest training picture beside that to the true picture.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 64  # pixels of the pictures that are compared
REACH = 2  # shifts by so many softened pixels each way
GRID = 40  # prompts of the sheet
SEED = 20

Row = dict[str, Any]


def read_rows(data: Path) -> list[Row]:
    """Read the rows of a folder's metadata."""
    return [json.loads(line) for line in (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def split(data: Path, out: Path, count: int) -> None:
    """Make a folder of links to all pictures but `count` combinations, which `held-back.json` lists."""
    by_base: dict[str, list[Row]] = {}
    for row in (rows := read_rows(data)):
        if "skin_tone" in row:
            by_base.setdefault(row["base"], []).append(row)
    whole = [base for base in sorted(by_base) if len(by_base[base]) == 5]
    draw = random.Random(SEED)
    held = [draw.choice(by_base[base]) for base in draw.sample(whole, count)]
    names = {row["file_name"] for row in held}
    out.mkdir(parents=True)
    kept = [row for row in rows if row["file_name"] not in names]
    for row in kept:
        (out / row["file_name"]).symlink_to((data / row["file_name"]).resolve())
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
    (out / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "held-back.json").write_text(json.dumps(held, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"{len(kept):,} pictures in {out}; {len(held)} held back")


# ---- the judge


def soften(images: Tensor) -> Tensor:
    """Average (n, 3, 64, 64) in [-1, 1] to gray levels (n, 3, 32, 32), softened."""
    levels = (images.clamp(-1, 1) + 1) * 127.5
    halved = F.avg_pool2d(levels, 2)
    return F.avg_pool2d(F.pad(halved, (1, 1, 1, 1), mode="replicate"), 3, 1)


def distances(drawn: Tensor, real: Tensor) -> Tensor:
    """Return the distance of each drawn picture to each real one, (n, m), in gray levels."""
    a, b = soften(drawn), soften(real).flatten(1)
    padded = F.pad(a, (REACH,) * 4, mode="replicate")
    best = torch.full((len(a), len(b)), torch.inf)
    for down in range(2 * REACH + 1):
        for right in range(2 * REACH + 1):
            moved = padded[:, :, down : down + a.shape[2], right : right + a.shape[3]].flatten(1)
            best = torch.minimum(best, torch.cdist(moved, b) / b.shape[1] ** 0.5)
    return best


def load_real(data: Path, rows: list[Row]) -> Tensor:
    """Load pictures at 64 pixels, on white."""
    from mar.data.images import Transform, decode_image

    transform = Transform(SIDE, 3)
    return torch.stack([transform(decode_image(data / row["file_name"], row["file_name"])) for row in rows])


def draw(model: Any, prompts: list[str], **settings: Any) -> Tensor:
    """Draw a picture of each prompt, with the seeds 0, 1, 2, ..."""
    images: Tensor = model.sample(prompts=prompts, output="tensor", batch=50, progress=True, **settings)
    return images if images.shape[-1] == SIDE else F.interpolate(images, (SIDE, SIDE), mode="area")


def judge_seen(drawn: Tensor, asked: list[int], rows: list[Row], real: Tensor) -> dict[str, float]:
    """Judge pictures of training names; `asked` are their rows."""
    apart = distances(drawn, real)
    return {"named": share(apart.argmin(1), asked), **judge_tones(apart, asked, rows)}


def judge_tones(apart: Tensor, asked: list[int], rows: list[Row]) -> dict[str, float]:
    """Judge base and tone, of pictures that have one."""
    base_right, tone_right = [], []
    for distance, row in zip(apart, asked, strict=True):
        if "base" in rows[row]:
            same = [i for i, other in enumerate(rows) if other.get("base") == rows[row]["base"]]
            base_right.append(int(distance.argmin()) in same)
            tone_right.append(same[int(distance[same].argmin())] == row)
    return {"base": mean(base_right), "tone": mean(tone_right)}


def share(found: Tensor, asked: list[int]) -> float:
    """Return the share of pictures whose nearest is the one asked for."""
    return float((found == torch.tensor(asked)).float().mean())


def mean(flags: list[bool]) -> float:
    """Return the share of true values."""
    return sum(flags) / max(len(flags), 1)


def corner(drawn: Tensor) -> float:
    """Return the median of all corner pixels, in gray levels."""
    levels = ((drawn.clamp(-1, 1) + 1) * 127.5).round()
    return float(levels[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].flatten().median())


def judge(options: argparse.Namespace) -> None:
    """Draw, judge and print."""
    import mar
    from mar.data.images import image_grid
    from mar.pipeline import to_pil

    model = mar.load(options.model)
    rows = read_rows(options.data)
    settings: dict[str, Any] = json.loads(options.settings)
    held = json.loads(options.held_back.read_text(encoding="utf-8")) if options.held_back else []
    names = {row["file_name"] for row in held}
    seen = [i for i, row in enumerate(rows) if row["file_name"] not in names]
    unseen = [i for i, row in enumerate(rows) if row["file_name"] in names]
    real = load_real(options.data, rows)
    figures: dict[str, float] = {}

    asked = random.Random(SEED).sample(seen, min(options.count, len(seen)))
    started = time.perf_counter()
    drawn = draw(model, [rows[i]["text"] for i in asked], **settings)
    figures["seconds a picture"] = (time.perf_counter() - started) / len(asked)
    figures |= {f"seen: {name}": value for name, value in judge_seen(drawn, asked, rows, real).items()}
    figures["seen: corner"] = corner(drawn)
    if unseen:
        extra = draw(model, [rows[i]["text"] for i in unseen], **settings)
        apart = distances(extra, real)
        figures |= {f"unseen: {name}": value for name, value in judge_tones(apart, unseen, rows).items()}
        figures["unseen: named"] = share(apart.argmin(1), unseen)
        figures["unseen: corner"] = corner(extra)
        figures["unseen: distance to the true picture"] = median(apart[range(len(unseen)), unseen].tolist())
        figures["unseen: distance to the nearest training picture"] = median(apart[:, seen].min(1).values.tolist())
    for name, value in figures.items():
        print(f"{name:50} {value:8.3f}")
    if options.sheet:
        chosen = random.Random(SEED + 1).sample(range(len(asked)), min(GRID, len(asked)))
        pairs = [image for i in chosen for image in (real[asked[i]], drawn[i])]
        image_grid(to_pil(torch.stack(pairs)), 10, 2).save(options.sheet)
    if options.frechet:
        print(f"{'Fréchet distance, EfficientNet-Lite0':50} {frechet(model, rows, seen, real, options, settings)}")


def frechet(
    model: Any, rows: list[Row], seen: list[int], real: Tensor, options: argparse.Namespace, settings: dict[str, Any]
) -> str:
    """Compare `options.frechet` drawn pictures with the real ones, and one half of the real ones with the other."""
    from mar.evaluation.features.efficientnet import efficientnet_lite0
    from mar.evaluation.metrics import frechet_distance
    from mar.evaluation.statistics import FeatureStats

    extractor = efficientnet_lite0()

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return torch.cat([extractor(part).values.double() for part in levels.split(100)])

    def statistics(values: Tensor) -> FeatureStats:
        return FeatureStats(values.mean(0), torch.cov(values.T), len(values))

    chosen = [seen[i % len(seen)] for i in range(options.frechet)]
    drawn = features(draw(model, [rows[i]["text"] for i in chosen], **settings))
    every = features(real)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(SEED))
    halves = frechet_distance(statistics(every[order[::2]]), statistics(every[order[1::2]]))
    distance = frechet_distance(statistics(drawn), statistics(every))
    return f"{distance:.1f} of {len(drawn):,} drawn; real halves {halves:.1f}"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    splitting = verbs.add_parser("split")
    splitting.add_argument("--data", type=Path, required=True)
    splitting.add_argument("--out", type=Path, required=True)
    splitting.add_argument("--count", type=int, default=100)
    judging = verbs.add_parser("judge")
    judging.add_argument("model")
    judging.add_argument("--data", type=Path, required=True)
    judging.add_argument("--held-back", type=Path)
    judging.add_argument("--count", type=int, default=1000, help="training names to ask for")
    judging.add_argument("--settings", default="{}", help='JSON of sampling settings, as {"guidance_scale": 2}')
    judging.add_argument("--sheet", type=Path, help="PNG of real and drawn pictures side by side")
    judging.add_argument("--frechet", type=int, default=0, help="pictures to draw for the Fréchet distance")
    options = parser.parse_args()
    if options.verb == "split":
        split(options.data, options.out, options.count)
    else:
        judge(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
