"""The training loop: skipped steps, early ends, exports, weights to start from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from orientations import lay_down
from tiny import HEAD, open_tiny_run, tiny_config, tiny_model, tiny_train_config, write_images
from torch import Tensor

from mar.config import ConfigError, SamplingConfig
from mar.data.loader import Augmentations, ImageBatch
from mar.pipeline import Pipeline
from mar.tokenizer import PixelTokenizer
from mar.training import trainer
from mar.training.log import RunLog
from mar.training.run import export, init_from, make_pipeline
from mar.training.trainer import Run, TrainingError, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("pictures"))


def go(run: Run) -> bool:
    log = RunLog(run.folder, run.config.images, run.progress.images)
    try:
        return train(run, log)
    finally:
        log.close()


def lines(run: Run) -> list[dict[str, Any]]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (run.folder / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def breaking(run: Run, when: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes pictures not-a-number at the steps where `when`."""
    encode = Run.encode

    def broken(run: Run, batch: Any) -> Tensor:
        latents = encode(run, batch)
        return latents * torch.nan if when(run.progress.step) else latents

    monkeypatch.setattr(Run, "encode", broken)


def weights(run: Run) -> list[Tensor]:
    both = [*run.model.parameters(), *run.ema.model.parameters()]
    moments = [value for p in run.model.parameters() for o in run.optimizers for value in o.state.get(p, {}).values()]
    return [t.detach().clone() for t in [*both, *moments]]


def test_step_with_nonfinite_loss_is_skipped_and_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_tiny_run(tiny_train_config(data, images=24), tmp_path)
    breaking(run, lambda step: step in (2, 3), monkeypatch)
    kept: dict[int, list[Tensor]] = {}
    real = Run.step

    def watched(run: Run, batch: Any) -> tuple[float, float]:
        result = real(run, batch)
        kept[run.progress.step] = weights(run)
        return result

    monkeypatch.setattr(Run, "step", watched)
    assert go(run)
    assert (run.progress.step, run.progress.images) == (6, 24)
    assert (run.progress.skipped_steps, run.progress.skipped_in_a_row) == (2, 0)

    def same(one: int, other: int) -> list[bool]:
        return [torch.equal(a, b) for a, b in zip(kept[one], kept[other], strict=True)]

    assert all(same(2, 3))
    assert all(same(3, 4))
    assert not all(same(4, 5))
    assert all(tensor.isfinite().all() for tensor in kept[6])
    assert [line["skipped_steps"] for line in lines(run)] == [0, 0, 1, 2, 2, 2]
    assert [line["skipped_share"] for line in lines(run)] == [0, 0, 1, 1, 0, 0]
    assert [line["loss"] is None for line in lines(run)] == [False, False, True, True, False, False]


def test_skipped_share_is_since_the_last_log_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_tiny_run(tiny_train_config(data, images=24, log_every=4), tmp_path)
    breaking(run, lambda step: step in (1, 2, 5), monkeypatch)
    assert go(run)
    assert [line["skipped_share"] for line in lines(run)] == [2 / 4, 1 / 2]


def test_step_with_nonfinite_gradient_is_skipped(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_tiny_run(tiny_train_config(data, images=4), tmp_path)
    run.model.mask_token.register_hook(lambda gradient: gradient * torch.inf)
    before = weights(run)
    assert go(run)
    assert run.progress.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(weights(run), before, strict=True))
    assert lines(run)[0]["loss"] > 0


def test_run_that_only_skips_steps_stops(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "MAX_NONFINITE_STEPS", 3)
    run = open_tiny_run(tiny_train_config(data, save_every=4), tmp_path)
    breaking(run, lambda step: step >= 2, monkeypatch)
    with pytest.raises(TrainingError, match=r"not finite for 3 steps in a row, up to image 20: .*--lr"):
        go(run)
    assert [state.name for state in run.store.states()][-1] == "state-000000000016"  # and none of the end


