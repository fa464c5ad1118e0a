"""What the benchmarks decide by themselves: which settings a trial has, and which ways of drawing are worth it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from mar.config import ConfigError, HeadConfig
from mar.presets import CIFAR10, FASHION

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)  # as Python does for a script
    return importlib.import_module("quality")


@pytest.fixture
def tradeoff(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("tradeoff")


def test_the_papers_settings_are_the_papers(quality: ModuleType) -> None:
    config = quality.settings("reference", Path("pictures"), [])
    model, own = config.model, CIFAR10.model
    assert (model.head, model.grid) == (HeadConfig(own.head.width, own.head.depth), own.grid)
    assert not model.encoder.rotary
    assert (model.encoder.width, model.decoder.depth) == (own.encoder.width, own.decoder.depth)
    assert (model.attention_dropout, model.projection_dropout, model.mask_ratio_min) == (0.1, 0.1, 0.7)
    assert (config.optimizer, config.decay, config.clip) == ("adamw", 0, 3.0)
    assert config.scaled_lr == pytest.approx(8e-4)


def test_settings_are_changed_by_their_paths(quality: ModuleType) -> None:
    changes = ["model.patch=7", "sampling.solver=ddim", "ema_others=0.99", "optimizer=adamw"]
    config = quality.settings("fashion", Path("pictures"), changes)
    assert (config.model.patch, config.sampling.solver, config.optimizer) == (7, "ddim", "adamw")
    assert (config.ema_others, config.lr, config.data) == ((0.99,), FASHION.lr, "pictures")
    for wrong in ("model.patches=7", "patch=7", "model.encoder=3"):
        with pytest.raises(ConfigError, match=f"a recipe has no setting {wrong[:5]}"):
            quality.settings("fashion", Path("pictures"), [wrong])


def test_on_the_front_no_other_is_sooner_and_better(tradeoff: ModuleType) -> None:
    def line(seconds: float, distance: float) -> dict[str, float]:
        return {"seconds": seconds, "distance": distance}

    quick, slow, waste, same, best = line(1, 9), line(3, 4), line(2, 10), line(3, 4.5), line(8, 3)
    assert tradeoff.front([slow, best, waste, same, quick]) == [quick, slow, best]


def test_a_way_has_one_value_for_each_field(tradeoff: ModuleType) -> None:
    assert tradeoff.settings("K=10 solver=dpm++2m noisiest=0.95") == {
        "steps": 10,
        "solver": "dpm++2m",
        "noisiest": 0.95,
    }
    with pytest.raises(ValueError, match="2 combinations, expected one value"):
        tradeoff.settings("K=10,20")
    assert [tradeoff.settings(way) for way in tradeoff.WAYS]


def test_what_drew_no_pictures_is_no_point(tradeoff: ModuleType, tmp_path: Path) -> None:
    lines = [
        {"way": "a", "broken": "step 3"},
        {"way": "b", "distance": 2, "seconds": 1},
        {"way": "a", "broken": "step 4"},
    ]
    (tmp_path / tradeoff.MEASURED).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert [line["way"] for line in tradeoff.read(tmp_path)] == ["b"]
    assert tradeoff.read(tmp_path / "nowhere") == []
