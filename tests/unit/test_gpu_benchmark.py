"""What `benchmarks/gpu.py` does without a GPU: every step is rehearsed, and what fails or hangs is noted."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


def rehearse(out: Path, *arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--rehearse", "--strict", "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "gpu.log").read_text(encoding="utf-8")[-3000:]
    return json.loads((out / "gpu.json").read_text(encoding="utf-8"))


def test_gpu_benchmark_rehearses_every_step(gpu: ModuleType, tmp_path: Path) -> None:
    report = rehearse(tmp_path, "--fork")
    names = [name for name in gpu.steps() if name != "train"]
    assert [*report["steps"]] == names
    assert "no figure says anything about speed" in report["kind"]
    assert all(record["status"] == "done" and record["results"] for record in report["steps"].values())
    assert not any("failed" in str(record["results"]) for record in report["steps"].values())
    results = {name: value for record in report["steps"].values() for name, value in record["results"].items()}
    assert results["ddp, most relative difference"] == results["fsdp, most relative difference"] == 0
    assert results["resumed against in one go, fp32, most difference of a weight"] == 0
    assert results["fashion, device against CPU, of [-1, 1]"] == {"mean": 0, "most": 0}
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert all(f"| {name} | | done, " in table for name in names)


def test_gpu_benchmark_trains_a_recipe_for_its_minutes(tmp_path: Path) -> None:
    changes = ("--set", "batch=8")
    report = rehearse(tmp_path, "--train", "fashion", "--minutes", "0.02", "--precision", "fp32", *changes)
    found = report["steps"]["train"]["results"]
    assert found["trained"]["images"] == found["images"] >= 32
    assert found["images"] % 8 == 0
    assert found["a sample of the export"] in ("drawn",) or "broken" in found["a sample of the export"]
    assert (tmp_path / "train-fashion" / "model.safetensors").is_file()
    settings = json.loads((tmp_path / "train-fashion" / "run.json").read_text(encoding="utf-8"))
    assert (settings["batch"], settings["precision"], settings["images"]) == (8, "fp32", found["images"])


def test_gpu_benchmark_step_that_hangs_is_stopped_and_its_results_are_kept(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time\nprint('RESULT {\"first\": 1.5}', flush=True)\ntime.sleep(600)\n", encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(script))
    options = argparse.Namespace(out=tmp_path, device="cpu", rehearse=True, train=None, fork=False)
    record = gpu.start_step(options, "graphs", 3.0)
    assert record["status"] == "stopped at 3 s"
    assert record["results"] == {"first": 1.5}
    assert record["seconds"] < 30
    gpu.write_report({"graphs": record}, options)
    assert "| | first | 1.5 |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_gpu_benchmark_forked_step_that_hangs_is_stopped(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(options: argparse.Namespace) -> int:
        print('RESULT {"first": 1.5}', flush=True)
        time.sleep(600)
        return 0

    monkeypatch.setattr(gpu, "run_step", hang)
    options = argparse.Namespace(out=tmp_path, device="cpu", rehearse=True, train=None, fork=True)
    record = gpu.start_step(options, "graphs", 1.0)
    assert (record["status"], record["results"]) == ("stopped at 1 s", {"first": 1.5})


def test_gpu_benchmark_second_call_runs_what_was_not_done(gpu: ModuleType, tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path, rehearse=True)
    done = {"status": "done", "seconds": 1.0, "results": {"kept": 7}}
    names = [name for name in gpu.steps() if name != "train"]
    failed = {"status": "failed", "seconds": 1.0, "results": {}, "why": "Error: it | broke"}
    gpu.write_report({name: failed if name == "machine" else done for name in names}, options)
    report = rehearse(tmp_path, "--left-out", "--fork")
    assert report["steps"]["machine"]["status"] == "done"
    assert "torch" in report["steps"]["machine"]["results"]
    assert all(report["steps"][name] == done for name in names if name != "machine")


def test_gpu_benchmark_without_time_leaves_steps_out(gpu: ModuleType, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--rehearse", "--budget", "1", "--out", str(tmp_path)]
    assert subprocess.run(command, env=environment, timeout=300, stdout=subprocess.DEVNULL).returncode == 0
    report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["steps"]
    assert {record["status"] for record in report.values()} == {"left out"}


def test_gpu_benchmark_without_cuda_says_how_to_rehearse(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "has_cuda", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "--rehearse" in capsys.readouterr().err


def test_gpu_benchmark_device_is_cuda_where_there_is_one(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "has_cuda", lambda: True)
    assert gpu.device_name("auto", rehearse=False) == "cuda"
    assert gpu.device_name("auto", rehearse=True) == "cpu"
    assert gpu.device_name("cuda:1", rehearse=True) == "cuda:1"


def test_gpu_benchmark_of_unknown_step_names_the_known_ones(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "graphics"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "got graphics, expected some of machine, tests, parity" in capsys.readouterr().err