def test_log_line_averages_losses(data: Path, tmp_path: Path) -> None:
    each = open_tiny_run(tiny_train_config(data, images=24), tmp_path / "each")
    some = open_tiny_run(tiny_train_config(data, images=24, log_every=4), tmp_path / "some")
    assert go(each)
    assert go(some)
    losses = [line["loss"] for line in lines(each)]
    assert [line["images"] for line in lines(some)] == [16, 24]  # the last step has a line in any case
    assert [line["loss"] for line in lines(some)] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 2])


def test_dropout_is_keyed_by_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seeds, real = open_tiny_run(tiny_train_config(data, images=24), tmp_path), [], Run.encode

    def watched(run: Run, batch: Any) -> Tensor:
        seeds.append(torch.initial_seed())
        return real(run, batch)

    monkeypatch.setattr(Run, "encode", watched)
    assert go(run)
    assert len(set(seeds)) == len(seeds) == 6


def test_training_makes_the_loss_fall(data: Path, tmp_path: Path) -> None:
    run = open_tiny_run(tiny_train_config(data, images=400, log_every=20, warmup=40, lr=0.3), tmp_path)
    assert go(run)
    losses = [line["loss"] for line in lines(run)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": tiny_config(channels=1, grid=(8, 8), patch_size=2, classes=0)},
        {"model": tiny_config(channels=3, grid=(4, 8), patch_size=4, classes=2)},
        {"precision": "bf16"},
        {"batch": 7, "images": 14},
    ],
)
def test_run_of_any_model_trains_and_draws(data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    run = open_tiny_run(tiny_train_config(data, **{"images": 8, **changes}), tmp_path)
    assert go(run)
    assert run.progress.skipped_steps == 0
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    drawer = make_pipeline(run)
    assert drawer.classes == (("across", "down") if run.config.model.classes else ())
    (image,) = drawer.sample([None], allow_broken=True)
    assert (image.height, image.width) == run.config.model.grid


def test_run_in_bf16_trains_to_nearly_the_same(data: Path, tmp_path: Path) -> None:
    both = [open_tiny_run(tiny_train_config(data, images=24, precision=p), tmp_path / p) for p in ("fp32", "bf16")]
    for run in both:
        assert go(run)
    one, other = (lines(run)[-1]["loss"] for run in both)
    assert one != other
    assert one == pytest.approx(other, rel=0.02)


def test_export_holds_the_runs_weights(data: Path, tmp_path: Path) -> None:
    run = open_tiny_run(tiny_train_config(data, images=12, sampling=SamplingConfig(3, 5, x0_bound=2.0)), tmp_path)
    assert go(run)
    assert [path.name for path in export(run)] == ["model.safetensors", "model-raw.safetensors"]
    for path, source, kind in ((tmp_path / "model.safetensors", run.ema.model, "ema"),
                               (tmp_path / "model-raw.safetensors", run.model, "raw")):  # fmt: skip
        read = Pipeline.open(path)
        assert read.weights == kind
        assert read.sampling == run.config.sampling
        assert read.notes["images"] == 12
        assert torch.equal(read.tokenizer.std, run.tokenizer.std)
        pairs = zip(read.model.state_dict().items(), source.state_dict().items(), strict=True)
        assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def test_several_emas_are_kept_and_exported(data: Path, tmp_path: Path) -> None:
    config = tiny_train_config(data, images=24, ema=0.2, ema_others=(0.1, 0.3))
    whole, first = (
        open_tiny_run(config, tmp_path / "whole"),
        open_tiny_run(replace(config, images=12), tmp_path / "parts"),
    )
    assert go(whole)
    assert go(first)
    second = open_tiny_run(config, tmp_path / "parts")
    assert second.progress.images == 12
    assert go(second)
    names = ["model.safetensors", "model-raw.safetensors", "model-ema-0.1.safetensors", "model-ema-0.3.safetensors"]
    assert [path.name for path in export(second)] == names
    held = [Pipeline.open(tmp_path / "parts" / name) for name in names]
    assert [(each.weights, each.notes.get("ema")) for each in held] == [
        ("ema", None), ("raw", None), ("ema", 0.1), ("ema", 0.3)
    ]  # fmt: skip
    states = [each.model.state_dict() for each in held]
    for name, module in zip(("ema", "raw", "ema-0.1", "ema-0.3"), whole.weights.values(), strict=True):
        state = states[list(whole.weights).index(name)]
        assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())
    short, usual, long = (states[i]["mask_token"] - states[1]["mask_token"] for i in (2, 0, 3))
    assert short.norm() < usual.norm() < long.norm()  # the longer, the farther behind


