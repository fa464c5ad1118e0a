"""The page of a run: its text, its curves, and damaged files that must not end a run."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from PIL import Image
from tiny import open_tiny_run, tiny_train_config, write_images

from mar.training import page as page_module
from mar.training.callbacks import export_and_sample, on_snapshot
from mar.training.curves import Axis, Chart, Curve, Series, draw_chart, y_axis
from mar.training.log import Log, RunLog, Writer, open_log, open_writers
from mar.training.page import PAGE_FILE, Page, find_sheets, read_log
from mar.training.page_html import Command, Sheet, Stage, charts, clock, draw_commands, render, status
from mar.training.trainer import train

NOW = datetime(2026, 11, 28, 19, 4, 12)
HOSTILE = """</title><script>alert(1)</script>'"&<img src=x onerror=alert(2)>"""


def model(folder: Path = Path("run"), **facts: object) -> Stage:
    return replace(Stage("model", folder, 1000, "running", 400), **facts)  # type: ignore[arg-type]


def curve(*points: tuple[float, float]) -> Curve:
    made = Curve()
    for x, y in points:
        made.add(x, y)
    return made


def page_of(*stages: Stage, root: Path = Path("run"), commands: tuple[Command, ...] = ()) -> str:
    return render(root, stages, commands, NOW)


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html))


def sheet(folder: Path, images: int, size: tuple[int, int] = (20, 8), suffix: str = "") -> Path:
    path = folder / "samples" / f"{images:012d}{suffix}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 90).save(path)
    return path


def written(folder: Path) -> str:
    return (folder / PAGE_FILE).read_text(encoding="utf-8")


# ---- the time left


def test_clock_names_another_day() -> None:
    assert clock(NOW + timedelta(hours=1), NOW) == "20:04"
    assert clock(NOW + timedelta(hours=5), NOW) == "tomorrow 00:04"
    assert clock(NOW + timedelta(days=2), NOW) == "Mon 30 Nov 19:04"


def test_status_of_the_last_stage_is_the_time_left() -> None:
    stages = [Stage("tokenizer", Path("t"), 50, "finished"), model(seconds_left=60 * 36.0)]
    assert text_of(status(stages, NOW)) == "36 min left until about 19:40"


def test_status_of_an_earlier_stage_names_it_unless_the_model_is_timed() -> None:
    running, waiting = model(kind="tokenizer", seconds_left=600.0), Stage("latents", Path("l"))
    stages = [running, waiting, Stage("model", Path("m"))]
    assert text_of(status(stages, NOW)) == ("Tokenizer: 10 min left until about 19:14; then the latents and the model")
    known = [running, waiting, replace(stages[2], seconds_expected=1260.0)]
    assert text_of(status(known, NOW)) == (
        "31 min left until about 19:35; now the tokenizer, then the latents and the model"
    )


def test_status_without_a_speed_promises_nothing() -> None:
    assert text_of(status([model()], NOW)) == "Begun training the model; its speed is measured"
    assert text_of(status([model(state="opening")], NOW)) == "Getting ready for training the model"


def test_page_reloads_itself_only_while_the_run_is_alive() -> None:
    refresh = '<meta http-equiv="refresh" content="10">'
    alive = page_of(model(seconds_left=60.0))
    assert refresh in alive
    assert "<title>40% model · run</title>" in alive
    between = page_of(Stage("tokenizer", Path("t"), 50, "finished"), Stage("model", Path("m"), 1000))
    assert refresh in between
    stopped = page_of(model(state="stopped"))
    assert refresh not in stopped
    assert "Stopped at 19:04; the same command goes on" in text_of(stopped)
    assert "400 of 1,000 images" in text_of(stopped)
    finished = page_of(model(state="finished"))
    assert refresh not in finished
    assert "Finished 400 images seen" in text_of(finished)
    assert "<title>finished · run</title>" in finished
    assert 'value="100.0"' in finished  # also where early stopping ended it


# ---- what comes from outside


