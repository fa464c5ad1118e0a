"""Settings of the page: listed, read from JSON, and in words that draw the same picture."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import tiny_pipeline
from words_model import words_pipeline

from mar.app import settings as words
from mar.cli import main
from mar.config import SamplingConfig, to_dict
from mar.pipeline import Pipeline

CHANGED: dict[str, Any] = {"steps": 3, "x0_bound": None, "guidance_interval": [0.2, 0.9], "order": "halton"}


def test_describe_settings_lists_every_field_with_its_help() -> None:
    described = words.describe_settings()
    assert [each["name"] for each in described] == [field.name for field in fields(SamplingConfig)]
    kinds = {each["name"]: (each["kind"], each["optional"]) for each in described}
    assert kinds["steps"] == ("int", False)
    assert kinds["x0_bound"] == ("float", True)
    assert kinds["guidance_interval"] == ("pair", False)
    assert all(each["help"] for each in described)
    [solver] = [each for each in described if each["name"] == "solver"]
    assert "dpm++2m" in solver["choices"]


def test_read_settings_of_json_are_a_config_again() -> None:
    config = SamplingConfig(guidance_scale=2.5, guidance_interval=(0.1, 0.8), x0_bound=None, diffusion_steps_end=7)
    assert SamplingConfig(**words.read_settings(json.loads(json.dumps(to_dict(config))))) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepz": 1}, "got 'stepz', expected some of steps,"),
        ({"steps": "7"}, "steps: got '7', expected a number"),
        ({"steps": True}, "steps: got True, expected a number"),
        ({"steps": 1.5}, "steps: got 1.5, expected a whole number"),
        ({"steps": None}, "steps: got None, expected a number"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": 10**400}, "temperature: got 1000"),
        ({"guidance_interval": [0.1]}, r"guidance_interval: got \[0.1\], expected two numbers"),
        ({"guidance_interval": [0.1, "1"]}, "guidance_interval: got '1'"),
        ({"order": 3}, "order: got 3, expected a name"),
        ([], "settings: got list"),
        ({"order": "x" * 1000, "steps": {"a": 1}}, "steps: got {'a': 1}"),
    ],
)
def test_read_settings_of_wrong_types_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        words.read_settings(given)


@pytest.fixture
def pipeline() -> Pipeline:
    return tiny_pipeline()


@pytest.mark.parametrize("preset", [None, "fast"])
def test_command_line_draws_the_same_picture(pipeline: Pipeline, preset: str | None, tmp_path: Path) -> None:
    model = tmp_path / "my model.safetensors"
    pipeline.save(model)
    sampling = pipeline.sampling_with(preset, **words.read_settings(CHANGED))
    changed = words.changed_settings(pipeline, preset, sampling)
    options = {"out": str(tmp_path / "out"), "device": "cpu"}
    command = words.command_line(str(model), {"label": "bee"}, 5, preset, changed, options)
    assert main(shlex.split(command)[1:]) == 0
    [expected] = pipeline.sample(["bee"], [5], **words.read_settings(to_dict(sampling)))
    with Image.open(tmp_path / "out" / "bee-00005.png") as image:
        assert image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("prompt", ["a red ant's", "", "--seed"])
def test_command_line_and_python_code_of_a_prompt_draw_the_same_picture(prompt: str, tmp_path: Path) -> None:
    model = str(tmp_path / "model.safetensors")
    pipeline = words_pipeline()
    pipeline.save(model)
    [expected] = pipeline.sample(prompts=[prompt], seeds=[5])
    command = words.command_line(
        model, {"prompt": prompt}, 5, None, {}, {"out": str(tmp_path / "out"), "device": "cpu"}
    )
    assert main(shlex.split(command)[1:]) == 0
    [path] = [path for path in (tmp_path / "out").iterdir() if path.name != "grid.png"]
    with Image.open(path) as image:
        assert image.tobytes() == expected.tobytes()
    names: dict[str, Any] = {}
    exec(words.python_code(model, {"prompt": prompt}, 5, None, {}), names)
    assert names["image"].tobytes() == expected.tobytes()


@pytest.mark.parametrize("preset", [None, "fast"])
def test_python_code_draws_the_same_picture(pipeline: Pipeline, preset: str | None, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "model.safetensors")
    sampling = pipeline.sampling_with(preset, **words.read_settings(CHANGED))
    changed = words.changed_settings(pipeline, preset, sampling)
    code = words.python_code(str(tmp_path / "model.safetensors"), {"label": None}, 5, preset, changed)
    names: dict[str, Any] = {}
    exec(code, names)
    [expected] = pipeline.sample([None], [5], **words.read_settings(to_dict(sampling)))
    assert names["image"].tobytes() == expected.tobytes()


def test_python_code_of_a_changed_picture_draws_it(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline.sampling = replace(pipeline.sampling, x0_bound=2.0)
    pipeline.save(tmp_path / "model.safetensors")
    known, mask = Image.new("L", (4, 4), 90), Image.new("L", (4, 4))
    mask.paste(255, (0, 0, 2, 2))
    known.save("known.png")
    mask.save("mask.png")
    names: dict[str, Any] = {}
    exec(words.python_code("model.safetensors", {"label": "ant"}, 1, None, {}, grow=0), names)
    [expected] = pipeline.sample(["ant"], [1], known=[known], mask=[mask], grow=0)
    assert names["image"].tobytes() == expected.tobytes()


def test_changed_settings_of_the_models_own_are_none(pipeline: Pipeline) -> None:
    assert words.changed_settings(pipeline, None, pipeline.sampling) == {}
    assert words.changed_settings(pipeline, "fast", pipeline.sampling_with("fast", steps=2)) == {"steps": 2}