def test_run_measures_statistics_of_its_images(data: Path, tmp_path: Path) -> None:
    run = open_tiny_run(tiny_train_config(data), tmp_path)
    every = torch.stack([torch.from_numpy(np.array(run.source[i].image)) for i in range(len(run.source))])
    pixels = every.double() / 127.5 - 1
    assert float(run.tokenizer.mean) == pytest.approx(float(pixels.mean()), rel=1e-5)
    assert float(run.tokenizer.std) == pytest.approx(float(pixels.std(correction=0)), rel=1e-5)
    batch = next(run.batches())
    latents = run.encode(batch)
    torch.testing.assert_close(latents * run.tokenizer.std + run.tokenizer.mean, batch.images)


def test_run_with_another_class_count_is_refused(data: Path, tmp_path: Path) -> None:
    ten = tiny_config(channels=1, grid=(8, 8), patch_size=2, classes=10)
    with pytest.raises(ConfigError, match=r"model has 10 classes, but .* has 2; set --model.classes 2, or 0"):
        open_tiny_run(tiny_train_config(data, model=ten), tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_run_with_a_tokenizer_of_other_channels_is_refused(data: Path, tmp_path: Path) -> None:
    settings = tiny_train_config(data, tokenizer="some-vae")
    with pytest.raises(ConfigError, match="latents have 3 channels, the model's 1"):
        loop_open(settings, tmp_path)


def loop_open(settings: Any, folder: Path) -> Run:
    from mar.training.run import open_run

    def rgb(name: str) -> PixelTokenizer:
        return PixelTokenizer(3, 0.0, 1.0)

    return open_run(settings, folder, device=torch.device("cpu"), load_tokenizer=rgb, load_model=rgb)  # type: ignore[arg-type]


def test_init_weights_of_other_classes_get_new_embeddings() -> None:
    own, theirs = tiny_model(seed=1, classes=5), tiny_model(seed=2, classes=3, label_drop=0.0)
    embedding = own.class_embed.weight.detach().clone()  # type: ignore[union-attr]
    assert init_from(own, theirs) == ["class_embed.weight"]
    assert torch.equal(own.class_embed.weight, embedding)  # type: ignore[union-attr]
    rest = {name: tensor for name, tensor in own.state_dict().items() if name != "class_embed.weight"}
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in rest.items())
    same = tiny_model(seed=3)
    assert init_from(same, theirs) == []
    assert torch.equal(same.class_embed.weight, theirs.class_embed.weight)  # type: ignore[union-attr]


def test_init_weights_of_another_grid_have_their_positions_resized(caplog: pytest.LogCaptureFixture) -> None:
    own, theirs = tiny_model(seed=1), tiny_model(seed=2, grid=(2, 8))
    buffer = own.config.buffer_size
    with torch.no_grad():  # positions that are their column's number
        columns = torch.arange(8.0).repeat(2).unsqueeze(1)
        theirs.decoder_position[buffer:] = columns
    assert init_from(own, theirs) == []
    assert "positions of 2 x 8 tokens are resized to 4 x 4" in caplog.text
    assert torch.equal(own.decoder_position[:buffer], theirs.decoder_position[:buffer])
    by_row = own.decoder_position[buffer:, 0].unflatten(0, (4, 4))
    assert torch.allclose(by_row, by_row[:1].expand(4, -1), atol=1e-5)
    assert torch.allclose(by_row[0, 1:3], torch.tensor([2.5, 4.5]), atol=0.1)
    assert torch.equal(own.token_embed.weight, theirs.token_embed.weight)


