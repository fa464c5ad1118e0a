"""A user's mistake is one line on stderr that says what and what to do, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from orientations import forget_upright, lay_down
from PIL import Image
from tiny import write_images

from mar.cli import VERBS, main
from mar.cli.options import parse
from mar.cli.sample import SampleOptions
from mar.config import HeadConfig, ModelConfig, SamplingConfig, TrunkConfig, to_dict
from mar.config.fields import field_docs
from mar.model.mar import MAR
from mar.pipeline import Pipeline
from mar.presets import apply_preset
from mar.tokenizer import PixelTokenizer

TRUNK = TrunkConfig(width=16, depth=1, num_heads=2)
HEAD = HeadConfig(width=16, depth=1, prediction="v", batch_mul=1)
TINY = ["--model.encoder.width", "16", "--model.encoder.num-heads", "2", "--model.encoder.depth", "1"]
TINY += ["--model.decoder.width", "16", "--model.decoder.num-heads", "2", "--model.decoder.depth", "1"]
TINY += ["--model.head.width", "16", "--model.head.depth", "1"]


def config(label_drop: float = 0.1) -> ModelConfig:
    return ModelConfig(
        channels=1, grid=(8, 8), patch_size=4, encoder=TRUNK, decoder=TRUNK, head=HEAD, buffer_size=2, classes=3,
        label_drop=label_drop,
    )  # fmt: skip


def tiny(path: Path, label_drop: float = 0.1) -> Path:
    torch.manual_seed(0)
    sampling = SamplingConfig(steps=2, diffusion_steps=2, x0_bound=3)
    classes = ("cat", "dog", "crane bird")
    Pipeline(MAR(config(label_drop)), PixelTokenizer(1, 0.0, 1.0), classes=classes, sampling=sampling).save(path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny(tmp_path / "tiny.safetensors")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs a command that must fail as a user's mistake does, and returns what it said."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("mar: ")
    assert said.err.count("\n") == 1, said.err
    assert said.out == ""
    return said.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--labels", "wolf"], ["wolf", "cat", "dog"]),
        (["--labels", "3"], ["3", "0 to 2"]),
        (["--steps", "0"], ["--steps is 0", "at least 1"]),
        (["--diffusion-steps", "0"], ["--diffusion-steps is 0", "at least 1"]),
        (["--diffusion-steps", "1001"], ["1001", "1000"]),
        (["--batch", "0"], ["--batch: got 0", "at least 1"]),
        (["--count", "0"], ["--count: got 0", "1 to 10,000"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--solver", "euler"], ["euler", "ancestral", "mar sample --help"]),
        (["--preset", "slow"], ["slow", "balanced", "mar sample --help"]),
        (["--x0-bound", "None"], ["--x0-bound", "got 'None', expected FLOAT or off"]),
        (["--diffusion-steps-end", "None"], ["--diffusion-steps-end", "got 'None', expected INT or off"]),
        (["--diffusion-steps-end", "1001"], ["--diffusion-steps-end is 1001", "1000"]),
        (["--start-t", "0"], ["--start-t is 0"]),
        (["--guidance-interval", "0.7", "0.2"], ["0.7", "0.2"]),
        (["--uncond-interval", "0"], ["--uncond-interval is 0", "at least 1"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--known", "missing.png"], ["--known", "--mask", "both"]),
        (["--known", "missing.png", "--mask", "missing.png"], ["missing.png", "No such file"]),
        (["--bogus", "1"], ["--bogus", "mar sample --help"]),
    ],
)
def test_sample_invalid_options_are_one_line(
    options: list[str], words: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "sample", model, "--out", tmp_path / "out", *options)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_sample_preset_with_flags_is_recorded_in_the_png(model: Path, tmp_path: Path) -> None:
    way = ["--preset", "fast", "--guidance-scale", "2", "--order", "halton", "--diffusion-steps", "3"]
    assert main(["sample", str(model), "--labels", "dog", "--out", str(tmp_path / "out"), "--device", "cpu", *way]) == 0
    with Image.open(tmp_path / "out" / "dog-00000.png") as image:
        facts = json.loads(image.text["mar"])  # type: ignore[attr-defined]
    expected = apply_preset(SamplingConfig(steps=2, diffusion_steps=2, x0_bound=3), 4, "fast")
    expected = replace(expected, guidance_scale=2.0, order="halton", diffusion_steps=3)
    assert {name: facts[name] for name in to_dict(expected)} == to_dict(expected)
    held = Pipeline.open(model)
    assert (facts["label"], facts["dtype"], facts["seed"]) == (held.classes.index("dog"), "fp32", 0)
    assert facts["weights"] == held.fingerprint()


def test_sample_off_differs_from_the_models_default() -> None:
    off = parse(SampleOptions, "sample", ["fashion", "--x0-bound", "off", "--diffusion-steps-end", "off"])
    assert off.settings() == {"x0_bound": None, "diffusion_steps_end": None}
    numbers = parse(SampleOptions, "sample", ["fashion", "--x0-bound", "2.5", "--diffusion-steps-end", "5"])
    assert numbers.settings() == {"x0_bound": 2.5, "diffusion_steps_end": 5}
    assert parse(SampleOptions, "sample", ["fashion"]).settings() == {}


@pytest.mark.parametrize("verb", ["sample", "generate", "evaluate"])
def test_sample_has_every_sampling_option_with_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, help in field_docs(SamplingConfig).items():
        assert f"--{name.replace('_', '-')} " in shown
        assert help in shown
    assert "--guidance-from" not in shown
    assert {*field_docs(SamplingConfig)} == {*to_dict(SamplingConfig())}


def test_sample_guidance_without_label_drop_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny(tmp_path / "classful.safetensors", label_drop=0.0)
    said = refused(capsys, "sample", path, "--guidance-scale", "2", "--out", tmp_path / "out")
    assert "label_drop 0" in said
    assert "--guidance-scale 1" in said


def test_train_patch_size_not_dividing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "train", "fashion", "--out", tmp_path / "run", "--model.grid", "28", "27")
    assert "28x27" in said
    assert "4x4" in said
    assert not (tmp_path / "run").exists()


def test_sample_truncated_checkpoint_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.write_bytes(model.read_bytes()[:-100])
    assert "truncated" in refused(capsys, "sample", model, "--out", tmp_path / "out")


def test_sample_checkpoint_of_another_config_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = model.read_bytes()
    model.write_bytes(data.replace(b'\\"buffer_size\\": 2', b'\\"buffer_size\\": 3'))
    said = refused(capsys, "sample", model, "--out", tmp_path / "out")
    assert "config" in said
    assert "encoder_position" in said


class Payload:
    """What a malicious file holds."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("plain", [True, False], ids=["pickle", "torch"])
