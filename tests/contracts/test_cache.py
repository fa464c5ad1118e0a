"""`mar cache`, and training from what it makes: the run that the pictures would have given."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import tiny
import torch
from orientations import forget_upright, lay_down
from PIL import Image

from mar.checkpoint.tokenizers import save_tokenizer
from mar.cli import main
from mar.config import ConfigError, TrainConfig
from mar.tokenizer import KLTokenizer, Tokenizer
from mar.tokenizer.kl import from_config
from mar.training.callbacks import Validation, take_snapshot
from mar.training.log import Log, RunLog
from mar.training.run import open_run
from mar.training.trainer import Run, train
from mar.zoo import load_tokenizer

AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
STEPS = 8
BATCH = 4


def autoencoder(seed: int) -> KLTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return from_config(AUTOENCODER).requires_grad_(False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes in three classes, one of them broken; two autoencoders: `kl`, and `other`."""
    folder = tmp_path_factory.mktemp("cache")
    generator = np.random.default_rng(0)
    for i in range(14):
        path = folder / "pictures" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (*generator.integers(8, 30, 2), 3)
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(path)
    (folder / "pictures" / "b" / "4.png").write_bytes(b"no picture")
    save_tokenizer(autoencoder(0), folder / "kl")
    save_tokenizer(autoencoder(1), folder / "other")
    return folder


def cached(home: Path, out: Path, *more: str, tokenizer: str = "kl") -> list[str]:
    name = str(home / tokenizer) if tokenizer in ("kl", "other") else tokenizer
    settings = ["--tokenizer", name, "--image-size", "8", "--shard", "4", "--batch", "3", "--device", "cpu"]
    return ["cache", str(home / "pictures"), "--out", str(out), *settings, *more]


@pytest.fixture(scope="module")
def caches(home: Path) -> Path:
    for dtype in ("fp32", "fp16", "bf16"):
        assert main(cached(home, home / dtype, "--dtype", dtype)) == 0
    return home


def settings(home: Path, data: str, **changes: Any) -> TrainConfig:
    model = tiny.tiny_config(channels=4, grid=(4, 4), classes=3)
    options: dict[str, Any] = {"model": model, "tokenizer": str(home / "kl"), "images": STEPS * BATCH, "lr": 0.05}
    return tiny.tiny_train_config(home / data, **{**options, **changes})


def open_it(config: TrainConfig, folder: Path, tokenizer: Tokenizer | None = None) -> Run:
    def load(name: str) -> Tokenizer:
        return tokenizer or load_tokenizer(name)

    def nothing(name: str) -> Any:
        raise AssertionError(f"{name} is not to be loaded")

    return open_run(config, folder, device=torch.device("cpu"), load_tokenizer=load, load_model=nothing)


def go(run: Run) -> list[float]:
    log = RunLog(run.folder, run.config.images, run.progress.images)
    try:
        assert train(run, log)
    finally:
        log.close()
    return [json.loads(line)["loss"] for line in (run.folder / "log.jsonl").read_text().splitlines()]


def test_training_from_cache_equals_training_from_images(caches: Path, tmp_path: Path) -> None:
    """Flips on, posterior sampled, statistics measured on the way, a broken picture replaced: the same run."""
    kinds = ("pictures", "fp32", "fp16", "bf16")
    losses = {kind: go(open_it(settings(caches, kind), tmp_path / kind)) for kind in kinds}
    exact = np.array(losses["pictures"])
    assert len(exact) == STEPS
    assert len({round(loss, 4) for loss in exact}) == STEPS  # they do depend on what comes in
    assert np.abs(np.array(losses["fp32"]) / exact - 1).max() < 1e-6
    assert 0 < np.abs(np.array(losses["fp16"]) / exact - 1).max() < 3e-4
    assert np.abs(np.array(losses["fp16"]) - exact).max() < np.abs(np.array(losses["bf16"]) - exact).max() < 1e-2
    unflipped = go(open_it(settings(caches, "fp32", flip=False), tmp_path / "unflipped"))
    assert np.abs(np.array(unflipped) / exact - 1).max() > 1e-3


