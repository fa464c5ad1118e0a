"""`mar generate`: killed and started again it ends with the same bytes; mistakes are one line and touch nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import processes
import pytest
import tiny
from PIL import Image
from torch import Tensor

from mar.cli import main
from mar.pipeline import Pipeline

OUT = {"png": "out", "npz": "out.npz", "webdataset": "out"}
PLAN = ["--count", "7", "--batch", "3", "--seed", "2", "--device", "cpu", "--allow-broken"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    tiny.tiny_pipeline().save(path)
    return path


def command(model: Path, folder: Path, kind: str, *more: str) -> list[str]:
    return ["generate", str(model), "--out", str(folder / OUT[kind]), "--format", kind, *PLAN, *more]


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of each format."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in OUT}
    assert [main(command(model, folder, kind)) for kind, folder in folders.items()] == [0, 0, 0]
    return {kind: processes.read_tree(folder) for kind, folder in folders.items()}


@pytest.mark.parametrize("moment", [3, 6, 10])
@pytest.mark.parametrize("kind", OUT)
def test_generate_killed_and_restarted_gives_the_same_bytes(
    kind: str, moment: int, model: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """While the first picture or part is written, after one has got its name, after parts were put together."""
    folder, said = tmp_path / "files", tmp_path / "said"
    code = processes.run_to_end(command(model, folder, kind), said, die=(moment, signal.SIGKILL))
    assert code == -signal.SIGKILL, said.read_text()
    half = processes.read_tree(folder)
    assert half != undisturbed[kind]
    left = any(".mar-tmp-" in name for name in half)
    assert left == (moment == 3 or (kind, moment) == ("png", 10))
    assert main(command(model, folder, kind)) == 0
    assert processes.read_tree(folder) == undisturbed[kind]


@pytest.mark.parametrize(
    ("kind", "number"), [*((kind, signal.SIGTERM) for kind in OUT), ("png", signal.SIGINT)], ids=str
)
def test_generate_stopped_leaves_no_partial_file(
    kind: str, number: signal.Signals, model: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    folder, said = tmp_path / "files", tmp_path / "said"
    assert processes.run_to_end(command(model, folder, kind), said, die=(5, number)) == 130
    assert said.read_text().splitlines()[-1] == "mar: stopped; the same command goes on"
    left = processes.read_tree(folder)
    assert not [name for name in left if Path(name).name.startswith(".")]
    assert all(undisturbed[kind].get(name, data) == data for name, data in left.items())
    assert main(command(model, folder, kind)) == 0
    assert processes.read_tree(folder) == undisturbed[kind]


@pytest.mark.parametrize("kind", OUT)
def test_generate_finished_output_is_not_drawn_again(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(model, tmp_path, kind)) == 0
    assert "7 drawn in" in capsys.readouterr().out
    monkeypatch.setattr(Pipeline, "stream", None)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert main(command(model, tmp_path, kind)) == 0
    assert capsys.readouterr().out == f"{tmp_path / OUT[kind]} is finished: 7 pictures; nothing to do\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_generate_draws_what_sample_draws(model: Path, tmp_path: Path) -> None:
    plain = ["--device", "cpu", "--allow-broken", "--steps", "3"]
    assert (
        main(["generate", str(model), "--out", str(tmp_path / "out"), "--labels", "cat", "--count", "9", *plain]) == 0
    )
    assert main(["sample", str(model), "--out", str(tmp_path / "one"), "--labels", "cat", "--seed", "8", *plain]) == 0
    with Image.open(tmp_path / "out/cat/000008.png") as many, Image.open(tmp_path / "one/cat-00008.png") as one:
        assert np.abs(np.asarray(many).astype(int) - np.asarray(one)).max() <= 1
        facts, of_one = json.loads(many.text["mar"]), json.loads(one.text["mar"])
        assert (facts["seed"], facts["label"], facts["steps"], facts["model"]) == (8, 2, 3, model.name)
        shared = set(facts) & set(of_one) - {"model", "label"}
        assert {key: facts[key] for key in shared} == {key: of_one[key] for key in shared}


def test_generate_is_independent_of_batch_size(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, decode = [], Pipeline._decode

    def counted(self: Pipeline, latents: Tensor) -> Tensor:
        drawn.append(len(latents))
        return decode(self, latents)

    monkeypatch.setattr(Pipeline, "_decode", counted)
    pictures = {}
    for batch in (1, 4, 64):
        out = tmp_path / f"{batch}.npz"
        arguments = ["generate", str(model), "--out", str(out), "--per-class", "3", "--batch", str(batch)]
        assert main([*arguments, "--device", "cpu", "--allow-broken"]) == 0
        with np.load(out) as file:
            pictures[batch] = file["arr_0"].astype(int)
            assert file["arr_1"].tolist() == [0, 1, 2] * 3
    assert drawn == [1] * 9 + [4, 4, 1] + [9]
    assert len(np.unique(pictures[1].reshape(9, -1), axis=0)) == 9
    assert max(np.abs(pictures[1] - pictures[batch]).max() for batch in (4, 64)) <= 1


def test_generate_labels_from_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\n0\nnone\n\nbee\ncat\n")
    arguments = ["generate", str(model), "--out", str(tmp_path / "out.npz"), "--device", "cpu", "--allow-broken"]
    assert main([*arguments, "--labels-file", str(tmp_path / "labels.txt")]) == 0
    with np.load(tmp_path / "out.npz") as file:
        assert file["arr_1"].tolist() == [2, 0, -1, 1, 2]
        assert file["arr_0"].shape == (5, 4, 4, 3)


def test_generate_default_is_fifty_of_each_class(model: Path, tmp_path: Path) -> None:
    assert main(["generate", str(model), "--out", str(tmp_path), "--device", "cpu", "--allow-broken"]) == 0
    assert [len(list((tmp_path / name).iterdir())) for name in ("ant", "bee", "cat")] == [50, 50, 50]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", "0"], "batch: got 0, expected at least 1"),
        (["--count", "0"], "count: got 0"),
        (["--per-class", "0"], "got 0, expected at least 1"),
        (["--per-class", "2", "--count", "3"], "--per-class and --count: got both"),
        (["--seed", "-1"], "seed: got -1"),
        (["--labels", "wolf"], "label 'wolf' is not a class"),
        (["--labels-file", "nothing.txt"], "nothing.txt"),
        (["--labels-file", "labels.txt"], "label 3 is out of range"),
        (["--labels-file", "labels.txt", "--count", "2"], "leave --labels, --per-class and --count out"),
        (["--format", "npz"], "expected a file .npz for npz"),
        (["--format", "jpeg"], "mar generate --help"),
        (["--out", "x.npz", "--format", "png"], "expected a file .npz for npz"),
        (["--guidance-scale", "-1"], "--guidance-scale is -1"),
        (["--diffusion-steps", "1001"], "1001"),
        (["--device", "tpu"], "'tpu'"),
        (["--bogus", "1"], "--bogus"),
        (["--out", "labels.txt"], "labels.txt is a file"),
    ],
)
def test_generate_invalid_options_are_refused(
    options: list[str],
    words: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("labels.txt").write_text("0\n3\n")
    assert main(["generate", str(model), "--out", "out", "--device", "cpu", *options]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("mar: ")
    assert said.err.count("\n") == 1, said.err
    assert words in said.err
    assert said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["labels.txt"]


def test_generate_resumed_with_other_settings_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: list[bool] = []
    monkeypatch.setattr("mar.zoo.configure", lambda device, tf32: rounded.append(tf32))
    assert main(command(model, tmp_path, "png")) == 0
    before = processes.read_tree(tmp_path)
    capsys.readouterr()
    for more in (["--temperature", "0.5"], ["--seed", "3"], ["--labels", "ant"], ["--batch", "4"], ["--tf32"]):
        assert main(command(model, tmp_path, "png", *more)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"was begun with {more[0].strip('-')}" in said
    assert rounded == [False] * 5 + [True]
    other = tmp_path.with_name("other") / model.name
    tiny.tiny_pipeline(seed=1).save(other)
    assert main(command(other, tmp_path, "png")) == 2
    assert "was begun with weights" in capsys.readouterr().err
    assert processes.read_tree(tmp_path) == before


def test_generate_broken_image_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.safetensors"
    pipeline = Pipeline.open(model)
    for parameter in pipeline.model.parameters():
        parameter.data.mul_(1e30)
    pipeline.save(broken)
    assert main(["generate", str(broken), "--out", str(tmp_path / "out"), "--count", "5", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "pictures from 0: image 0 is broken" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["generate.json"]


def test_generate_goes_on_with_broken_pictures_once_they_are_allowed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its message says; and from then on not without."""
    strict = ("--x0-bound", "1", "--no-allow-broken")
    assert main(command(model, tmp_path / "out", "png", *strict)) == 0
    before = processes.read_tree(tmp_path / "out")
    drawn = sorted(name for name in before if name.endswith(".png"))
    (tmp_path / "out" / drawn[-1]).unlink()
    assert main(command(model, tmp_path / "out", "png", *strict[:2], "--allow-broken")) == 0
    after = processes.read_tree(tmp_path / "out")
    assert {name: after[name] for name in drawn} == {name: before[name] for name in drawn}
    assert main(command(model, tmp_path / "out", "png", *strict)) == 2
    assert "was begun with --allow-broken True, not False" in capsys.readouterr().err
