"""Files and command lines of version 0.1 do what they did: the same pictures, losses and numbers.

`replay.py` uses the files; what version 0.1 made of them is in fixtures/v0_1. Other processors round differently, so
that numbers are compared closely, and with MAR_COMPAT_BITWISE=1 bit by bit: for the machine that made the fixtures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compat import replay

from mar.config import SamplingConfig, later_defaults, rename_old_keys

BITWISE = os.environ.get("MAR_COMPAT_BITWISE") == "1"


@cache
def expected() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Outcomes by the name of their replay, and arrays by their path."""
    outcomes = json.loads((replay.FIXTURES / "expected.json").read_text(encoding="utf-8"))
    with np.load(replay.FIXTURES / "expected.npz") as held:
        return outcomes, {name: held[name] for name in held.files}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are split between threads, and come out otherwise by another number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("untyped", "one_thread")
@pytest.mark.parametrize("name", replay.REPLAYS)
def test_replay_of_v0_1_gives_recorded_outcome(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, arrays = expected()
    replay.copy_fixtures(tmp_path)
    monkeypatch.chdir(tmp_path)
    outcome = replay.REPLAYS[name]()
    require_same(outcome, outcomes[name], arrays, name)
    recorded = {path for path in arrays if path.startswith(f"{name}/")}
    assert recorded == set(paths(outcome, name)), "as many arrays as were recorded"


def paths(value: Any, name: str) -> list[str]:
    """The paths of all arrays."""
    if isinstance(value, dict):
        return [path for key, inner in value.items() for path in paths(inner, f"{name}/{key}")]
    return [name] if isinstance(value, np.ndarray) else []


def require_same(got: Any, wanted: Any, arrays: dict[str, np.ndarray], where: str) -> None:
    """Compares an outcome with the recorded one: floats and pictures closely or bit by bit, all else exactly."""
    if isinstance(got, np.ndarray):
        require_same_array(got, arrays[where], where)
    elif isinstance(got, dict):
        assert isinstance(wanted, dict), where
        if "guidance_scale" in got:  # what a PNG says of its sampling: under the names of today
            wanted = later_defaults(SamplingConfig) | json.loads(json.dumps(rename_old_keys(SamplingConfig, wanted)))
        assert {key for key in got if not isinstance(got[key], np.ndarray)} == wanted.keys(), where
        for key, value in got.items():
            if BITWISE or not str(key).startswith("bits."):
                require_same(value, wanted.get(key), arrays, f"{where}/{key}")
    elif isinstance(got, list | tuple):
        assert len(got) == len(wanted), where
        for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
            require_same(one, other, arrays, f"{where}/{number}")
    elif isinstance(got, float) and isinstance(wanted, float) and not BITWISE:
        # a pixel that is rounded otherwise moves a distance
        tolerance = 1e-3 if "/drawn/" in where else 1e-5
        assert got == pytest.approx(wanted, rel=tolerance, abs=1e-7), where
    else:
        assert (type(got), got) == (type(wanted), wanted), where


def require_same_array(got: np.ndarray, wanted: np.ndarray, where: str) -> None:
    """Pictures: at most one level of 255 in under 1% of the pixels; floats as single ones."""
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), where
    if BITWISE or got.dtype.kind not in "uf":
        assert got.tobytes() == wanted.tobytes(), where
    elif got.dtype == np.uint8:
        difference = np.abs(got.astype(int) - wanted.astype(int))
        assert difference.max() <= 1, where
        assert (difference > 0).mean() < 0.01, where
    else:
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6, err_msg=where)
