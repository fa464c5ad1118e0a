"""`mar verify`: what is whole, what is damaged, what has no checksums."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from mar.checkpoint.checksums import CHECKSUMS
from mar.checkpoint.run_state import RunState
from mar.cli import main
from mar.evaluation.statistics import FeatureStats


def flip(path: Path, place: int = -3) -> None:
    """Flip a bit."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder of two states and a model."""
    folder = tmp_path / "run"
    for images in (1, 2):
        RunState(folder).save(images, {"w": torch.arange(100.0), "images": images})
    tiny.tiny_pipeline().save(folder / "model.safetensors")
    return folder


def test_verify_of_a_whole_run_names_its_parts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    parts = ("state-000000000001", "state-000000000002", "model.safetensors")
    assert capsys.readouterr().out == "".join(f"{run / part} is as it was written\n" for part in parts)


def test_verify_of_damage_names_the_files_and_fails(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((run / "state-000000000002").glob("*.distcp"))
    flip(shard, 1000)
    flip(run / "model.safetensors")
    assert main(["verify", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{run / 'state-000000000001'} is as it was written\n"
    first, second = err.splitlines()
    assert first == f"mar: {shard} is damaged: its bytes are not those that were written"
    assert second.startswith(f"mar: {run / 'model.safetensors'} is damaged")


def test_verify_without_checksums_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "state-000000000001" / CHECKSUMS).unlink()
    assert main(["verify", str(run)]) == 0
    assert f"{run / 'state-000000000001'} opens; it has no checksums" in capsys.readouterr().out


def test_verify_of_statistics_and_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.npz"
    FeatureStats(torch.zeros(3).double(), torch.eye(3).double(), 5).save(path)
    assert main(["verify", str(path)]) == 0
    flip(path, 300)
    assert main(["verify", str(path)]) == 2
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path / "empty")]) == 2
    assert main(["verify"]) == 2
    out, err = capsys.readouterr()
    assert out == f"{path} is as it was written\n"
    assert len(err.splitlines()) == 4
