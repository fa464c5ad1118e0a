"""A rank that waits for pictures ends when it is told to, and the others with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import processes
from readers import Stuck
from tiny import open_tiny_run, tiny_train_config, write_images

from mar import distributed
from mar.config import ConfigError
from mar.training import trainer
from mar.training.log import open_log


def stuck(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainer.WAIT_AFTER_SIGNAL_S = 0.5
    message = ""
    try:
        with distributed.process_group("cpu"):
            run = open_tiny_run(tiny_train_config(Path(folder, "data")), Path(folder, "run"))
            run.source = Stuck(4 if rank else 40)
            threading.Timer(6, os.kill, (os.getpid(), signal.SIGTERM)).start()  # as torchrun sends it to all
            trainer.train(run, open_log(run))
    except (trainer.TrainingError, ConfigError) as error:
        message = str(error)
    Path(folder, f"said.{rank}").write_text(message)


def test_train_rank_without_pictures_ends_all_ranks(tmp_path: Path) -> None:
    write_images(tmp_path / "data")
    begun = time.monotonic()
    processes.spawn_ranks(2, stuck, processes.free_port(), str(tmp_path))
    assert time.monotonic() - begun < 100
    assert "rank 1 was told to end, and waits for pictures" in (tmp_path / "said.1").read_text()
    assert "another rank has ended" in (tmp_path / "said.0").read_text()


def alone_with_an_error(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.ERROR_WAIT_S = 0.5
    message = ""
    try:
        with distributed.process_group("cpu"), distributed.collective_errors():
            if rank == 0:
                raise ValueError("the disk is full")
            distributed.any_rank(False)
    except ValueError as error:
        message = str(error)
    Path(folder, f"said.{rank}").write_text(message)


def test_error_of_a_rank_ends_the_others_in_a_collective(tmp_path: Path) -> None:
    begun = time.monotonic()
    processes.spawn_ranks(2, alone_with_an_error, processes.free_port(), str(tmp_path))
    assert time.monotonic() - begun < 100
    assert (tmp_path / "said.0").read_text() == "the disk is full"
    assert "another rank has ended" in (tmp_path / "said.1").read_text()
