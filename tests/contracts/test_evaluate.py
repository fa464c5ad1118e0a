"""`mar stats` and `mar evaluate`: a report, a sweep that goes on, and one line for what can't be."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import extractors
import numpy as np
import pytest
import tiny
from orientations import lay_down
from PIL import Image

from mar.checkpoint import files
from mar.cli import main
from mar.cli.evaluate import EvaluateOptions
from mar.cli.options import parse
from mar.evaluation.statistics import FeatureStats

JUDGE = ["--features", f"{extractors.__file__}:tiny", "--device", "cpu"]
DRAW = ["--allow-broken", "--count", "12"]
SWEEP = ["--sweep", "cfg=1,3", "--sweep", "K=1,4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `model.safetensors` of 4x4 pictures, 8x8 ones in `pictures`, their statistics at 4x4."""
    folder = tmp_path_factory.mktemp("place")
    tiny.tiny_pipeline().save(folder / "model.safetensors")
    tiny.write_images(folder / "pictures", 20)
    found = folder / "statistics.npz"
    assert main(["stats", str(folder / "pictures"), "--out", str(found), "--image-size", "4", *JUDGE]) == 0
    return folder


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("mar.evaluation.evaluate.KID_SUBSETS", 5)


def evaluate(*arguments: str | Path) -> int:
    return main(["evaluate", *map(str, arguments), *JUDGE])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, judge: bool = True) -> str:
    """Runs a command that must fail as a user's mistake does, and returns what it said."""
    capsys.readouterr()
    assert main([*map(str, arguments), *(JUDGE if judge else ())]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("mar: ")
    assert said.err.count("\n") == 1, said.err
    assert said.out == ""
    return said.err


def png(folder: Path, *sizes: int) -> Path:
    folder.mkdir()
    for i, side in enumerate(sizes):
        Image.new("L", (side, side), 9 * i).save(folder / f"{i}.png")
    return folder


# ---- stats


def test_stats_of_images_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.npz"
    assert (
        main(["stats", "pictures", "--out", str(out), "--count", "9", "--keep-features", "--batch", "2", *JUDGE]) == 0
    )
    said = capsys.readouterr()
    assert said.out == f"{out}: 6 features of 9 pictures, with the features\n"
    assert said.err == "keeping the features of 9 pictures takes 216 bytes of memory\n"
    found = FeatureStats.load(out)
    assert found.count == 9
    assert found.provenance is not None
    assert found.provenance.size == (8, 8)
    assert found.provenance.source == "pictures (train)"
    assert found.features is not None
    assert list(tmp_path.iterdir()) == [out]


def test_stats_and_evaluate_turn_upright_if_told(tmp_path: Path) -> None:
    lay_down(tiny.write_images(tmp_path / "pictures", 20))
    means = []
    for name, where, more in (("plain", "pictures", []), ("up", tmp_path / "pictures", ["--upright"])):
        assert main(["stats", str(where), "--out", str(tmp_path / f"{name}.npz"), *more, *JUDGE]) == 0
        means.append(FeatureStats.load(tmp_path / f"{name}.npz").mean)
    assert means[0].tolist() == means[1].tolist()
    distances = []
    for more in (["--upright"], []):
        report = tmp_path / "report.json"
        assert evaluate(tmp_path / "pictures", "--reference", "pictures", "--out", report, *more) == 0
        distances.append(json.loads(report.read_text())["distance"])
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances[1] > 1e-3


def test_stats_skips_and_counts_broken_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_images(tmp_path / "pictures", 20)
    (data / "across" / "7.png").write_bytes(b"no picture")
    (data / "down" / "4.png").write_bytes(b"")
    out, clean = tmp_path / "s.npz", tmp_path / "clean.npz"
    assert main(["stats", str(data), "--out", str(out), "--batch", "1", *JUDGE]) == 0
    said = capsys.readouterr()
    assert said.err == (
        f"mar: warning: 2 of the 20 pictures of {data} (train) can't be read and are left out, such as "
        f"{data}/across/7.png (it is no picture of a known kind): the figures rest on the other 18\n"
    )
    assert said.out == f"{out}: 6 features of 18 pictures\n"
    for name in ("across/7.png", "down/4.png"):
        (data / name).unlink()
    assert main(["stats", str(data), "--out", str(clean), *JUDGE]) == 0
    assert np.allclose(FeatureStats.load(clean).covariance, FeatureStats.load(out).covariance, rtol=1e-5, atol=1e-9)


def test_evaluate_says_how_many_pictures_it_rests_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_images(tmp_path / "pictures", 20)
    (data / "across" / "1.png").write_bytes(b"no picture")  # the first of all
    report, grid = tmp_path / "r.json", tmp_path / "g.png"
    assert evaluate(data, "--reference", data, "--reference-split", "train", "--neighbors-grid", grid, "--out", report,
                    "--precision", "--batch", "3") == 0  # fmt: skip
    said = capsys.readouterr()
    assert said.err.count("1 of the 20 pictures of ") == 2, "the pictures and the reference"
    assert "19 against 19" in said.out
    values = json.loads(report.read_text())
    assert (values["count"], values["reference_count"], values["recall"]) == (19, 19, 1.0)
    assert sum("the figures rest on the other 19" in line for line in values["warnings"]) == 2
    assert all(pair["picture"] == pair["reference"] > 0 for pair in values["pairs"]), "numbers are those of the set"
    pixels = np.asarray(Image.open(grid))
    assert np.array_equal(pixels[:, : pixels.shape[1] // 2], pixels[:, pixels.shape[1] // 2 :])


@pytest.mark.parametrize("left", [0, 1])
def test_stats_of_too_few_readable_pictures_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], left: int
) -> None:
    data = png(tmp_path / "pictures", *[8] * 5)
    for i in range(left, 5):
        (data / f"{i}.png").write_bytes(b"no picture")
    said = refused(capsys, "stats", data, "--out", tmp_path / "s.npz")
    assert f"{5 - left} of the 5 pictures of {data} (train) can't be read, such as {data}/{left}.png" in said
    assert f"; {left} are left, expected at least 2; replace them" in said
    assert not (tmp_path / "s.npz").exists()
    said = refused(capsys, "evaluate", "pictures", "--reference", data, "--reference-split", "train")
    assert "can't be read, such as" in said


def test_evaluate_of_an_empty_split_has_no_inception_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = png(tmp_path / "pictures", *[8] * 6)
    (data / "2.png").write_bytes(b"no picture")
    report = tmp_path / "r.json"
    assert evaluate(data, "--reference", "statistics.npz", "--image-size", "4", "--splits", "6", "--out", report) == 0
    values = json.loads(report.read_text())
    assert (values["count"], values["inception_score"]) == (5, None)
    assert any("no Inception Score: 5 pictures leave one of 6 splits empty" in line for line in values["warnings"])


def test_stats_convert_adms_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mu, sigma = np.arange(6.0), np.diag(np.arange(1.0, 7.0))
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma)
    assert main(["stats", str(tmp_path / "adm.npz"), "--out", str(tmp_path / "ours.npz"), *JUDGE]) == 0
    assert "an unknown number of pictures" in capsys.readouterr().out
    with np.load(tmp_path / "ours.npz") as held:
        assert np.array_equal(held["mu"], mu)
        assert np.array_equal(held["sigma"], sigma)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere", "--out", "o.npz"], ["nowhere", "does not exist"]),
        (["pictures", "--out", "o.txt"], ["o.txt", ".npz"]),
        (["statistics.npz", "--out", "statistics.npz"], ["out is statistics.npz, and so is pictures"]),
        (["statistics.npz", "--out", "o.npz", "--count", "5"], ["count needs pictures"]),
        (["statistics.npz", "--out", "o.npz", "--keep-features"], ["keep-features needs pictures"]),
        (["statistics.npz", "--out", "o.npz", "--image-size", "8"], ["image-size needs pictures"]),
        (["pictures", "--out", "o.npz", "--count", "1"], ["count: got 1", "at least 2"]),
        (["pictures", "--out", "o.npz", "--batch", "0"], ["batch: got 0"]),
        (["pictures", "--out", "o.npz", "--image-size", "0"], ["image-size: got 0"]),
        (["pictures", "--out", "o.npz", "--features", "resnet"], ["resnet", "efficientnet-lite0"]),
        (["pictures", "--out", "o.npz", "--device", "tpu"], ["tpu"]),
    ],
)
def test_stats_invalid_options_are_refused(
    options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = [] if "--features" in options else JUDGE[:2]
    said = refused(capsys, "stats", *own, *options, judge=False)
    assert all(word in said for word in words), said
    assert not list(Path().glob("o.*"))


# ---- one report


def test_evaluate_model_against_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "reports" / "r.json"
    assert evaluate("model.safetensors", "--reference", "statistics.npz", *DRAW, "--out", out) == 0
    said = capsys.readouterr()
    report = json.loads(out.read_text())
    assert report["metric"] == "FD (tiny)"
    assert report["distance"] > 0
    assert (report["count"], report["reference_count"]) == (12, 20)
    assert report["inception_score"] >= 1
    assert report["kernel_distance"] is None
    assert report["agreement"] is None
    assert f"{report['distance']:.4g}" in said.out
    assert "12 against 20" in said.out
    assert said.err == ""


def test_evaluate_all_metrics_for_any_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for batch in (5, 64):
        out = tmp_path / f"{batch}.json"
        more = ["--kid", "--precision", "--splits", "2", "--classifier", f"{extractors.__file__}:insects"]
        more += ["--batch", str(batch), "--out", str(out)]
        assert evaluate("model.safetensors", "--reference", "pictures", "--seed", "1", *DRAW, *more) == 0
        found.append(json.loads(out.read_text()))
    said = capsys.readouterr()
    assert "keeping the features of 20 pictures" in said.err
    assert "keeping the features of 12 pictures" in said.err
    one, other = ({k: v for k, v in report.items() if isinstance(v, float) and k != "seconds"} for report in found)
    assert one == pytest.approx(other, rel=1e-4)
    assert len(one) == 9
    assert found[0]["worst_class"] == found[1]["worst_class"] in ("ant", "bee", "cat")


@pytest.mark.parametrize("kind", ["folder", "npz", "statistics"])
def test_evaluate_images_against_themselves_is_zero(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = np.stack([np.asarray(Image.open(p)) for p in sorted(Path("pictures").glob("*/*.png"))])
    np.savez_compressed(tmp_path / "p.npz", arr_0=pictures[..., None].repeat(3, 3))
    assert main(["stats", "pictures", "--out", str(tmp_path / "s.npz"), *JUDGE]) == 0
    what = {"folder": "pictures", "npz": tmp_path / "p.npz", "statistics": tmp_path / "s.npz"}[kind]
    assert evaluate(what, "--reference", tmp_path / "s.npz", "--out", tmp_path / "r.json") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["distance"] <= 1e-6
    assert report["count"] == 20
    assert (report["inception_score"] is None) == (kind == "statistics")


@pytest.fixture(scope="module")
def learned(place: Path) -> Path:
    """What the model draws with seed 0, as if it had learned it by heart; beside it `others.npz`, of seed 1."""
    for seed, name in enumerate(("learned.npz", "others.npz")):
        draw = ["--count", "120", "--seed", str(seed), "--out", str(place / name), "--device", "cpu", "--allow-broken"]
        assert main(["generate", str(place / "model.safetensors"), *draw]) == 0
    return place / "learned.npz"


@pytest.mark.parametrize(("seed", "least", "most"), [(0, 1, 1), (2, 0, 0.1)])
def test_evaluate_counts_copies(
    seed: int, least: float, most: float, learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seed 0 draws what was learned again; seed 2 as much of it as held-out pictures do."""
    out, sheet = tmp_path / "r.json", tmp_path / "sheets" / "near.png"
    more = ["--seed", str(seed), "--held-out", "others.npz", "--neighbors-grid", sheet, "--out", out, "--batch", "50"]
    assert evaluate("model.safetensors", "--reference", learned, "--count", "120", "--allow-broken", *more) == 0
    report = json.loads(out.read_text())
    assert least <= report["copies"] <= most
    assert report["held_out_distance"] > 0
    assert (report["neighbour_distance"] < 1e-5) == (seed == 0)
    assert f"{report['copies']:.2%} (nearer than 99% of held-out pictures)" in capsys.readouterr().out
    distances = [pair["distance"] for pair in report["pairs"]]
    assert distances == sorted(distances)
    assert all(pair["picture"] == pair["reference"] for pair in report["pairs"]) == (seed == 0)
    with Image.open(sheet) as image:
        shown = np.asarray(image)
        assert json.loads(image.info["mar"])["pairs"] == report["pairs"]
    assert shown.shape == (8 * 112, 2 * 112, 3)
    with np.load(learned) as held:
        rows = [held["arr_0"][pair["reference"]] for pair in report["pairs"]]
    right = np.broadcast_to(np.concatenate(rows), (32, 4, 3))
    assert np.array_equal(shown[::28, 112::28], right)
    assert np.array_equal(shown[::28, :112:28], right) == (seed == 0)


def test_evaluate_neighbors_of_statistics_with_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept.npz"
    assert main(["stats", "pictures", "--out", str(kept), "--image-size", "4", "--keep-features", *JUDGE]) == 0
    assert evaluate(kept, "--reference", kept, "--neighbors") == 0
    said = capsys.readouterr().out
    assert "nearest reference picture        0 (median)" in said
    assert "copies" not in said
    assert "are in the reference" in refused(
        capsys, "evaluate", "model.safetensors", "--reference", kept, "--held-out", kept
    )


def test_evaluate_sweep_of_copies(tmp_path: Path, learned: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "sw"
    near = ["--reference", learned, "--held-out", "others.npz", "--sweep", "K=1,4", "--out", folder]
    assert evaluate("model.safetensors", *DRAW, *near) == 0
    one, four = (row["report"]["copies"] for row in json.loads((folder / "sweep.json").read_text())["rows"])
    assert four == 1  # this is how the pictures were drawn
    assert one < 0.5
    header = (folder / "sweep.csv").read_text().splitlines()[0]
    assert ",copies," in header
    assert "pairs" not in header


def test_evaluate_fewer_images_than_features_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("pictures", "--reference", "pictures", "--count", "5") == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "5 pictures for 6 features: the covariance is singular" in said.err
    assert "5 against 20" in said.out


def never(*_: object, **__: object) -> None:
    raise AssertionError("nothing should be drawn")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.safetensors", "--reference", "statistics.npz", "--kid"], ["need the features", "--keep-features"]),
        (["model.safetensors", "--reference", "statistics.npz", "--precision"], ["statistics.npz", "--keep-features"]),
        (["model.safetensors", "--reference", "statistics.npz", "--neighbors"], ["neighbors", "--keep-features"]),
        (["model.safetensors", "--reference", "pictures", "--held-out", "statistics.npz"], ["--keep-features"]),
        (["model.safetensors", "--reference", "pictures", "--held-out", "nowhere"], ["nowhere"]),
        (["model.safetensors", "--reference", "statistics.npz", "--neighbors-grid", "g.png"], ["needs pictures"]),
        (["statistics.npz", "--reference", "pictures", "--neighbors-grid", "g.png"], ["needs pictures"]),
        (["model.safetensors", "--reference", "pictures", "--neighbors-grid", "g.jpg"], ["g.jpg", ".png"]),
        (["model.safetensors", "--reference", "pictures", "--neighbors-grid", "g.png", "--sweep", "K=1"], ["sweep"]),
        (["model.safetensors", "--reference", "large.npz"], ["(8, 8) and (4, 4)", "one resolution"]),
        (["model.safetensors", "--reference", "pictures.npz"], ["8x8", "expected 4x4"]),
        (["model.safetensors", "--reference", "nothing.npz"], ["nothing.npz"]),
        (["model.safetensors", "--reference", "empty"], ["no pictures in empty"]),
        (["model.safetensors", "--reference", "statistics.npz", "--count", "1"], ["count: got 1"]),
        (["model.safetensors", "--reference", "statistics.npz", "--splits", "0"], ["splits: got 0"]),
        (["model.safetensors", "--reference", "statistics.npz", "--seed", "-1"], ["seed: got -1"]),
        (["model.safetensors", "--reference", "statistics.npz", "--steps", "0"], ["steps is 0"]),
        (["model.safetensors", "--reference", "statistics.npz", "--image-size", "8"], ["image-size: got 8", "4x4"]),
        (["model.safetensors", "--reference", "statistics.npz", "--out", "empty"], ["out: got the folder empty"]),
        (["model.safetensors", "--reference", "statistics.npz", "--out", "r.txt"], ["out: got r.txt", ".json"]),
        (["pictures", "--reference", "statistics.npz", "--out", "statistics.npz"], ["got statistics.npz", ".json"]),
        (["model.safetensors", "--reference", "pictures", "--neighbors-grid", "g.png", "--out", "g.png"], [".json"]),
        (["model.safetensors", "--reference", "r.json", "--out", "./r.json"], ["out is r.json, and so is reference"]),
        (["model.safetensors", "--reference", "pictures", "--sweep", "K=1", "--out", "pictures"], ["so is reference"]),
        (["no-model", "--reference", "statistics.npz"], ["no-model"]),
        (["empty", "--reference", "statistics.npz"], ["no pictures in empty"]),
        (["nothing.npz", "--reference", "statistics.npz"], ["nothing.npz"]),
        (["damaged.npz", "--reference", "statistics.npz"], ["damaged.npz", "can't be read"]),
        (["floats.npz", "--reference", "statistics.npz"], ["float32", "expected uint8"]),
        (["unnamed.npz", "--reference", "statistics.npz"], ["no arr_0"]),
        (["statistics.npz", "--reference", "statistics.npz", "--count", "9"], ["count needs pictures"]),
        (["pictures", "--reference", "pictures", "--guidance-scale", "4"], ["guidance-scale is of drawing"]),
        (["pictures", "--reference", "pictures", "--preset", "fast"], ["leave --preset out"]),
        (["pictures", "--reference", "pictures", "--dtype", "int8"], ["leave --dtype out"]),
        (["pictures", "--reference", "pictures", "--seed", "7"], ["leave --seed out"]),
        (["statistics.npz", "--reference", "statistics.npz", "--allow-broken"], ["leave --allow-broken out"]),
        (["pictures", "--reference", "pictures", "--classifier-weights", "w.pt"], ["name it with --classifier"]),
        (["pictures", "--reference", "statistics.npz", "--sweep", "cfg=1,2"], ["sweep", "pictures is no model"]),
        (["statistics.npz", "--reference", "statistics.npz", "--sweep", "cfg=1,2"], ["is no model"]),
        (["no-model", "--reference", "statistics.npz", "--sweep", "cfg=1,2"], ["no-model"]),
        (["model.safetensors", "--reference", "statistics.npz", "--sweep", "gfc=1,2"], ["gfc", "cfg"]),
        (["model.safetensors", "--reference", "statistics.npz", "--sweep", "K=0,2"], ["steps is 0"]),
        (["model.safetensors", "--reference", "statistics.npz", "--sweep", "diffusion_steps=1,2000"], ["2000", "1000"]),
    ],
)  # fmt: skip
def test_evaluate_invalid_request_fails_before_sampling(
    options: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("empty").exists():
        Path("empty").mkdir()
        pictures = np.zeros((9, 8, 8, 3), np.uint8)
        np.savez("pictures.npz", arr_0=pictures)
        np.savez("floats.npz", arr_0=pictures.astype(np.float32))
        np.savez("unnamed.npz", pictures=pictures)
        Path("damaged.npz").write_bytes(Path("pictures.npz").read_bytes()[:500])
        assert main(["stats", "pictures", "--out", "large.npz", *JUDGE]) == 0
    monkeypatch.setattr("mar.evaluation.session.collect", never)
    said = refused(capsys, "evaluate", *options)
    assert all(word in said for word in words), said
    assert not Path("runs").exists()


@pytest.mark.parametrize(("judge", "words"), [("other", "tiny and of other"), ("retrained", "other weights")])
def test_evaluate_other_extractors_statistics_are_refused(
    judge: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mar.evaluation.session.collect", never)
    arguments = ["--reference", "statistics.npz", "--features", f"{extractors.__file__}:{judge}", "--device", "cpu"]
    assert words in refused(capsys, "evaluate", "model.safetensors", *arguments, judge=False)


def test_evaluate_mismatched_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = png(tmp_path / "mixed", 8, 8, 6)
    said = refused(capsys, "evaluate", mixed, "--reference", "pictures")
    assert "2.png is 6x6, expected 8x8 as before it" in said
    assert "--image-size" in said
    assert evaluate(mixed, "--reference", "pictures", "--image-size", "4") == 0
    said = refused(capsys, "evaluate", png(tmp_path / "small", 6, 6), "--reference", "pictures")
    assert "small (train) 6x6, pictures (test) 8x8" in said


def test_class_accuracy_without_shared_classes_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mar.evaluation.session.collect", never)
    judge = ["--classifier", f"{extractors.__file__}:brightness"]
    said = refused(capsys, "evaluate", "model.safetensors", "--reference", "statistics.npz", *DRAW, *judge)
    assert "brightness knows the classes dark, middling, bright" in said
    assert "ant, bee, cat" in said
    said = refused(capsys, "evaluate", "statistics.npz", "--reference", "statistics.npz", *judge)
    assert "classifier needs pictures" in said


def test_evaluate_broken_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    wild = ["--count", "4", "--temperature", "1000"]
    said = refused(capsys, "evaluate", "model.safetensors", "--reference", "statistics.npz", *wild)
    assert "broken" in said
    assert "--allow-broken" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", ["stats", "evaluate", "sweep"])
def test_evaluate_stopped_is_one_line(
    verb: str, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Any, images: Any) -> Any:
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("it was not stopped")

    monkeypatch.setattr("mar.evaluation.features.ModuleExtractor.__call__", stop)
    arguments = {
        "stats": ["stats", "pictures", "--out", str(tmp_path / "s.npz")],
        "evaluate": ["evaluate", "pictures", "--reference", "pictures", "--out", str(tmp_path / "r.json")],
        "sweep": ["evaluate", "model.safetensors", "--reference", "pictures", *SWEEP, "--out", str(tmp_path / "sw")],
    }[verb]
    assert main([*arguments, *JUDGE]) == 130
    said = capsys.readouterr().err
    assert said == f"mar: stopped; {'the same command goes on' if verb == 'sweep' else 'nothing was written'}\n"
    assert list(tmp_path.iterdir()) == []


def test_evaluate_stopped_in_neighbors_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("mar.evaluation.neighbors._read_image", stop)
    out = ["--out", tmp_path / "r.json", "--neighbors-grid", tmp_path / "g.png"]
    assert evaluate("pictures", "--reference", "pictures", *out) == 130
    said = capsys.readouterr()
    assert "FD (tiny)" in said.out
    assert said.err.endswith("mar: stopped; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


# ---- sweeps


def sweep(out: Path, *more: str) -> list[str]:
    return ["evaluate", "model.safetensors", "--reference", "statistics.npz", *DRAW, *SWEEP, *more, "--out", str(out)]


def table(folder: Path) -> dict[str, Any]:
    """sweep.json without the seconds; the csv has the same rows."""
    held: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    lines = (folder / "sweep.csv").read_text().splitlines()
    assert len(lines) == len(held["rows"]) + 1
    assert lines[-1].split(",")[2] == str(held["rows"][-1]["report"]["distance"])
    for row in held["rows"]:
        del row["report"]["seconds"]
    return held


@pytest.fixture(scope="module")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    before, folder = Path.cwd(), tmp_path_factory.mktemp("sweep") / "sw"
    os.chdir(place)
    try:
        assert main([*sweep(folder), *JUDGE]) == 0
    finally:
        os.chdir(before)
    return folder


def test_evaluate_sweep_writes_a_table(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = table(undisturbed)
    assert [row["point"] for row in held["rows"]] == [
        {"guidance_scale": guidance, "steps": steps} for guidance in (1.0, 3.0) for steps in (1, 4)
    ]
    assert len({row["report"]["distance"] for row in held["rows"]}) == 4
    assert sorted(path.name for path in undisturbed.iterdir()) == ["sweep.csv", "sweep.json", "sweep.png"]
    with Image.open(undisturbed / "sweep.png") as image:
        image.load()
    assert main([*sweep(undisturbed), *JUDGE]) == 0  # nothing is left to do
    said = capsys.readouterr()
    assert said.err == ""
    best = min(held["rows"], key=lambda row: row["report"]["distance"])
    assert f"guidance scale {best['point']['guidance_scale']}, steps {best['point']['steps']}: FD (tiny)" in said.out


def test_evaluate_sweep_over_presets_and_solvers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    axes = [
        "--sweep",
        "preset=exact,fast",
        "--sweep",
        "solver=ancestral,dpm++2s",
        "--sweep",
        "diffusion_steps_end=none,1",
    ]
    out = ["--out", str(tmp_path / "sw")]
    model = tiny.tiny_pipeline()
    model.sampling = replace(tiny.FAST, steps=8, diffusion_steps=10)  # more than those of a preset
    model.save(tmp_path / "slow.safetensors")
    assert evaluate(tmp_path / "slow.safetensors", "--reference", "statistics.npz", *DRAW, *axes, *out) == 0
    held = json.loads((tmp_path / "sw" / "sweep.json").read_text())
    assert len(held["rows"]) == 8
    assert held["rows"][5]["point"] == {"preset": "fast", "solver": "ancestral", "diffusion_steps_end": 1}
    assert len({row["report"]["distance"] for row in held["rows"]}) == 8
    assert held["settings"]["order"] == "random"
    assert (tmp_path / "sw" / "sweep.png").exists()


@pytest.mark.parametrize("moment", [1, 2, 6, 8, 12])
def test_evaluate_stopped_sweep_continues(
    moment: int, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the `moment`-th file that is to be put on the disk: three a point, the table, the .csv and the plot."""
    seen, write = 0, files.write_atomically

    def stopping(path: Path, make: Callable[[Path], None], needed: int = 0, *, durable: bool = True) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            raise KeyboardInterrupt
        write(path, make, needed, durable=durable)

    monkeypatch.setattr("mar.evaluation.sweep.plot", lambda table, path: files.write_text(path, "quick"))
    folder, measured = tmp_path / "sw", (moment + 1) // 3
    with monkeypatch.context() as patch:
        patch.setattr("mar.checkpoint.files.write_atomically", stopping)
        assert main([*sweep(folder), *JUDGE]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "mar: stopped; the same command goes on"
    assert main([*sweep(folder, "--batch", "5"), *JUDGE]) == 0  # how many at once is no setting
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == [f"{i + 1} of {4 - measured}" for i in range(4 - measured)]
    assert (folder / "sweep.png").exists()
    one, other = table(folder), table(undisturbed)
    assert one["settings"] == other["settings"]
    for a, b in zip(one["rows"], other["rows"], strict=True):
        assert a["point"] == b["point"]
        measures = [{k: v for k, v in row["report"].items() if isinstance(v, float)} for row in (a, b)]
        assert measures[0] == pytest.approx(measures[1], rel=1e-5)
        assert len(measures[0]) == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed", "1"], "seed 0 -> 1"),
        (["--temperature", "0.5"], "temperature 1.0 -> 0.5"),
        (["--sweep", "temperature=0.5,1"], "swept guidance scale, steps -> guidance scale, steps, temperature"),
        (["--count", "14"], "pictures 12 -> 14"),
        (["--features", f"{extractors.__file__}:other", "--reference", "pictures"], "features"),
        (["--splits", "3"], "splits 10 -> 3"),
    ],
)
def test_evaluate_sweep_of_other_settings_is_refused(
    more: list[str], words: str, undisturbed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mar.evaluation.session.collect", never)
    before = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    said = refused(capsys, *sweep(undisturbed), *JUDGE, *more, judge=False)
    assert "holds another sweep" in said
    assert words in said
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir()} == before


def test_evaluate_sweep_against_another_reference_is_refused(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = FeatureStats.load(Path("statistics.npz"))
    replace(first, mean=first.mean + 1).save(tmp_path / "statistics.npz")
    said = refused(capsys, *sweep(undisturbed), "--reference", tmp_path / "statistics.npz")
    assert f"reference_digest {first.digest()} -> " in said


def test_evaluate_sweep_with_more_values_measures_only_these(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mar.evaluation.sweep.plot", lambda table, path: None)
    folder = tmp_path / "sw"
    folder.mkdir()
    (folder / "sweep.json").write_bytes((undisturbed / "sweep.json").read_bytes())
    arguments = [argument.replace("K=1,4", "K=1,2,4") for argument in sweep(folder)]
    capsys.readouterr()
    assert main([*arguments, *JUDGE]) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()] == ["1 of 2", "2 of 2"]
    assert len(table(folder)["rows"]) == 6


def test_old_names_of_options_still_work(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pictures", "--reference", "pictures", "--neighbours", "--neighbours-grid", "near.png"]
    for _ in range(2):
        options = parse(EvaluateOptions, "evaluate", words)
        assert options.neighbors
        assert options.neighbors_grid == Path("near.png")
    assert capsys.readouterr().err == (
        "mar: --neighbours is now --neighbors; the old name still works\n"
        "mar: --neighbours-grid is now --neighbors-grid; the old name still works\n"
    )


def test_evaluate_upright_without_pictures_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_images(tmp_path / "pictures", 20)
    stats = tmp_path / "stats.npz"
    assert main(["stats", str(tmp_path / "pictures"), "--out", str(stats), *JUDGE]) == 0
    assert evaluate(stats, "--reference", stats, "--upright") == 2
    assert "--upright: got no folder or other source of pictures" in capsys.readouterr().err


def test_evaluate_other_sizes_are_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_images(tmp_path / "pictures", 20)
    stats = tmp_path / "stats.npz"
    assert main(["stats", str(tmp_path / "pictures"), "--image-size", "16", "--out", str(stats), *JUDGE]) == 0
    monkeypatch.setattr("mar.evaluation.session.collect", lambda *arguments, **options: pytest.fail("measured"))
    assert evaluate(tmp_path / "pictures", "--reference", stats) == 2
    said = capsys.readouterr().err
    assert "got pictures of different sizes: " in said
    assert "8x8" in said
    assert "16x16" in said
