"""What `tradeoff.py` decides by itself: which ways of drawing are worth it, and what it has measured already."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline, tiny_words_pipeline, write_captions, write_images

from mar.backends.cpu.int8 import is_quantized
from mar.data.splits import hold_out

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tradeoff(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("tradeoff")


def test_pareto_front_has_no_dominated_point(tradeoff: ModuleType) -> None:
    def line(seconds: float, distance: float) -> dict[str, float]:
        return {"seconds": seconds, "distance": distance}

    quick, slow, waste, same, best = line(1, 9), line(3, 4), line(2, 10), line(3, 4.5), line(8, 3)
    assert tradeoff.pareto_front([slow, best, waste, same, quick]) == [quick, slow, best]


def test_sampling_variant_sets_each_field_once(tradeoff: ModuleType) -> None:
    assert tradeoff.settings("K=10 solver=dpm++2m start_t=0.95") == {
        "steps": 10,
        "solver": "dpm++2m",
        "start_t": 0.95,
    }
    with pytest.raises(ValueError, match="got 2 combinations, expected one value"):
        tradeoff.settings("K=10,20")
    assert [tradeoff.settings(way) for way in tradeoff.WAYS]


def test_variant_without_images_is_no_point(tradeoff: ModuleType, tmp_path: Path) -> None:
    lines = [
        {"way": "a", "broken": "step 3"},
        {"way": "b", "distance": 2, "seconds": 1},
        {"way": "a", "broken": "step 4"},
    ]
    (tmp_path / tradeoff.RESULTS_FILE).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert [line["way"] for line in tradeoff.successful_results(tmp_path)] == ["b"]
    assert {*tradeoff.results_by_way(tmp_path)} == {"a", "b"}
    assert tradeoff.successful_results(tmp_path / "nowhere") == []


def test_measured_variant_is_not_repeated(
    tradeoff: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"way": "K=5", "broken": "step 3"}, {"way": "K=7", "distance": 2, "seconds": 1}]
    (tmp_path / tradeoff.RESULTS_FILE).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    measured: list[str] = []
    monkeypatch.setattr(tradeoff, "Measurement", lambda _: SimpleNamespace(measure=measured.append))
    tradeoff.run_measure(SimpleNamespace(way=["K=5", "K=10", "K=7"], out=tmp_path))
    assert measured == ["K=10"]


@pytest.mark.usefixtures("full_disk")
def test_failed_write_keeps_earlier_variants(
    tradeoff: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / tradeoff.RESULTS_FILE
    path.write_bytes(b'{"way": "K=5", "broken": "step 3"}\n')
    monkeypatch.setattr(tradeoff, "collect", lambda *_, **__: None)
    report = SimpleNamespace(distance=1.0, class_accuracy=None)
    monkeypatch.setattr(tradeoff, "compare", lambda *_: report)
    measurement = object.__new__(tradeoff.Measurement)
    vars(measurement).update(
        pipeline=tiny_pipeline(), path=path, count=2, seed=0, batch=2, extractor=None, reference=None, prompts=()
    )
    with pytest.raises(ValueError, match="No space left"):
        measurement.measure("K=2")
    assert path.read_bytes() == b'{"way": "K=5", "broken": "step 3"}\n'


def test_partial_last_line_is_ignored(tradeoff: ModuleType, tmp_path: Path) -> None:
    path, lines = tmp_path / tradeoff.RESULTS_FILE, '{"way": "K=5", "distance": 2}\n{"way": "K=7", "dis'
    path.write_text(lines, encoding="utf-8")
    assert tradeoff.successful_results(tmp_path) == [{"way": "K=5", "distance": 2}]
    path.write_text(lines + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{tradeoff.RESULTS_FILE}, line 2 is not JSON"):
        tradeoff.successful_results(tmp_path)


@pytest.fixture
def measure(tradeoff: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens a measurement of a tiny model, held against a folder of pictures, with nothing but what is given changed;
    its judge is made up."""
    monkeypatch.setattr(tradeoff, "collect", lambda *_, **__: SimpleNamespace(statistics=None))
    monkeypatch.setattr(tradeoff, "frechet_distance", lambda *_: 0.5)
    monkeypatch.setattr(tradeoff, "evaluation_extractor", lambda *_: None)
    tiny_pipeline().save(tmp_path / "model.safetensors")
    usual: dict[str, Any] = {
        "model": str(tmp_path / "model.safetensors"), "data": write_images(tmp_path / "pictures"), "classifier": None,
        "out": tmp_path / "out", "way": ["K=2"], "count": 2, "seed": 0, "batch": 2, "threads": torch.get_num_threads(),
        "dtype": "fp32",
    }  # fmt: skip
    return lambda **changes: tradeoff.Measurement(SimpleNamespace(**{**usual, **changes}))


