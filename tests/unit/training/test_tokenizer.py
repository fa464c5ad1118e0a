"""Tokenizer training: losses, resuming, export, and models trained on the result."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FAST, HEAD, noise, open_tiny_run, tiny_model, tiny_train_config, write_images
from tiny import tiny_config as model_config
from torch import nn

from mar.checkpoint import run_state
from mar.checkpoint.tokenizers import load_tokenizer, save_tokenizer
from mar.cli import main
from mar.config import ConfigError, TrainConfig, from_dict, to_dict
from mar.config.tokenizer import TokenizerTrainConfig
from mar.data.loader import ImageBatch, in_order
from mar.data.splits import hold_out, subset
from mar.pipeline import Pipeline
from mar.tokenizer import KLTokenizer, PCATokenizer, PixelTokenizer
from mar.tokenizer.base import RoundTrip, psnr, round_trip
from mar.tokenizer.residual import ResidualTokenizer
from mar.training.log import Log, RunLog
from mar.training.preflight import check_tokenizer, token_width_warning
from mar.training.run import check_same_run, load_config, open_run
from mar.training.tokenizer import (
    NOISE_RISE,
    Evaluation,
    PatchDiscriminator,
    PerceptualDistance,
    TokenizerRun,
    adversarial_weight,
    ema_tokenizer,
    evaluate_reconstruction,
    export_tokenizer,
    hinge_loss,
    open_tokenizer_run,
)
from mar.training.trainer import Run, train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are bitwise the same for one number of threads only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("pictures"), 40)


def settings(data: Path, **changes: Any) -> TokenizerTrainConfig:
    """A run over `pictures` for six steps: 8x8 pixels to 4x4 cells of three values."""
    own: dict[str, Any] = {
        "data": str(data), "kind": "kl", "image_size": 8, "image_channels": 1, "stride": 2, "channels": 3, "width": 8,
        "images": 24, "batch": 4, "lr": 0.3, "warmup": 8, "decay": 8, "ema": 0.9, "log_every": 1, "sample_every": 0,
        "seed": 3,
    }  # fmt: skip
    return TokenizerTrainConfig(**{**own, **changes})


class Network(nn.Module):
    """Named as EfficientNet-Lite0 names its parts, and tiny."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._conv_stem, self._bn0, self._swish = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU6()
            self._blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(11))


def opened(config: TokenizerTrainConfig, folder: Path) -> TokenizerRun:
    return open_tokenizer_run(config, folder, device=CPU, load_network=Network)


class Stopping(Log):
    """Sends this process a signal after a number of images."""

    def __init__(self, at: int | None, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__()
        self.at, self.number = at, number
        self.losses: dict[int, float] = {}

    def advance(self, images: int, loss: float) -> None:
        self.losses[images] = loss
        if images == self.at:
            os.kill(os.getpid(), self.number)


class Told(Log):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.numbers: dict[str, Any] = {}

    def write(self, images: int, **numbers: Any) -> None:
        self.numbers |= numbers

    def note(self, text: str) -> None:
        self.notes.append(text)


ALL = {"perceptual": 0.5, "adversarial": 0.7, "adversarial_start": 0.25}


@pytest.mark.parametrize(
    ("losses", "at", "number"), [({}, 4, signal.SIGTERM), (ALL, 16, signal.SIGINT)], ids=["plain", "all"]
)
@pytest.mark.parametrize("kind", ["residual", "kl"])
def test_tokenizer_run_resume_is_bitwise(
    data: Path, tmp_path: Path, kind: str, losses: dict[str, float], at: int, number: signal.Signals
) -> None:
    config = settings(data, kind=kind, lr=0.1, **losses)
    whole = opened(config, tmp_path / "whole")
    undisturbed = Stopping(None)
    assert train(whole, undisturbed)
    stopped, first = opened(config, tmp_path / "parts"), Stopping(at, number)
    assert not train(stopped, first)
    assert stopped.progress.images == at
    resumed, second = opened(config, tmp_path / "parts"), Stopping(None)
    torch.rand(7)  # whatever else happened in between
    assert resumed.progress.images == at
    assert train(resumed, second)
    assert first.losses | second.losses == undisturbed.losses
    ours, theirs = (run_state.flatten(run.state_dict())[1] for run in (resumed, whole))
    assert set(ours) == set(theirs)
    assert {name.split("/")[0] for name in ours} >= {"model", "ema", "optimizer"}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    if losses:
        assert {"critic", "critic_optimizer"} <= {name.split("/")[0] for name in ours}
        kl = {"kl"} if kind == "kl" else set()
        assert set(resumed.extra_metrics) == {"l1", "perceptual", "adversarial", "critic"} | kl
        assert all(math.isfinite(part) for part in resumed.extra_metrics.values())


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, float]:
    """A folder with a trained tokenizer, and the held-out pictures' PSNR before and after."""
    folder = tmp_path_factory.mktemp("tokenizer")
    run = opened(settings(data, images=480, batch=8, ema=0.95), folder)
    log = RunLog(folder, run.config.images, 0)
    before = evaluate_reconstruction(run, log)
    assert train(run, log)
    tokenizer, after = export_tokenizer(run, log)
    log.close()
    assert tokenizer.has_stats
    return folder, before.psnr, after.psnr