def test_init_weights_with_a_tied_vector_become_two_and_back() -> None:
    tied = tiny_model(seed=2, tie_null=True, mask_schedule="exp")
    assert init_from(own := tiny_model(seed=1), tied) == []
    assert torch.equal(own.null_class[0], tied.mask_token)
    assert torch.equal(own.mask_token, tied.mask_token)
    again = tiny_model(seed=3, tie_null=True)
    assert init_from(again, own) == []
    assert torch.equal(again.mask_token, own.mask_token)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"buffer_size": 3}, "buffer_size 3, here 2"),
        ({"encoder": replace(tiny_config().encoder, depth=2)}, "encoder .*'depth': 2.*, here .*'depth': 1"),
        ({"head": replace(HEAD, depth=2)}, "head.depth 2, here 1"),
        ({"head": replace(HEAD, prediction="noise")}, "head.prediction noise, here v"),
        ({"encoder": replace(tiny_config().encoder, num_heads=4)}, "'num_heads': 4"),
    ],
)
def test_init_weights_of_another_model_are_refused(changes: dict[str, Any], words: str) -> None:
    own = tiny_model(seed=1)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    with pytest.raises(ConfigError, match=words):
        init_from(own, tiny_model(seed=2, **changes))
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())


def test_run_shifts_images_as_configured(data: Path, tmp_path: Path) -> None:
    plain, moved = (
        open_tiny_run(tiny_train_config(data, shift=shift, flip=False), tmp_path / str(shift)) for shift in (0, 2)
    )
    one, other = next(plain.batches()), next(moved.batches())
    assert isinstance(one, ImageBatch)
    assert isinstance(other, ImageBatch)
    changes = [Augmentations(5, False, 2).at(position) for position in range(4)]
    assert len(set(changes)) > 1
    for row, change in enumerate(changes):
        assert torch.equal(other.images[row], change(one.images[row]))
    with pytest.raises(ConfigError, match="shift 2 -> 1"):
        open_tiny_run(tiny_train_config(data, shift=1, flip=False), moved.folder)
    with pytest.raises(ConfigError, match="shift is -1, but it must not be negative"):
        tiny_train_config(data, shift=-1)


def test_run_of_lying_pictures_learns_upright_ones_if_told(data: Path, tmp_path: Path) -> None:
    """The batches, and the principal components fitted to them."""
    lying = lay_down(write_images(tmp_path / "lying"))
    model = tiny_config(channels=4, grid=(4, 4), classes=2)
    settings: dict[str, Any] = {"model": model, "tokenizer": "pca2", "image_channels": 1, "hold_out": 5}
    runs = [
        open_tiny_run(tiny_train_config(where, upright=told, **settings), tmp_path / str(number))
        for number, (where, told) in enumerate([(data, False), (lying, True), (lying, False)])
    ]
    plain, told, untold = (next(run.batches()) for run in runs)
    assert isinstance(plain, ImageBatch)
    assert isinstance(told, ImageBatch)
    assert isinstance(untold, ImageBatch)
    assert torch.equal(plain.images, told.images)
    assert not torch.equal(plain.images, untold.images)
    bases = [torch.cat([value.flatten() for value in run.tokenizer.state_dict().values()]) for run in runs]
    assert torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[0], bases[2])
    with pytest.raises(ConfigError, match="upright False -> True"):
        open_tiny_run(tiny_train_config(lying, upright=True, **settings), runs[2].folder)
