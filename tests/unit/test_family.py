"""The whole path of eMIGM and l-DeTok's MAR, with random weights in files of the published layouts."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mar import zoo
from mar.checkpoint.files import CheckpointError
from mar.checkpoint.official import to_official
from mar.cli import main
from mar.config import HeadConfig, ModelConfig, TrunkConfig
from mar.model.mar import MAR
from mar.pipeline import Pipeline
from mar.presets import recipe
from mar.published import PUBLISHED, published
from mar.tokenizer.pixels import PixelTokenizer

TRUNK = TrunkConfig(width=16, depth=1, num_heads=2)
MODELS = {
    family: ModelConfig(
        channels=3, grid=(4, 4), encoder=TRUNK, decoder=TRUNK, head=HeadConfig(16, 1), buffer_size=2, classes=3,
        tie_null=family == "emigm", mask_schedule="exp" if family == "emigm" else "normal",
    )
    for family in ("emigm", "detok")
}  # fmt: skip
SMALL = {"width": 16, "depth": 1, "heads": 2}
"""A transformer of a tokenizer."""
TRAINING = {
    "emigm": {"epoch": 799, "scaler": {"scale": 65536.0, "_growth_tracker": 2}, "optimizer": None},
    "detok": {
        "epoch": 799,
        "loss_scaler": {"scale": 1.0},
        "last_elapsed_time": 12.5,
        "optimizer": {"param_groups": [], "state": {}},
    },
}
"""What the files have beside weights."""


def published_file(path: Path, family: str) -> dict[str, dict[str, Tensor]]:
    """Write a file of random weights as the authors write theirs."""
    weights: dict[str, dict[str, Tensor]] = {}
    for seed, key in enumerate(("model", "model_ema")):
        torch.manual_seed(seed)
        model = MAR(MODELS[family])
        torch.nn.init.normal_(model.head.output.weight, std=0.02)
        weights[key] = to_official(model.state_dict(), tied=family == "emigm")
    args = argparse.Namespace(model="mar_tiny", diffusion_batch_mul=4, mask_strategy="exp")
    torch.save({**weights, **TRAINING[family], "args": args}, path)
    return weights


@pytest.mark.parametrize("family", ["emigm", "detok"])
def test_published_layout_is_converted_drawn_and_written_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    weights = published_file(tmp_path / "published.pth", family)
    pixels = PixelTokenizer(3, 0.0, 1.0)
    monkeypatch.setattr(zoo, "load_tokenizer", lambda name: pixels)
    options = ["--num-heads", "2", "--tokenizer", str(tmp_path / "tokenizer")]
    assert main(["convert", str(tmp_path / "published.pth"), str(tmp_path / "ours.safetensors"), *options]) == 0
    assert f"recognized as {family}" in capsys.readouterr().out

    # drawn, in its own way
    pipeline = zoo.load(tmp_path / "ours.safetensors", device="cpu")
    assert pipeline.model.config == MODELS[family]
    way = pipeline.sampling
    assert (way.reveal, way.solver) == (("binomial", "dpm++3s") if family == "emigm" else ("counted", "ancestral"))
    out = tmp_path / "drawn"
    drawing = ["sample", str(tmp_path / "ours.safetensors"), "--labels", "1", "--steps", "4", "--out", str(out)]
    assert main([*drawing, "--diffusion-steps", "8", "--x0-bound", "1", "--guidance-scale", "2"]) == 0
    [path] = [path for path in out.glob("**/*.png") if path.name != "grid.png"]
    with Image.open(path) as image:
        assert image.convert("RGB").getextrema() != ((0, 0), (0, 0), (0, 0))

    # and back: its EMA, equal
    assert main(["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pth")]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model_ema"]
    assert list(back) == list(weights["model_ema"])
    assert all(torch.equal(back[name], tensor) for name, tensor in weights["model_ema"].items())


@pytest.mark.parametrize("family", ["emigm", "detok"])
def test_model_with_other_channels_or_tokenizer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    published_file(tmp_path / "published.pth", family)
    missing = {"emigm": "mar download kl16", "detok": "mar download detok"}
    with pytest.raises(CheckpointError, match=missing[family]):
        zoo.import_official(tmp_path / "published.pth", None, num_heads=2)
    other = PixelTokenizer(1, 0.0, 1.0)
    monkeypatch.setattr(zoo, "load_tokenizer", lambda name: other)
    with pytest.raises(ValueError, match="tokenizer: got one with 1 latent channels, expected 3"):
        zoo.import_official(tmp_path / "published.pth", tmp_path / "tokenizer", num_heads=2)


def test_published_models_are_found_by_family_and_architecture() -> None:
    for name, model in PUBLISHED.items():
        assert published(model.config, model.family) is model, name
    assert published(PUBLISHED["mar-base"].config, "emigm") is None
    assert published(replace(PUBLISHED["emigm-xs"].config, classes=10), "emigm") is None
    assert PUBLISHED["emigm-xs-512"].config.channels == 32


def test_pipeline_of_unknown_weights_is_saved_but_not_exported(tmp_path: Path) -> None:
    pipeline = Pipeline(MAR(MODELS["detok"]), PixelTokenizer(3, 0.0, 1.0), weights="unknown")
    pipeline.save(tmp_path / "m.safetensors")
    assert zoo.load(tmp_path / "m.safetensors", device="cpu").weights == "unknown"
    assert main(["convert", str(tmp_path / "m.safetensors"), str(tmp_path / "m.pth")]) == 2


def test_import_with_another_projects_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the channels fit, the numbers would not
    from mar.tokenizer.vit import ViTConfig, ViTTokenizer

    published_file(tmp_path / "emigm.pth", "emigm")
    published_file(tmp_path / "detok.pth", "detok")
    vit = ViTTokenizer(ViTConfig.from_dict({"image_size": 64, "channels": 3, "encoder": SMALL, "decoder": SMALL}))
    monkeypatch.setattr(zoo, "load_tokenizer", lambda name: vit)
    with pytest.raises(CheckpointError, match=r"of kind vit; it needs KL-16 of MAR \(kl16\)$"):
        zoo.import_official(tmp_path / "emigm.pth", tmp_path / "vit.pth", num_heads=2)
    with pytest.raises(CheckpointError, match=r"has no statistics of its latents, expected l-DeTok's stats\.pkl"):
        zoo.import_official(tmp_path / "detok.pth", tmp_path / "vit.pth", num_heads=2)
    vit.set_statistics(0.0, 1.0)
    assert zoo.import_official(tmp_path / "detok.pth", tmp_path / "vit.pth", num_heads=2).tokenizer is vit


@pytest.mark.parametrize("name", ["emigm-xs", "emigm-large-512", "detok-large"])
def test_recipe_of_a_published_model_trains_it(name: str) -> None:
    config = recipe(f"imagenet-{name}")
    assert config.model == PUBLISHED[name].config
    assert config.sampling.guidance_scale == PUBLISHED[name].sampling.guidance_scale
    assert config.batch == PUBLISHED[name].batch
    if name.startswith("detok"):
        assert config.scaled_lr == pytest.approx(2e-4)
        assert (config.weight_decay, config.warmup) == (0.0, 0)
    else:
        assert config.lr == 1e-4
        assert (config.model.mask_schedule, config.model.tie_null) == ("exp", True)