def test_tokenizer_run_learns(trained: tuple[Path, float, float]) -> None:
    folder, before, after = trained
    assert after > before + 6
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["psnr"] for line in lines if "psnr" in line] == [before, after]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 60
    assert steps[-1]["l1"] < 0.5 * steps[0]["l1"]
    assert all(line["loss"] >= line["l1"] for line in steps)
    with Image.open(folder / "samples" / "000000000480.png") as sheet:
        assert sheet.size == (2 * 8, 2 * 8)  # two of forty pictures are held out; originals above what came back


def test_tokenizer_run_exports_normalized_latents(trained: tuple[Path, float, float], data: Path) -> None:
    folder, _, after = trained
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, KLTokenizer)
    assert (tokenizer.stride, tokenizer.channels, tokenizer.image_channels) == (2, 3, 1)
    assert len(tokenizer.mean) == 3
    run = opened(settings(data, images=480, batch=8, ema=0.95), folder)
    assert run.progress.images == 480
    kept = in_order(run.held_out, run.transform)
    assert round_trip(tokenizer, kept).psnr == pytest.approx(after, abs=1e-3)
    with torch.no_grad():
        posterior = tokenizer.encode(torch.cat(list(in_order(run.source, run.transform))))
    mean = posterior.mean.double()
    spread_of = (mean.square().mean((0, 2, 3)) + posterior.std.double().square().mean((0, 2, 3))).sqrt()
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(spread_of, torch.ones(3).double(), atol=1e-4, rtol=0)


def test_residual_run_begins_at_the_principal_components(data: Path, tmp_path: Path) -> None:
    run = opened(settings(data, kind="residual"), tmp_path / "run")
    components = PCATokenizer(1, 2, 3)
    components.fit(in_order(run.source, run.transform))
    held_out = list(in_order(run.held_out, run.transform))
    assert evaluate_reconstruction(run, Log()).psnr == pytest.approx(round_trip(components, held_out).psnr, abs=1e-3)
    assert torch.equal(run.ema.model.linear.basis, components.basis)