def test_page_escapes_names(tmp_path: Path) -> None:
    root = tmp_path / HOSTILE.replace("/", "∕")
    stage = model(
        root, classes=(HOSTILE, "cat"), sheets=(Sheet(f"{HOSTILE}/a.png", 400, 20, 8),), state="stopped"
    )  # fmt: skip
    html = page_of(stage, root=root, commands=draw_commands(root))
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;" in html
    assert html.count("<title>") == html.count("</title>") == 1
    ElementTree.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>|<img[^>]*>|<style>.*?</style>", "", html, flags=re.S))
    source = re.findall(r'<img class="[^"]*" src="([^"]*)"', html)
    assert [unquote(url) for url in source] == [f"{HOSTILE}/a.png"]


def test_page_commands_are_quoted_for_a_shell() -> None:
    html = page_of(model(), commands=draw_commands(Path("runs/my cats")))
    assert "mar sample &#x27;runs/my cats&#x27;" in html
    assert "mar app &#x27;runs/my cats&#x27;" in html


def test_page_tells_when_a_model_can_be_used() -> None:
    commands = draw_commands(Path("run"))
    first = page_of(model(sample_every=300), commands=commands)
    assert "so this works while it trains, from 600 images on." in first
    assert "the first come at 600 images" in first
    drawn = page_of(model(sample_every=300, sheets=(Sheet("a.png", 300, 20, 8),)), commands=commands)
    assert "so this works while it trains." in drawn
    for never in (model(), model(sample_every=2000)):
        assert "This works once the run is finished." in page_of(never, commands=commands)
        assert "Samples" not in page_of(never)
    assert "finished." not in page_of(model(state="finished"), commands=commands)
    waiting = page_of(model(state="waiting", total=0, images=0, sample_every=300), commands=commands)
    assert "so this works before the run is finished." in waiting


# ---- pictures


def test_sheet_of_small_pictures_keeps_square_pixels() -> None:
    small = page_of(model(sheets=(Sheet("samples/a.png", 400, 280, 112),)))
    assert 'class="pixels"' in small
    assert 'style="width:840px"' in small  # 3 x 280
    large = page_of(model(sheets=(Sheet("samples/a.png", 400, 640, 256),)))
    assert 'class="pixels"' not in large
    assert 'style="width:990px"' in large
    tall = page_of(model(sheets=(Sheet("samples/a.png", 400, 512, 1024),)))
    assert 'style="width:260px"' in tall


def test_find_sheets_spreads_earlier_ones(tmp_path: Path) -> None:
    for images in range(100, 1201, 100):
        sheet(tmp_path, images)
        sheet(tmp_path, images, suffix="-raw")
    assert [s.images for s in find_sheets(tmp_path, tmp_path, None)] == [100, 300, 600, 900, 1100, 1200]
    assert [s.images for s in find_sheets(tmp_path, tmp_path, 350)] == [100, 200, 300]
    assert [s.images for s in find_sheets(tmp_path, tmp_path, 100)] == [100]
    assert find_sheets(tmp_path, tmp_path, 0) == ()
    newest = find_sheets(tmp_path, tmp_path.parent, None)[-1]
    assert newest == Sheet(f"{tmp_path.name}/samples/000000001200.png", 1200, 20, 8)


def test_find_sheets_leaves_out_what_is_no_picture(tmp_path: Path) -> None:
    assert find_sheets(tmp_path / "nowhere", tmp_path, None) == ()
    sheet(tmp_path, 100)
    sheet(tmp_path, 200).write_bytes(b"")
    sheet(tmp_path, 300).write_bytes(b"no picture, but long enough to be one")
    (tmp_path / "samples" / f"{400:012d}.png").mkdir()
    assert [s.images for s in find_sheets(tmp_path, tmp_path, None)] == [100]


# ---- curves


def test_curve_is_thinned_by_means_of_neighbors() -> None:
    thin = Curve(most=8)
    for x in range(100):
        thin.add(x, 2.0 * x)
    assert 4 <= len(thin.points) <= 8
    assert thin.latest == 198
    assert all(y == pytest.approx(2 * x) for x, y in thin.points)
    weights = [thin.group_size] * (len(thin.points) - 1)
    weights.append(100 - sum(weights))
    assert sum(w * x for w, (x, _) in zip(weights, thin.points, strict=True)) == pytest.approx(sum(range(100)))


