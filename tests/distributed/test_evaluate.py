"""Any number of processes, with uneven and empty shares, judge as one does; a mistake of one ends all with its line."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import extractors
import numpy as np
import processes
import pytest
import tiny
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from mar import cli
from mar.cli import main
from mar.data.images import UnreadableImage
from mar.evaluation import evaluate, sweep
from mar.evaluation.evaluate import Collected, MetricOptions, collect, compare
from mar.evaluation.features import Features
from mar.evaluation.image_sets import ImageBatch
from mar.random import make_generator

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
COUNTS = (700, 2)
LOST = (*range(400, 700), 0, 7)
"""Unreadable pictures of the first count: all of the last process's share, and some of the first one's."""
"""Pictures: uneven shares, and fewer than processes, so that one has none."""
ALL = MetricOptions(kid=True, precision=True, splits=2)
JUDGE = ["--features", f"{extractors.__file__}:insects", "--device", "cpu"]
DRAW = ["--allow-broken", "--count", "8", "--batch", "3", "--splits", "2"]
SEVERAL = (2, 3)


class Numbered:
    """Pictures that are made of their numbers; those from `wide` on are wider.

    An error ends all at picture `broken`; those of `unreadable` are left out.
    """

    name, classes = "numbered", ("ant", "bee", "cat")

    def __init__(
        self, count: int, wide: int | None = None, broken: int | None = None, unreadable: tuple[int, ...] = ()
    ) -> None:
        self.count, self.wide, self.broken, self.unreadable = count, wide, broken, unreadable

    def __len__(self) -> int:
        return self.count

    def batches(self, batch: int, first: int, end: int) -> Iterator[ImageBatch]:
        for start in range(first, end, batch):
            numbers = list(range(start, min(start + batch, end)))
            if self.broken in numbers:
                raise ValueError(f"picture {self.broken} can't be read")
            side = 8 if self.wide is not None and start >= self.wide else 4
            lost = tuple(UnreadableImage(f"{i}.png", "cut short") for i in numbers if i in self.unreadable)
            numbers = [i for i in numbers if i not in self.unreadable]
            images = [torch.randint(0, 256, (3, 4, side), generator=make_generator(i)) for i in numbers]
            labels = torch.tensor([i % 3 for i in numbers], dtype=torch.int64)
            pixels = torch.stack([*images, torch.empty(3, 4, side)])[:-1]
            yield ImageBatch(pixels.to(torch.uint8), torch.tensor(numbers, dtype=torch.int64), labels, lost)


class Recorded:
    """An extractor whose features do not depend on the batch at all: float64 sums of a picture, bit for bit."""

    name, metric, width, scores, classes = "recorded", "FD (recorded)", 4, True, ("bee", "ant", "cat")
    fingerprint = "0"

    def to(self, device: torch.device | str) -> Recorded:
        return self

    def __call__(self, images: Tensor) -> Features:
        rows = [(image.double() / 255).mean(0).flatten()[:4].float() for image in images]
        values = torch.stack(rows)
        return Features(values, 9 * values[:, :3])


def outcome(folder: Path, rank: int, world: int) -> None:
    """What this process of the group finds, into a file of its own."""
    found = {}
    for count in COUNTS:
        for extractor in (Recorded(), extractors.insects()):
            found[count, extractor.name] = collect(Numbered(count), extractor, options=ALL, batch=16)
    found[700, "lost"] = collect(Numbered(700, unreadable=LOST), Recorded(), options=ALL, batch=16)
    torch.save({key: plain(value) for key, value in found.items()}, folder / f"{world}-{rank}.pt")
    refusals = [said(Numbered(60, wide=40)), said(Numbered(60, broken=59)), said(Numbered(60, broken=0))]
    refusals.append(said(Numbered(60, unreadable=tuple(range(59)))))
    (folder / f"{world}-{rank}.json").write_text(json.dumps(refusals))


def plain(found: Collected) -> dict[str, object]:
    of = found.statistics
    return {
        "mean": of.mean, "covariance": of.covariance, "features": of.features, "count": of.count,
        "score": found.inception_score, "right": found.correct, "judged": found.total,
        "numbers": found.numbers, "warnings": found.warnings,
    }  # fmt: skip


def said(pictures: Numbered) -> str:
    with pytest.raises(ValueError, match=r"picture") as refused:
        collect(pictures, Recorded(), batch=4)
    return str(refused.value)


def on_each_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    evaluate.KID_SUBSETS = 5
    cli.ERROR_GRACE_S = 0.5
    sweep.plot = lambda table, path: None  # matplotlib takes seconds to come
    os.chdir(folder)
    for world in SEVERAL:
        if rank >= world:
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        dist.init_process_group("gloo", init_method=f"file://{folder / f'meet-{world}'}", rank=rank, world_size=world)
        try:
            outcome(folder, rank, world)
            commands(folder, rank, world)
        finally:
            dist.destroy_process_group()


def commands(folder: Path, rank: int, world: int) -> None:
    """`mar evaluate` in this process of the group; what it says and ends with goes into a file."""
    report = ["evaluate", "model.safetensors", "--reference", "pictures", "--kid", "--out", f"report-{world}.json"]
    report += ["--held-out", "others", "--neighbors-grid", f"near-{world}.png"]
    sweep = ["evaluate", "model.safetensors", "--reference", "s.npz", "--sweep", "K=1,2", "--out", f"sweep-{world}"]
    stats = ["stats", "pictures", "--out", f"stats-{world}.npz", "--image-size", "4"]
    broken = ["stats", "broken", "--out", f"broken-{world}.npz", "--batch", "2"]
    refused = ["evaluate", "model.safetensors", "--reference", f"only-{rank}.npz"]  # is there for process 0 alone
    lines = []
    for arguments in ([*report, *DRAW], [*sweep, *DRAW], stats, broken, [*refused, *DRAW]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([*arguments, *JUDGE])
            except SystemExit as stopped:
                code = int(stopped.code or 0)
        lines.append((code, out.getvalue(), err.getvalue()))
    (folder / f"said-{world}-{rank}.json").write_text(json.dumps(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What groups of two and three processes left, and one process alone."""
    folder = tmp_path_factory.mktemp("group")
    tiny.tiny_pipeline().save(folder / "model.safetensors")
    for name in ("pictures", "broken"):
        tiny.write_images(folder / name, 8)
    broken = sorted((folder / "broken").glob("*/*.png"))[-1]
    broken.write_bytes(b"no picture")
    for path in tiny.write_images(folder / "others", 6).glob("*/*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["stats", "pictures", "--out", "s.npz", "--image-size", "4", *JUDGE]) == 0
        (folder / "only-0.npz").write_bytes((folder / "s.npz").read_bytes())
        report = ["evaluate", "model.safetensors", "--reference", "pictures", "--kid", "--out", "report-1.json"]
        report += ["--held-out", "others", "--neighbors-grid", "near-1.png"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mar.evaluation.evaluate.KID_SUBSETS", 5)
            assert main([*report, *DRAW, *JUDGE]) == 0
        processes.spawn_ranks(max(SEVERAL), on_each_rank, folder)
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize("world", SEVERAL)
@pytest.mark.parametrize("count", COUNTS)
def test_evaluate_ranks_give_the_same_statistics(world: int, count: int, folder: Path) -> None:
    alone = plain(collect(Numbered(count), Recorded(), options=ALL, batch=64))
    for rank in range(world):
        found = torch.load(folder / f"{world}-{rank}.pt")[count, "recorded"]
        for name in ("mean", "covariance"):
            torch.testing.assert_close(found[name], alone[name], rtol=1e-9, atol=1e-15)
        assert torch.equal(found["features"], alone["features"])
        assert found["score"] == pytest.approx(alone["score"], rel=1e-9)
        assert (found["count"], found["right"], found["judged"]) == (count, alone["right"], alone["judged"])
    assert sum(alone["judged"]) == count  # type: ignore[call-overload]


@pytest.mark.parametrize("world", SEVERAL)
@pytest.mark.parametrize("count", COUNTS)
def test_evaluate_ranks_match_one_process_end_to_end(world: int, count: int, folder: Path) -> None:
    extractor = extractors.insects()
    alone = collect(Numbered(count), extractor, options=ALL, batch=64)
    assert compare(alone, alone.statistics, extractor, MetricOptions()).distance <= 1e-6
    for rank in range(world):
        found = torch.load(folder / f"{world}-{rank}.pt")[count, "insects"]
        torch.testing.assert_close(found["mean"], alone.statistics.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["covariance"], alone.statistics.covariance, rtol=1e-5, atol=1e-7)
        assert found["right"] == alone.correct


@pytest.mark.parametrize("world", SEVERAL)
def test_evaluate_error_on_one_rank_is_raised_by_all(world: int, folder: Path) -> None:
    for rank in range(world):
        mixed, last, first, few = json.loads((folder / f"{world}-{rank}.json").read_text())
        assert "4x4 and 4x8" in mixed
        assert "expected one size" in mixed
        assert last == "picture 59 can't be read"
        assert first == "picture 0 can't be read"
        assert few.startswith("59 of the 60 pictures of numbered can't be read, such as 0.png (cut short); 1 are left")


@pytest.mark.parametrize("world", SEVERAL)
def test_evaluate_ranks_leave_out_the_same_images(world: int, folder: Path) -> None:
    alone = plain(collect(Numbered(700, unreadable=LOST), Recorded(), options=ALL, batch=64))
    line = "302 of the 700 pictures of numbered can't be read and are left out, such as 0.png (cut short): the figures "
    assert alone["warnings"] == (f"{line}rest on the other 398",)
    for rank in range(world):
        found = torch.load(folder / f"{world}-{rank}.pt")[700, "lost"]
        torch.testing.assert_close(found["mean"], alone["mean"], rtol=1e-9, atol=1e-15)
        assert torch.equal(found["features"], alone["features"])
        assert found["numbers"].tolist() == [i for i in range(700) if i not in LOST]
        assert found["score"] == pytest.approx(alone["score"], rel=1e-9)
        assert (found["count"], found["right"], found["warnings"]) == (398, alone["right"], alone["warnings"])


@pytest.mark.parametrize("world", SEVERAL)
def test_evaluate_commands_on_several_ranks_match(world: int, folder: Path) -> None:
    said = [json.loads((folder / f"said-{world}-{rank}.json").read_text()) for rank in range(world)]
    codes = [[code for code, _, _ in lines] for lines in said]
    assert codes == [[0, 0, 0, 0, 2]] * world
    assert all(out == "" for lines in said[1:] for _, out, _ in lines)
    one, several = (json.loads((folder / f"report-{n}.json").read_text()) for n in (1, world))
    measures = [{k: v for k, v in r.items() if isinstance(v, float) and k != "seconds"} for r in (one, several)]
    assert measures[0] == pytest.approx(measures[1], rel=1e-5)
    assert len(measures[0]) == 8
    assert [pair["reference"] for pair in several["pairs"]] == [pair["reference"] for pair in one["pairs"]]
    sheets = [np.asarray(Image.open(folder / f"near-{n}.png"), dtype=int) for n in (1, world)]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1
    assert len(json.loads((folder / f"sweep-{world}" / "sweep.json").read_text())["rows"]) == 2
    with np.load(folder / "s.npz") as mine, np.load(folder / f"stats-{world}.npz") as theirs:
        np.testing.assert_allclose(theirs["mu"], mine["mu"], rtol=1e-5)
        np.testing.assert_allclose(theirs["sigma"], mine["sigma"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("world", SEVERAL)
def test_evaluate_warning_or_error_on_ranks_is_one_line(world: int, folder: Path) -> None:
    said = [json.loads((folder / f"said-{world}-{rank}.json").read_text()) for rank in range(world)]
    for verb, words in ((3, "1 of the 8 pictures of broken (train) can't be read and are left out"), (4, "only-1.npz")):
        lines = [line for rank in said for line in rank[verb][2].splitlines()]
        assert len(lines) == 1, lines
        assert lines[0].startswith("mar: warning: " if verb == 3 else "mar: ")
        assert words in lines[0]
    with np.load(folder / f"broken-{world}.npz") as statistics:
        assert int(statistics["count"]) == 7