def test_residual_run_learns_and_is_a_tokenizer(data: Path, tmp_path: Path) -> None:
    config = settings(data, kind="residual", images=800, batch=8, ema=0.95, noise=0.1, channels=1, lr=0.3)
    run = opened(config, tmp_path / "run")
    before = evaluate_reconstruction(run, Log())
    assert train(run, Log())
    exported, after = export_tokenizer(run, Log())
    assert after.psnr > before.psnr + 1
    tokenizer = load_tokenizer(tmp_path / "run")
    assert isinstance(tokenizer, ResidualTokenizer)
    assert (tokenizer.stride, tokenizer.channels, tokenizer.sample_size, tokenizer.has_stats) == (2, 1, 8, True)
    images = torch.cat(list(in_order(run.source, run.transform)))
    with torch.no_grad():
        latents = tokenizer.encode(images).mean
        assert torch.equal(latents, exported.encode(images).mean)
        assert torch.equal(tokenizer.decode(latents), exported.decode(latents))
    assert float(latents.mean()) == pytest.approx(0, abs=1e-3)
    assert float(latents.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_residual_run_noise_makes_decoding_robust(data: Path, tmp_path: Path) -> None:
    psnrs = {}
    for noise_level in (0.0, 1.0):
        config = settings(data, kind="residual", images=800, batch=8, ema=0.95, noise=noise_level, channels=2, lr=0.1)
        run = opened(config, tmp_path / f"{noise_level}")
        assert train(run, Log())
        tokenizer, _ = export_tokenizer(run, Log())
        images = torch.cat(list(in_order(run.held_out, run.transform)))
        with torch.no_grad():
            latents = tokenizer.encode(images).mean
            drawn = latents + 0.5 * noise(*latents.shape)
            psnrs[noise_level] = float(psnr(images, tokenizer.decode(drawn)).mean())
    assert psnrs[1.0] > psnrs[0.0] + 1


def test_residual_run_noise_rises_from_nothing(data: Path, tmp_path: Path) -> None:
    """Else a young network would lose more by it than it has learned, and fall below its components."""
    config = settings(data, kind="residual", images=800, noise=1.0).resolved()
    run = opened(config, tmp_path / "run")
    images = noise(2, 1, 8, 8).clamp(-1, 1)
    plain = run.model.decode_raw(run.model.encode_raw(images))

    def distance(position: int) -> float:
        positions = torch.tensor([position, position])
        decoded, _ = run.objective.reconstruct(run.model, images, positions, config)
        return (decoded - plain).abs().mean().item()

    assert distance(0) == 0
    means = [sum(distance(position) for position in range(first, first + 40)) / 40 for first in (0, 80, 200, 700)]
    assert means[0] < means[1] / 2
    assert means[1] < means[2]
    assert means[2] == pytest.approx(means[3], rel=0.3)  # it has risen after a quarter


def test_model_with_a_residual_tokenizer_inside_opens_and_samples(data: Path, tmp_path: Path) -> None:
    run = opened(settings(data, kind="residual"), tmp_path / "tokenizer")
    assert train(run, Log())
    export_tokenizer(run, Log())
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    pipeline = Pipeline(tiny_model(channels=3, grid=(4, 4)), tokenizer, sampling=replace(FAST, x0_bound=2.0))
    pipeline.save(tmp_path / "model.safetensors")
    again = Pipeline.open(tmp_path / "model.safetensors")
    assert again.image_size == (8, 8)
    assert torch.equal(again.sample([0], output="tensor"), pipeline.sample([0], output="tensor"))
    assert again.fingerprint() == pipeline.fingerprint()


def test_tokenizer_run_of_before_is_an_autoencoders(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"data": "photos", "width": 16, "depth": 1, "lr": 0.008}))
    saved = load_config(TokenizerTrainConfig, tmp_path)
    assert saved is not None
    config = TokenizerTrainConfig("photos", kind="kl").resolved()
    assert (saved.kind, saved.resolved()) == ("kl", config)
    assert config.optimizer == "adamw"
    assert check_same_run(config, tmp_path)
    assert from_dict(TokenizerTrainConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("psnrs", "patience", "stopped"),
    [
        ([20.0, 21.0, 21.01, 20.5, 21.015], 3, 5),
        ([20.0, 21.0, 21.01, 20.5, 21.03], 3, None),
        ([20.0, 21.0, 20.9], 1, 3),
        ([27.63, 27.38, 27.46, 27.53], 3, None),  # it fell after the noise, and rises again
        ([20.0, 19.0, 18.0], 0, None),
        ([math.nan, math.nan], 1, None),
    ],
)
def test_tokenizer_run_ends_where_the_psnr_has_stopped_rising(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    psnrs: list[float],
    patience: int,
    stopped: int | None,
) -> None:
    run = opened(replace(settings(data, kind="residual"), patience=patience), tmp_path / "run")
    values = iter(psnrs)
    monkeypatch.setattr("mar.training.tokenizer.evaluate_reconstruction", lambda run, log: RoundTrip(next(values), 4))
    evaluation = Evaluation(run, Log())
    risen = math.ceil(NOISE_RISE * run.config.images)
    evaluation.psnrs = {images: 50.0 - images for images in range(risen)}  # while the noise rises
    for count in range(1, len(psnrs) + 1):
        run.progress.images = risen + count
        evaluation(run)
        assert run.should_stop == (stopped is not None and count >= stopped)
    # a run that resumes decides alike, and forgets what is after its state
    for images in (len(psnrs), len(psnrs) - 1):
        again = opened(replace(settings(data, kind="residual"), patience=patience), tmp_path / "run")
        again.progress.images = risen + images
        Evaluation(again, Log())
        assert again.should_stop == (stopped is not None and images >= stopped)


