"""`mar train folder`: from pictures to a model in one command, which may be stopped anywhere and given again."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import extractors
import processes
import pytest
import tiny
import torch
from encoders import save_encoder
from orientations import forget_upright, lay_down
from PIL import Image
from published_files import dc_files
from tiny import caption_images
from tiny import write_images as bars

from mar.autoconfig.plan import FolderPlan
from mar.autoconfig.sizes import VALIDATIONS
from mar.autoconfig.summary import save_summary
from mar.autoconfig.timing import RESERVE_SECONDS, TimePlan, save_time_plan
from mar.checkpoint.tokenizers import save_tokenizer
from mar.cli import main
from mar.cli.train_folder import _recipe_options, plan_folder
from mar.config import ConfigError, TrainConfig
from mar.config.tokenizer import TokenizerTrainConfig
from mar.data.latent_cache import read_manifest, write_manifest
from mar.pipeline import Pipeline
from mar.tokenizer import PCATokenizer
from mar.tokenizer.kl import from_config
from mar.training.run import open_run_data, save_config
from mar.training.speed import ModelSpeed
from mar.training.tokenizer import autoencoder_config

SMALL = ["--model.encoder.width", "16", "--model.encoder.num-heads", "2", "--model.encoder.depth", "1"]
SMALL += ["--model.decoder.width", "16", "--model.decoder.num-heads", "2", "--model.decoder.depth", "1"]
SMALL += ["--model.head.width", "16", "--model.head.depth", "1", "--sampling.steps", "2"]
SMALL += ["--sampling.diffusion-steps", "2", "--sampling.x0-bound", "1", "--device", "cpu"]
SHORT = ["--images", "16", "--batch", "4", "--log-every", "1", "--save-every", "4"]
TOKENIZER = ["--vae.width", "8", "--vae.images", "8", "--vae.batch", "4", "--vae.save-every", "4", "--vae.stride", "2"]


def command(data: str, out: str, *more: str) -> list[str]:
    return ["train", "folder", "--data", data, "--out", out, *SMALL, *SHORT, *more]


WHOLE = command("pictures", "run", *TOKENIZER)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty grey pictures of 8x8 in two classes."""
    return bars(tmp_path / "pictures")


def planned(data: Path | str, *more: str | Path) -> FolderPlan:
    return plan_folder(["--data", str(data), *map(str, more)])[0]


def color(folder: Path, count: int, size: tuple[int, int], kinds: int = 2) -> Path:
    for number in range(count):
        path = folder / f"kind{number % kinds}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (9 * number % 250, 70, 120)).save(path)
    return folder


def test_folder_small_gray_images_use_pixels(data: Path, tmp_path: Path) -> None:
    steps = planned(data, "--out", tmp_path / "run")
    config = steps.train
    assert (steps.tokenizer, steps.cache) == (None, None)
    assert (config.data, config.tokenizer, config.model.classes) == (str(data), "pixels", 2)
    assert (config.model.channels, config.model.grid, config.model.patch_size) == (1, (8, 8), 2)
    assert "20 gray pictures in 2 classes, typically of 8 pixels, cut to 8x8; raw pixels, 16 tokens" in steps.lines[0]
    assert "3 + 5 blocks 192 wide, head 3 x 256; 100,000 pictures to be seen in all, 32 a step" in steps.lines[1]
    assert not (tmp_path / "run").exists()


def test_folder_large_color_images_get_tokenizer_and_cache(tmp_path: Path) -> None:
    data, out = color(tmp_path / "data", 20, (130, 140), kinds=3), tmp_path / "run"
    steps = planned(data, "--out", out, "--flip", "False", "--workers", "2", "--vae.perceptual", "0.5")
    assert steps.tokenizer is not None
    assert steps.cache is not None
    tokenizer, config = steps.tokenizer.config, steps.train
    assert (tokenizer.data, tokenizer.size, tokenizer.stride, tokenizer.channels) == (str(data), (64, 64), 8, 16)
    assert (tokenizer.image_channels, tokenizer.flip, tokenizer.perceptual) == (3, False, 0.5)
    assert (steps.cache.data, steps.cache.tokenizer) == (str(data), str(out / "tokenizer"))
    assert (steps.cache.image_size, steps.cache.flip, steps.cache.workers) == ((64, 64), False, 2)
    assert (config.data, config.tokenizer) == (str(out / "latents"), str(out / "tokenizer"))
    assert (config.model.channels, config.model.grid, config.model.classes) == (16, (8, 8), 3)
    _, options = plan_folder(["--data", str(data), "--out", str(out)])
    assert options.eval_reference == str(data)
    assert (
        "cut to 64x64 (larger from 5,000 pictures on, or by --image-size); by a tokenizer of their own"
        in steps.lines[0]
    )


@pytest.mark.parametrize("text", [None, "encoder", ""])
def test_folder_captions_are_read_as_asked(data: Path, tmp_path: Path, text: str | None) -> None:
    caption_images(data)
    name = str(save_encoder(tmp_path / "encoder")) if text == "encoder" else text
    plan = planned(data, "--out", tmp_path / "run", *([] if name is None else ["--text", name]))
    model = plan.train.model
    if text == "encoder":
        assert (model.text_width, model.words, model.classes, model.buffer_size) == (12, 0, 0, 32)
        assert f"pictures with captions, read by {name}, typically" in plan.lines[0]
        assert plan.lines[1].endswith("captions of up to 32 tokens")
    elif text is None:
        assert (model.text_width, model.words, model.classes, model.buffer_size) == (0, 10, 0, 8)
    else:
        assert (model.text_width, model.words, model.classes) == (0, 0, 2)
        assert not any("captions of up to" in line for line in plan.lines)


def test_folder_encoder_for_images_without_captions_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "--data", data, "--out", tmp_path / "run", "--text", "minilm")
    assert "text is minilm, but" in message
    assert "has no captions" in message


