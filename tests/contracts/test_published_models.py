"""Published models from the download to the picture, with tiny random weights in files of their layouts."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import published_files as published
import pytest
import torch
from local_hub import LocalHub, serve_hub
from PIL import Image
from safetensors.torch import save_file

from mar import zoo
from mar.assets import asset
from mar.checkpoint.official_vit import load_vit, vit_state
from mar.cli import main
from mar.data.latent_cache import LatentSource
from mar.pipeline import Pipeline
from mar.published import PUBLISHED
from mar.training.run import load_unrounded, open_run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    published.shrink(monkeypatch)
    with serve_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield served


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a user's mistake ends with."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("name", published.NAMES)
def test_published_model_is_downloaded_drawn_and_written_back(
    name: str, hub: LocalHub, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ema = published.publish(name, hub.put, tmp_path / "dc")
    drawing = ["sample", name, "--labels", "1", "--steps", "4", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert refusal(drawing, capsys) == f"mar: {name} is not in {home}; get it with `mar download {name}`"
    assert main(["download", name]) == 0
    capsys.readouterr()
    assert main(["models"]) == 0
    here = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("yes")]
    assert [*here] == ["emoji", "fashion", name, PUBLISHED[name].tokenizer]
    assert main(["info", name]) == 0
    assert f"{name}: " in capsys.readouterr().out

    # drawn in its authors' way
    way = zoo.load(name, device="cpu").sampling
    assert way == PUBLISHED[name].sampling
    assert main([*drawing, "--diffusion-steps", "8", "--x0-bound", "1"]) == 0
    [path] = [path for path in (tmp_path / "out").glob("**/*.png") if path.name != "grid.png"]
    with Image.open(path) as image:
        assert image.size == (published.SIDES[name],) * 2
        assert np.asarray(image).std() > 1

    # one file of ours, and back to the layout that it came from
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    assert main(["convert", str(home / f"{name}.pth"), str(ours)]) == 0
    assert f"recognized as {PUBLISHED[name].family}" in capsys.readouterr().out
    again = zoo.load(ours, device="cpu")
    assert again.model.config == published.tiny_model(name)
    latents = torch.randn(1, again.tokenizer.channels, *again.model.config.grid)
    assert torch.equal(again.tokenizer.decode(latents), zoo.load(name, device="cpu").tokenizer.decode(latents))
    assert main(["verify", str(ours)]) == 0
    assert main(["convert", str(ours), str(back)]) == 0
    if "fake_latent" in ema and published.tiny_model(name).tie_null:
        ema["fake_latent"] = ema["mask_token"]  # the value that its authors' code uses
    returned = torch.load(back, weights_only=True)["model_ema"]
    assert list(returned) == list(ema)
    assert all(torch.equal(returned[n], tensor) for n, tensor in ema.items())


def test_published_tokenizers_names_cache_their_latents(hub: LocalHub, home: Path, tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    published.publish("detok-base", hub.put, tmp_path / "dc")
    published.publish("emigm-xs-512", hub.put, tmp_path / "dc")
    assert main(["download", "detok", "dc-ae"]) == 0
    for name, shape in (("detok", (2, 16, 4, 4)), ("dc-ae", (1, 32, 32, 32))):
        out = tmp_path / name
        options = ["--tokenizer", name, "--image-size", "64", "--dtype", "fp32", "--device", "cpu"]
        assert main(["cache", str(tmp_path / "pictures"), "--out", str(out), *options]) == 0
        latents = LatentSource(out)
        assert len(latents) == 4
        with Image.open(tmp_path / "pictures/b/1.png") as image:
            tensor = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
        tokenizer = zoo.load_tokenizer(name)
        posterior = tokenizer.encode(tensor)
        raw = tokenizer.denormalize(posterior.mean)[0]
        moments, label = latents.read(2, flip=False)
        assert label == 1
        assert moments.shape == shape  # no variance where there is no posterior
        torch.testing.assert_close(moments[0], raw, atol=1e-4, rtol=1e-4)


def small_training(grid: str, classes: int) -> list[str]:
    """Options that make a recipe two steps of a tiny model."""
    small = ["--model.grid", grid, grid, "--model.classes", str(classes), "--model.buffer-size", "2", "--device", "cpu"]
    small += ["--model.head.width", "16", "--model.head.depth", "1", "--images", "8", "--batch", "4", "--warmup", "0"]
    small += ["--workers", "0", "--sample-every", "0", "--validate-every", "0", "--hold-out", "0"]
    for stack in ("encoder", "decoder"):
        small += [f"--model.{stack}.width", "16", f"--model.{stack}.depth", "1", f"--model.{stack}.num-heads", "2"]
    return small


@pytest.mark.parametrize(("model", "grid"), [("detok-base", "4"), ("emigm-xs-512", "32")])
def test_recipe_of_a_published_model_finds_its_tokenizer_by_name(
    hub: LocalHub, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, grid: str
) -> None:
    for number in range(8):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (30 * number, 255 - 30 * number, 90)).save(path)
    training = ["train", f"imagenet-{model}", "--data", str(tmp_path / "pictures"), "--out", str(tmp_path / "run")]
    training += small_training(grid, 2)
    tokenizer = PUBLISHED[model].tokenizer
    assert f"{tokenizer} is not in {home}; get it with `mar download {tokenizer}`" in refusal(training, capsys)
    published.publish(model, hub.put, tmp_path / "dc")
    assert main(["download", tokenizer]) == 0
    assert main(training) == 0
    trained = zoo.load(tmp_path / "run", device="cpu")
    assert trained.tokenizer.config() == zoo.load_tokenizer(tokenizer).config()
    assert trained.sampling.reveal == PUBLISHED[model].sampling.reveal


def test_published_tokenizer_of_detok_goes_back_to_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published.shrink(monkeypatch)
    content, ema = published.detok_file()
    (tmp_path / "any.pth").write_bytes(content)
    back = vit_state(load_vit(tmp_path / "any.pth"))
    assert back.keys() == ema.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ema.items())


def test_training_starts_from_a_published_model_by_its_name(hub: LocalHub, home: Path, tmp_path: Path) -> None:
    published.publish("emigm-xs", hub.put, tmp_path / "dc")
    assert main(["download", "emigm-xs"]) == 0
    for number in range(8):
        path = tmp_path / "pictures" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (30 * number, 255 - 30 * number, 90)).save(path)
    data = ["--data", str(tmp_path / "pictures"), "--out", str(tmp_path / "run"), "--init", "emigm-xs"]
    assert main(["train", "imagenet-emigm-xs", *data, *small_training("4", 3), "--lr", "1e-9"]) == 0
    started, trained = (zoo.load(name, device="cpu").model.state_dict() for name in ("emigm-xs", str(tmp_path / "run")))
    assert started.keys() == trained.keys()
    for name, tensor in started.items():  # a rate of next to nothing leaves them
        torch.testing.assert_close(trained[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", published.NAMES)
def test_published_model_in_a_folder_of_ones_own_finds_its_tokenizer(
    name: str, hub: LocalHub, home: Path, tmp_path: Path
) -> None:
    published.publish(name, hub.put, tmp_path / "dc")
    place = tmp_path / "elsewhere"
    assert main(["download", name, "--to", str(place)]) == 0
    assert main(["convert", str(place / f"{name}.pth"), str(tmp_path / "ours.safetensors")]) == 0
    assert not home.exists()


def test_flat_file_of_somebody_stands_in_for_a_published_one(hub: LocalHub, home: Path, tmp_path: Path) -> None:
    """It has the name of a converted one; what was published is preferred."""
    published.publish("mar-base", hub.put, tmp_path / "dc")
    assert main(["download", "mar-base"]) == 0
    theirs = zoo.load("mar-base", device="cpu").model.state_dict()
    ema = torch.load(home / "mar-base.pth", weights_only=False)["model_ema"]
    save_file({n: (t + 1).contiguous() for n, t in ema.items()}, home / "mar-base.safetensors")
    assert all(torch.equal(t, theirs[n]) for n, t in zoo.load("mar-base", device="cpu").model.state_dict().items())
    (home / "mar-base.pth").unlink()
    other = zoo.load("mar-base", device="cpu").model.state_dict()
    assert not torch.equal(other["mask_token"], theirs["mask_token"])


def test_training_starts_from_unrounded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine draws in."""
    monkeypatch.setattr("mar.devices.default_precision", lambda device: "bf16")
    assert inspect.signature(open_run).parameters["load_model"].default is load_unrounded
    stored = Pipeline.open(asset("fashion.safetensors")).model.state_dict()
    assert all(torch.equal(t, stored[n]) for n, t in load_unrounded("fashion").model.state_dict().items())


