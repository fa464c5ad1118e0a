"""The studio without the web: events of a request, stopping, models that come and go."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from tiny import tiny_pipeline, tiny_words_pipeline

from mar.app import studio as module
from mar.app.pictures import facts_of, png_url, read_picture
from mar.app.studio import PRESETS, Previews, Studio, read_request
from mar.app.timings import Timings
from mar.pipeline import Pipeline
from mar.published import PUBLISHED


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files of models of 4x4 tokens."""
    folder = tmp_path_factory.mktemp("models")
    paths = [folder / f"{name}.safetensors" for name in ("one", "two", "three")]
    for seed, path in enumerate(paths):
        pipeline = tiny_pipeline(seed)
        pipeline.sampling = replace(pipeline.sampling, x0_bound=2.0, diffusion_steps=9)  # more than those of `fast`
        pipeline.save(path)
    return [str(path) for path in paths]


@pytest.fixture
def studio(models: list[str], tmp_path: Path) -> Iterator[Studio]:
    studio = Studio(models, device="cpu", timings=Timings(tmp_path / "timings.json"))
    yield studio
    studio.close()


def draw(studio: Studio, request: module.DrawRequest, ticket: str = "") -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    studio.submit(request, events.append, ticket).future.result(timeout=60)
    return events


def test_draw_events_begin_step_and_end_with_the_pictures_of_sample(studio: Studio, models: list[str]) -> None:
    events = draw(studio, read_request(models[0], ["bee", 2, None], [3, 4, 5], settings={"steps": 6}))
    assert [event["kind"] for event in events] == ["begin", *["step"] * 5, "done"]
    assert [event["step"] for event in events] == [0, 1, 2, 3, 4, 5, 6]
    revealed_at = torch.tensor(events[0]["revealed_at"])
    assert revealed_at.shape == (3, 4, 4)
    assert set(revealed_at.flatten().tolist()) == {1, 2, 3, 4, 5, 6}
    expected = Pipeline.open(models[0]).sample(["bee", 2, None], [3, 4, 5], steps=6)
    for picture, image in zip(events[-1]["images"], expected, strict=True):
        assert read_picture(picture["image"]).tobytes() == image.tobytes()
    assert [picture["label"] for picture in events[-1]["images"]] == ["bee", "cat", None]


def test_draw_picture_restores_its_settings(studio: Studio, models: list[str]) -> None:
    request = read_request(models[0], ["bee"], [3], "fast", {"steps": 3, "guidance_interval": [0.5, 1]})
    [picture] = draw(studio, request)[-1]["images"]
    opened = studio.open(models[0], picture["image"])
    assert opened["restored"] == {
        "model": models[0], "label": 1, "seed": 3, "preset": "fast",
        "settings": {"steps": 3, "guidance_interval": [0.5, 1.0]},
    }  # fmt: skip
    assert opened["note"] == ""
    assert read_picture(opened["image"]).tobytes() == read_picture(picture["image"]).tobytes()
    facts = facts_of(read_picture(picture["image"]))
    assert facts is not None
    assert facts["weights"] == Pipeline.open(models[0]).fingerprint()


def test_open_picture_of_old_names_and_of_strangers(studio: Studio, models: list[str]) -> None:
    blank = Image.new("L", (4, 4))
    old = studio.open(models[0], png_url(blank, {"seed": 1, "label": 0, "guidance": 2.0, "guidance_from": 0.25}))
    assert old["restored"]["settings"] == {"guidance_scale": 2.0, "guidance_interval": [0.25, 1.0]}
    for facts in ({"steps": "many"}, {"steps": -1}, {"guidance": 1, "guidance_scale": 2}, {"order": ["x"]}):
        strange = studio.open(models[0], png_url(blank, facts))
        assert strange["restored"] is None
        assert strange["note"].startswith("its settings do not fit this model: ")
    edited = studio.open(models[0], png_url(blank, {"seed": 1, "label": 0, "edited": True}))
    assert edited["restored"]["seed"] == 1
    assert "can't repeat" in edited["note"]
    wide = studio.open(models[0], png_url(Image.new("RGB", (40, 20), "white")))
    assert read_picture(wide["image"]).size == (4, 4)
    assert wide["restored"] is None


def test_draw_with_known_and_mask_keeps_the_rest(studio: Studio, models: list[str]) -> None:
    known, mask = Image.new("L", (4, 4), 100), Image.new("L", (4, 4))
    mask.paste(255, (0, 0, 1, 4))
    request = read_request(models[0], ["bee"], [1], known=png_url(known), mask=png_url(mask), grow=0)
    [picture] = draw(studio, request)[-1]["images"]
    result = read_picture(picture["image"])
    assert result.crop((1, 0, 4, 4)).tobytes() == known.crop((1, 0, 4, 4)).tobytes()
    assert result.tobytes() != known.tobytes()
    assert "--known known.png --mask mask.png --grow 0" in picture["command"]


