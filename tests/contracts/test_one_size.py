"""A tokenizer that knows one size, as l-DeTok's: everything takes that size, or says so before it works."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from PIL import Image

from mar.checkpoint.tokenizers import save_tokenizer
from mar.cli import main
from mar.cli.train_folder import plan_folder
from mar.config import ConfigError
from mar.pipeline import Pipeline
from mar.tokenizer.vit import ViTConfig, ViTSize, ViTTokenizer

SIZE = ViTSize(16, 1, 2)
VIT = ViTConfig(image_size=32, patch_size=4, channels=2, encoder=SIZE, decoder=SIZE)
SMALL = "--model.encoder.width=16 --model.encoder.num-heads=2 --model.encoder.depth=1 --model.decoder.width=16 "
SMALL += "--model.decoder.num-heads=2 --model.decoder.depth=1 --model.head.width=16 --model.head.depth=1 "
SMALL += "--model.channels=2 --model.patch-size=1 --model.classes=0 --sampling.guidance-scale=1"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tokenizer of 32x32 pixels and portraits that are larger."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(ViTTokenizer(VIT, 0.0, 1.0), tmp_path / "vit")
    (tmp_path / "pictures").mkdir()
    for number in range(20):
        Image.new("RGB", (60, 90), (number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path


def test_folder_takes_the_size_of_the_tokenizer(place: Path) -> None:
    """Neither a larger one, nor the pictures' own shape."""
    del place
    plan, _ = plan_folder(["--data", "pictures", "--tokenizer", "vit"])
    assert plan.cache is not None
    assert (plan.cache.image_size, plan.train.model.grid) == ((32, 32), (8, 8))
    with pytest.raises(ConfigError, match="image-size: got 48x48, expected 32x32: the tokenizer knows no other size"):
        plan_folder(["--data", "pictures", "--tokenizer", "vit", "--image-size", "48"])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cache pictures --tokenizer vit --image-size 48 --out out", "--image-size: got 48x48, expected 32x32"),
        ("tokenizer stats vit --data pictures --image-size 48", "--image-size: got 48x48, expected 32x32"),
        (
            f"train --data pictures --tokenizer vit --model.grid 12 12 --out out {SMALL}",
            "--model.grid: got one for pictures of 48x48, expected one for 32x32",
        ),
    ],
)
def test_verb_of_another_size_begins_nothing(
    command: str, said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    assert f"{said}: the tokenizer knows no other size" in capsys.readouterr().err
    assert sorted(path.name for path in place.iterdir()) == ["pictures", "vit"]


def test_stats_take_the_only_size(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del place
    stats, data = ["tokenizer", "stats"], ["--data", "pictures", "--limit", "4"]
    assert main([*stats, "vit", *data]) == 0
    assert "measured on 4 pictures" in capsys.readouterr().out
    assert main([*stats, "pixels", *data]) == 2
    assert "--image-size is missing: the tokenizer takes pictures of many sizes" in capsys.readouterr().err
    assert main([*stats, "pixels", *data, "--image-size", "0", "4"]) == 2
    assert "--image-size: got 0x4, expected" in capsys.readouterr().err
    assert main([*stats, "pixels", *data, "--image-size", "12", "8"]) == 0


def test_pipeline_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="grid makes pictures of 16x16, expected 32x32: the tokenizer knows no other"):
        Pipeline(tiny.tiny_model(), ViTTokenizer(VIT, 0.0, 1.0))
