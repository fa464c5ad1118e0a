"""`mar train --patience`: a run whose held-out pictures gain nothing ends, for two processes as for one."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest
import torch.distributed as dist
from tiny import write_images

from mar import zoo
from mar.cli import main
from mar.training.early_stopping import BEST_FILE, HISTORY_FILE

SMALL = ["--model.encoder.width", "16", "--model.encoder.num-heads", "2", "--model.encoder.depth", "1"]
SMALL += ["--model.decoder.width", "16", "--model.decoder.num-heads", "2", "--model.decoder.depth", "1"]
SMALL += ["--model.head.width", "16", "--model.head.depth", "1", "--device", "cpu"]
STILL = ["--lr", "1e-30", "--weight-decay", "0", "--ema", "0", "--optimizer", "adamw"]
"""Nothing is learned, so that the loss stays the same to the bit."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pictures")


def command(data: Path, out: Path, *more: str) -> list[str]:
    short = ["--images", "2400", "--batch", "4", "--sample-every", "0", "--validate-every", "8", "--patience", "2"]
    return ["train", "folder", "--data", str(data), "--out", str(out), *SMALL, *STILL, *short, *more]


def test_patience_ends_a_run_and_reports_it(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    for number in (1, 2):
        assert main(command(data, out, "--hold-out", "5")) == 0
        said = capsys.readouterr()
        (line,) = [line for line in said.err.splitlines() if "the run ends" in line]
        assert "not fallen for 2 validations" in line
        assert f"was at image 8, whose weights are {out / BEST_FILE}" in line
        assert "memorize them" not in said.err
        assert "draw: mar sample" in said.out
        assert said.err.count("held-out pictures)") == (3 if number == 1 else 0)
    assert (out / "state-000000000024").is_dir()
    assert zoo.load(str(out / "model.safetensors")).notes["images"] == 24
    assert main(command(data, out, "--hold-out", "5", "--patience", "3")) == 0
    assert (out / "state-000000000032").is_dir()


def test_patience_without_held_out_images_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before a tokenizer is trained."""
    for tokenizer in ([], ["--tokenizer", "own"]):
        assert main(command(data, tmp_path / "run", *tokenizer)) == 2
        said = capsys.readouterr()
        assert said.err.startswith("mar: --patience is 2, but there are no held-out pictures")
        assert said.err.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_few_images_warn_once(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    often = command(data, tmp_path / "run", "--batch", "400", "--patience", "0", "--validate-every", "0")
    for count in (1, 0):
        assert main(often) == 0
        said = capsys.readouterr().err
        assert said.count("warning: 20 pictures will be seen 120 times each") == count


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_patience_two_ranks_end_together(data: Path, tmp_path: Path, strategy: str) -> None:
    out = tmp_path / "run"
    arguments = command(data, out, "--hold-out", "5", "--strategy", strategy)
    codes = processes.run_group(2, arguments, tmp_path / "said")
    first, second = ((tmp_path / f"said.{rank}").read_text() for rank in (0, 1))
    assert codes == [0, 0], first + second
    assert (first.count("the run ends"), second.count("the run ends")) == (1, 0)
    assert list(json.loads((out / HISTORY_FILE).read_text())["losses"]) == ["8", "16", "24"]
    assert zoo.load(str(out / BEST_FILE)).notes["images"] == 8
    assert (out / "state-000000000024").is_dir()
