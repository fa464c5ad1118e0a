"""The judge of emoji: moved or blurred pictures are nearest to themselves; its split keeps four of five tones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks import emoji_judge as judge


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Smooth random pictures on white."""
    coarse = torch.rand(30, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.pad(F.interpolate(coarse, (48, 48), mode="bilinear"), (8, 8, 8, 8), value=1.0)


def test_judge_moved_and_blurred_pictures_are_nearest_to_themselves(pictures: torch.Tensor) -> None:
    moved = pictures.roll((2, -2), (2, 3))
    assert (judge.distances(moved, pictures).argmin(1) == torch.arange(30)).all()
    assert float(judge.distances(moved, pictures).diagonal().max()) < 0.5, "2 pixels are 1 softened pixel"
    blurred = F.avg_pool2d(pictures, 5, 1, 2)
    assert (judge.distances(blurred, pictures).argmin(1) == torch.arange(30)).all()


def test_judge_distance_is_in_gray_levels(pictures: torch.Tensor) -> None:
    white, grayer = torch.ones(1, 3, 64, 64), torch.full((1, 3, 64, 64), 1 - 10 / 127.5)
    assert float(judge.distances(white, grayer)) == pytest.approx(10, abs=0.01)
    assert judge.corner(grayer) == 245
    assert judge.corner(pictures) == 255


def test_judge_base_and_tone_of_a_wrong_tone() -> None:
    rows = [{"base": "man", "skin_tone": str(tone)} for tone in range(5)] + [{}]
    apart = torch.ones(2, 6)
    apart[0, 3] = apart[1, 5] = 0.1  # another tone; another picture, of all tones the asked one
    apart[1, 2] = 0.5
    assert judge.judge_tones(apart, [2, 2], rows) == {"base": 0.5, "tone": 0.5}


def test_split_holds_back_one_tone_of_a_base(tmp_path: Path) -> None:
    (data := tmp_path / "data").mkdir()
    rows = []
    for base in range(6):
        for tone in range(5 - (base == 5)):
            rows.append({"file_name": f"{base}-{tone}.png", "text": "x", "base": str(base), "skin_tone": str(tone)})
            Image.new("RGB", (8, 8)).save(data / rows[-1]["file_name"])
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judge.split(data, tmp_path / "out", 4)
    kept, held = judge.read_rows(tmp_path / "out"), json.loads((tmp_path / "out/held-back.json").read_text())
    assert len(kept) == 25
    assert len({row["base"] for row in held}) == 4
    assert "5" not in {row["base"] for row in held}, "a base that lacks a tone already"
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {row["file_name"] for row in kept}
