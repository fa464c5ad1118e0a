"""Prompts on the page: a studio with a model that draws from words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import tiny_pipeline
from words_model import EXAMPLES, WORDS, words_pipeline

from mar.app import server
from mar.app.pictures import facts_of, png_url, read_picture
from mar.app.prompts import MAX_EXAMPLES, MAX_NOTE, check_prompts, describe_prompts, sample_prompt, unlogged_prompts
from mar.app.studio import MAX_PROMPT, DrawRequest, Studio, read_request
from mar.app.timings import Timings
from mar.pipeline import Pipeline


def save_words_model(path: Path, **sampling: Any) -> str:
    """Save a model that draws from words, with these settings of its own."""
    pipeline = words_pipeline()
    pipeline.sampling = replace(pipeline.sampling, **sampling)
    pipeline.save(path)
    return str(path)


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of a model of 4x4 tokens that draws from words."""
    return save_words_model(tmp_path_factory.mktemp("models") / "worded.safetensors", x0_bound=2.0)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of a model of classes."""
    path = tmp_path_factory.mktemp("models") / "classes.safetensors"
    tiny_pipeline().save(path)
    return str(path)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of such a model with more diffusion steps than `fast` has."""
    return save_words_model(tmp_path_factory.mktemp("models") / "slow.safetensors", diffusion_steps=9)


@pytest.fixture
def studio(worded: str, classes: str, slow: str, tmp_path: Path) -> Iterator[Studio]:
    studio = Studio([worded, classes, slow], device="cpu", timings=Timings(tmp_path / "timings.json"))
    yield studio
    studio.close()


def draw(studio: Studio, request: DrawRequest) -> dict[str, Any]:
    """Return the last event of a request."""
    events: list[dict[str, Any]] = []
    studio.submit(request, events.append).future.result(timeout=60)
    return events[-1]


# ---- drawing


def test_draw_of_prompts_gives_the_pictures_of_sample(studio: Studio, worded: str) -> None:
    asked = ["a red ant", "bee", None]
    event = draw(studio, read_request(worded, None, [3, 4, 5], prompts=asked))
    expected = Pipeline.open(worded).sample(prompts=asked, seeds=[3, 4, 5])
    for picture, image in zip(event["images"], expected, strict=True):
        assert read_picture(picture["image"]).tobytes() == image.tobytes()
    assert [picture["prompt"] for picture in event["images"]] == asked
    assert all("label" not in picture for picture in event["images"])
    assert event["notes"] == []
    first, _, last = event["images"]
    assert first["command"] == f"mar sample {worded} --prompt 'a red ant' --seed 3"
    assert "prompts=['a red ant'], seeds=[3]" in first["python"]
    assert last["command"] == f"mar sample {worded} --prompt '' --seed 5"


def test_draw_picture_of_a_prompt_restores_it(studio: Studio, slow: str) -> None:
    [picture] = draw(studio, read_request(slow, None, [3], "fast", {"steps": 3}, prompts=["a red ant"]))["images"]
    facts = facts_of(read_picture(picture["image"]))
    assert facts is not None
    assert (facts["prompt"], facts["seed"]) == ("a red ant", 3)
    assert "label" not in facts
    assert studio.open(slow, picture["image"])["restored"] == {
        "model": slow, "prompt": "a red ant", "seed": 3, "preset": "fast", "settings": {"steps": 3}
    }  # fmt: skip


@pytest.mark.parametrize("prompt", [7, None, ["ant"], "x" * (MAX_PROMPT + 1)])
def test_open_picture_with_a_prompt_of_strangers_restores_none(studio: Studio, worded: str, prompt: Any) -> None:
    opened = studio.open(worded, png_url(Image.new("L", (4, 4)), {"seed": 1, "prompt": prompt}))
    assert opened["restored"]["prompt"] is None


def test_draw_with_known_and_another_prompt_keeps_the_rest(studio: Studio, worded: str) -> None:
    known, mask = Image.new("L", (4, 4), 100), Image.new("L", (4, 4))
    mask.paste(255, (0, 0, 3, 4))
    drawn = []
    for prompt in ("a red ant", "bee"):
        request = read_request(
            worded, None, [2], known=png_url(known), mask=png_url(mask), grow=0, prompts=[prompt]
        )  # fmt: skip
        [picture] = draw(studio, request)["images"]
        drawn.append(read_picture(picture["image"]))
        assert drawn[-1].crop((3, 0, 4, 4)).tobytes() == known.crop((3, 0, 4, 4)).tobytes()
        assert "--known known.png --mask mask.png --grow 0" in picture["command"]
    assert drawn[0].tobytes() != drawn[1].tobytes()