def test_folder_flat_images_are_accepted(tmp_path: Path) -> None:
    """Which vary in fewer ways than there are components, by default: nobody has asked for so many."""
    data, out = color(tmp_path / "data", 20, (16, 16)), tmp_path / "run"
    assert main(command(str(data), str(out), "--sample-every", "0", "--images", "4")) == 0
    assert Pipeline.open(out / "model.safetensors").tokenizer.channels == 16


def test_folder_gray_images_get_gray_components(data: Path, tmp_path: Path) -> None:
    """Of colours that are all the same, there would be three times the values, and pictures in colour."""
    out = tmp_path / "run"
    assert planned(data, "--out", out, "--tokenizer", "pca4").train.image_channels == 1
    run = command(str(data), str(out), "--tokenizer", "pca4", "--sample-every", "0", "--images", "4")
    assert main(run) == 0
    model = Pipeline.open(out / "model.safetensors")
    assert (model.tokenizer.image_channels, model.tokenizer.channels) == (1, 16)
    assert model.sample([0], steps=1, diffusion_steps=2)[0].mode == "L"
    assert planned(data, "--out", out).train.image_channels is None, "pixels say it themselves"
    assert planned("fashion", "--tokenizer", "pca4").train.image_channels is None, "the bundled ones are known"


def test_folder_every_choice_can_be_overridden(tmp_path: Path) -> None:
    data, out = color(tmp_path / "data", 20, (90, 100)), tmp_path / "run"
    pixels = planned(data, "--out", out, "--tokenizer", "pixels").train
    assert (pixels.model.grid, pixels.model.patch_size, pixels.tokenizer) == ((64, 64), 4, "pixels")
    smaller = planned(data, "--out", out, "--image-size", "32", "24").train
    assert (smaller.model.grid, smaller.model.channels, smaller.tokenizer) == ((8, 6), 16, "pca4")
    taken = planned(data, "--out", out, "--tokenizer", "pca8", "--model.channels", "40")
    assert (taken.tokenizer, taken.cache) == (None, None), "components are taken as pictures are read"
    model = taken.train.model
    assert (model.grid, model.channels, taken.train.tokenizer) == ((8, 8), 40, "pca8")
    assert "as principal components, 64 tokens of 40 values each" in taken.lines[0]
    own = planned(data, "--out", out, "--image-size", "32", "--tokenizer", "own", "--vae.channels", "6")
    assert own.tokenizer is not None
    assert (own.tokenizer.config.size, own.train.model.channels, own.train.model.grid) == (
        (32, 32),
        6,
        (8, 8),
    )
    larger = planned(data, "--out", out, "--image-size", "128", "--vae.stride", "16", "--images", "320", "--lr", "0.5")
    assert larger.tokenizer is not None
    assert (larger.tokenizer.config.stride, larger.train.model.grid) == (16, (8, 8))
    assert (larger.train.images, larger.train.decay, larger.train.lr) == (320, 106, 0.5)
    assert larger.recipe.lr == 1.2e-2
    cells = planned(data, "--out", out, "--model.grid", "4", "6")
    assert cells.tokenizer is not None
    assert cells.tokenizer.config.size == (32, 48)
    assert "cut to 32x48" in cells.lines[0]
    without = planned(data, "--out", out, "--model.classes", "0").train
    assert (without.model.classes, without.sampling.guidance_scale) == (0, 1)
    assert planned(data, "--out", out, "--model.label-drop", "0").train.sampling.guidance_scale == 1


@pytest.mark.parametrize(
    ("size", "asked", "cut", "grid", "said"),
    [
        ((140, 105), "", (56, 72), (7, 9), ", as most are 1.33 times as wide as high;"),
        ((105, 140), "", (72, 56), (9, 7), ", as most are 1.33 times as high as wide;"),
        ((105, 140), "--tokenizer pca4", (72, 56), (18, 14), ", as most are 1.33 times as high as wide;"),
        ((105, 140), "--tokenizer pixels", (72, 56), (72, 56), ", as most are 1.33 times as high as wide;"),
        ((105, 140), "--vae.stride 16 --tokenizer own", (64, 48), (4, 3), ", as most are 1.33 times as high as wide;"),
        ((30, 40), "", (32, 24), (8, 6), ", as most are 1.33 times as high as wide;"),
        ((600, 100), "", (40, 120), (5, 15), ", as most are 3.00 times as wide as high;"),
        ((105, 140), "--image-size 64", (64, 64), (8, 8), "cut to 64x64; "),
        ((105, 140), "--model.grid 8 8", (64, 64), (8, 8), "cut to 64x64; "),
        ((120, 130), "", (64, 64), (8, 8), "cut to 64x64; "),
    ],
)
def test_folder_of_oblong_pictures_keeps_their_shape(
    size: tuple[int, int], asked: str, cut: tuple[int, int], grid: tuple[int, int], said: str, tmp_path: Path
) -> None:
    steps = planned(color(tmp_path / "data", 20, size), "--out", tmp_path / "run", *asked.split())
    assert steps.train.model.grid == grid
    assert f"cut to {cut[0]}x{cut[1]}" in steps.lines[0]
    assert said in steps.lines[0]
    for step_size in (steps.tokenizer and steps.tokenizer.config.size, steps.cache and steps.cache.image_size):
        assert step_size in (None, cut)


def test_folder_of_mixed_shapes_stays_square(tmp_path: Path) -> None:
    data = color(tmp_path / "data", 20, (100, 140))
    for path in sorted(data.rglob("*.png"))[::2]:
        Image.new("RGB", (140, 100)).save(path)
    assert planned(data, "--out", tmp_path / "run").train.model.grid == (8, 8)