def test_tokenizer_patience_is_off_with_a_discriminator() -> None:
    assert TokenizerTrainConfig(kind="residual").resolved().patience == 3
    assert TokenizerTrainConfig(kind="residual", adversarial=0.5).resolved().patience == 0
    with pytest.raises(ConfigError, match="patience is 2, but a discriminator lowers the PSNR"):
        TokenizerTrainConfig(adversarial=0.5, patience=2)


def latents_config(data: Path, folder: Path, **changes: Any) -> TrainConfig:
    small = model_config(channels=3, grid=(4, 4), patch_size=1, classes=2)
    return tiny_train_config(data, tokenizer=str(folder), model=replace(small, **changes), images=8, lr=0.01)


def latent_run(config: TrainConfig, folder: Path) -> Run:
    def nothing(name: str) -> Any:
        raise AssertionError(name)

    return open_run(config, folder, device=CPU, load_tokenizer=load_tokenizer, load_model=nothing)


def test_model_trains_on_an_exported_tokenizer(trained: tuple[Path, float, float], data: Path, tmp_path: Path) -> None:
    folder, _, _ = trained
    run = latent_run(latents_config(data, folder), tmp_path)
    assert torch.equal(run.tokenizer.std, load_tokenizer(folder).std)  # not measured anew
    told = Told()
    check_tokenizer(run, told)
    assert told.notes[0].startswith("the tokenizer brings 8 pictures back with a PSNR of ")
    assert told.numbers["tokenizer_psnr"] > 10
    assert train(run, told)
    assert math.isfinite(told.numbers["loss"])
    again = Told()
    check_tokenizer(run, again)  # it was tried when the run began
    assert again.notes == []


def test_run_on_another_tokenizers_latents_is_refused(
    trained: tuple[Path, float, float], data: Path, tmp_path: Path
) -> None:
    tokenizer, folder = load_tokenizer(trained[0]), tmp_path / "vae"
    assert isinstance(tokenizer, KLTokenizer)
    save_tokenizer(tokenizer, folder)
    config = latents_config(data, folder)
    assert not train(latent_run(config, tmp_path / "run"), Stopping(4))
    statistics = tokenizer.mean.clone(), tokenizer.std.clone()
    tokenizer.set_statistics(torch.full((3,), 0.5), torch.full((3,), 2.0))
    save_tokenizer(tokenizer, folder)
    kept = latent_run(config, tmp_path / "run")  # which has its own
    assert torch.equal(kept.tokenizer.mean, statistics[0])
    assert torch.equal(kept.tokenizer.std, statistics[1])
    with torch.no_grad():
        tokenizer.autoencoder.encoder.conv_out.weight.mul_(1.01)
    save_tokenizer(tokenizer, folder)
    with pytest.raises(ConfigError, match=r"run of another tokenizer's latents \(\w{12}\) than .*vae is now") as said:
        latent_run(config, tmp_path / "run")
    assert "\n" not in str(said.value)
    state = tmp_path / "run" / "state-000000000004" / "state.json"
    older = json.loads(state.read_text(encoding="utf-8"))
    del older["tokenizer_fingerprint"]
    (state.parent / "checksums.json").unlink()  # earlier versions wrote none
    state.write_text(json.dumps(older), encoding="utf-8")
    assert latent_run(config, tmp_path / "run").progress.images == 4


def test_poor_tokenizer_and_wide_tokens_warn(data: Path, tmp_path: Path) -> None:
    poor = opened(settings(data, images=4), tmp_path / "poor")
    assert train(poor, Log())
    export_tokenizer(poor, Log())
    run = latent_run(latents_config(data, tmp_path / "poor", patch_size=4), tmp_path / "run")
    told = Told()
    check_tokenizer(run, told)
    assert told.numbers["tokenizer_psnr"] < 20
    assert "a token has 48 values, but the head is only 16 wide" in told.notes[0]
    assert "less than 20 dB" in told.notes[2]
    pixels, silent = open_tiny_run(tiny_train_config(data), tmp_path / "pixels"), Told()
    check_tokenizer(pixels, silent)
    assert silent.notes == []
    wide = tiny_train_config(data)
    run = open_tiny_run(replace(wide, model=replace(wide.model, patch_size=8)), tmp_path / "wide")
    check_tokenizer(run, silent)
    assert ["a token has 64 values" in note for note in silent.notes] == [True]