def test_stop_ends_a_request_within_a_step(studio: Studio, models: list[str]) -> None:
    events: list[dict[str, Any]] = []

    def emit(event: dict[str, Any]) -> None:
        events.append(event)
        if event["step"] == 3:
            studio.stop("mine")

    studio.submit(read_request(models[0], ["bee"], [1], settings={"steps": 16}), emit, "mine").future.result(60)
    assert events[-1]["kind"] == "done"
    assert events[-1]["stopped"]
    assert (events[-1]["step"], events[-1]["steps"]) == (3, 16)
    [picture] = events[-1]["images"]
    facts = facts_of(read_picture(picture["image"]))
    assert facts is not None
    assert facts["stopped"]


def test_stop_before_a_request_begins_draws_nothing(studio: Studio, models: list[str]) -> None:
    studio.stop("mine")
    events = draw(studio, read_request(models[0], ["bee"], [1]), "mine")
    assert [(event["kind"], event["images"], event["stopped"]) for event in events] == [("done", [], True)]
    assert not draw(studio, read_request(models[0], ["bee"], [1]), "mine")[-1]["stopped"]


def test_requests_are_drawn_one_after_the_other(studio: Studio, models: list[str]) -> None:
    seen: list[tuple[str, str]] = []
    works = [
        studio.submit(read_request(model, ["bee"], [1]), lambda event, model=model: seen.append((model, event["kind"])))
        for model in models[:2]
    ]
    for work in works:
        work.future.result(60)
    firsts = [i for i, (_, kind) in enumerate(seen) if kind == "begin"]
    assert seen[firsts[1] - 1] == (models[0], "done")
    assert {model for model, _ in seen[: firsts[1]]} == {models[0]}


def test_models_in_memory_are_bounded(studio: Studio, models: list[str]) -> None:
    for name in (*models, models[0]):
        draw(studio, read_request(name, ["bee"], [1]))
        assert sum(model["state"] == "ready" for model in studio.catalog()) <= module.MAX_LOADED
    states = {model["name"]: model["state"] for model in studio.catalog()}
    assert (states[models[0]], states[models[1]]) == ("ready", "waiting")


