"""Commands that draw from words: pictures, files and metadata; a user's mistake is one line."""

from __future__ import annotations

import json
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import extractors
import numpy as np
import processes
import pytest
import tiny
from PIL import Image

from mar.cli import main
from mar.data.sources import open_source
from mar.pipeline import Pipeline

DRAW = ["--device", "cpu", "--allow-broken"]
JUDGE = ["--features", f"{extractors.__file__}:tiny", "--device", "cpu"]
PROMPTS = ["a red cat", "dog", "none"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "words.safetensors"
    tiny.tiny_words_pipeline().save(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red cat\r\n\n dog \nNone\n".encode())
    return path


def facts(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        read: dict[str, Any] = json.loads(image.text["mar"])  # type: ignore[attr-defined]
    return read


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs a command that must fail as a user's mistake does, and returns what it said."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("mar: ")
    assert said.err.count("\n") == 1, said.err
    assert said.out == ""
    return said.err


# ---- sample


def test_sample_prompts_name_files_and_metadata(model: Path, prompts: Path, tmp_path: Path) -> None:
    assert main(["sample", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out"), *DRAW]) == 0
    names = ["a-red-cat-00000.png", "dog-00001.png", "none-00002.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "grid.png"])
    read = [facts(tmp_path / "out" / name) for name in names]
    assert [(each["prompt"], each["seed"]) for each in read] == [("a red cat", 0), ("dog", 1), (None, 2)]
    assert all("label" not in each for each in read)
    assert facts(tmp_path / "out/grid.png")["prompts"] == ["a red cat", "dog", None]
    drawn = Pipeline.open(model).sample(prompts=["a red cat", "dog", None], allow_broken=True)
    assert all(np.array_equal(pixels(tmp_path / "out" / n), np.asarray(d)) for n, d in zip(names, drawn, strict=True))
    assert main(["sample", str(model), "--prompt", *PROMPTS, "--out", str(tmp_path / "same"), *DRAW]) == 0
    assert processes.read_tree(tmp_path / "same") == processes.read_tree(tmp_path / "out")


def test_sample_long_and_equal_names_stay_apart(model: Path, tmp_path: Path) -> None:
    long = "red " * 30
    arguments = ["--prompt", f"{long}cat", f"{long}dog", "a cat", "a cat!", "--count", "2"]
    assert main(["sample", str(model), *arguments, "--out", str(tmp_path), *DRAW]) == 0
    names = [path.name for path in tmp_path.iterdir() if path.name != "grid.png"]
    assert len(names) == 8
    assert max(map(len, names)) < 80
    assert len({name.rpartition("-")[0] for name in names}) == 3  # two long ones by their hash, and a-cat


@pytest.mark.parametrize(
    ("notes", "said", "expected"),
    [
        ({"examples": ["red dog", "a cat"]}, "drawing the model's examples", ["red dog", "a cat"]),
        ({}, "drawing pictures without a condition", [None]),
    ],
)
def test_sample_without_prompts_draws_the_models_examples(
    notes: dict[str, Any], said: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    tiny.tiny_words_pipeline(notes=notes).save(path)
    assert main(["sample", str(path), "--out", str(tmp_path / "out"), *DRAW]) == 0
    assert f"mar: no prompts were given: {said}; --prompt says what to draw\n" in capsys.readouterr().err
    assert facts(tmp_path / "out/grid.png")["prompts"] == expected


def test_sample_known_part_takes_another_prompt(model: Path, tmp_path: Path) -> None:
    original = np.arange(16, dtype=np.uint8).reshape(4, 4) * 15
    Image.fromarray(original).save(tmp_path / "known.png")
    Image.fromarray(np.array([[0, 0, 255, 255]] * 4, dtype=np.uint8)).save(tmp_path / "mask.png")
    edit = ["--known", str(tmp_path / "known.png"), "--mask", str(tmp_path / "mask.png"), "--grow", "0"]
    arguments = ["sample", str(model), *edit, "--out", str(tmp_path / "out"), *DRAW, "--seed", "3"]
    for prompt in ("dog", "a red cat"):
        assert main([*arguments, "--prompt", prompt]) == 0
    one, other = (pixels(tmp_path / "out" / f"{name}-00003.png") for name in ("dog", "a-red-cat"))
    assert np.array_equal(one[:, :2], original[:, :2])
    assert np.array_equal(other[:, :2], original[:, :2])
    assert not np.array_equal(one, other)
    assert facts(tmp_path / "out/dog-00003.png")["prompt"] == "dog"


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--labels", "cat"], "labels: got 'cat', but this model draws from words; give prompts"),
        (["--labels", "cat", "--prompt", "cat"], "got labels and prompts, expected one of them"),
        (["--prompt", "cat", "--prompts", "prompts.txt"], "got --prompt and --prompts, expected one of them"),
        (["--prompts", "empty.txt"], "empty.txt has no prompts, expected one a line"),
        (["--prompts", "binary.txt"], "binary.txt is no text, expected a prompt a line"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["--prompt", "cot"], "prompt 'cot': unknown words: cot (cat?)"),
        (["--prompt", "!"], "prompt '!': it has no words"),
    ],
)
@pytest.mark.parametrize("verb", ["sample", "generate"])
def test_prompts_invalid_are_refused(
    verb: str,
    options: list[str],
    words: str,
    model: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(prompts.parent)
    Path("empty.txt").write_text("\n \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    assert words in refused(capsys, verb, model, "--out", "out", *DRAW, *options)
    assert not Path("out").exists()


@pytest.mark.parametrize("verb", ["sample", "generate"])
def test_prompts_for_a_class_model_are_refused(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "classes.safetensors"
    tiny.tiny_pipeline().save(path)
    said = refused(capsys, verb, path, "--out", tmp_path / "out", *DRAW, "--prompt", "cat")
    assert "prompts: this model does not read words; give labels" in said


def test_prompts_read_in_part_are_one_clean_line(model: Path, tmp_path: Path) -> None:
    """In a process of its own: nothing has set up logging there."""
    said = tmp_path / "said"
    arguments = ["generate", str(model), "--prompt", "a rod cat", "dog", "--count", "9", "--batch", "2", *DRAW]
    assert processes.run_to_end([*arguments, "--out", str(tmp_path / "out")], said) == 0
    lines = [line for line in said.read_text().splitlines() if "unknown" in line]
    assert lines == ["prompt 'a rod cat': unknown words: rod (red?); left out"]


# ---- generate


def test_generate_prompts_make_a_folder_with_captions(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["generate", str(model), "--prompts", str(prompts), "--count", "5", "--out", str(out), *DRAW]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["000000.png", "000001.png", "000002.png", "000003.png",
                                                     "000004.png", "generate.json", "metadata.jsonl"]  # fmt: skip
    source = open_source(out)
    assert [source[i].captions for i in range(5)] == [("a red cat",), ("dog",), (), ("a red cat",), ("dog",)]
    assert source.classes == ()
    assert [facts(out / f"{i:06}.png")["prompt"] for i in range(3)] == ["a red cat", "dog", None]
    assert main(["sample", str(model), "--prompt", "dog", "--seed", "4", "--out", str(tmp_path / "one"), *DRAW]) == 0
    assert np.abs(pixels(out / "000004.png") - pixels(tmp_path / "one/dog-00004.png")).max() <= 1


def test_generate_prompts_in_shards_have_texts(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--format", "webdataset", "--prompt", *PROMPTS, "--out", str(out), *DRAW]
    assert main(["generate", str(model), *arguments]) == 0
    with tarfile.open(out / "000000.tar") as shard:
        read = {m.name: shard.extractfile(m).read() for m in shard if m.name.endswith(".txt")}  # type: ignore[union-attr]
        assert len(shard.getnames()) == 6
    assert read == {"000000.txt": b"a red cat", "000001.txt": b"dog", "000002.txt": b""}


def test_generate_prompts_in_npz_have_no_class(model: Path, tmp_path: Path) -> None:
    assert main(["generate", str(model), "--prompt", *PROMPTS, "--out", str(tmp_path / "out.npz"), *DRAW]) == 0
    with np.load(tmp_path / "out.npz") as file:
        assert file["arr_0"].shape == (3, 4, 4, 3)
        assert file["arr_1"].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("moment", [3, 6, 8])
def test_generate_prompts_killed_and_restarted_gives_the_same_bytes(moment: int, model: Path, tmp_path: Path) -> None:
    """While a picture is written, between pictures, and before the prompts are written."""
    arguments = ["generate", str(model), "--prompt", *PROMPTS, "--count", "7", "--batch", "3", *DRAW, "--out"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    out = tmp_path / "out"
    assert processes.run_to_end([*arguments, str(out)], tmp_path / "said", die=(moment, signal.SIGKILL)) < 0
    assert processes.read_tree(out) != processes.read_tree(tmp_path / "whole")
    assert main([*arguments, str(out)]) == 0
    assert processes.read_tree(out) == processes.read_tree(tmp_path / "whole")


def test_generate_other_prompts_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", model, "--out", tmp_path / "out", *DRAW, "--prompt", "cat"]
    assert main([*map(str, arguments), "dog"]) == 0
    assert "was begun with prompts" in refused(capsys, *arguments, "red")
    said = refused(capsys, "generate", model, "--out", tmp_path / "new", *DRAW, "--per-class", "2")
    assert "draws from words and has no classes; give --count" in said


# ---- evaluate


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Nine pictures without classes, of which one has no caption, and one none that the model knows."""
    tiny.write_images(tmp_path / "classes", 9)
    folder = tmp_path / "captioned"
    folder.mkdir()
    for path in (tmp_path / "classes").rglob("*.png"):
        shutil.copy(path, folder / path.name)
    captions: dict[str, str | list[str]] = {f"{i}.png": ["a red cat", "dog", "man"][i % 3] for i in range(8)}
    return tiny.write_captions(folder, {**captions, "7.png": "zzz"})


def test_evaluate_draws_the_captions_of_the_reference(
    model: Path, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    stream = Pipeline.stream

    def noted(self: Pipeline, *arguments: Any, **options: Any) -> Any:
        drawn.extend(options["prompts"])
        return stream(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "stream", noted)
    assert main(["evaluate", str(model), "--reference", str(captioned), "--allow-broken", *JUDGE]) == 0
    assert drawn == ["a red cat", "dog", "man", "a red cat", "dog", "man", "a red cat"]
    assert "7 against 9" in capsys.readouterr().out
    drawn.clear()
    (tmp_path / "p.txt").write_text("dog\nnone\n")
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--count", "5"]
    assert main(["evaluate", str(model), "--reference", str(captioned), "--allow-broken", *arguments, *JUDGE]) == 0
    assert drawn == ["dog", "", "dog", "", "dog"]


def test_evaluate_prompts_invalid_are_refused(
    model: Path, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", model, "--reference", captioned, *JUDGE]
    said = refused(capsys, "evaluate", model, "--reference", tmp_path / "classes", *JUDGE)
    assert "has no captions to draw; give --prompts FILE" in said
    said = refused(capsys, *words, "--classifier", f"{extractors.__file__}:tiny")
    assert "class accuracy needs a model of classes" in said
    (tmp_path / "p.txt").write_text("cot\n")
    assert "unknown words: cot (cat?)" in refused(capsys, *words, "--prompts", tmp_path / "p.txt")
    said = refused(capsys, "evaluate", captioned, "--reference", captioned, "--prompts", tmp_path / "p.txt", *JUDGE)
    assert "prompts is of drawing" in said


def test_evaluate_sweep_of_other_prompts_is_refused(
    model: Path, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["--sweep", "K=1,2", "--out", tmp_path / "sweep", "--allow-broken", *JUDGE]
    arguments = ["evaluate", model, "--reference", captioned, *sweep]
    assert main([str(argument) for argument in arguments]) == 0
    assert "prompts" in json.loads((tmp_path / "sweep/sweep.json").read_text())["settings"]
    (tmp_path / "p.txt").write_text("\n".join(["dog"] * 7))
    capsys.readouterr()
    said = refused(capsys, *arguments, "--prompts", tmp_path / "p.txt")
    assert "holds another sweep (prompts" in said


# ---- train and info


def test_train_evaluates_a_run_of_words(captioned: Path, tmp_path: Path) -> None:
    trunk = "--model.{0}.width 16 --model.{0}.num-heads 2 --model.{0}.depth 1 "
    small = "--model.grid 4 4 --model.channels 1 --model.patch-size 1 --model.buffer-size 4 --tokenizer pixels "
    small += trunk.format("encoder") + trunk.format("decoder") + "--model.head.width 16 --model.head.depth 1 "
    small += "--text words --model.classes 0 --model.words 6 --images 8 --batch 4 --sample-every 0 "
    small += "--sampling.steps 2 --sampling.diffusion-steps 2 --eval-every 4 --eval-count 4"
    out = tmp_path / "run"
    arguments = ["train", "fashion", "--data", str(captioned), "--out", str(out), "--device", "cpu", *small.split()]
    assert main([*arguments, "--eval-features", f"{extractors.__file__}:tiny"]) == 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows if "ema_distance" in row] == [4, 8]


def test_info_names_the_words_of_a_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model)]) == 0
    said = capsys.readouterr().out
    assert f"captions: 10 words, learned with the model: {', '.join(tiny.WORDS)}\n" in said
