"""Names lead to models: bundled, official, files, folders; and a reference's run is gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from official_run import CONFIG, TRUNK, official_file
from PIL import Image

from mar import zoo
from mar.checkpoint.files import CheckpointError
from mar.checkpoint.official import from_official, to_official
from mar.checkpoint.official_vit import PATCH_EMBED
from mar.config import TrainConfig
from mar.model.mar import MAR
from mar.pipeline import Pipeline
from mar.tokenizer import PixelTokenizer
from mar.training.run import open_run, resume_official


def test_bundled_model_has_its_classes() -> None:
    model = zoo.load("fashion", device="cpu")
    assert model.classes[3] == "Dress"
    assert model.image_size == (28, 28)
    assert model.model.config.guidable


def test_zoo_files_and_folders_are_opened(tmp_path: Path) -> None:
    Pipeline(MAR(CONFIG), PixelTokenizer(3, 0.0, 1.0)).save(tmp_path / "model.safetensors")
    for place in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        assert zoo.load(place, device="cpu").model.config == CONFIG
    assert zoo.load(tmp_path, dtype=torch.bfloat16, device="cpu").model.token_embed.weight.dtype == torch.bfloat16


def test_zoo_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mar download mar-base"):
        zoo.load("mar-base")
    with pytest.raises(CheckpointError, match="mar download kl16"):
        zoo.load_tokenizer("kl16")
    with pytest.raises(CheckpointError, match="model: got 'fasion', expected emoji, fashion, mar-base"):
        zoo.load("fasion")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        zoo.load(tmp_path)


def test_zoo_repository_names_may_have_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def from_hub(name: str) -> Pipeline:
        asked.append(name)
        return Pipeline(MAR(CONFIG), PixelTokenizer(3, 0.0, 1.0))

    monkeypatch.setattr(zoo, "_from_hub", from_hub)
    names = ["owner/mar", "owner/mar-v1.5", "own.er/mar-1.0-base"]
    for name in names:
        zoo.load(name, device="cpu")
    assert asked == names
    for name in ("owner/mar.pth", "owner/mar.ckpt", "owner/mar.safetensors"):
        with pytest.raises(CheckpointError):
            zoo.load(name, device="cpu")
    assert asked == names


def test_zoo_official_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To tell what they are and to load them: a file has gigabytes."""
    read: list[str] = []
    load = torch.load

    def counted(path: Any, **options: Any) -> Any:
        read.append(Path(path).name)
        return load(path, **options)

    monkeypatch.setattr(torch, "load", counted)
    parts = ("encoder.conv_in", "decoder.conv_in", "quant_conv")
    torch.save({"model": {f"{part}.weight": torch.zeros(1) for part in parts}}, tmp_path / "kl.ckpt")
    torch.save({"model": {PATCH_EMBED: torch.zeros(1)}}, tmp_path / "vit.pth")
    for name in ("kl.ckpt", "vit.pth"):
        with pytest.raises(CheckpointError):
            zoo.load_tokenizer(str(tmp_path / name))
    official_file(tmp_path / "mine.pth")
    monkeypatch.setattr(zoo, "load_tokenizer", lambda name: PixelTokenizer(3, 0.0, 1.0))
    zoo.import_official(tmp_path / "mine.pth", tmp_path / "vit.pth", num_heads=2)
    assert read == ["kl.ckpt", "vit.pth", "mine.pth"]


def test_zoo_mismatched_tokenizer_is_one_line(tmp_path: Path) -> None:
    parts = ("encoder.conv_in", "decoder.conv_in", "quant_conv")
    torch.save({"model": {f"{part}.weight": torch.zeros(1) for part in parts}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"other\.ckpt is not the KL-16 tokenizer: ") as refused:
        zoo.load_tokenizer(str(tmp_path / "other.ckpt"))
    assert "\n" not in str(refused.value)


def test_zoo_official_file_needs_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.pth"
    model, _ = official_file(path)
    with pytest.raises(CheckpointError, match="mar download kl16"):
        zoo.import_official(path, None, num_heads=2)
    monkeypatch.setattr(zoo, "load_tokenizer", lambda name: PixelTokenizer(3, 0.0, 1.0))
    loaded = zoo.import_official(path, tmp_path / "kl16.ckpt", num_heads=2)
    assert loaded.weights == "ema"
    assert loaded.model.config.encoder == TRUNK
    assert loaded.model.state_dict().keys() == model.state_dict().keys()


def test_zoo_reference_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), "red" if name == "a" else "blue").save(tmp_path / "pictures" / name / "1.png")
    monkeypatch.setattr("mar.checkpoint.official._HEADS_BY_WIDTH", {16: 2})
    _, expected = official_file(tmp_path / "checkpoint-last.pth")
    config = TrainConfig(model=CONFIG, data=str(tmp_path / "pictures"), batch=256, lr=1e-3)
    run = open_run(config, tmp_path / "run", device=torch.device("cpu"))
    resume_official(run, tmp_path / "checkpoint-last.pth")
    assert run.progress.images == 5 * 2  # five epochs of two pictures
    torch.manual_seed(1)  # the same gradients again, by our names
    MAR(CONFIG)
    shapes = to_official(run.model.state_dict())
    gradients = {name: torch.randn_like(tensor) for name, tensor in shapes.items()}
    for name, gradient in from_official(gradients).items():
        run.model.get_parameter(name).grad = gradient
    run.optimizers[0].step()
    for name, tensor in to_official(run.model.state_dict()).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
