"""`mar generate` by two processes: the same pictures as by one, one voice, and no process that waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import processes
import pytest
import tiny
import torch.distributed as dist

from mar.cli import main

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    tiny.tiny_pipeline().save(path)
    return path


def command(model: Path, out: Path, *more: str) -> list[str]:
    plan = ["--count", "11", "--batch", "2", "--device", "cpu", "--allow-broken"]
    return ["generate", str(model), "--out", str(out), *plan, *more]


def last_line(path: Path) -> str:
    """On a busy machine there may be lines of progress before it."""
    return path.read_text().splitlines()[-1]


def pictures(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return file["arr_0"].astype(int)


def test_generate_two_processes_draw_the_same(model: Path, tmp_path: Path) -> None:
    """Started by torchrun, as people do."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mar"]
    done = subprocess.run(
        [*torchrun, *command(model, tmp_path / "two.npz")], capture_output=True, text=True, check=False, timeout=300,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"11 pictures in {tmp_path / 'two.npz'}"
    assert done.stdout.count("\n") == 2  # one process speaks
    assert "by 2 processes on cpu" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.npz", "two.npz.json"]
    for batch in ("1", "64"):
        assert main(command(model, tmp_path / f"{batch}.npz", "--batch", batch)) == 0
        assert np.abs(pictures(tmp_path / "two.npz") - pictures(tmp_path / f"{batch}.npz")).max() <= 1
    assert main(command(model, tmp_path / "one.npz")) == 0
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_generate_prompts_by_two_processes_are_one_voice(tmp_path: Path) -> None:
    model = tmp_path / "words.safetensors"
    tiny.tiny_words_pipeline().save(model)
    prompts = ["--prompt", "a rod cat", "dog", "none"]
    assert processes.run_group(2, command(model, tmp_path / "two", *prompts), tmp_path / "said") == [0, 0]
    assert [path.read_text().count("unknown words: rod") for path in sorted(tmp_path.glob("said.*"))] == [1, 0]
    assert main(command(model, tmp_path / "one", *prompts)) == 0
    assert processes.read_tree(tmp_path / "two") == processes.read_tree(tmp_path / "one")
    assert (tmp_path / "one/metadata.jsonl").read_text().count("a rod cat") == 4


def test_generate_more_processes_than_units_and_resume(model: Path, tmp_path: Path) -> None:
    arguments = command(model, tmp_path / "out", "--format", "webdataset", "--batch", "6")
    assert processes.run_group(3, arguments, tmp_path / "said") == [0, 0, 0]  # two units: one has nothing to do
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        assert len(tar.getnames()) == 22
    assert processes.run_group(2, arguments, tmp_path / "again") == [0, 0]
    assert [path.read_text().count("is finished") for path in sorted(tmp_path.glob("again.*"))] == [1, 0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--labels", "wolf"], "'wolf' is not a class"),
        (["--device", "tpu"], "'tpu'"),
        (["--out", "."], "not from a run"),
    ],
    ids=["label", "device", "out"],
)
def test_error_on_all_ranks_is_printed_once(options: list[str], words: str, model: Path, tmp_path: Path) -> None:
    if "--out" in options:
        options = ["--out", str(model.parent)]
    assert processes.run_group(2, [*command(model, tmp_path / "out"), *options], tmp_path / "said") == [2, 2]
    first, second = ((tmp_path / f"said.{rank}").read_text() for rank in (0, 1))
    assert words in first
    assert (first.count("\n"), second) == (1, "")
    assert not (tmp_path / "out").exists()


def test_generate_failed_rank_ends_the_others_and_resumes(model: Path, tmp_path: Path) -> None:
    port = processes.free_port()
    arguments = command(model, tmp_path / "out.npz")
    failing = processes.start_process(arguments, tmp_path / "said.1", die=(3, signal.SIGTERM), world=(1, 2, port))
    left = processes.start_process(arguments, tmp_path / "said.0", world=(0, 2, port))
    for process in (failing, left):
        process.join(120)
    assert (failing.exitcode, left.exitcode) == (130, 2)
    assert last_line(tmp_path / "said.0") == "mar: rank 0 stops, since rank 1 has ended"
    assert not (tmp_path / "out.npz").exists()
    assert main(arguments) == 0
    assert main(command(model, tmp_path / "one.npz")) == 0
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "out.npz").read_bytes()


def test_generate_waiting_rank_stops_on_a_signal(model: Path, tmp_path: Path) -> None:
    """It waits for one that never comes to the end of its share."""
    port = processes.free_port()
    arguments = command(model, tmp_path / "out.npz")
    asleep = processes.start_process(arguments, tmp_path / "said.1", die=(1, signal.SIGSTOP), world=(1, 2, port))
    waiting = processes.start_process(arguments, tmp_path / "said.0", world=(0, 2, port))
    try:
        for _ in range(600):
            if len(list((tmp_path / "out.npz.parts").glob("0*.npy"))) == 3:  # all of its share
                break
            time.sleep(0.1)
        time.sleep(0.3)
        assert waiting.is_alive()
        waiting.terminate()
        waiting.join(60)
        assert waiting.exitcode == 130
        assert last_line(tmp_path / "said.0") == "mar: stopped; the same command goes on"
    finally:
        asleep.kill()
        asleep.join(60)