def test_convert_malicious_pickle_is_refused(
    plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("checkpoint-last.pth")
    if plain:
        path.write_bytes(pickle.dumps({"model_ema": Payload()}))
    else:
        torch.save({"model_ema": Payload()}, path)
    Path("kl16.ckpt").write_bytes(b"")
    refused(capsys, "convert", path, "ours.safetensors")
    assert sorted(os.listdir()) == ["checkpoint-last.pth", "kl16.ckpt"]


def test_train_folder_without_images_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    said = refused(capsys, "train", "fashion", "--data", tmp_path / "pictures", "--out", tmp_path / "run")
    assert str(tmp_path / "pictures") in said
    assert not (tmp_path / "run").exists()


def test_train_class_count_mismatch_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "pictures" / name / "1.png")
    said = refused(capsys, "train", "fashion", "--data", tmp_path / "pictures", "--out", tmp_path / "run")
    assert "--model.classes 2" in said


@pytest.mark.parametrize(
    "arguments",
    [["paint"], ["sample", "runs-that-are-not"], ["train", "no-recipe"], ["convert", "nothing.pth", "x.safetensors"]],
    ids=lambda arguments: arguments[0],
)
def test_unknown_names_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, *arguments)


def test_sample_full_disk_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Image.Image, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert main(["sample", str(model), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_convert_full_disk_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mar.checkpoint.files.shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    said = refused(capsys, "convert", model, tmp_path / "copy.safetensors")
    assert "make room" in said
    assert not (tmp_path / "copy.safetensors").exists()


def test_sample_writes_pictures_with_their_settings(model: Path, tmp_path: Path) -> None:
    arguments = ["sample", str(model), "--labels", "dog", "none", "--seed", "7", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--steps", "4"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["dog-00007.png", "grid.png", "none-00008.png"]
    with Image.open(tmp_path / "out" / "dog-00007.png") as picture:
        assert picture.size == (8, 8)
        assert '"seed": 7' in picture.text["mar"]
        assert '"steps": 4' in picture.text["mar"]


def test_sample_known_and_mask_keep_the_rest_of_the_picture(model: Path, tmp_path: Path) -> None:
    known, mask = Image.new("L", (8, 8), 200), Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 8, 3))
    known.save(tmp_path / "known.png")
    mask.save(tmp_path / "mask.png")
    edit = ["--known", str(tmp_path / "known.png"), "--mask", str(tmp_path / "mask.png")]
    assert main(["sample", str(model), "--labels", "dog", *edit, "--out", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "dog-00000.png") as picture:
        values = picture.convert("L").tobytes()
        facts = json.loads(picture.text["mar"])  # type: ignore[attr-defined]
    assert values[24:] == bytes([200]) * 40
    assert values[:24] != bytes([200]) * 24
    assert (facts["known"], facts["mask"]) == (edit[1], edit[3])


def test_train_evaluates_and_validates_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = tmp_path / "network.py"
    network.write_text(
        "from torch import nn\n"
        "def means(weights=None):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())\n"
    )
    command = ["train", "fashion", *TINY, "--batch", "8", "--sampling.steps", "2", "--sampling.diffusion-steps", "3"]
    command += ["--eval-count", "4", "--eval-features", f"{network}:means", "--sample-every", "0", "--images", "32"]
    judged, plain = tmp_path / "judged", tmp_path / "plain"
    looks = ["--eval-every", "16", "--validate-every", "32", "--validate-count", "5", "--log-to"]
    assert main([*command, *looks, "--lr", "0.2", "--out", str(judged)]) == 0
    said = capsys.readouterr().err
    assert main([*command, "--lr", "0.2", "--out", str(plain)]) == 0
    lines = [json.loads(line) for line in (judged / "log.jsonl").read_text().splitlines()]
    for weights in ("ema", "raw"):
        assert [line["images"] for line in lines if line.get(f"{weights}_distance", 0) > 0] == [16, 32]
    assert [line["images"] for line in lines if line.get("val_loss", 0) > 0] == [32]
    assert not (judged / "tensorboard").exists()
    # it is a look at the run, and changes nothing in it
    assert (judged / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert "ema: FD (means) " in said
    assert "(5 held-out pictures)" in said
    assert said.count("warning: the learning rate is 0.00625 ") == 1


def test_train_missing_tracker_fails_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for verb in (["train", "fashion"], ["tokenizer", "train", "fashion"]):
        said = refused(capsys, *verb, "--log-to", "tensorboard", "wandb", "--out", tmp_path / "run")
        assert said == 'mar: --log-to wandb needs the extra `wandb`: pip install ".[wandb]" in the clone of mar\n'
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "file", "changed"),
    [("residual", "tokenizer.safetensors", "--noise"), ("kl", "mar_statistics.json", "--kl")],
)
def test_tokenizer_train_then_model_train(
    kind: str, file: str, changed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(16):
        path = tmp_path / "pictures" / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (16 * i, 250 - 16 * i, 90)).save(path)
    data, vae = str(tmp_path / "pictures"), str(tmp_path / "vae")
    command = ["tokenizer", "train", data, "--out", vae, "--image-size", "16", "--stride", "8", "--channels", "5"]
    command += ["--width", "8", "--batch", "2", "--sample-every", "4", "--device", "cpu"]
    assert main([*command, "--kind", kind, "--images", "4"]) == 0
    assert main([*command, "--images", "8"]) == 0  # goes on with its kind
    said = capsys.readouterr()
    assert "768 values in, 20 out: 38.4 times fewer\n4 tokens of 5 values with --model.patch-size 1\n" in said.out
    assert "PSNR " in said.out
    assert "on 1 held-out pictures" in said.out
    names = {path.name for path in Path(vae).iterdir()}
    assert {"config.json", file, "run.json", "log.jsonl", "latest", "state-000000000008"} <= names
    assert (Path(vae) / "samples" / "000000000008.png").is_file()
    page = (Path(vae) / "index.html").read_text(encoding="utf-8")
    assert 'src="samples/000000000008.png"' in page
    assert f"<code>mar train folder --data {data} --tokenizer {vae}</code>" in page
    assert said.err.count(f"watch it: file://{vae}/index.html") == 2
    printed = said.out.splitlines()[-1]
    assert printed == f"train on it: mar train folder --data {data} --tokenizer {vae}"
    options = shlex.split(printed)[4:]
    model = ["--out", str(tmp_path / "run"), "--images", "4", "--batch", "2", *TINY]
    assert main([*options, *model, "--sample-every", "0", "--device", "cpu"]) == 0
    told = capsys.readouterr().err
    assert "the tokenizer brings 8 pictures back with a PSNR of " in told
    assert "no validation loss: " in told
    assert "--hold-out 20 keeps one of twenty from learning" in told
    assert "tokenizer_psnr" in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()[1]
    assert "another run" in refused_after(capsys, [*command, "--images", "8", changed, "1"])


def test_tokenizer_train_turns_upright_unless_begun_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {}
    for name, lying, more in (("a", False, []), ("b", True, []), ("c", True, ["--no-upright"])):
        data = write_images(tmp_path / name / "pictures")
        command = ["tokenizer", "train", str(lay_down(data) if lying else data), "--out", str(tmp_path / name / "vae")]
        command += ["--image-size", "8", "--width", "8", "--batch", "4", "--decay", "0", "--device", "cpu", "--images"]
        assert main([*command, "4", *more]) == 0
        weights[name] = (tmp_path / name / "vae" / "tokenizer.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]
    run = tmp_path / "c" / "vae" / "run.json"
    forget_upright(run)
    assert main([*command, "8"]) == 0  # goes on as it began, with a version that did not say it
    assert json.loads(run.read_text())["upright"] is False
    assert "another run (upright False -> True)" in refused_after(capsys, [*command, "8", "--upright"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing", "train or stats"]),
        (["paint"], ["'paint'", "train or stats"]),
        (["train", "fashion", "--stride", "3"], ["--stride", "mar tokenizer train --help"]),
        (["train", "fashion", "--image-size", "30"], ["30x30", "multiple of the stride 4"]),
        (["train", "fashion", "--bogus", "1"], ["--bogus", "mar tokenizer train --help"]),
        (["train", "no-such-pictures"], ["no-such-pictures does not exist"]),
    ],
)
def test_tokenizer_train_invalid_options_are_one_line(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "vae")] if arguments[:1] == ["train"] else []
    said = refused(capsys, "tokenizer", *arguments, *out)
    assert all(word in said for word in words), said
    assert not (tmp_path / "vae").exists()


def test_train_then_resume_then_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    arguments = ["train", "fashion", "--out", str(run), "--batch", "8", *TINY, "--sample-every", "0"]
    assert main([*arguments, "--images", "16"]) == 0
    assert main([*arguments, "--images", "24"]) == 0
    assert (run / "state-000000000024").is_dir()
    said = refused_after(capsys, [*arguments, "--images", "24", "--seed", "5"])
    assert "another run" in said
    assert main(["info", str(run)]) == 0
    assert "images=24" in capsys.readouterr().out


def test_train_unreadable_image_is_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pictures" / "only"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("L", (8, 8), 80 * number).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    arguments = ["train", "fashion", "--data", str(tmp_path / "pictures"), "--out", str(tmp_path / "run"), *TINY]
    arguments += ["--model.classes", "1", "--model.grid", "8", "8", "--batch", "4", "--images", "8"]
    assert main([*arguments, "--sample-every", "0"]) == 0
    assert "1 pictures could not be read" in capsys.readouterr().err
    assert str(folder / "broken.png") in caplog.text


def refused_after(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_convert_to_official_format_and_bf16(tmp_path: Path) -> None:
    noise = ModelConfig(
        channels=1,
        grid=(8, 8),
        patch_size=4,
        encoder=TRUNK,
        decoder=TRUNK,
        head=HeadConfig(16, 1),
        buffer_size=2,
        classes=3,
    )
    source = tmp_path / "ours.safetensors"
    Pipeline(MAR(noise), PixelTokenizer(1, 0.0, 1.0)).save(source)
    assert main(["convert", str(source), str(tmp_path / "official.pth")]) == 0
    holder = torch.load(tmp_path / "official.pth", weights_only=True)
    assert set(holder) == {"model", "model_ema"}
    assert holder["model_ema"]["fake_latent"].shape == (1, 16)
    assert main(["convert", str(source), str(tmp_path / "half.safetensors"), "--dtype", "bf16"]) == 0
    before, after = Pipeline.open(source).model, Pipeline.open(tmp_path / "half.safetensors").model
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a.bfloat16().float(), b)


def test_train_too_little_memory_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(Pipeline, "sample", full)
    said = refused(capsys, "sample", model, "--out", tmp_path / "out", "--device", "cpu")
    assert "tiny.safetensors (CUDA out of memory. Tried to allocate 2 GiB); take a smaller --batch than 16" in said


def small(weights: str = "ema", seed: int = 0) -> Pipeline:
    noise = ModelConfig(channels=1, grid=(4, 4), encoder=TRUNK, decoder=TRUNK, head=HeadConfig(16, 1), buffer_size=2)
    torch.manual_seed(seed)
    return Pipeline(MAR(noise), PixelTokenizer(1, 0.0, 1.0), weights=weights)


def test_convert_run_takes_the_requested_weights(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small().save(run / "model.safetensors")
    small("raw", seed=1).save(run / "model-raw.safetensors")
    for weights, name in (("raw", "model-raw"), ("ema", "model")):
        out = tmp_path / f"{weights}.safetensors"
        assert main(["convert", str(run), str(out), "--weights", weights]) == 0
        assert out.read_bytes() == (run / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m.safetensors", "o.safetensors", "--weights", "raw"], "--weights says nothing of m.safetensors"),
        (["m.safetensors", "o.safetensors", "--num-heads", "2"], "--num-heads says nothing of m.safetensors"),
        (["run", "o.safetensors", "--tokenizer", "kl16.ckpt"], "--tokenizer says nothing of run"),
        (["run", "o.safetensors", "--weights", "raw"], "model-raw.safetensors"),
        (["m.safetensors", "o.pth", "--dtype", "bf16"], "--dtype says nothing of the official format"),
        (["m.safetensors", "o.pth", "--weights", "ema"], "--weights says nothing of the official format"),
        (["m.safetensors", "m.safetensors", "--dtype", "bf16"], "is the source, which would be lost"),
        (["raw.safetensors", "o.pth"], "raw.safetensors holds raw weights"),
        (["x.pth", "o.pth"], "x.pth -> o.pth: only files and run folders of ours"),
    ],
)
def test_convert_impossible_requests_are_refused(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, weights in (("m", "ema"), ("raw", "raw"), ("run/model", "ema")):
        small(weights).save(Path(f"{name}.safetensors"))
    Path("x.pth").touch()
    before = Path("m.safetensors").read_bytes()
    assert words in refused(capsys, "convert", *arguments)
    assert not list(Path().glob("o.*"))
    assert Path("m.safetensors").read_bytes() == before


def test_help_of_every_verb_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(verb in said for verb in VERBS)
    for verb in VERBS:
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--help"])
        assert not stopped.value.code
        assert "--help" in capsys.readouterr().out


def test_help_of_tokenizer_train_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tokenizer", "train", "--help"])
    said = capsys.readouterr().out
    assert all(option in said for option in ("--out", "--image-size", "--no-upright"))


def test_help_and_import_do_without_torch() -> None:
    check = "import sys, mar.cli; mar.cli.main(['--help']); assert not {'torch', 'tyro', 'numpy'} & set(sys.modules)"
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)
    assert time.monotonic() - begun < 30  # quick is told by what is not imported; this only says that it ends


INTERRUPTED = """
import os, signal, sys, time

class AsTorchIsImported:
    asked = 0
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            self.asked += 1
            if self.asked > 1:
                os._exit(99)  # half imported, it would crash
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

sys.meta_path.insert(0, AsTorchIsImported())
from mar.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verb", ["evaluate", "stats", "generate"])
def test_stop_while_torch_is_imported_is_one_line(verb: str) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        process = subprocess.run(
            [sys.executable, "-c", INTERRUPTED, verb], capture_output=True, text=True, env={**os.environ, "RANK": rank},
        )  # fmt: skip
        assert process.returncode == 130
        assert process.stderr.count("mar: stopped; ") == process.stderr.count("\n") == lines