def test_draw_with_unknown_words_notes_them_and_logs_nothing(
    studio: Studio, worded: str, caplog: pytest.LogCaptureFixture
) -> None:
    event = draw(studio, read_request(worded, None, [1], prompts=["a red antt"]))
    assert event["notes"] == ["unknown words: antt (ant?); left out"]
    assert [record for record in caplog.records if record.name == "mar.data"] == []


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda worded, classes: read_request(worded, ["bee"], [0]), "draws from words; give prompts"),
        (lambda worded, classes: read_request(classes, None, [0], prompts=["bee"]), "does not read words; give labels"),
        (lambda worded, classes: read_request(worded, None, [0], prompts=["xyz"]), "unknown words: xyz"),
    ],
)
def test_draw_of_what_the_model_does_not_take_is_refused(
    studio: Studio, worded: str, classes: str, request_of: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(studio, request_of(worded, classes))


def test_confidence_of_a_prompt_is_that_of_the_library(studio: Studio, worded: str) -> None:
    picture = Image.new("L", (4, 4), 90)
    losses = studio.confidence(worded, None, png_url(picture), "a red ant")
    expected = Pipeline.open(worded).token_losses(None, [picture], prompts=["a red ant"])
    assert losses == expected[0].tolist()
    assert losses != studio.confidence(worded, None, png_url(picture), "bee")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [0]}, "got labels and prompts, expected one of them"),
        ({"prompts": "bee"}, "prompts: got str, expected a list of 1 to 16, one per picture"),
        ({"prompts": []}, "prompts: got 0"),
        ({"prompts": ["bee"] * 17}, "prompts: got 17, expected a list of 1 to 16"),
        ({"prompts": [3]}, "prompt '3': got int, expected text"),
        ({"prompts": ["x" * 301]}, "prompt 'x{40}...': got 301 characters, expected at most 300"),
        ({"seeds": []}, "seeds: got 0, expected one per prompt, 1"),
        ({"prompts": None}, "labels: got NoneType"),
    ],
)
def test_read_request_of_wrong_prompts_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_request(**{"model": "emoji", "labels": None, "seeds": [0], "prompts": ["bee"], **changes})


def test_read_request_of_the_longest_prompt_is_taken() -> None:
    assert read_request("emoji", None, [0], prompts=["x" * MAX_PROMPT]).asks == ["x" * MAX_PROMPT]


# ---- what the page knows


def test_catalog_of_a_model_of_words_has_its_words_and_examples(studio: Studio, worded: str) -> None:
    draw(studio, read_request(worded, None, [0], prompts=["bee"]))
    [model] = [each for each in studio.catalog() if each["name"] == worded]
    assert model["asks"] == {"kind": "prompt", "words": list(WORDS), "examples": EXAMPLES}


def test_prepare_of_a_model_of_words_measures_its_presets(studio: Studio, worded: str) -> None:
    studio.prepare(worded)
    studio._worker.submit(lambda: None).result(60)
    [model] = [each for each in studio.catalog() if each["name"] == worded]
    assert all(model["seconds"].values())


@pytest.mark.parametrize("notes", [{}, {"examples": "a bee"}, {"examples": [3, None, ""]}])
def test_describe_prompts_without_examples_has_none(notes: dict[str, Any]) -> None:
    pipeline = words_pipeline()
    pipeline.notes = notes
    assert describe_prompts(pipeline)["examples"] == []
    assert sample_prompt(pipeline) == WORDS[0]


def test_describe_prompts_of_many_examples_has_a_few() -> None:
    pipeline = words_pipeline()
    pipeline.notes = {"examples": ["bee"] * 50}
    assert describe_prompts(pipeline)["examples"] == ["bee"] * MAX_EXAMPLES


@pytest.mark.parametrize(
    ("prompts", "notes", "draws"),
    [
        (["a red ant"], [], True),
        ([None, ""], [], True),
        (["a red antt"], ["unknown words: antt (ant?); left out"], True),
        (["xyz"], ["unknown words: xyz; expected some of the 7 words that this model knows"], False),
        (["a red ant bee beetle"], ["cut after 4 words, before 'beetle'"], True),
        (["antt red", "bee", "antt red"], ["prompt 'antt red': unknown words: antt (ant?); left out"], True),
    ],
)
def test_check_prompts_tells_what_is_not_read(prompts: list[str | None], notes: list[str], draws: bool) -> None:
    assert check_prompts(words_pipeline(), prompts) == {"notes": notes, "draws": draws}


def test_check_prompts_of_a_model_of_classes_tells_what_to_give() -> None:
    told = check_prompts(tiny_pipeline(), ["bee"])
    assert told == {
        "notes": ["prompts: this model does not read words; give labels: class names or numbers"], "draws": False
    }  # fmt: skip


def test_check_prompts_with_many_unknown_words_is_cut() -> None:
    [note] = check_prompts(words_pipeline(), [" ".join(f"antt{i}" for i in range(40))])["notes"]
    assert len(note) == MAX_NOTE + 3


def test_check_of_the_studio_loads_the_model_and_refuses_long_prompts(studio: Studio, worded: str) -> None:
    assert studio.check(worded, ["antt bee"])["notes"] == ["unknown words: antt (ant?); left out"]
    with pytest.raises(ValueError, match="expected at most 300"):
        studio.check(worded, ["x" * 301])


def test_unlogged_prompts_leaves_the_log_to_others(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("mar.data")
    with unlogged_prompts():
        logger.warning("inside")
    logger.warning("outside")
    assert caplog.messages == ["outside"]


@pytest.mark.parametrize(
    ("bundled", "expected"),
    [(("fashion",), ["fashion"]), (("fashion", "emoji"), ["emoji", "fashion"]), (("a", "emoji"), ["emoji", "a"])],
)
def test_bundled_models_begin_with_emoji(
    bundled: tuple[str, ...], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mar.zoo.BUNDLED", bundled)
    assert list(server._bundled()) == expected