def test_prepare_measures_every_preset_once(studio: Studio, models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    studio.prepare(models[0])
    studio._worker.submit(lambda: None).result(60)
    seconds = studio.catalog()[0]["seconds"]
    assert set(seconds) == set(PRESETS)
    assert all(value > 0 for value in seconds.values())
    monkeypatch.setattr(studio, "_measure", lambda *arguments, **options: pytest.fail("measured again"))
    studio.prepare(models[0])
    studio._worker.submit(lambda: None).result(60)


def test_prepare_makes_way_for_a_request(studio: Studio, models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    draw(studio, read_request(models[0], ["bee"], [1], settings={"steps": 2}))
    begun, steps = threading.Event(), []
    reveal = Pipeline.reveal

    def slow(pipeline: Pipeline, labels: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        for step in reveal(pipeline, labels, *arguments, **options):
            if labels == [0]:  # a measurement's
                begun.set()
                steps.append(step.step)
                time.sleep(0.05)
            yield step

    monkeypatch.setattr(Pipeline, "reveal", slow)
    studio.timings.put(studio._machine(studio.models[models[0]]), "exact", 1)
    studio.prepare(models[0])
    assert begun.wait(60)
    count = len(steps)
    draw(studio, read_request(models[0], ["bee"], [1], settings={"steps": 2}))
    assert len(steps) <= count + 2


def test_model_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no model")
    studio = Studio([str(tmp_path / "broken.safetensors")], device="cpu", timings=Timings(tmp_path / "t.json"))
    with pytest.raises(ValueError, match="can't be loaded"):
        draw(studio, read_request(str(tmp_path / "broken.safetensors"), [None], [0]))
    assert studio.catalog()[0]["state"] == "failed"
    assert "\n" not in studio.catalog()[0]["error"]
    studio.close()


def test_official_models_are_offered_with_their_size(studio: Studio) -> None:
    offered = {model["name"]: model for model in studio.catalog()}
    assert offered["mar-base"]["state"] == "absent"
    assert offered["mar-base"]["mebibytes"] == pytest.approx((1_663_614_946 + 265_900_046) / 2**20)
    assert offered["emigm-xs-512"]["mebibytes"] == 0  # not known
    assert offered["emigm-xs-512"]["about"].startswith("105 M parameters, 512 x 512 pixels; ")
    assert offered.keys() >= PUBLISHED.keys()
    with pytest.raises(ValueError, match="mar-base is not downloaded: mar download mar-base"):
        draw(studio, read_request("mar-base", [0], [0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model: got int"),
        ({"labels": "bee"}, "labels: got str"),
        ({"labels": []}, "labels: got 0"),
        ({"labels": [0] * 17, "seeds": [0] * 17}, "labels: got 17, expected a list of 1 to 16"),
        ({"labels": [1.5]}, "label '1.5'"),
        ({"labels": ["x" * 201]}, "expected a class name"),
        ({"seeds": [1, 2]}, "seeds: got 2, expected one per label, 1"),
        ({"seeds": [2**63]}, "of 63 bits"),
        ({"seeds": [True]}, "seed True"),
        ({"preset": "slow"}, "preset: got 'slow'"),
        ({"preset": ["fast"]}, "preset: got"),
        ({"known": "x"}, "known and mask: got only one"),
        ({"grow": -1}, "grow: got -1"),
        ({"settings": 7}, "settings: got int"),
    ],
)
def test_read_request_of_wrong_values_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_request(**{"model": "fashion", "labels": [0], "seeds": [0], **changes})


def test_previews_take_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)

    class Step:
        def __init__(self, step: int) -> None:
            self.step = step

        def decode(self) -> torch.Tensor:
            nonlocal now
            now += 0.5  # as long as decoding takes with a large tokenizer
            return torch.zeros(1, 3, 8, 8)

    previews, decoded = Previews(), 0
    for step in range(1, 201):
        now += 0.1
        decoded += previews.of(Step(step)) is not None  # type: ignore[arg-type]
    assert decoded >= 2
    assert 0.5 * decoded <= module.PREVIEW_SHARE * now + 0.5


def test_studio_import_does_without_torch_and_gradio() -> None:
    code = "import sys, mar.app.studio, mar.app.server; print({'torch', 'gradio', 'PIL'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("count", [1, 2])
def test_draw_of_a_slow_measurement_corrects_it(studio: Studio, models: list[str], count: int) -> None:
    draw(studio, read_request(models[0], ["bee"], [1], settings={"steps": 2}))
    machine = studio._machine(studio.models[models[0]])
    studio.timings.put(machine, "fast", 1e6)
    events = draw(studio, read_request(models[0], ["bee"] * count, list(range(count)), "fast"))
    assert studio.timings.get(machine, "fast") == pytest.approx(events[-1]["seconds"], abs=0.001)
    studio.timings.put(machine, "fast", 1e-6)
    draw(studio, read_request(models[0], ["bee"] * 2, [0, 1], "fast"))
    assert studio.timings.get(machine, "fast") == pytest.approx(1e-6, abs=1e-4)


def test_draw_of_several_pictures_is_no_measurement(studio: Studio, models: list[str]) -> None:
    """Their seconds are those of all together."""
    draw(studio, read_request(models[0], ["bee"] * 2, [0, 1], "fast"))
    assert studio.timings.get(studio._machine(studio.models[models[0]]), "fast") is None


def test_draw_that_was_stopped_before_loads_nothing(studio: Studio, models: list[str]) -> None:
    studio.stop("ticket")
    events = draw(studio, read_request(models[2], ["bee"], [1]), "ticket")
    assert [(event["kind"], event["stopped"]) for event in events] == [("done", True)]
    assert studio.models[models[2]].state == "waiting"


def test_binomial_steps_have_a_bound(studio: Studio, models: list[str]) -> None:
    """Each has a probability: a million would take the memory of all."""
    request = read_request(models[0], ["bee"], [1], settings={"steps": 10**8, "reveal": "binomial"})
    with pytest.raises(ValueError, match="steps is 100000000, but the binomial rule takes at most 4,096"):
        draw(studio, request)


@pytest.mark.parametrize(
    ("facts", "note"),
    [
        ({}, ""),
        ({"known": "a.png", "mask": "b.png", "grow": 1}, "painted over or stopped"),
        ({"labels": [1, 2], "seeds": [0, 1]}, "a sheet of several pictures"),
        ({"image_size": [32, 32]}, "of another size"),
        ({"weights": "0" * 64}, "by other weights"),
    ],
)
def test_open_says_what_draw_cannot_repeat(studio: Studio, models: list[str], facts: dict[str, Any], note: str) -> None:
    draw(studio, read_request(models[0], ["bee"], [1], settings={"steps": 2}))
    url = png_url(Image.new("L", (8, 8)), {"model": models[0], "label": 1, "seed": 3, **facts})
    said = studio.open(models[0], url)["note"]
    assert note in said
    assert bool(note) == bool(said)


def test_least_sure_logs_no_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_words_pipeline().save(tmp_path / "words.safetensors")
    name = str(tmp_path / "words.safetensors")
    studio = Studio([name], device="cpu", timings=Timings(tmp_path / "t.json"))
    height, width = tiny_words_pipeline().image_size
    studio.confidence(name, None, png_url(Image.new("RGB", (width, height)), None), f"a {tiny.WORDS[0]} xyzzy")
    studio.close()
    assert "xyzzy" not in caplog.text


def test_class_called_none_is_named_by_its_number() -> None:
    pipeline = tiny_pipeline()
    pipeline.classes = ("none", "bee", "cat")
    assert [module._label(pipeline, number) for number in (None, 0, 1)] == [None, "0", "bee"]