def test_run_on_a_cache_finds_its_images(trained: tuple[Path, float, float], tmp_path: Path) -> None:
    own, cache = write_images(tmp_path / "own", 6), tmp_path / "cache"
    made = ["cache", str(own), "--tokenizer", str(trained[0]), "--image-size", "8", "--out", str(cache)]
    assert main([*made, "--device", "cpu"]) == 0
    config = replace(latents_config(own, trained[0]), data=str(cache))
    told = Told()
    check_tokenizer(latent_run(config, tmp_path / "run"), told)
    assert told.notes[0].startswith("the tokenizer brings 6 pictures back")
    own.rename(tmp_path / "elsewhere")
    lost = Told()
    check_tokenizer(latent_run(config, tmp_path / "run"), lost)
    assert lost.notes == ["the tokenizer was not tried: the pictures that were cached are not where they were"]


@pytest.mark.parametrize(("channels", "patch", "width", "warned"), [
    (16, 1, 256, False), (32, 1, 256, False), (33, 1, 1023, True), (16, 2, 1024, False), (4, 4, 512, True),
])  # fmt: skip
def test_wide_tokens_are_recognized(channels: int, patch: int, width: int, warned: bool) -> None:
    config = model_config(channels=channels, patch_size=patch, head=replace(HEAD, width=width))
    assert (token_width_warning(config) is not None) == warned


def test_psnr_is_for_values_in_minus_one_to_one() -> None:
    images = noise(3, 1, 4, 4).clamp(-1, 1)
    others = torch.stack([images[0] + 0.2, images[1] - 0.02, images[2]])
    torch.testing.assert_close(psnr(images, others), torch.tensor([20.0, 40.0, 100.0]), atol=1e-3, rtol=0)
    assert math.isnan(round_trip(PixelTokenizer(1, 0.0, 1.0), []).psnr)


def test_tokenizer_run_holds_out_images(data: Path, tmp_path: Path) -> None:
    source, kept = hold_out(str(data))
    names = [{part[i].name for i in range(len(part))} for part in (source, kept)]
    assert (len(source), len(kept)) == (38, 2)
    assert not names[0] & names[1]
    assert {kept[i].label for i in range(2)} == {0, 1}
    assert source.classes == kept.classes == ("across", "down")
    assert source.flips
    few = [subset(source, count) for count in (3, 100)]
    assert [len(part) for part in few] == [3, 38]
    assert few[0][1].label != few[0][0].label or few[0][2].label != few[0][0].label
    parted = tmp_path / "parted"
    for name in ("train", "val"):
        write_images(parted / name, 4)
    source, kept = hold_out(parted)
    assert (len(source), len(kept)) == (4, 4)
    assert f"{os.sep}val{os.sep}" in kept[0].name
    assert [len(part) for part in hold_out("fashion")] == [10_000, 2_000]
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    (tmp_path / "single").mkdir()
    (tmp_path / "one.png").rename(tmp_path / "single" / "one.png")
    with pytest.raises(ValueError, match="got 1 picture, but one to learn from and one to judge by"):
        hold_out(tmp_path / "single")


