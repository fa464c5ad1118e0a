"""Training runs killed at seeded moments, or while they save, end as one that was never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import processes
import torch
from safetensors.torch import load_file
from tiny import write_images

KILLS = int(os.environ.get("MAR_KILLS", "4"))
"""At random moments, and as many while a state is being written."""
KEPT = ("images", "step", "loss", "gradient_norm", "lr", "skipped_steps")

MODEL = ["--model.encoder.width", "16", "--model.encoder.num-heads", "2", "--model.encoder.depth", "1"]
MODEL += ["--model.decoder.width", "16", "--model.decoder.num-heads", "2", "--model.decoder.depth", "1"]
MODEL += ["--model.head.width", "16", "--model.head.depth", "1", "--model.classes", "2", "--model.grid", "8", "8"]
MODEL += ["--model.projection-dropout", "0.1"]


def command(data: Path, out: Path, images: int) -> list[str]:
    settings = ["--images", str(images), "--batch", "4", "--save-every", "40", "--log-every", "1", "--device", "cpu"]
    return ["train", "fashion", "--data", str(data), "--out", str(out), *MODEL, *settings, "--sample-every", "0"]


def log(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in KEPT} for line in lines if "loss" in line]


def test_run_killed_repeatedly_ends_bitwise_the_same(tmp_path: Path) -> None:
    data, said, draws = write_images(tmp_path / "pictures"), tmp_path / "said", random.Random(0)
    images = 4 * (80 + 60 * KILLS)
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    assert processes.run_to_end(command(data, quiet, images), said) == 0, said.read_text()
    for _ in range(KILLS):
        process = processes.start_process(command(data, killed, images), said)
        while not (killed / "log.jsonl").is_file() and process.is_alive():
            time.sleep(0.01)
        time.sleep(draws.uniform(0.05, 0.6))
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join(120)
        # and once while it saves: at the n-th time that something is to be on the disk
        code = processes.run_to_end(command(data, killed, images), said, die=(draws.randint(1, 8), signal.SIGKILL))
        assert code in (-signal.SIGKILL, 0), said.read_text()
    assert processes.run_to_end(command(data, killed, images), said) == 0, said.read_text()
    assert log(killed) == log(quiet)
    assert len(log(quiet)) == images // 4
    for name in ("model.safetensors", "model-raw.safetensors"):
        ours, theirs = load_file(killed / name), load_file(quiet / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