def test_cache_holds_out_the_same_images(caches: Path, tmp_path: Path) -> None:
    runs = [open_it(settings(caches, kind, hold_out=4, images=16), tmp_path / kind) for kind in ("pictures", "fp32")]
    assert [(len(run.source), len(run.held_out or ())) for run in runs] == [(11, 3)] * 2
    losses = [go(run) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    found = [dict(Validation(run, Log())(take_snapshot(run))) for run in runs]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["val_loss"] > 0


def test_run_from_a_cache_resumes_bitwise(caches: Path, tmp_path: Path) -> None:
    whole = open_it(settings(caches, "fp16"), tmp_path / "whole")
    losses = go(whole)
    go(open_it(settings(caches, "fp16", images=STEPS * BATCH // 2), tmp_path / "half"))
    resumed = open_it(settings(caches, "fp16"), tmp_path / "half")
    assert resumed.progress.step == STEPS // 2
    assert go(resumed) == losses
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_cache_uses_the_tokenizers_statistics(caches: Path, tmp_path: Path) -> None:
    measured = autoencoder(0)
    measured.set_statistics(0.25, 1.5)
    run = open_it(settings(caches, "fp32"), tmp_path, measured)
    assert (run.tokenizer.mean.tolist(), run.tokenizer.std.tolist()) == ([0.25], [1.5])


def test_run_on_an_unsuitable_cache_is_refused(caches: Path, tmp_path: Path) -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=words) as said:
            open_it(settings(caches, "fp32", **changes), tmp_path)
        assert "\n" not in str(said.value)

    refused(r"was cached by the tokenizer .*/kl \(.*, but the run's is .*/other \(", tokenizer=str(caches / "other"))
    refused("channels: got 4 for latents of pixels, expected 1 or 3; choose --tokenizer .*/kl", tokenizer="pixels")
    larger = tiny.tiny_config(channels=4, grid=(8, 8), classes=3)
    refused("is of pictures of 8x8, but the model is for 16x16; set --model.grid 4 4", model=larger)
    refused("the model has 4 classes, but .* has 3", model=tiny.tiny_config(channels=4, grid=(4, 4), classes=4))
    refused("holds latents of pictures as they are, which can't be moved by 2 pixels; train with --shift 0", shift=2)
    assert main(cached(caches, tmp_path / "plain", "--flip", "False")) == 0
    config = settings(caches, str(tmp_path / "plain"), flip=True)
    with pytest.raises(ConfigError, match="holds no flipped pictures; train with --flip False"):
        open_it(config, tmp_path / "run")


def test_cache_command_prints_a_summary(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(cached(home, out)) == 0
    said = capsys.readouterr()
    broken = home / "pictures" / "b" / "4.png"
    assert f"1 pictures could not be read and are left out: {broken}\n" in said.err
    first, second = said.out.splitlines()
    assert first == f"13 pictures in {out}, plain and flipped, fp16"
    assert second.startswith("8.5 KiB, 62")  # 512 + 4 + checksums of some digits, and the headers of tiny shards
    assert main(cached(home, out)) == 0
    assert capsys.readouterr().out == f"{out} is finished: 14 pictures; nothing to do\n"
    assert main(["cache", "--verify", str(out)]) == 0
    assert "is as it was written: 13 pictures, 1 left out" in capsys.readouterr().out
    shard = out / "00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-200] ^= 4
    shard.write_bytes(data)
    for arguments in (["cache", "--verify", str(out)], ["cache", str(out), "--verify"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "1 of 4 shards are damaged: 00002.safetensors; delete it" in error
        assert f"run the `mar cache` that made the folder again ({home / 'pictures'} by the tokenizer" in error
        assert error.count("\n") == 1
    shard.unlink()
    assert main(cached(home, out)) == 0
    assert main(["cache", "--verify", str(out)]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--tokenizer", "pixels", "--dtype", "fp8"], "--dtype"),
        (["--image-size", "7"], "image-size: got 7x7, expected multiples of the stride 2"),
        (["--tokenizer", "nowhere.safetensors"], "nowhere.safetensors: there is no such file"),
        (["--batch", "0"], "got 0 and 0"),
        (["--shard", "0"], "in shards of 0"),
        (["--out", "."], "is there, but not from `mar cache`"),
    ],
    ids=["dtype", "size", "tokenizer", "batch", "shard", "out"],
)
def test_cache_errors_are_one_line(
    change: list[str], words: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--out" in change:
        change = ["--out", str(home)]
    assert main(cached(home, tmp_path / "out", *change)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_cache_command_turns_upright_unless_begun_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_images(tmp_path / "plain" / "pictures")
    lay_down(tiny.write_images(tmp_path / "pictures"))
    made = {}
    for name, where, more in (
        ("plain", tmp_path / "plain", []), ("new", tmp_path, []), ("begun", tmp_path, ["--upright", "False"]),
    ):  # fmt: skip
        assert main(cached(where, tmp_path / name / "cache", *more, tokenizer="pixels")) == 0
        made[name] = processes.read_tree(tmp_path / name / "cache")
    shards = [name for name in made["new"] if name.endswith(".safetensors")]
    assert len(shards) == 5
    assert [made["new"][name] for name in shards] == [made["plain"][name] for name in shards]
    assert all(made["new"][name] != made["begun"][name] for name in shards)

    # begun by a version without the option: it goes on as it is
    begun = tmp_path / "begun" / "cache"
    forget_upright(begun / "cache.json")
    for name in ("00001.safetensors", "index.json"):
        (begun / name).unlink()
    capsys.readouterr()
    assert main(cached(tmp_path, begun, "--upright", "True", tokenizer="pixels")) == 2
    said = capsys.readouterr().err
    assert "was begun with upright False, not True; give the same settings, remove it, or take another --out" in said
    assert said.count("\n") == 1
    assert main(cached(tmp_path, begun, tokenizer="pixels")) == 0
    assert {**processes.read_tree(begun), "cache.json": b""} == {**made["begun"], "cache.json": b""}


def test_training_on_a_cache_validates_on_pictures_as_cached(tmp_path: Path) -> None:
    """A test part lies in its files, and is turned as the cached pictures were."""
    for part, count in (("train", 20), ("test", 12)):
        tiny.write_images(tmp_path / "plain" / "pictures" / part, count)
        lay_down(tiny.write_images(tmp_path / "pictures" / part, count))
    losses = {}
    for name, where, more in (
        ("plain", tmp_path / "plain", []), ("new", tmp_path, []), ("lying", tmp_path, ["--upright", "False"]),
    ):  # fmt: skip
        assert main(cached(where, tmp_path / name / "cache", *more, tokenizer="pixels")) == 0
        model = tiny.tiny_config(channels=3, grid=(8, 8), classes=2)
        config = settings(tmp_path / name, "cache", tokenizer="pixels", model=model)
        run = open_it(config, tmp_path / name / "run")
        losses[name] = Validation(run, Log())(take_snapshot(run))["val_loss"]
    assert losses["new"] == losses["plain"]
    assert losses["lying"] != pytest.approx(losses["plain"])
    with pytest.raises(ConfigError, match="as they lie in their files; train with --no-upright, or cache anew with"):
        open_it(
            settings(tmp_path / "lying", "cache", tokenizer="pixels", model=model, upright=True), tmp_path / "refused"
        )


def test_cache_verify_names_missing_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "fashion"]) == 2
    assert "needs --tokenizer, --out, --image-size too, or --verify" in capsys.readouterr().err
    assert main(["cache", str(tmp_path), "--verify"]) == 2
    assert "is not a cache that `mar cache` made" in capsys.readouterr().err


def test_cache_killed_repeatedly_gives_the_same_bytes(home: Path, tmp_path: Path) -> None:
    """Before and after every file gets its name: the manifest, four shards, the index."""
    arguments = cached(home, tmp_path / "killed", tokenizer="pixels")
    for moment, shards in ((1, 0), (2, 0), (3, 1), (4, 3), (3, 4), (1, 4)):
        assert processes.run_to_end(arguments, tmp_path / "said", die=(moment, signal.SIGKILL)) == -signal.SIGKILL
        assert len(list((tmp_path / "killed").glob("0*.safetensors"))) == shards
        assert main(["cache", "--verify", str(tmp_path / "killed")]) == 2
    assert main(arguments) == 0
    assert main(cached(home, tmp_path / "whole", tokenizer="pixels")) == 0
    assert processes.read_tree(tmp_path / "killed") == processes.read_tree(tmp_path / "whole")


def test_cache_stopped_by_a_signal_is_one_line(home: Path, tmp_path: Path) -> None:
    arguments = cached(home, tmp_path / "out", tokenizer="pixels")
    assert processes.run_to_end(arguments, tmp_path / "said", die=(r"00001\.safetensors", signal.SIGTERM)) == 130
    assert (tmp_path / "said").read_text() == "mar: stopped; the same command goes on\n"
    assert main(arguments) == 0
