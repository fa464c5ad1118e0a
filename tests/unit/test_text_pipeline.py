"""A model that draws by a text encoder: padding, null captions, guidance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoders import KINDS, save_encoder
from tiny import FAST, randomize, tiny_config

from mar.data.text_encoder import TextReader
from mar.model.conditions import NO_CONDITION
from mar.model.mar import MAR
from mar.pipeline import Pipeline
from mar.tokenizer import PixelTokenizer

SHORT, LONG = "a red cat", "the cat on the mat and a blue bar down across"


def text_pipeline(encoder: Path, buffer_size: int = 12) -> Pipeline:
    """A model of grey pictures of 4x4 pixels that reads captions by an encoder."""
    reader = TextReader.of(str(encoder), buffer_size)
    config = tiny_config(channels=1, classes=0, text_width=reader.info.width, buffer_size=buffer_size)
    return Pipeline(randomize(MAR(config)), PixelTokenizer(1, mean=-0.4, std=0.5), captions=reader, sampling=FAST)


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return text_pipeline(save_encoder(tmp_path_factory.mktemp("encoder"), request.param))


def draw(pipeline: Pipeline, prompts: list[str | None], **settings: float) -> torch.Tensor:
    return pipeline.sample(prompts=prompts, seeds=[3] * len(prompts), output="tensor", **settings)  # type: ignore[call-overload]


def test_pipeline_longer_prompts_beside_it_leave_a_picture_alone(pipeline: Pipeline) -> None:
    alone = draw(pipeline, [SHORT])
    together = draw(pipeline, [SHORT, LONG])
    assert torch.allclose(alone[0], together[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_text_condition_padding_is_not_read(pipeline: Pipeline) -> None:
    assert pipeline.captions is not None
    rows = pipeline.captions.embed([SHORT])
    there = rows[..., -1] > 0
    other = torch.where(there.unsqueeze(2), rows, 7.0)
    other[..., -1] = rows[..., -1]
    embed = pipeline.model.text_embed
    assert torch.equal(embed(rows), embed(other))
    assert torch.equal(embed(rows[:, : int(there.sum())]), embed(rows))  # a batch that is padded less


def test_pipeline_null_prompts_are_unconditional(pipeline: Pipeline) -> None:
    empty, none, blank = draw(pipeline, ["", None, "  "])
    assert torch.equal(empty, none)
    assert torch.equal(empty, blank)
    assert not torch.allclose(empty, draw(pipeline, [SHORT])[0], atol=1e-2)
    # guidance has nothing to go away from
    assert torch.allclose(draw(pipeline, [None], guidance_scale=4.0)[0], none, atol=1e-4)


def test_pipeline_guidance_changes_pictures_of_prompts(pipeline: Pipeline) -> None:
    plain, guided = (draw(pipeline, [SHORT], guidance_scale=scale) for scale in (1.0, 4.0))
    assert not torch.allclose(plain, guided, atol=1e-2)


def test_text_model_condition_dropped_equals_none(pipeline: Pipeline) -> None:
    assert pipeline.captions is not None
    rows = pipeline.captions.embed(["", SHORT])
    assert (rows[0] == NO_CONDITION).all()
    assert not (rows[1] == NO_CONDITION).all()