def test_chart_draws_points_where_they_are() -> None:
    points = curve((0, 10.0), (50, 20.0), (100, 30.0))
    svg = draw_chart(Chart("PSNR", " dB", (Series("held-out", points.points, points.latest),)))
    (line,) = re.findall(r'points="([^"]*)"', svg)
    places = [tuple(map(float, place.split(","))) for place in line.split()]
    xs, ys = zip(*places, strict=True)
    assert xs == (46, 252, 458)  # margins of 46 and 12 in 470
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2])
    assert 0 < ys[2] < ys[0] < 164
    assert "held-out <b>30 dB</b>" in svg
    ElementTree.fromstring(svg)
    labels = {float(at): float(text) for at, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)}
    assert list(labels.values()) == [10, 20, 30]
    for at, value in labels.items():  # labels stand where the curve has their values; they are 4 below their lines
        assert at - 4 - 10 == pytest.approx(ys[1] - (value - 20) / 10 * (ys[1] - ys[2]), abs=0.2)


def test_axis_ticks_are_round_and_inside() -> None:
    assert Axis(0, 97, 100).ticks == [0, 25, 50, 75]
    assert Axis(0.28, 0.52, 100, log=True).ticks == pytest.approx([0.3, 0.4, 0.5])
    assert Axis(0.5, 5e3, 100, log=True).ticks == pytest.approx([1, 10, 100, 1000])
    assert Axis(0.009, 0.6, 100, log=True).ticks == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    assert Axis(1, 100, 100, log=True)(10) == pytest.approx(50)


def test_y_axis_leaves_out_the_first_fall_of_a_loss() -> None:
    falling = Series("training", tuple((x, 50.0 if x < 3 else 1 + 1 / x) for x in range(1, 101)), None)
    assert y_axis([falling], log=True).high < 2
    assert y_axis([falling], log=False).high > 50
    negative = Series("training", ((1, -1.0), (100, 1.0)), None)
    assert not y_axis([negative], log=True).log
    assert y_axis([Series("training", ((5, 0.3),), 0.3)], log=True).low < 0.3


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.0, 0.0], [-1e-9, 1e9], [1e-30, 1e30]])
def test_chart_of_odd_values_can_be_drawn(values: list[float]) -> None:
    points = tuple((32.0 * i, value) for i, value in enumerate(values))
    for log in (True, False):
        svg = draw_chart(Chart("Loss", "", (Series("training", points, values[-1]),), log))
        ElementTree.fromstring(svg)
        assert "nan" not in svg


def test_charts_of_a_folder_run_show_the_model_once_it_learns() -> None:
    tokenizer = Stage("tokenizer", Path("t"), curves={"loss": curve((1, 1)), "psnr": curve((1, 20))})
    assert [c.title for c in charts([tokenizer, Stage("model", Path("m"))])] == [
        "Loss of the tokenizer", "PSNR of the tokenizer",
    ]  # fmt: skip
    learns = model(curves={"loss": curve((1, 1)), "val_loss": curve((1, 2)), "ema_distance": curve((1, 30))})
    shown = charts([tokenizer, learns])
    assert [c.title for c in shown] == ["Loss", "Fréchet distance", "PSNR of the tokenizer"]
    assert [s.label for s in shown[0].series] == ["training", "held-out"]
    assert charts([Stage("model", Path("m"))]) == []


# ---- the writer


