"""What is saved comes back bitwise: weights, statistics, and all that the header says."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from mar.config import SamplingConfig
from mar.pipeline import Pipeline
from mar.tokenizer import PixelTokenizer

STATISTIC = st.floats(-3, 3, width=32)
SPREAD = st.floats(0.125, 3, width=32)


@st.composite
def parts(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the parts of a pipeline. The test builds it: shape checks use randomness, strategies must not."""
    channels, classes = draw(st.sampled_from([1, 3])), draw(st.sampled_from([0, 1, 4]))
    patch = draw(st.sampled_from([1, 2]))
    grid = (patch * draw(st.integers(1, 3)), patch * draw(st.integers(1, 3)))
    many = channels if draw(st.booleans()) else 1
    return {
        "seed": draw(st.integers(0, 9)),
        "model": {"channels": channels, "classes": classes, "patch": patch, "grid": grid},
        "statistics": [draw(st.lists(kind, min_size=many, max_size=many)) for kind in (STATISTIC, SPREAD)],
        "classes": tuple(draw(st.text()) for _ in range(classes)),
        "sampling": (draw(st.integers(1, 9)), 5, 1.0, "linear", 1.0, draw(st.none() | st.floats(0.5, 5))),
        "weights": draw(st.sampled_from(["ema", "raw"])),
        "notes": {"data": draw(st.text()), "images": draw(st.integers(0, 10**12))},
    }


def made(of: dict[str, Any]) -> Pipeline:
    return Pipeline(
        tiny_model(of["seed"], **of["model"]),
        PixelTokenizer(of["model"]["channels"], *of["statistics"]),
        classes=of["classes"],
        sampling=SamplingConfig(*of["sampling"]),
        weights=of["weights"],
        notes=of["notes"],
    )


@settings(max_examples=10)
@given(of=parts())
def test_pipeline_saved_and_opened_is_equal(of: dict[str, Any]) -> None:
    before = made(of)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        before.save(path)
        after = Pipeline.open(path)
    assert after.model.config == before.model.config
    for name in ("classes", "sampling", "weights", "notes"):
        assert getattr(after, name) == getattr(before, name)
    assert after.tokenizer.config() == before.tokenizer.config()
    for ours, theirs in ((after.model, before.model), (after.tokenizer, before.tokenizer)):
        one, other = ours.state_dict(), theirs.state_dict()
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
        assert not ours.training


@settings(max_examples=3)
@given(of=parts())
def test_pipeline_loaded_draws_the_same_images(of: dict[str, Any]) -> None:
    before = made(of)
    with tempfile.TemporaryDirectory() as folder:
        before.save_pretrained(folder)
        after = Pipeline.from_pretrained(folder)
    drawn = [p.sample([None, None], allow_broken=True, output="tensor", diffusion_steps=3) for p in (before, after)]
    assert torch.equal(*drawn)