# ---- files that do not fit


def test_published_name_with_another_models_file_is_one_line(
    hub: LocalHub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published.publish("emigm-xs", hub.put, tmp_path / "dc")
    assert main(["download", "emigm-xs"]) == 0
    other = replace(PUBLISHED["emigm-xs"], config=replace(published.tiny_model("emigm-xs"), classes=4))
    monkeypatch.setitem(PUBLISHED, "emigm-xs", other)
    assert "emigm-xs.pth is another model than emigm-xs" in refusal(["sample", "emigm-xs"], capsys)


def test_repository_of_published_files_names_the_download(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(["sample", "jjiaweiyang/l-DeTok"], capsys)
    assert line.endswith("has the authors' files; get them with `mar download detok-base detok-large detok`")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    """A folder with a model of each family, and all tokenizers."""
    published.shrink(monkeypatch)
    folder = tmp_path / "shelf"
    for name in published.NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "model.pth").write_bytes(published.model_file(name)[0])
    for name in ("detok", "others"):
        (folder / name).mkdir()
    (folder / "kl16.ckpt").write_bytes(published.kl16_file())
    (folder / "detok/detok-BB-gamm3.0-m0.7.pth").write_bytes(published.detok_file()[0])
    (folder / "detok/stats.pkl").write_bytes(published.stats_file())
    (folder / "others/vitok-BB.pth").write_bytes(published.detok_file()[0])
    (folder / "others/stats.pkl").write_bytes(published.stats_file())
    published.dc_files(folder / "dc-ae")
    published.dc_files(folder / "sana", scaling_factor=0.41407)
    published.dc_files(folder / "unscaled", scaling_factor=1.0)
    return folder


def conversion(shelf: Path, model: str, tokenizer: str | None = None) -> list[str]:
    options = [] if tokenizer is None else ["--tokenizer", str(shelf / tokenizer)]
    return ["convert", str(shelf / model / "model.pth"), str(shelf / "ours.safetensors"), *options]


FITS = {
    "mar-base": "kl16.ckpt",
    "emigm-xs": "kl16.ckpt",
    "emigm-xs-512": "dc-ae",
    "detok-base": "detok/detok-BB-gamm3.0-m0.7.pth",
}


@pytest.mark.parametrize("model", FITS)
def test_model_with_its_own_tokenizer_is_converted(shelf: Path, model: str) -> None:
    assert main(conversion(shelf, model, FITS[model])) == 0


@pytest.mark.parametrize(
    ("model", "tokenizer", "line"),
    [
        ("mar-base", "detok/detok-BB-gamm3.0-m0.7.pth", "of kind vit; it needs KL-16 of MAR (kl16), or --family detok"),
        ("emigm-xs", "detok/detok-BB-gamm3.0-m0.7.pth", "a tokenizer of kind vit; it needs KL-16 of MAR (kl16)"),
        ("emigm-xs", "dc-ae", "a tokenizer of kind dc; it needs KL-16 of MAR (kl16)"),
        ("detok-base", "kl16.ckpt", "a tokenizer of kind kl; it needs l-DeTok BB"),
        ("emigm-xs-512", "kl16.ckpt", "a tokenizer of kind kl; it needs DC-AE f32c32-in-1.0 (dc-ae)"),
        ("emigm-xs-512", "sana", "another tokenizer: got latents of the scale 0.4141, expected 0.3189 of DC-AE"),
        ("emigm-xs-512", "unscaled", "has no statistics of its latents, expected the scale 0.3189 of DC-AE"),
        ("detok-base", "others/vitok-BB.pth", "got statistics of detok-BB-gamm3.0-m0.7, expected those of vitok-BB"),
        ("detok-base", None, "needs the tokenizer l-DeTok BB, decoder fine-tuned; get it with `mar download detok`"),
        ("emigm-xs-512", None, "needs the tokenizer DC-AE f32c32-in-1.0; get it with `mar download dc-ae`"),
    ],
)
def test_model_with_anothers_tokenizer_is_one_line(
    shelf: Path, capsys: pytest.CaptureFixture[str], model: str, tokenizer: str | None, line: str
) -> None:
    assert line in refusal(conversion(shelf, model, tokenizer), capsys)
    assert not (shelf / "ours.safetensors").exists()


class Code:
    """What runs if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran-the-code"),))


@pytest.mark.parametrize(
    ("statistics", "line"),
    [
        (pickle.dumps({"detok-BB-gamm3.0-m0.7": Code()}), "is refused: it wants to run pathlib"),
        (published.stats_file()[:200], "is damaged or no stats.pkl"),
        (published.stats_file(8), "got statistics of 16 values, expected 32, twice the channels"),
        (published.stats_file(key="vitok-BB"), "got statistics of vitok-BB, expected those of detok-BB-gamm3.0-m0.7"),
        (None, "has no statistics of its latents, expected l-DeTok's stats.pkl beside it"),
    ],
    ids=["code", "half", "channels", "another's", "none"],
)
def test_model_with_other_statistics_is_one_line(
    shelf: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    statistics: bytes | None,
    line: str,
) -> None:
    monkeypatch.chdir(shelf)
    (shelf / "detok/stats.pkl").unlink()
    if statistics is not None:
        (shelf / "detok/stats.pkl").write_bytes(statistics)
    assert line in refusal(conversion(shelf, "detok-base", FITS["detok-base"]), capsys)
    assert not Path("ran-the-code").exists()


@pytest.mark.parametrize("model", FITS)
@pytest.mark.parametrize("half", ["bytes", "tensors", "tokenizer"])
def test_half_a_checkpoint_is_one_line(shelf: Path, capsys: pytest.CaptureFixture[str], model: str, half: str) -> None:
    path = shelf / model / "model.pth"
    if half == "tokenizer":
        path = shelf / FITS[model]
        path = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    if half == "tensors":
        ema = published.model_weights(model)
        path.write_bytes(published.saved({"model_ema": dict(list(ema.items())[: len(ema) // 2])}))
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    line = refusal(conversion(shelf, model, FITS[model]), capsys)
    assert str(path.parent) in line
    assert not (shelf / "ours.safetensors").exists()