def test_tokenizer_run_holds_out_rows_of_a_table(tmp_path: Path) -> None:
    import io

    import pyarrow
    from pyarrow import parquet

    cells = []
    for value in range(5):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8), 50 * value, np.uint8)).save(file, format="PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "all.parquet")
    source, kept = hold_out(tmp_path / "all.parquet")
    assert (len(source), len(kept)) == (4, 1)
    assert int(np.asarray(kept[0].image)[0, 0]) == 200


def test_tokenizer_step_with_nonfinite_gradient_is_skipped(data: Path, tmp_path: Path) -> None:
    run = opened(settings(data, **ALL | {"adversarial_start": 0.0}), tmp_path)
    before = {name: tensor.clone() for name, tensor in run_state.flatten(run.state_dict())[1].items()}
    batch = next(run.batches())
    assert isinstance(batch, ImageBatch)
    run.step(replace(batch, images=torch.full_like(batch.images, math.nan)))
    assert run.progress.skipped_steps == 1
    after = run_state.flatten(run.state_dict())[1]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    run.step(batch)
    assert not torch.equal(before["model/decoder.conv_out.weight"], after["model/decoder.conv_out.weight"])


def test_discriminator_start_is_kept_in_a_longer_run(data: Path, tmp_path: Path) -> None:
    losses = {"adversarial": 0.7, "adversarial_start": 0.5}  # from 12 of 24 pictures on
    assert not train(opened(settings(data, **losses), tmp_path / "early"), Stopping(12))
    assert not train(opened(settings(data, **losses), tmp_path / "begun"), Stopping(16))
    parts = {}
    for name, at in (("early", 16), ("begun", 20)):
        longer = opened(settings(data, **losses, images=80), tmp_path / name)
        assert not train(longer, Stopping(at))
        parts[name] = set(longer.extra_metrics)
    assert "critic" not in parts["early"]
    assert "critic" in parts["begun"]


def test_tokenizer_run_exports_the_ema(data: Path, tmp_path: Path) -> None:
    run = opened(settings(data), tmp_path)
    train(run, Log())
    raw, ema = run.model.decoder.conv_out.weight, run.ema.model.decoder.conv_out.weight
    assert not torch.equal(raw, ema)
    assert torch.equal(ema_tokenizer(run).autoencoder.decoder.conv_out.weight, ema)


def test_perceptual_loss_uses_the_extras_network() -> None:
    from mar.evaluation.features.efficientnet import efficientnet_lite0

    distance = PerceptualDistance(efficientnet_lite0().module.network)
    images = noise(2, 1, 16, 16).clamp(-1, 1)
    near, far = (images + 0.05 * noise(2, 1, 16, 16, seed=1)).requires_grad_(), noise(2, 1, 16, 16, seed=2)
    assert distance(images, images).item() == 0
    assert 0 < distance(images, near).item() < distance(images, far.clamp(-1, 1)).item()
    (gradient,) = torch.autograd.grad(distance(images, near), near)
    assert gradient.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_discriminator_learns_and_its_weight_balances() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critic = PatchDiscriminator(1, 8)
    real, fake = noise(8, 1, 16, 16), noise(8, 1, 16, 16, seed=1).mean(-1, keepdim=True).expand(-1, -1, -1, 16)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    first = hinge_loss(critic(real), critic(fake)).item()
    for _ in range(10):
        optimizer.zero_grad()
        hinge_loss(critic(real), critic(fake)).backward()
        optimizer.step()
    assert hinge_loss(critic(real), critic(fake)).item() < 0.5 * first
    assert float(hinge_loss(torch.full((1, 1, 2, 2), 1.5), torch.full((1, 1, 2, 2), -0.5))) == 0.25
    weight = torch.tensor([3.0], requires_grad=True)
    assert adversarial_weight((5 * weight).sum(), (2 * weight).sum(), weight).item() == pytest.approx(2.5, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 9}, "image_size is 9x9, but it must be a multiple of the stride 2"),
        ({"width": 12}, "width is 12, but it must be a multiple of 8"),
        ({"image_channels": 2}, "image_channels is 2"),
        ({"kl": -1.0}, "kl is -1.0"),
        ({"adversarial_start": 1.0}, "adversarial_start is 1.0"),
        ({"channels": 0}, "channels is 0"),
    ],
)
def test_tokenizer_config_invalid_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(Path("x"), **changes)


def test_tokenizer_config_json_round_trip_is_equal() -> None:
    config = settings(Path("x"), image_size=(8, 16))
    assert from_dict(TokenizerTrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert TokenizerTrainConfig("fashion").channels_in == 1
    assert TokenizerTrainConfig("photos").channels_in == 3
    assert config.size == (8, 16)


def test_tokenizer_run_in_another_runs_folder_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(settings(data), tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=r"holds another run \(channels 3 -> 4\)"):
        opened(settings(data, channels=4), tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match="holds a run of another kind or version"):
        open_tiny_run(tiny_train_config(data), tmp_path / "tokenizer")
    open_tiny_run(tiny_train_config(data), tmp_path / "model")
    with pytest.raises(ConfigError, match="holds a run of another kind or version"):
        opened(settings(data), tmp_path / "model")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="got 2 processes, but a tokenizer is trained by one"):
        opened(settings(data), tmp_path / "new")
    assert not (tmp_path / "new").exists()
