"""Principal components of squares of pixels: what they hold, and that a run keeps them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import open_tiny_run, tiny_train_config, write_images
from torch import Tensor

from mar import zoo
from mar.checkpoint.files import CheckpointError
from mar.config import ConfigError
from mar.model.mar import MAR
from mar.pipeline import Pipeline
from mar.tokenizer import PCATokenizer, build, from_name, is_name
from mar.training.callbacks import export_and_sample, take_snapshot
from mar.training.log import Log, RunLog
from mar.training.run import export
from mar.training.trainer import train


def smooth(count: int = 40, channels: int = 3, seed: int = 0) -> Tensor:
    """Coarse random pictures, enlarged: (count, channels, 8, 12) within [-1, 1]."""
    coarse = torch.rand(count, channels, 3, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(8, 12), mode="bilinear")


def fitted(channels: int, images: Tensor, stride: int = 4) -> PCATokenizer:
    tokenizer = PCATokenizer(images.shape[1], stride, channels)
    tokenizer.fit(images.split(16))
    return tokenizer


def squares(images: Tensor, side: int = 4) -> Tensor:
    """(squares, values), cut by hand: colour, row, column."""
    found = [
        image[:, top : top + side, left : left + side].flatten()
        for image in images
        for top in range(0, image.shape[1], side)
        for left in range(0, image.shape[2], side)
    ]
    return torch.stack(found)


def test_pca_latents_match_the_definition() -> None:
    """By a singular value decomposition of squares that were cut by hand; the sign of a component is free."""
    images = smooth()
    latents = fitted(5, images).encode(images).mean
    assert latents.shape == (40, 5, 2, 3)
    x = squares(images).double()
    x = x - x.mean(0)
    _, singular, rows = torch.linalg.svd(x, full_matrices=False)
    deviations = singular[:5] / len(x) ** 0.5
    expected = x @ rows[:5].T / (deviations * deviations.mean()).sqrt()
    found = latents.permute(0, 2, 3, 1).reshape(-1, 5).double()
    torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-3, atol=1e-4)


def test_pca_latents_are_normalized() -> None:
    images = smooth()
    latents = fitted(6, images).encode(images).mean
    assert latents.mean((0, 2, 3)).abs().max() < 1e-5
    assert latents.square().mean().item() == pytest.approx(1, rel=1e-4)
    deviations = latents.std((0, 2, 3))
    assert (deviations[:-1] > deviations[1:]).all(), "the largest first"


def test_pca_all_components_reconstruct_exactly() -> None:
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole = fitted(16, images)
    torch.testing.assert_close(whole.decode(whole.encode(images).mean), images, rtol=0, atol=1e-5)
    errors = []
    for count in (1, 4, 12):
        tokenizer = fitted(count, images)
        errors.append((tokenizer.decode(tokenizer.encode(images).mean) - images).square().mean().item())
    assert errors[0] > errors[1] > errors[2] > 1e-3
    x = squares(images)
    left = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))[:12].sum() / 16  # what 4 components can't hold
    assert errors[1] <= left.item() * 1.01, "clipping to [-1, 1] can only help"


def test_pca_sign_of_components_is_fixed() -> None:
    """Of a component and its opposite one is taken, whatever the solver gave: its largest value is positive."""
    basis = fitted(6, smooth()).basis
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_pca_from_config_and_state_is_equal() -> None:
    images = smooth()
    tokenizer = fitted(5, images)
    again = build(json.loads(json.dumps(tokenizer.config())))
    again.load_state_dict(tokenizer.state_dict())
    assert again.has_stats
    assert torch.equal(again.encode(images).mean, tokenizer.encode(images).mean)


def test_pca_fitted_state_stays_float32() -> None:
    tokenizer = fitted(5, smooth())
    before = {name: value.clone() for name, value in tokenizer.fitted_state().items()}
    tokenizer.to(torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.fitted_state().items())


@pytest.mark.parametrize("ways", [12, 3, 0])
def test_pca_components_beyond_the_rank_are_zero(ways: int) -> None:
    """Enlarged sprites, flat ones, and all of one colour: they come back, and nothing drawn for the rest shows."""
    generator = torch.Generator().manual_seed(3)
    count, pixels = {12: (40, 2), 3: (40, 4), 0: (1, 8)}[ways]
    coarse = torch.rand(count, 3, 8 // pixels, 8 // pixels, generator=generator) * 2 - 1
    images = coarse.repeat_interleave(pixels, 2).repeat_interleave(pixels, 3)
    tokenizer = fitted(16, images)
    latents = tokenizer.encode(images).mean
    live = latents.abs().amax((0, 2, 3)) > 0
    assert live.tolist() == [True] * ways + [False] * (16 - ways)
    assert ways == 0 or latents[:, :ways].square().mean().item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(tokenizer.decode(latents), images, rtol=0, atol=1e-5)
    noise = torch.randn(latents.shape, generator=generator) * 10
    assert torch.equal(tokenizer.decode(torch.where(live.view(-1, 1, 1), latents, noise)), tokenizer.decode(latents))


def test_pca_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        PCATokenizer().fit(iter(()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [((3, 4, 49), "got 49, expected 1 to 48"), ((1, 4, 0), "expected 1 to 16"), ((2, 4, 4), "image_channels: got 2")],
)
def test_pca_invalid_sizes_are_refused(settings: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PCATokenizer(*settings)


def test_pca_names_are_parsed() -> None:
    found = from_name("pca8", 3, 32)
    assert isinstance(found, PCATokenizer)
    assert (found.stride, found.channels, found.image_channels) == (8, 32, 3)
    assert from_name("pixels", 1).channels == 1
    assert not is_name("pca0")
    assert not is_name("kl16")


def test_pca_by_name_is_for_training_only() -> None:
    with pytest.raises(CheckpointError, match="name the model instead"):
        zoo.load_tokenizer("pca4")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data")


def test_pca_run_fits_keeps_and_exports_components(data: Path, tmp_path: Path) -> None:
    config = tiny_train_config(data, tokenizer="pca4", save_every=20)
    config = replace(config, model=replace(config.model, channels=3, grid=(2, 2), patch_size=1))
    run = open_tiny_run(replace(config, images=20), tmp_path / "run")
    basis = run.tokenizer.fitted_state()["basis"].clone()
    log = RunLog(run.folder, run.config.images, 0)
    assert train(run, log)
    for path in data.rglob("*.png"):  # others by now: the run goes on with what it began with
        Image.open(path).rotate(45).save(path)
    again = open_tiny_run(config, tmp_path / "run")
    assert torch.equal(again.tokenizer.fitted_state()["basis"], basis)
    assert train(again, log)
    export_and_sample(take_snapshot(again), log)
    log.close()
    pipeline = Pipeline.open(tmp_path / "run" / "model.safetensors")
    assert torch.equal(pipeline.tokenizer.fitted_state()["basis"], basis)
    assert pipeline.image_size == (8, 8)
    drawn = pipeline.sample([0, 1], seeds=[0, 1], steps=2, diffusion_steps=3, output="tensor")
    assert drawn.shape == (2, 3, 8, 8)


def test_pca_too_many_components_are_refused_early(data: Path, tmp_path: Path) -> None:
    config = tiny_train_config(data, tokenizer="pca2")
    config = replace(config, model=replace(config.model, channels=13, grid=(4, 4), patch_size=1))
    with pytest.raises(ValueError, match="got 13, expected 1 to 12"):
        open_tiny_run(config, tmp_path / "run")


def test_pca_init_weights_bring_their_components(data: Path, tmp_path: Path) -> None:
    config = tiny_train_config(data, tokenizer="pca2", images=4)
    config = replace(config, model=replace(config.model, channels=2, grid=(4, 4), patch_size=1))
    first = open_tiny_run(config, tmp_path / "first")
    assert train(first, Log())
    export(first)
    others = write_images(tmp_path / "others", 12)
    for path in others.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path)) // 2).rotate(90).save(path)
    settings = replace(config, data=str(others), init=str(tmp_path / "first"))
    alone = open_tiny_run(replace(settings, init=None), tmp_path / "alone").tokenizer
    second = open_tiny_run(settings, tmp_path / "second", zoo.load).tokenizer
    for name, found in first.tokenizer.fitted_state().items():
        assert torch.equal(second.fitted_state()[name], found)
    assert not torch.equal(alone.fitted_state()["basis"], second.fitted_state()["basis"])


def test_pca_init_weights_of_other_components_are_refused(data: Path, tmp_path: Path) -> None:
    config = tiny_train_config(data, tokenizer="pca2")
    config = replace(config, model=replace(config.model, channels=2, grid=(4, 4), patch_size=1), init="theirs")
    other = Pipeline(MAR(config.model), fitted(2, smooth()))  # as many, but of larger squares
    with pytest.raises(ConfigError, match=r"have learned other latents than .* makes; --tokenizer pca4 takes"):
        open_tiny_run(config, tmp_path / "run", lambda name: other)


def test_image_channels_are_for_pca_only(data: Path, tmp_path: Path) -> None:
    gray = tiny_train_config(data, tokenizer="pca4", image_channels=1)
    run = open_tiny_run(
        replace(gray, model=replace(gray.model, channels=3, grid=(2, 2), patch_size=1)), tmp_path / "run"
    )
    assert run.tokenizer.image_channels == 1
    with pytest.raises(ConfigError, match="image_channels is 3, but the tokenizer takes 1; leave --image-channels out"):
        open_tiny_run(tiny_train_config(data, image_channels=3), tmp_path / "other")
