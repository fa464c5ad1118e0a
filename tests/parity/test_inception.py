"""FID, Inception Score, KID, precision and recall against torch-fidelity's and torchmetrics' numbers.

The golden files are made by tools/record_fid_golden.py where both are installed; see golden/inception/README.md.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from parity.support import GOLDEN, golden

from mar.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from mar.evaluation.statistics import Moments

FOLDER = GOLDEN / "inception"
FEATURES = "features.safetensors"


def recorded(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def ours() -> dict[str, float]:
    tensors = golden("inception/features")
    fake, real = tensors["fake"], tensors["real"]
    moments = [Moments(fake.shape[1]) for _ in range(2)]
    for part, rows in zip(moments, (fake, real), strict=True):
        for batch in rows.split(77):
            part.update(batch)
    precision, recall = precision_recall(real, fake)
    return {
        "fid": frechet_distance(*moments),
        "kid": kernel_distance(real, fake, 1, len(fake), 0)[0],
        "is": inception_score(tensors["logits"], 1)[0],
        "precision": precision,
        "recall": recall,
    }


@pytest.mark.parametrize("tool", ["torch-fidelity", "torchmetrics"])
def test_metrics_of_recorded_features_match(tool: str) -> None:
    theirs, found = recorded("small.json")[FEATURES][tool], ours()
    assert set(theirs) >= {"fid", "kid", "is"}
    for name, value in theirs.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=0), name


def test_golden_features_are_no_degenerate_case() -> None:
    tensors = golden("inception/features")
    for side in (tensors["fake"], tensors["real"]):
        assert torch.linalg.matrix_rank(torch.cov(side.double().T)) == side.shape[1] < len(side)
    assert 1.05 < ours()["is"] < tensors["logits"].shape[1]


@pytest.mark.parametrize(("file", "runs"), [("small.json", 2)])
def test_metrics_of_images_match_the_recording(file: str, runs: int) -> None:
    whole = {name: tools for name, tools in recorded(file).items() if name[0].isdigit()}
    assert len(whole) == runs
    for name, tools in whole.items():
        for tool in ("torch-fidelity", "torchmetrics"):
            for metric, value in tools[tool].items():
                assert tools["mar"][metric] == pytest.approx(value, rel=1e-4, abs=0), (name, tool, metric)
