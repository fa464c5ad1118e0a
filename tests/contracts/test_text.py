"""`mar train folder` on captioned pictures: a model that draws from their words, and may be stopped anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mar.cli import main
from mar.cli.train_folder import plan_folder
from mar.data.images import Transform
from mar.data.latent_cache import LatentSource
from mar.data.loader import batches
from mar.data.sources import open_source
from mar.pipeline import Pipeline

SMALL = ["--model.encoder.width", "16", "--model.encoder.num-heads", "2", "--model.encoder.depth", "1"]
SMALL += ["--model.decoder.width", "16", "--model.decoder.num-heads", "2", "--model.decoder.depth", "1"]
SMALL += ["--model.head.width", "16", "--model.head.depth", "1", "--sampling.steps", "2"]
SMALL += ["--sampling.diffusion-steps", "2", "--sampling.x0-bound", "1", "--device", "cpu"]
COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Eighteen pictures of 16x16 with captions such as "a red square"; one has none, one has two."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number in range(18):
        name = list(COLORS)[number % 3]
        Image.new("RGB", (16, 16), tuple(value - number for value in COLORS[name])).save(folder / f"{number}.png")
        if number:
            rows.append({"file_name": f"{number}.png", "text": f"a {name} square"})
    rows.append({"file_name": "1.png", "text": "a green picture"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def command(data: Path, out: Path, *more: str) -> list[str]:
    short = ["--images", "24", "--batch", "6", "--save-every", "6", "--sample-every", "12", "--log-every", "1"]
    return ["train", "folder", "--data", str(data), "--out", str(out), *SMALL, *short, *more]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(Pipeline.open(path).model.state_dict())


def test_captioned_folder_trains_a_model_of_words(captioned: Path, tmp_path: Path) -> None:
    plan, options = plan_folder(["--data", str(captioned), "--out", str(tmp_path / "run")])
    assert "with captions of 6 different words" in plan.lines[0]
    assert (options.config.text, options.config.model.condition, options.config.model.words) == ("words", "words", 6)
    assert options.config.sampling.guidance_scale == 1.5
    assert main(command(captioned, tmp_path / "run")) == 0
    model = Pipeline.open(tmp_path / "run/model.safetensors")
    assert model.captions is not None
    assert model.captions.header()["words"][:3] == ["a", "square", "green"]
    assert len(model.examples) == 8
    assert model.examples[0] in {"a green square", "a blue square"}
    red, same, blue = model.sample(prompts=["a red square", "red", None], seeds=[0, 0, 0], output="tensor")
    assert not torch.equal(red, blue)
    assert not torch.equal(red, same)
    assert main(["sample", str(tmp_path / "run"), "--prompt", "blue square", "", "--out", str(tmp_path / "out")]) == 0
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png"}
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_captioned_folder_stopped_and_continued_is_bitwise_the_same(captioned: Path, tmp_path: Path) -> None:
    assert main(command(captioned, tmp_path / "parts", "--images", "12", "--decay", "0")) == 0
    for name in ("parts", "whole"):
        assert main(command(captioned, tmp_path / name, "--decay", "0")) == 0
    parts, whole = tensors(tmp_path / "parts/model.safetensors"), tensors(tmp_path / "whole/model.safetensors")
    assert parts.keys() == whole.keys()
    assert "words_embed.words.weight" in parts
    assert all(torch.equal(parts[name], whole[name]) for name in parts)


def test_captioned_folder_is_mirrored_only_without_its_captions(captioned: Path, tmp_path: Path) -> None:
    by_default, given, without = (
        plan_folder(["--data", str(captioned), "--out", str(tmp_path / "run"), *more])[1].config
        for more in ([], ["--flip", "True"], ["--text", ""])
    )
    assert [config.flip_of_data for config in (by_default, given, without)] == [False, True, None]
    assert open_source(captioned).flips
    own = ["--data", str(captioned), "--out", str(tmp_path / "run"), "--tokenizer", "own"]
    plan, _ = plan_folder(own)
    assert plan.tokenizer is not None
    assert plan.cache is not None
    assert (plan.tokenizer.config.flip, plan.cache.flip) == (False, False)


def test_captioned_folder_without_text_has_no_condition(captioned: Path, tmp_path: Path) -> None:
    _, options = plan_folder(["--data", str(captioned), "--out", str(tmp_path / "run"), "--text", ""])
    assert (options.config.text, options.config.model.condition) == ("", "none")


def test_captioned_folder_other_words_are_refused(
    captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(captioned, tmp_path / "run", "--images", "12")) == 0
    note = tmp_path / "run/captions.json"
    note.write_text(json.dumps({"kind": "words", "words": ["a"]}))
    assert main(command(captioned, tmp_path / "run")) == 2
    assert "the model has 6 words, but the captions 1" in capsys.readouterr().err


def test_recipe_with_text_reads_captions(captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model.grid", "16", "16", "--model.channels", "3"]
    run = ["train", "fashion", "--data", str(captioned), "--text", "words", "--out", str(tmp_path / "run"), *SMALL]
    assert main([*run, *small, "--images", "12", "--batch", "6", "--sample-every", "0", "--model.classes", "0"]) == 0
    assert Pipeline.open(tmp_path / "run/model.safetensors").model.config.words == 6
    (captioned / "metadata.jsonl").unlink()
    assert main([*run[: -len(SMALL)], "--out", str(tmp_path / "none")]) == 2
    assert "has no captions" in capsys.readouterr().err


def test_cached_latents_keep_captions(captioned: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    cache = [
        "cache",
        str(captioned),
        "--out",
        str(out),
        "--tokenizer",
        "pixels",
        "--image-size",
        "16",
        "--device",
        "cpu",
    ]
    assert main(cache) == 0
    source, cached = open_source(captioned), LatentSource(out)
    assert tuple(cached.captions) == tuple(source.captions)  # type: ignore[attr-defined]
    part = cached.subset(torch.tensor([3, 1]).numpy())
    assert part.captions == (("a red square",), ("a green square", "a green picture"))
    given = [next(batches(each, Transform(16, 3), batch=18, seed=4)) for each in (source, cached)]
    assert given[0].captions == given[1].captions
    assert given[0].captions.count("") == 1
    assert {"a green square", "a green picture"} & {*given[0].captions}
