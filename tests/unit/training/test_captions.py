"""Training on captions: read by words or by a text encoder, embedded once, and resumed bit by bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import save_encoder
from tiny import caption_images, open_tiny_run, randomize, tiny_train_config, write_images
from torch import Tensor

from mar.checkpoint.checksums import read_json
from mar.checkpoint.run_state import RunState
from mar.config import ConfigError, TrainConfig
from mar.data import text_encoder
from mar.data.conditions import WordReader
from mar.data.text_encoder import TextReader
from mar.pipeline import Pipeline
from mar.training.callbacks import export_and_sample, take_snapshot
from mar.training.log import Log
from mar.training.run import CAPTIONS_FILE, export, make_pipeline, with_captions
from mar.training.trainer import Callback, Run, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return caption_images(write_images(tmp_path_factory.mktemp("pictures")))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"), "t5")


def config_of(data: Path, text: str | Path, **changes: Any) -> TrainConfig:
    """Settings of a short run with captions of at most eight tokens."""
    config = tiny_train_config(data, text=str(text), **changes)
    return with_captions(replace(config, model=replace(config.model, buffer_size=8)))


def weights(run: Run) -> dict[str, Tensor]:
    return {f"{which}.{name}": t.clone() for which, m in run.weights.items() for name, t in m.state_dict().items()}


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise AssertionError("no encoder is to be loaded")

    monkeypatch.setattr(text_encoder, "load_encoder", fail)


@pytest.mark.parametrize("kind", ["words", "encoder"])
def test_run_with_captions_resumes_bitwise(data: Path, encoder: Path, tmp_path: Path, kind: str) -> None:
    config = config_of(data, "words" if kind == "words" else encoder)
    expected = open_tiny_run(config, tmp_path / "whole")
    train(expected, Log())
    half = open_tiny_run(replace(config, images=20), tmp_path / "run")
    train(half, Log())
    for table in (tmp_path / "run").glob("text-*"):
        table.unlink()  # what is embedded anew is the same
    resumed = open_tiny_run(config, tmp_path / "run")
    assert resumed.progress.images == 20
    train(resumed, Log())
    states = weights(expected), weights(resumed)
    assert states[0].keys() == states[1].keys()
    assert any("text_embed.project" in name or "words_embed.words" in name for name in states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_run_learns_from_the_features(data: Path, encoder: Path, tmp_path: Path) -> None:
    run = open_tiny_run(config_of(data, encoder), tmp_path)
    before = run.model.text_embed.project.weight.clone()
    train(run, Log())
    assert not torch.equal(run.model.text_embed.project.weight, before)


def test_run_embeds_captions_once(data: Path, encoder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    config = config_of(data, encoder)
    run = open_tiny_run(config, tmp_path)
    assert isinstance(run.captions, TextReader)
    [table] = tmp_path.glob("text-*.safetensors")
    assert table.name == run.captions.info.table_file
    assert read_json(tmp_path / CAPTIONS_FILE) == run.captions.header()
    request.getfixturevalue("no_encoder")
    again = open_tiny_run(config, tmp_path)
    train(again, Log())
    assert set(again.grid_conditions) == {"a red bar across", "a blue bar across", "a cat on the mat", "a red bar down",
                                    "a blue bar down"} - {"a cat on the mat"}  # fmt: skip
    pipeline = make_pipeline(again)
    assert len(pipeline.sample(prompts=["a red bar across", "", None])) == 3


def test_sample_sheet_leaves_out_captions_without_words(tmp_path: Path) -> None:
    """And is drawn of a single one."""
    pictures = write_images(tmp_path / "pictures")
    files = sorted(path.relative_to(pictures) for path in pictures.rglob("*.png"))
    shutil.move(pictures, tmp_path / "flat")
    texts = ["a red bar", "👍", "..."]
    lines = [json.dumps({"file_name": str(file), "text": text}) for file, text in zip(files, texts, strict=False)]
    (tmp_path / "flat" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = open_tiny_run(config_of(tmp_path / "flat", "words", images=8), tmp_path / "run")
    assert run.grid_conditions == ["a red bar"]
    train(run, Log())
    assert export_and_sample(take_snapshot(run), Log()) == {}


def test_run_of_a_cache_keeps_features_with_it(data: Path, encoder: Path, tmp_path: Path) -> None:
    from mar.cli import main

    cache = tmp_path / "cache"
    assert main(["cache", str(data), "--out", str(cache), "--tokenizer", "pixels", "--image-size", "8"]) == 0
    config = config_of(cache, encoder)
    config = replace(config, model=replace(config.model, channels=3))
    run = open_tiny_run(config, tmp_path / "run")
    assert isinstance(run.captions, TextReader)
    assert (cache / run.captions.info.table_file).is_file()
    train(run, Log())


def test_run_continued_with_another_encoder_is_refused(data: Path, encoder: Path, tmp_path: Path) -> None:
    moving = tmp_path / "encoder"
    shutil.copytree(encoder, moving)
    config, folder = config_of(data, moving, images=8), tmp_path / "run"
    train(open_tiny_run(config, folder), Log())
    other = save_encoder(tmp_path / "other", "bert")
    with pytest.raises(ConfigError, match=r"holds another run .*text"):
        open_tiny_run(config_of(data, other), folder)
    shutil.rmtree(moving)
    save_encoder(moving, "t5", seed=1)
    [table] = folder.glob("text-*")
    table.unlink()
    with pytest.raises(ConfigError, match=r"another one now .* than the model was trained with"):
        open_tiny_run(config, folder)
    assert RunState(folder).states()
    (folder / CAPTIONS_FILE).write_text(json.dumps(WordReader(["a"], 8).header()))
    with pytest.raises(ConfigError, match="is not of captions read by"):
        open_tiny_run(config, folder)


def test_run_without_captions_in_data_is_refused(encoder: Path, tmp_path: Path) -> None:
    plain = write_images(tmp_path / "plain")
    for text in (str(encoder), "words"):
        with pytest.raises(ConfigError, match="has no captions"):
            open_tiny_run(config_of(plain, text), tmp_path / "run")


def test_run_exports_the_encoders_name_alone(data: Path, encoder: Path, tmp_path: Path) -> None:
    moving = tmp_path / "encoder"
    shutil.copytree(encoder, moving)
    run = open_tiny_run(config_of(data, moving, images=8), tmp_path / "run")
    train(run, Log())
    path = export(run)[0]
    pipeline = Pipeline.open(path)
    assert isinstance(pipeline.captions, TextReader)
    assert pipeline.captions.info == run.captions.info  # type: ignore[union-attr]
    pictures = pipeline.sample(prompts=["a red cat"], output="tensor")
    shutil.rmtree(moving)
    gone = Pipeline.open(path)  # the encoder is not asked for
    assert torch.equal(gone.sample(prompts=[""], output="tensor"), pipeline.sample(prompts=[None], output="tensor"))
    with pytest.raises(ValueError, match="is not there: expected minilm, a folder"):
        gone.sample(prompts=["a red cat"])
    save_encoder(moving, "t5", seed=1)
    with pytest.raises(ValueError, match="another one now"):
        gone.sample(prompts=["a red cat"])
    shutil.rmtree(moving)
    shutil.copytree(encoder, moving)
    assert torch.equal(gone.sample(prompts=["a red cat"], output="tensor"), pictures)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_run_null_captions_equal_unconditional(data: Path, encoder: Path, tmp_path: Path, accumulate: int) -> None:
    run = open_tiny_run(config_of(data, encoder, accumulate=accumulate), tmp_path)
    randomize(run.model)
    batch = next(run.batches())
    none = replace(batch, captions=("",) * len(batch.labels))
    dropped = replace(batch, captions=())
    assert run.forward_backward(none) == run.forward_backward(dropped)
    assert run.forward_backward(batch) != run.forward_backward(none)


def test_run_validates_by_captions(data: Path, encoder: Path, tmp_path: Path) -> None:
    run = open_tiny_run(config_of(data, encoder, hold_out=5), tmp_path)
    losses = list[float]()

    def watch(watched: Run) -> None:
        from mar.training.callbacks import Validation, take_snapshot

        losses.extend(Validation(watched, Log())(take_snapshot(watched)).values())

    run.callbacks.append(Callback(20, watch))
    train(run, Log())
    assert all(torch.tensor(losses).isfinite())
    assert losses