def test_folder_of_portraits_trains_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begun by a version that cut squares, whose summary has no aspect, stays square."""
    monkeypatch.chdir(tmp_path)
    color(tmp_path / "pictures", 20, (18, 24))
    small = ["--sample-every", "0", *TOKENIZER, "--vae.stride", "4"]
    assert main(command("pictures", "new", *small)) == 0
    assert main(command("pictures", "new", *small, "--images", "20")) == 0
    model = Pipeline.open(tmp_path / "new" / "model.safetensors")
    assert (model.image_size, model.model.config.grid) == ((16, 12), (4, 3))
    assert main(command("new/latents", "second", "--sample-every", "0")) == 0
    assert main(command("pictures", "old", *small, "--image-size", "16")) == 0
    summary = json.loads((tmp_path / "old" / "pictures.json").read_text())
    assert summary.pop("aspect") == 4 / 3
    del summary["checksum"]
    (tmp_path / "old" / "pictures.json").write_text(json.dumps(summary))
    assert main(command("pictures", "old", *small, "--images", "20")) == 0
    assert Pipeline.open(tmp_path / "old" / "model.safetensors").image_size == (16, 16)


def test_folder_given_tokenizer_sets_grid_and_size(tmp_path: Path) -> None:
    data = color(tmp_path / "data", 20, (90, 100))
    torch.manual_seed(0)
    settings = TokenizerTrainConfig(image_size=32, stride=4, channels=3, width=8)
    save_tokenizer(from_config(autoencoder_config(settings)), tmp_path / "vae")
    steps = planned(data, "--out", tmp_path / "run", "--tokenizer", tmp_path / "vae")
    assert steps.tokenizer is None
    assert steps.cache is not None
    assert (steps.cache.tokenizer, steps.cache.image_size) == (str(tmp_path / "vae"), (32, 32))
    config = steps.train
    assert (config.model.channels, config.model.grid, config.tokenizer) == (3, (8, 8), str(tmp_path / "vae"))


def test_folder_components_of_file_or_cache_get_the_same_recipe(tmp_path: Path) -> None:
    """Not as an autoencoder's latents are."""
    data = color(tmp_path / "data", 20, (140, 140))
    tokenizer = PCATokenizer(3, 4, 16)
    tokenizer.fit([torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1])
    file = tmp_path / "other.safetensors"
    Pipeline(tiny.tiny_model(channels=16), tokenizer, classes=("ant", "bee", "cat"), sampling=tiny.FAST).save(file)
    steps = planned(data, "--out", tmp_path / "run", "--tokenizer", file)
    named = planned(data, "--out", tmp_path / "run", "--tokenizer", "pca4").train
    assert steps.cache is None
    assert steps.train == replace(named, tokenizer=str(file))
    assert (named.shift, named.model.head.prediction, named.sampling.x0_bound) == (4, "x0", 10)
    assert "as principal components, 256 tokens" in steps.lines[0]
    cache = tmp_path / "cache"
    assert main(["cache", str(data), "--tokenizer", str(file), "--image-size", "128", "--out", str(cache)]) == 0
    from_cache = planned(cache).train
    assert from_cache == replace(named, data=str(cache), tokenizer=str(file), shift=0)


def test_folder_dc_ae_is_an_autoencoder_though_it_has_no_variance(tmp_path: Path) -> None:
    data, vae, cache = color(tmp_path / "data", 20, (90, 100)), tmp_path / "vae", tmp_path / "cache"
    dc_files(vae)
    steps = planned(data, "--out", tmp_path / "run", "--tokenizer", vae)
    assert steps.cache is not None
    assert (steps.train.model.head.prediction, steps.train.sampling.x0_bound) == ("v", 4)
    assert main(["cache", str(data), "--tokenizer", str(vae), "--image-size", "16", "--out", str(cache)]) == 0
    shutil.rmtree(vae)
    from_cache = planned(cache).train
    assert (from_cache.model.head.prediction, from_cache.sampling) == ("v", steps.train.sampling)