def test_page_reads_a_damaged_log(tmp_path: Path) -> None:
    lines = ['{"images": 4, "loss": 2.0}', '{"images": 8, "lo', "[]", "null", '{"loss": 3.0}', '{"images": "9"}',
             '{"images": 12, "loss": null}', '{"images": 16, "loss": true, "psnr": ""}', '{"images": 20, "loss": 1.0}',
             '{"images": 24, "loss": NaN}', ""]  # fmt: skip
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\xfe{")
    page = Page(tmp_path, [model(tmp_path)], ())
    page.begin("model", 20, 100)
    assert page.stage.curves["loss"].points == ((4, 2.0), (20, 1.0))
    assert "psnr" not in page.stage.curves
    assert "20 of 100 images" in text_of(written(tmp_path))
    assert list(read_log(tmp_path / "none.jsonl")) == []


def test_page_times_the_session_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(page_module.time, "monotonic", lambda: now[0])
    page = Page(tmp_path, [model(tmp_path)], ())
    page.begin("model", 400, 1000)
    assert page.stage.seconds_left is None
    now[0] += 20
    page.advance(500)  # 5 a second, 500 to come
    assert page.stage.seconds_left == pytest.approx(100)
    assert page.stage.images_per_second == pytest.approx(5)
    page.write(500, {"loss": 0.3, "images_per_second": 6.0})
    page.advance(510)
    assert page.stage.images_per_second == 6  # of the log: without callbacks
    assert "2 min left" in text_of(written(tmp_path))
    page.advance(1010)
    assert page.stage.seconds_left == 0


def test_page_with_a_deadline_leaves_the_model_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(page_module.time, "monotonic", lambda: now[0])
    page = Page(tmp_path, [Stage("tokenizer", tmp_path / "tokenizer"), Stage("model", tmp_path)], ())
    page.deadline = 1000.0 + 30 * 60
    page.begin("tokenizer", 0, 1000)
    for seconds, images in ((60, 100), (60, 150)):  # it gets slower
        now[0] += seconds
        page.advance(images)
    assert page.stage.seconds_left == pytest.approx(680)
    assert "28 min left until about" in text_of(status(page.stages, NOW))
    now[0] += 1200
    page.advance(500)  # its time is more than there is
    assert "22 min left" in text_of(status(page.stages, NOW))
    page.deadline = None
    page.expect("model", 600.0)
    page.advance(500)
    assert "32 min left" in text_of(status(page.stages, NOW))


def test_page_is_written_now_and_then_and_for_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, texts = [1000.0], []
    monkeypatch.setattr(page_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(page_module, "write_text", lambda path, text, **how: texts.append(text))
    page = Page(tmp_path, [model(tmp_path)], ())
    page.begin("model", 0, 1000)
    for images in range(10, 60, 10):
        page.advance(images)
        page.write(images, {"loss": 0.3})
    assert len(texts) == 1
    now[0] += page_module.WRITE_INTERVAL_S
    page.advance(60)
    assert len(texts) == 2
    page.write(60, {"val_loss": 0.4})
    page.write_image(60, "samples", Image.new("L", (4, 4)))
    page.close()
    assert len(texts) == 5
    page.close()
    assert len(texts) == 5
    assert "held-out <b>0.4</b>" in texts[2]


def test_page_that_cannot_be_written_is_noted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / PAGE_FILE).mkdir()  # no file can take its place
    page = Page(tmp_path, [model(tmp_path)], ())
    log = RunLog(tmp_path, 100, 0, [], page)
    page.begin("model", 0, 100)
    log.write(4, val_loss=1.0)
    log.close()
    said = capsys.readouterr().err
    assert said.count("the page is not renewed") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [PAGE_FILE]


def test_page_of_several_stages_goes_through_them(tmp_path: Path) -> None:
    stages = [Stage("tokenizer", tmp_path / "tokenizer", 100), Stage("latents", tmp_path / "latents"),
              Stage("model", tmp_path, 200)]  # fmt: skip
    page = Page(tmp_path, stages, draw_commands(tmp_path))
    page.open("tokenizer")
    assert "Getting ready for training the tokenizer; then the latents and the model" in text_of(written(tmp_path))
    page.begin("tokenizer", 0, 100, sample_every=50)
    sheet(tmp_path / "tokenizer", 50)
    page.write_image(50, "reconstructions", Image.new("L", (20, 8)))
    page.write(50, {"psnr": 27.25})
    assert 'src="tokenizer/samples/000000000050.png"' in written(tmp_path)
    assert "27.2 dB" in written(tmp_path)
    page.finished = True
    page.close()
    assert "refresh" in written(tmp_path)
    page.show_latents(3, 30)
    assert "3 of 30 images" in text_of(written(tmp_path))
    page.show_latents(15, 30)
    assert page.stage.images == 15
    page.begin("model", 0, 200)
    assert [stage.state for stage in page.stages] == ["finished", "finished", "running"]
    page.close()
    assert "Stopped" in written(tmp_path)
    assert not page.finished
    # the same command again: another process, whose tokenizer is finished
    (tmp_path / "tokenizer" / "log.jsonl").write_text(json.dumps({"images": 100, "psnr": 28.0}) + "\n")
    again = Page(tmp_path, stages, draw_commands(tmp_path))
    again.begin("model", 0, 200)
    assert 'src="tokenizer/samples/000000000050.png"' in written(tmp_path)
    assert "28.0 dB" in written(tmp_path)


def test_page_of_a_resumed_run_forgets_what_was_cut(tmp_path: Path) -> None:
    for images in (40, 80):
        sheet(tmp_path, images)
    log = open_writers((), tmp_path, config={})[0]
    for images in (40, 80):
        log.write(images, {"step": images // 4, "loss": images / 100})
    open_writers((), tmp_path, config={}, images=60)
    page = Page(tmp_path, [model(tmp_path)], ())
    assert isinstance(page, Writer)
    page.begin("model", 60, 100)
    assert page.stage.curves["loss"].points == ((40, 0.4),)
    assert [s.images for s in page.stage.sheets] == [40]


class Interrupted(RunLog):
    """Breaks off the run after a step."""

    def advance(self, images: int, loss: float) -> None:
        super().advance(images, loss)
        raise RuntimeError


def test_run_leaves_a_page_with_its_newest_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_train_config(write_images(tmp_path / "pictures", 6), log_to=(), sample_every=16)
    run = open_tiny_run(config, tmp_path / "run")
    log = open_log(run)
    on_snapshot(run, log, 16, lambda snapshot: export_and_sample(snapshot, log))
    assert train(run, log)
    log.close()
    assert f"watch it: {(run.folder / PAGE_FILE).resolve().as_uri()}\n" in capsys.readouterr().err
    html = written(run.folder)
    newest = sorted(path.name for path in (run.folder / "samples").glob("*[0-9].png"))[-1]
    assert newest == f"{32:012d}.png"
    assert f'src="samples/{newest}"' in html
    assert all((run.folder / url).is_file() for url in re.findall(r'(?:src|href)="([^"]*)"', html))
    assert "Finished 40 images seen" in text_of(html)
    assert re.findall(r'<span title="(\w+)">', html) == ["across", "down"]
    assert f"mar sample {run.folder}" in text_of(html)
    # longer, and broken off
    more = open_tiny_run(replace(config, images=80), run.folder)
    page = Page(more.folder, [model(more.folder)], ())
    log = Interrupted(more.folder, 80, 40, [], page)
    page.begin("model", 40, 80)
    with pytest.raises(RuntimeError):
        train(more, log)
    log.close()
    assert "Stopped" in written(run.folder)
    assert "44 of 80 images" in text_of(written(run.folder))


def test_page_of_other_ranks_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_tiny_run(tiny_train_config(write_images(tmp_path / "pictures", 6), log_to=()), tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    assert type(open_log(run)) is Log
    assert not (run.folder / PAGE_FILE).exists()


def test_loss_that_is_not_finite_is_no_point(tmp_path: Path) -> None:
    page = Page(tmp_path, [model(tmp_path)], ())
    page.begin("model", 0, 100)
    for images, loss in ((4, math.nan), (8, 0.5), (12, math.inf)):
        page.write(images, {"loss": loss, "images_per_second": loss})
    page.close()
    assert page.stage.curves["loss"].points == ((8, 0.5),)
    assert "nan" not in written(tmp_path)
    assert "inf" not in text_of(written(tmp_path))