def test_model_of_words_draws_the_captions_of_all_pictures(measure: Any, tradeoff: ModuleType, tmp_path: Path) -> None:
    data = write_images(tmp_path / "captioned", 4)
    write_captions(data, {"across/1.png": "red cat", "across/3.png": "blue dog", "down/2.png": "red dog"})
    tiny_words_pipeline(words=("blue", "cat", "dog", "red")).save(tmp_path / "words.safetensors")
    measurement = measure(model=str(tmp_path / "words.safetensors"), data=data, out=tmp_path / "of_words")
    assert sorted(measurement.prompts) == ["blue dog", "red cat", "red dog"]
    recorded = json.loads((tmp_path / "of_words" / tradeoff.SETTINGS_FILE).read_text())
    assert recorded["prompts"] == measurement.prompts
    drawn = tradeoff.draw(measurement.pipeline, "K=2", 5, 0, measurement.prompts)
    assert drawn.generated.plan.asks == (*measurement.prompts, *measurement.prompts[:2])
    assert sum(len(batch.images) for batch in drawn.batches(2, 0, 5)) == 5


def test_timing_option_repeats_seconds_only(
    measure: Any, tradeoff: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match="has no measurements"):
        tradeoff.run_time(SimpleNamespace(folder=folder, count=2, rounds=3))
    measure()
    lines = [
        {"way": "K=2", "distance": 2.0, "seconds": 100.0},
        {"way": "K=1", "broken": "step 3"},
        {"way": "K=3", "distance": 1.5, "seconds": 200.0},
    ]
    (folder / tradeoff.RESULTS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    drawn: list[str] = []
    seconds = {"K=2": [2.0, 4.0, 1.0], "K=3": [6.0, 2.0, 5.0]}

    def draw(pipeline: Any, way: str, count: int, seed: int, prompts: Any) -> Any:
        drawn.append(way)
        return SimpleNamespace(seconds=seconds[way].pop(0), batches=lambda *_: iter("ab"))

    monkeypatch.setattr(tradeoff, "draw", draw)
    tradeoff.run_time(SimpleNamespace(folder=folder, count=2, rounds=3))
    assert drawn == ["K=2", "K=3"] * 3
    lines[0]["seconds"], lines[2]["seconds"] = 2.0 / 2, 5.0 / 2
    assert list(tradeoff.results_by_way(folder).values()) == lines


def test_variant_is_timed_by_sampling(measure: Any, tradeoff: ModuleType) -> None:
    pictures = tradeoff.draw(measure().pipeline, "K=2", 5, seed=0)
    assert [len(batch.images) for batch in pictures.batches(2, 0, 5)] == [2, 2, 1]
    assert pictures.seconds > 0


def test_variant_uses_the_requested_precision(measure: Any, tmp_path: Path) -> None:
    for dtype, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = measure(dtype=dtype, out=tmp_path / dtype).pipeline.model
        assert {parameter.dtype for parameter in model.parameters() if parameter.ndim > 1} >= {expected}
    assert is_quantized(measure(dtype="int8", out=tmp_path / "int8").pipeline.model)


def test_results_folder_of_another_setup_is_refused(measure: Any, tradeoff: ModuleType, tmp_path: Path) -> None:
    measure()
    note = tmp_path / "out" / tradeoff.SETTINGS_FILE
    before = note.read_bytes()
    measure(data=(tmp_path / "pictures").rename(tmp_path / "moved"))
    for changes, said in (({"dtype": "bf16"}, "dtype fp32, here bf16"), ({"seed": 1}, "seed 0, here 1")):
        with pytest.raises(ValueError, match=f"was begun with other settings \\({said}\\)"):
            measure(data=tmp_path / "moved", **changes)
    next((tmp_path / "moved" / "down").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"was begun with other settings \(pictures "):
        measure(data=tmp_path / "moved")
    assert note.read_bytes() == before


def test_results_folder_of_another_classifier_is_refused(
    measure: Any, tradeoff: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("quality_data"), "is_fashion", lambda data: data.name == "pictures")
    for name in ("one", "other"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    parts = hold_out(tmp_path / "pictures")
    monkeypatch.setattr(tradeoff, "open_splits", lambda _: parts)
    measure(classifier=tmp_path / "one")
    measure(classifier=(tmp_path / "one").rename(tmp_path / "moved"))
    with pytest.raises(
        ValueError, match=r"was begun with other settings \(classifier [0-9a-f]{16}, here [0-9a-f]{16}\)"
    ):
        measure(classifier=tmp_path / "other")


def test_older_results_are_read(measure: Any, tradeoff: ModuleType, tmp_path: Path) -> None:
    measure()
    note = tmp_path / "out" / tradeoff.SETTINGS_FILE
    about = json.loads(note.read_text(encoding="utf-8"))
    older = {name: about[name] for name in ("model", "data", "count", "seed", "batch", "threads")}
    note.write_text(json.dumps(older), encoding="utf-8")
    measure()
    assert json.loads(note.read_text(encoding="utf-8")) == older
    with pytest.raises(ValueError, match="dtype fp32, here int8"):
        measure(dtype="int8")
    with pytest.raises(ValueError, match="data pictures, here others"):
        measure(data=write_images(tmp_path / "others"))
