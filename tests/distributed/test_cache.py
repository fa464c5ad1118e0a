"""`mar cache` by several processes: the bytes that one makes, and nothing lost where one is killed."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from mar.checkpoint.tokenizers import save_tokenizer
from mar.cli import main
from mar.tokenizer.kl import from_config

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

AUTOENCODER = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    generator = np.random.default_rng(0)
    for i in range(18):
        path = folder / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16 + i, 3), dtype=np.uint8)).save(path)
    (folder / "pictures" / "a" / "6.png").write_bytes(b"no picture")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_tokenizer(from_config(AUTOENCODER), folder / "kl")
    return folder


def command(home: Path, out: Path, *more: str, tokenizer: str | None = None) -> list[str]:
    settings = ["--tokenizer", tokenizer or str(home / "kl"), "--image-size", "16", "--shard", "4", "--batch", "3"]
    return ["cache", str(home / "pictures"), "--out", str(out), *settings, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def one(home: Path) -> dict[str, bytes]:
    """What one process makes of pixels."""
    assert main(command(home, home / "one", tokenizer="pixels")) == 0
    return processes.read_tree(home / "one")


def test_cache_of_two_processes_has_the_same_bytes(home: Path, tmp_path: Path) -> None:
    """By an autoencoder, five shards of which the last is not full, with any number of threads; one process speaks."""
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert main(command(home, tmp_path / f"alone-{threads}")) == 0
        assert torch.get_num_threads() == threads  # as it was
    torch.set_num_threads(before)
    assert processes.read_tree(tmp_path / "alone-1") == processes.read_tree(tmp_path / "alone-3")
    assert processes.run_group(2, command(home, tmp_path / "two"), tmp_path / "said") == [0, 0]
    assert processes.read_tree(tmp_path / "two") == processes.read_tree(tmp_path / "alone-1")
    first, second = ((tmp_path / f"said.{rank}").read_text() for rank in (0, 1))
    assert "17 pictures in" in first
    assert "1 pictures could not be read" in first
    assert "pictures" not in second
    assert main(["cache", "--verify", str(tmp_path / "two")]) == 0


def test_cache_resumed_by_other_process_count(home: Path, one: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command(home, out, tokenizer="pixels")
    assert processes.run_to_end(arguments, tmp_path / "said", die=(5, signal.SIGKILL)) == -signal.SIGKILL
    there = {name for name in processes.read_tree(out) if name.startswith("0")}
    assert len(there) == 1
    when = (out / min(there)).stat().st_mtime_ns
    assert processes.run_group(3, arguments, tmp_path / "again") == [0, 0, 0]
    assert (out / min(there)).stat().st_mtime_ns == when  # what was there is not made again
    assert processes.read_tree(out) == one


def test_cache_killed_rank_resumes(home: Path, one: dict[str, bytes], tmp_path: Path) -> None:
    """The other one makes its share and waits, until torchrun ends it."""
    port = processes.free_port()
    arguments = command(home, tmp_path / "out", tokenizer="pixels")
    killed = processes.start_process(arguments, tmp_path / "said.1", die=(3, signal.SIGKILL), world=(1, 2, port))
    left = processes.start_process(arguments, tmp_path / "said.0", world=(0, 2, port))
    killed.join(120)
    left.terminate()
    left.join(120)
    assert (killed.exitcode, left.exitcode) == (-signal.SIGKILL, 130)
    assert main(["cache", "--verify", str(tmp_path / "out")]) == 2
    assert main(arguments) == 0
    assert processes.read_tree(tmp_path / "out") == one


def test_cache_error_on_all_ranks_is_printed_once(home: Path, tmp_path: Path) -> None:
    arguments = command(home, tmp_path / "out", "--image-size", "0", tokenizer="pixels")
    assert processes.run_group(2, arguments, tmp_path / "said") == [2, 2]
    first, second = ((tmp_path / f"said.{rank}").read_text() for rank in (0, 1))
    assert "image-size: got 0x0" in first
    assert (first.count("\n"), second) == (1, "")
    assert not (tmp_path / "out").exists()