def test_folder_pixels_from_cache_have_the_same_bound(tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    for number in range(24):  # nearly black
        image = Image.new("RGB", (16, 16))
        image.putpixel((number % 16, 3), (220, 210, 200))
        image.save(data / f"{number}.png")
    assert main(["cache", str(data), "--tokenizer", "pixels", "--image-size", "16", "--out", str(cache)]) == 0
    bounds = [
        planned(where, "--tokenizer", "pixels", "--out", tmp_path / "run").train.sampling.x0_bound
        for where in (data, cache)
    ]
    assert bounds[0] == bounds[1]
    assert bounds[0] is not None
    assert bounds[0] > 15


@pytest.mark.parametrize(
    ("side", "asked", "said"),
    [
        (140, "", True),
        (140, "--tokenizer own", True),
        (140, "--tokenizer pixels", False),
        (140, "--tokenizer pca8", False),
        (140, "--image-size 32", False),
        (140, "--model.grid 4 4", False),
        (100, "", False),
    ],
)
def test_folder_mentions_larger_size_for_more_images(side: int, asked: str, said: bool, tmp_path: Path) -> None:
    steps = planned(color(tmp_path / "data", 20, (side, side)), "--out", tmp_path / "run", *asked.split())
    assert ("(larger from 5,000 pictures on" in steps.lines[0]) == said


def test_folder_default_size_fits_the_tokenizer(tmp_path: Path) -> None:
    data, out = color(tmp_path / "data", 20, (140, 140)), tmp_path / "run"
    model = planned(data, "--out", out, "--tokenizer", "pca3").train.model
    assert (model.grid, model.patch_size) == ((40, 40), 4)
    small = planned(color(tmp_path / "small", 20, (28, 28)), "--out", out, "--vae.stride", "8", "--tokenizer", "own")
    assert small.tokenizer is not None
    assert small.tokenizer.config.size == (24, 24)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["train", "folder", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("mar: ")
    assert said.err.count("\n") == 1, said.err
    return said.err


def test_folder_errors_are_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    file = tmp_path / "notes.txt"
    file.write_text("no pictures")
    two = color(tmp_path / "two", 2, (64, 64))
    tiny = color(tmp_path / "tiny", 20, (5, 90))
    assert "needs --data" in refused(capsys, "--out", out)
    assert "two has 2 pictures: expected at least 16" in refused(capsys, "--data", two, "--out", out)
    assert "only 5 pixels wide or high" in refused(capsys, "--data", tiny, "--out", out)
    assert "neither a folder nor a .parquet or .tar file" in refused(capsys, "--data", file, "--out", out)
    assert "does not exist" in refused(capsys, "--data", tmp_path / "nowhere", "--out", out)
    assert "expected multiples of 4" in refused(capsys, "--data", data, "--out", out, "--image-size", "30")
    for size in ("0", "-4"):
        assert f"got {size}x{size}, expected" in refused(capsys, "--data", data, "--out", out, f"--image-size={size}")
    assert "--bogus" in refused(capsys, "--data", data, "--out", out, "--bogus", "1")
    assert "set --model.classes 2" in refused(capsys, "--data", data, "--out", out, "--model.classes", "3")
    assert "--tokenizer is pixels" in refused(
        capsys, "--data", data, "--out", out, "--tokenizer", "pixels", "--vae.width", "8"
    )
    own = ("--data", data, "--out", out, "--tokenizer", "own", "--model.channels", "5")
    assert "choose their number by --vae.channels alone" in refused(capsys, *own)
    moved = ("--data", data, "--out", out, "--tokenizer", "own", "--shift", "2")
    assert "shift is 2, but the pictures are cached as latents, which can't be moved" in refused(capsys, *moved)
    assert "is in" in refused(capsys, "--data", data, "--out", data / "run")
    assert not out.exists()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("pictures.json", "[]", "can't be understood"),
        ("pictures.json", {"count": "many"}, "count: got 'many', expected a whole number"),
        ("pictures.json", {"classes": 2}, "classes: got 2, expected"),
        ("pictures.json", {"max_abs_z": "far"}, "max_abs_z: got 'far', expected a number"),
        ("run.json", "", "is damaged"),
        ("run.json", "[]", "is damaged"),
        ("run.json", {"lr": "high"}, "is damaged"),
        ("run.json", {"model": []}, "is damaged"),
        ("run.json", {"lr": 0.5, "checksum": "as it was"}, "is damaged (it is not as it was written"),
        ("pictures.json", {"count": 19, "checksum": "as it was"}, "it is not as it was written"),
    ],
)
def test_folder_damaged_summary_is_one_line(
    file: str, content: str | dict[str, object], words: str, tmp_path: Path
) -> None:
    """In a process of its own: pytest's checks of types would speak first."""
    data, run = bars(tmp_path / "data"), tmp_path / "run"
    steps = planned(data, "--out", run)
    assert steps.summary is not None
    save_summary(run, steps.summary)
    save_config(steps.train, run)
    if isinstance(content, dict):
        written = json.loads((run / file).read_text())
        checksum = written.pop("checksum")
        kept = {"checksum": checksum} if "checksum" in content else {}
        content = json.dumps({**written, **content, **kept})
    (run / file).write_text(content)
    code = processes.run_to_end(["train", "folder", "--data", str(data), "--out", str(run)], tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert code == 2, said
    assert said.startswith("mar: ")
    assert said.count("\n") == 1, said
    assert file in said
    assert words in said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pictures` and the finished `run` of them, made by WHOLE there."""
    folder = tmp_path_factory.mktemp("made")
    bars(folder / "pictures")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert main(WHOLE) == 0
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to be changed, as the folder where one is."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_folder_trains_from_images_to_a_model(made: Path) -> None:
    model = Pipeline.open(made / "run" / "model.safetensors")
    assert model.classes == ("across", "down")
    assert model.image_size == (8, 8)
    assert model.tokenizer.stride == 2
    assert (made / "run" / "samples" / "000000000016.png").is_file()
    assert json.loads((made / "run" / "tokenizer" / "run.json").read_text())["images"] == 8
    assert (made / "run" / "latents" / "index.json").is_file()


def test_folder_page_shows_all_steps(made: Path) -> None:
    html = (made / "run" / "index.html").read_text(encoding="utf-8")
    for newest in ("samples/000000000016.png", "tokenizer/samples/000000000008.png"):
        assert (made / "run" / newest).is_file()
        assert f'<img class="pixels" src="{newest}"' in html
    assert html.count("<small>finished</small>") == 3
    assert "http-equiv" not in html
    assert "mar sample run" in html
    assert not (made / "run" / "tokenizer" / "index.html").exists()


def test_folder_same_command_does_the_rest(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = processes.read_tree(place / "run" / "tokenizer"), (place / "run" / "model.safetensors").read_bytes()
    Image.new("RGB", (300, 300), "red").save(place / "pictures" / "down" / "more.png")
    assert main([*WHOLE, "--images", "20"]) == 0
    said = capsys.readouterr().err
    assert "pictures has 21 pictures now, 20 when the run began" in said
    assert "warning: the learning rate" not in said  # that was said when it began
    assert "then the model" in said
    assert said.count("watch it: file:///") == 1
    assert "first" not in said
    assert "then the latents" not in said
    assert (place / "run" / "state-000000000020").is_dir()
    assert processes.read_tree(place / "run" / "tokenizer") == before[0]
    assert (place / "run" / "model.safetensors").read_bytes() != before[1]


def test_folder_begun_run_keeps_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions chose otherwise: they showed all pictures equally often, and their files do not say so."""
    monkeypatch.chdir(tmp_path)
    bars(tmp_path / "pictures")
    short = [*WHOLE, "--decay", "0", "--images", "8"]
    earlier = ["--balance", "0", "--sampling.guidance-scale", "3", "--model.head.prediction", "v"]
    assert main([*short, *earlier]) == 0
    file = tmp_path / "run" / "run.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    assert values.pop("balance") == 0
    del values["checksum"]
    file.write_text(json.dumps(values), encoding="utf-8")
    assert main([*WHOLE, "--decay", "0"]) == 0
    values = json.loads(file.read_text(encoding="utf-8"))
    assert (values["balance"], values["sampling"]["guidance_scale"]) == (0, 3)
    assert values["model"]["head"]["prediction"] == "v"
    assert main([*WHOLE, "--decay", "0", "--out", "new"]) == 0
    values = json.loads((tmp_path / "new" / "run.json").read_text(encoding="utf-8"))
    assert (values["balance"], values["sampling"]["guidance_scale"]) == (0.5, 5)


@pytest.mark.parametrize("finished", ["tokenizer", "latents", "state"])
def test_folder_run_of_an_earlier_version_stays_as_it_began(
    finished: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions did not turn pictures upright, and did not say so in their files."""
    monkeypatch.chdir(tmp_path)
    lay_down(bars(tmp_path / "pictures"))
    whole = [*WHOLE, "--decay", "0"]  # else a shorter run would not be the beginning of a longer one
    assert main([*whole, "--no-upright"]) == 0
    (tmp_path / "run").rename("whole")
    assert main([*whole, "--no-upright", "--images", "8"]) == 0
    run = tmp_path / "run"
    for path in ("run.json", "tokenizer/run.json", "latents/cache.json"):
        forget_upright(run / path)
    if finished != "state":
        for path in [*run.glob("state-*"), run / "samples"]:
            shutil.rmtree(path)
        for path in [run / "latest", run / "run.json", run / "log.jsonl", *run.glob("*.safetensors")]:
            path.unlink()
    if finished == "tokenizer":
        shutil.rmtree(run / "latents")
    assert main(whole) == 0
    ours, theirs = (Pipeline.open(tmp_path / name / "model.safetensors").model for name in ("run", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    capsys.readouterr()
    assert main([*whole, "--upright"]) == 2
    assert "run holds another run (upright False -> True); use its settings" in capsys.readouterr().err


def test_folder_new_run_turns_pictures_upright(tmp_path: Path) -> None:
    """In the tokenizer's training, the cache and what it is compared with: as pictures that stand in their files."""
    for name, lying in (("standing", False), ("lying", True)):
        data = bars(tmp_path / name)
        assert main(command(str(lay_down(data) if lying else data), str(tmp_path / f"run-{name}"), *TOKENIZER)) == 0
    for path in ("tokenizer/tokenizer.safetensors", "latents/00000.safetensors"):
        assert (tmp_path / "run-lying" / path).read_bytes() == (tmp_path / "run-standing" / path).read_bytes()
    for path in ("run.json", "tokenizer/run.json"):
        assert json.loads((tmp_path / "run-lying" / path).read_text())["upright"] is True
    lying, cached = tmp_path / "lying", tmp_path / "run-lying" / "latents"
    assert planned(cached, "--out", tmp_path / "other").train.upright
    steps = planned(lying, "--out", tmp_path / "new", "--tokenizer", "own", "--no-upright")
    assert steps.tokenizer is not None
    assert steps.cache is not None
    assert (steps.train.upright, steps.tokenizer.config.upright, steps.cache.upright) == (False, False, False)
    assert steps.tokenizer.command().endswith("--no-upright")
    steps = planned(lying, "--out", tmp_path / "new", "--tokenizer", "own")
    assert steps.tokenizer is not None
    assert "upright" not in steps.tokenizer.command()


def test_folder_of_another_run_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = processes.read_tree(place)
    for more, words in (
        (["--vae.images", "12"], "run/tokenizer is finished: it has seen 8 pictures, not 12"),
        (["--seed", "1"], "run holds another run (seed 0 -> 1)"),
        (["--vae.kl", "1"], "run/tokenizer holds another run (kl 1e-06 -> 1.0)"),
    ):
        assert main([*WHOLE, *more]) == 2
        assert words in capsys.readouterr().err
    (place / "pictures" / "third").mkdir()
    shutil.copy(place / "pictures" / "down" / "0.png", place / "pictures" / "third")
    assert main(WHOLE) == 2
    assert "the classes across, down, third now" in capsys.readouterr().err
    shutil.rmtree(place / "pictures" / "third")
    assert processes.read_tree(place) == before


def test_folder_cached_latents_are_enough(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place / "pictures")
    assert main(command("run/latents", "second", "--sample-every", "0")) == 0
    assert "20 pictures in 2 classes" in capsys.readouterr().err
    assert (place / "second" / "model.safetensors").read_bytes() == (place / "run" / "model.safetensors").read_bytes()
    assert "leave out --image-size" in refused(capsys, "--data", "run/latents", "--image-size", "8")


@pytest.mark.parametrize(("noted", "moved", "guidance"), [(True, True, 5), (False, False, 5), (False, True, 3)])
def test_folder_cache_knows_its_residual_tokenizer(noted: bool, moved: bool, guidance: float, place: Path) -> None:
    """Caches of earlier versions do not say its kind, but where it is."""
    if not noted:
        without_kind = replace(read_manifest(place / "run" / "latents"), tokenizer_kind="")
        write_manifest(place / "run" / "latents", without_kind)
    if moved:
        (place / "run" / "tokenizer").rename(place / "elsewhere")
    train = planned("run/latents", "--out", "second").train
    assert (train.sampling.guidance_scale, train.model.head.prediction) == (guidance, "x0")


def test_folder_long_run_on_few_images_warns(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mar.training.preflight.MANY_EPOCHS", 1)  # in place of 100 times
    warned = []
    for images in ("16", "20", "24"):
        assert main(command(str(data), str(tmp_path / "run"), "--sample-every", "0", "--images", images)) == 0
        warned.append("20 pictures will be seen 1 times each" in capsys.readouterr().err)
    assert warned == [False, True, False]


def test_folder_cached_pixels_are_not_shifted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert planned(color(tmp_path / "data", 20, (16, 16))).train.shift == 1
    assert main(["cache", "data", "--tokenizer", "pixels", "--image-size", "16", "--out", "cache"]) == 0
    assert main(command("cache", "moved", "--shift", "1")) == 2
    assert "can't be moved by 1 pixels; train with --shift 0" in capsys.readouterr().err
    assert main(command("cache", "run", "--sample-every", "0")) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_folder_killed_before_the_model_resumes(place: Path) -> None:
    """In the tokenizer's training, and while latents are cached: the same at the end."""
    (place / "run").rename(place / "undisturbed")
    said = place / "said"
    for file in (r"tokenizer/\.mar-tmp-[^/]*/state-000000000008", r"latents/\.mar-tmp-[^/]*/00000\.safetensors"):
        code = processes.run_to_end(WHOLE, said, die=(file, signal.SIGKILL))
        assert code == -signal.SIGKILL, said.read_text()
    assert processes.run_to_end(WHOLE, said) == 0, said.read_text()
    for name in (
        "tokenizer/tokenizer.safetensors",
        "tokenizer/config.json",
        "latents/index.json",
    ):
        assert (place / "run" / name).read_bytes() == (place / "undisturbed" / name).read_bytes()
    ours, theirs = (Pipeline.open(place / name / "model.safetensors").model for name in ("run", "undisturbed"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


TIMED = ["train", "folder", "--data", "pictures", "--out", "timed", *SMALL, "--batch", "4", "--log-every", "1"]
TIMED += ["--save-every", "20", "--vae.width", "8", "--vae.batch", "4", "--vae.save-every", "8", "--vae.stride", "2"]
TIMED += ["--minutes", "0.02"]


def test_folder_with_a_time_killed_anywhere_keeps_its_plan(place: Path) -> None:
    said = place / "said"
    for file in (r"tokenizer/\.mar-tmp-[^/]*/state-000000000016", r"timed/\.mar-tmp-[^/]*/state-000000000040"):
        code = processes.run_to_end(TIMED, said, die=(file, signal.SIGKILL))
        assert code == -signal.SIGKILL, said.read_text()
    plan = json.loads((place / "timed" / "time.json").read_text())
    assert plan["seconds"] == pytest.approx(1.2)
    assert min(plan["tokenizer_images"], plan["model_images"]) >= 40
    without = [word for word in TIMED if word not in ("--minutes", "0.02")]
    assert processes.run_to_end(without, said) == 0, said.read_text()  # the plan is the run's
    assert json.loads((place / "timed" / "time.json").read_text()) == plan
    # the same lengths, given by hand and never disturbed
    model, grids = plan["model_images"], plan["grids"]
    lengths = ["--images", model, "--vae.images", plan["tokenizer_images"], "--sample-every", model // grids]
    assert processes.run_to_end([*without, "--out", "whole", *map(str, lengths)], said) == 0, said.read_text()
    index = [(place / run / "latents" / "index.json").read_bytes() for run in ("timed", "whole")]
    assert index[0] == index[1]
    ours, theirs = (Pipeline.open(place / name / "model.safetensors").model for name in ("timed", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_folder_time_that_contradicts_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", "pictures", "--out")
    assert "a time, which chooses the number; leave one out" in refused(
        capsys, *data, "new", "--minutes", "1", "--images", "8"
    )
    assert "got --minutes 1 and --hours 1" in refused(capsys, *data, "new", "--minutes", "1", "--hours", "1")
    assert "minutes is -1, but it must be positive" in refused(capsys, *data, "new", "--minutes", "-1")
    at = WHOLE.index("--images")
    assert main([*WHOLE[:at], *WHOLE[at + 2 :], "--minutes", "1"]) == 2
    assert "run was begun without a time; leave it out" in capsys.readouterr().err
    save_time_plan(TimePlan(60.0, 8, 16, 2), place / "run")
    assert "run was planned for 60 s, not 2 min" in refused(capsys, *data, "run", "--minutes", "2")
    assert not (place / "new").exists()


def renamed(pictures: Path, others: str) -> Path:
    """The same pictures by other names: other pictures, as far as anybody can tell without reading them."""
    for path in sorted(pictures.rglob("*.png")):
        other = pictures.with_name(others) / path.parent.name / f"other-{path.name}"
        other.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other)
    return pictures.with_name(others)


def test_folder_other_pictures_than_those_of_the_cache_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a tokenizer that is here makes the cache, so that no training of one compares them."""
    renamed(place / "pictures", "others")
    (place / "run" / "tokenizer").rename(place / "tokenizer")
    given = ("--tokenizer", "tokenizer", "--image-size", "8")
    assert main(command("pictures", "second", *given)) == 0
    capsys.readouterr()
    assert main(command("others", "second", *given)) == 2
    said = capsys.readouterr().err
    assert "second/latents holds latents of pictures, and the pictures of others are others" in said


def test_folder_goes_on_where_pictures_and_run_were_moved(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But not with other pictures, also if only the tokenizer has seen the first ones."""
    renamed(place / "pictures", "others")
    (place / "pictures").rename(place / "moved")
    assert main([*WHOLE, "--data", "others"]) == 2
    assert "begin another run in another folder" in capsys.readouterr().err
    model = Pipeline.open(place / "run" / "model.safetensors").fingerprint()
    (place / "run").rename(place / "elsewhere")
    assert main([*WHOLE, "--data", "moved", "--out", "elsewhere"]) == 0
    assert Pipeline.open(place / "elsewhere" / "model.safetensors").fingerprint() == model
    assert read_manifest(place / "elsewhere" / "latents").data == "moved"
    shutil.rmtree(place / "elsewhere" / "latents")
    (place / "moved").rename(place / "gone")
    assert main([*WHOLE, "--data", "others", "--out", "elsewhere"]) == 2
    assert "begin another run in another folder" in capsys.readouterr().err


def test_folder_validates_on_the_test_part_of_moved_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bars(tmp_path / "pictures" / "train")
    bars(tmp_path / "pictures" / "test", 10)
    assert main([*WHOLE, "--patience", "9"]) == 0
    (tmp_path / "pictures").rename(tmp_path / "moved")
    assert main([*WHOLE, "--patience", "9", "--data", "moved"]) == 0
    _, held_out = open_run_data(plan_folder([*WHOLE[2:], "--data", "moved"])[0].train)
    assert held_out is not None
    assert len(held_out) == 10


def test_folder_begun_tokenizer_keeps_its_noise(place: Path) -> None:
    """Of earlier versions, short trainings have as much as long ones."""
    step = plan_folder(WHOLE[2:])[0].tokenizer
    assert step is not None
    assert step.config.noise < 0.01  # of 8 pictures
    save_config(replace(step.config.resolved(), noise=0.6), place / "run" / "tokenizer")
    begun = plan_folder(WHOLE[2:])[0].tokenizer
    assert begun is not None
    assert begun.config.noise == 0.6


def test_folder_names_the_batch_that_is_too_large(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> int:
        raise MemoryError

    monkeypatch.setattr("mar.cli.train_folder.train_model", fail)
    assert main(WHOLE) == 2
    assert "take a smaller --batch than 4" in capsys.readouterr().err
    monkeypatch.setattr("mar.cli.train_folder.train_tokenizer", fail)
    assert main([*WHOLE, "--out", "new"]) == 2
    assert "take a smaller --vae.batch than 4" in capsys.readouterr().err
    del place


def test_folder_time_of_a_run_that_never_began_is_no_plan(data: Path, tmp_path: Path) -> None:
    """Another time makes another plan; the same one, and none, keep it."""
    begun, given = tmp_path / "run", ("--out", str(tmp_path / "run"))
    save_time_plan(TimePlan(60.0, None, 320, 2), begun)
    assert planned(data, *given, "--minutes", "2").train.images == planned(data).train.images
    assert planned(data, *given, "--minutes", "1").train.images == planned(data, *given).train.images == 320
    (begun / "tokenizer").mkdir()
    (begun / "tokenizer" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="planned for 60 s, not 2 min"):
        planned(data, *given, "--minutes", "2")


def test_folder_time_counts_validation(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 pictures, or of one every 8, each at a third of the cost of one that is learned from."""
    monkeypatch.setattr("mar.training.speed.model_speed", lambda *arguments, **options: ModelSpeed(10.0, 0.0))
    monkeypatch.setattr("mar.cli.train_folder.time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr("mar.cli.train_folder.train_model", lambda *arguments: 0)
    seen = []
    for options in ((), ("--hold-out", "2"), ("--hold-out", "2", "--validate-every", "8")):
        out = tmp_path / f"run{len(seen)}"
        short = ("--batch", "4", "--sample-every", "0", "--minutes", "0.4", *SMALL)
        assert main(["train", "folder", "--data", str(data), "--out", str(out), *short, *options]) == 0, options
        seen.append(json.loads((out / "time.json").read_text())["model_images"])
    whole = (0.4 * 60 - RESERVE_SECONDS) * 10
    expected = [whole, whole - VALIDATIONS * 10 / 3, whole / (1 + 10 / 3 / 8)]
    assert seen == [images // 4 * 4 for images in expected]


def test_folder_of_little_time_gets_a_smaller_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that it sees 20,000 pictures, unless its size was named; a continued run keeps its size."""

    def speed(config: TrainConfig, *arguments: object, **options: object) -> ModelSpeed:
        return ModelSpeed({192: 10.0, 128: 20.0}.get(config.model.encoder.width, 5.0), 0.0)

    monkeypatch.setattr("mar.training.speed.model_speed", speed)
    monkeypatch.setattr("mar.cli.train_folder.time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr("mar.cli.train_folder.train_model", lambda *arguments: 0)
    sizes = []
    for number, options in enumerate(((30,), (35,), (5,), (5, "--model.decoder.width", "192"))):
        out = ["--data", str(data), "--out", str(tmp_path / f"run{number}")]
        timed = ["--minutes", str(options[0]), *options[1:]]
        assert main(["train", "folder", *out, "--sample-every", "0", *timed]) == 0
        model = planned(data, *out[2:], *options[1:]).train.model  # as it goes on, without the time
        sizes.append((model.encoder.width, model.decoder.width, model.head.width))
    assert sizes == [(128, 128, 192), (192, 192, 256), (128, 128, 192), (192, 192, 256)]
    said = capsys.readouterr().err
    assert said.count("the time is too short for 3 + 5 blocks 192 wide, head 3 x 256; a smaller model ") == 2
    assert said.count("learns more in it: 2 + 4 blocks 128 wide, head 3 x 192\n") == 2
    continued = planned(data, "--out", str(tmp_path / "run0"))
    assert continued.lines[1].startswith("for so many pictures in so little time: 2 + 4 blocks")


def test_folder_evaluation_is_checked_before_a_tokenizer_is_trained(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, said in (
        (("--eval-features", f"{extractors.__file__}:tiny", "--eval-reference", "nowhere.npz"), "nowhere.npz"),
        (("--eval-features", "of-mine"), "features: got 'of-mine', expected inception"),
    ):
        assert main([*WHOLE, "--out", "evaluated", "--eval-every", "8", *options]) == 2
        assert said in capsys.readouterr().err
        assert not (place / "evaluated" / "tokenizer").exists()


def test_folder_cache_that_no_token_divides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    color(tmp_path / "data", 20, (70, 70))
    assert main(["cache", "data", "--tokenizer", "pixels", "--image-size", "70", "--out", "cache"]) == 0
    said = "pictures of 70x70, expected multiples of 8; make another cache with `mar cache --image-size 64`"
    assert said in refused(capsys, "--data", "cache")


def test_folder_time_after_a_tokenizer_that_was_trained_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the line says to whom several processes are refused."""
    monkeypatch.chdir(tmp_path)
    bars(tmp_path / "pictures")
    at = WHOLE.index("--images")
    without = [*WHOLE[:at], *WHOLE[at + 2 :]]
    plan = plan_folder([*without[2:], "--minutes", "0.05"])[0]
    assert plan.tokenizer is not None
    assert main(shlex.split(plan.tokenizer.command())[1:]) == 0
    assert main([*without, "--minutes", "0.0001"]) == 2
    assert "are for tokenizer and model, but the tokenizer took" in capsys.readouterr().err
    assert main([*without, "--minutes", "0.05"]) == 0
    assert json.loads((tmp_path / "run" / "time.json").read_text())["tokenizer_images"] == 8
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_folder_time_counts_the_reading_of_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a camera take long: for components, statistics and latents, each is read again."""
    monkeypatch.chdir(tmp_path)
    bars(tmp_path / "pictures")
    monkeypatch.setattr("mar.training.speed.tokenizer_speed", lambda *arguments: 1000.0)
    monkeypatch.setattr("mar.cli.train_folder.train_tokenizer", lambda *arguments: 130)
    lengths = []
    for number, seconds_each in enumerate((0.0, 0.04)):
        monkeypatch.setattr("mar.training.speed.reading_seconds", lambda config, each=seconds_each: each)
        timed = ["--out", str(number), "--minutes", "0.05"]
        assert main([*TIMED[:-2], *timed]) == 130
        lengths.append(json.loads((tmp_path / str(number) / "time.json").read_text())["tokenizer_images"])
    said = capsys.readouterr().err
    # a fifth of 3 s, or of 0.6 s, less 11 evaluations of a picture and the encoding of 60, in steps of 4
    assert lengths == [592, 112]
    assert said.count("most of the time goes into reading") == 1
    assert said.count("warning: that is little: a model of 8x8 pixels will see about ") == 2


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (("--init", "fashoin"), "model: got 'fashoin', expected emoji, fashion"),
        (("--log-to", "wandb"), "--log-to wandb needs the extra `wandb`"),
        (("--validate-on", "nowhere"), "nowhere"),
    ],
)
def test_folder_mistakes_of_the_model_are_said_before_its_tokenizer(
    mistake: tuple[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    bars(tmp_path / "pictures")
    assert main([*WHOLE, *mistake]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_recipe_of_words_gives_up_its_lengths_for_a_time(tmp_path: Path) -> None:
    """Also where it goes on without naming it."""
    lengths = {"--images", "--vae.images", "--sample-every"}
    assert lengths < {*_recipe_options("emoji", ["--data", "x"])}
    timed = _recipe_options("emoji", ["--data", "x", "--minutes=5"])
    assert not lengths & {*timed}
    assert "--image-size" in timed
    save_time_plan(TimePlan(60.0, 8, 16, 2), tmp_path)
    begun = ["--data", "x", "--out", str(tmp_path)]
    assert _recipe_options("emoji", begun) == timed


def test_recipe_of_words_has_the_help_of_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "emoji", "--minutes", "5", "--help"])
    said = capsys.readouterr().out
    assert "shown: what is chosen" in said
    assert "Pictures are cut to squares" in said


def test_folder_channels_that_the_tokenizer_lacks_are_refused_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = TokenizerTrainConfig(image_size=32, stride=4, channels=3, width=8)
    save_tokenizer(from_config(autoencoder_config(settings)), tmp_path / "vae")
    with pytest.raises(ConfigError, match=r"channels is 8, but the latents of .*vae have 3; leave it out"):
        planned(color(tmp_path / "data", 20, (90, 100)), "--tokenizer", tmp_path / "vae", "--model.channels", "8")


def test_folder_size_of_a_tokenizer_is_that_of_its_training(tmp_path: Path) -> None:
    """Not the largest usual one below it."""
    data = color(tmp_path / "data", 20, (120, 120))
    torch.manual_seed(0)
    settings = TokenizerTrainConfig(image_size=96, stride=8, channels=3, width=8)
    save_tokenizer(from_config(autoencoder_config(settings)), tmp_path / "vae")
    assert planned(data, "--tokenizer", tmp_path / "vae").train.model.grid == (12, 12)


def test_folder_components_of_few_values_are_all_kept(tmp_path: Path) -> None:
    assert planned(color(tmp_path / "data", 20, (32, 32)), "--tokenizer", "pca2").train.model.channels == 4


def test_folder_says_how_long_it_takes(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mar.cli.train_folder.MIN_IMAGES_TIMED", 24)
    monkeypatch.setattr("mar.cli.train_folder.MEASURE_SECONDS", 0.1)
    for expected in (True, False):  # not again where it goes on
        assert main([*WHOLE, "--out", "new", "--sample-every", "0"]) == 0
        said = capsys.readouterr().err
        pattern = (
            r"on this machine: tokenizer \d+ s \([\d,]+ pictures a second\), model \d+ s \(\d+ pictures a second\)"
        )
        assert bool(re.search(pattern, said)) == expected, said


def test_folder_own_tokenizer_on_several_ranks_is_refused(place: Path) -> None:
    shutil.rmtree(place / "run")
    codes = processes.run_group(2, [*WHOLE, "--sample-every", "0"], place / "said")
    said = [(place / f"said.{rank}").read_text() for rank in range(2)]
    assert codes == [2, 2], said
    assert "got 2 processes, but a tokenizer is trained by one: first run `mar tokenizer train pictures" in said[0]
    assert "first run" not in said[1]
    (first,) = re.findall(r"first run `mar (.*?)`", said[0])
    assert main(shlex.split(first)) == 0
    codes = processes.run_group(2, [*WHOLE, "--sample-every", "0"], place / "said")
    said = [(place / f"said.{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], said
    assert Pipeline.open(place / "run" / "model.safetensors").image_size == (8, 8)


def test_folder_unusual_learning_rate_warns(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "fashion", *SMALL, "--images", "8", "--batch", "8", "--lr", "0.2", "--sample-every", "0",
                 "--out", str(tmp_path / "run")]) == 0  # fmt: skip
    said = capsys.readouterr().err
    assert "warning: the learning rate is 0.00625 for 8 pictures a step (--lr is for 256), 4.17 times above" in said
    assert "the 0.0015 of the recipe fashion; --lr 0.048 would be its rate" in said
