"""What all tests share: no network, no surprises from timing, no GPU tests where there is no GPU."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import hypothesis
import jaxtyping
import pytest

# The same examples on every machine, and no failures because a machine is busy.
hypothesis.settings.register_profile("mar", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("mar")


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test downloads or keeps goes to a folder of its own, never to the user's."""
    monkeypatch.setenv("MAR_HOME", str(tmp_path_factory.getbasetemp() / "mar-home"))


@pytest.fixture(autouse=True)
def nothing_renamed_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is told the new names of old options, as in a process of its own."""
    monkeypatch.setattr("mar.config.fields._noted", set())


@pytest.fixture
def untyped() -> Iterator[None]:
    """Calls as users make them, of whom nobody asks the types."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is written, half a line gets there."""
    write = Path.write_text

    def break_off(path: Path, text: str, **how: Any) -> int:
        write(path, text[: len(text) // 2], **how)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", break_off)


def pytest_configure(config: pytest.Config) -> None:
    """Give each process one thread, before torch is imported.

    Workers of pytest-xdist would fight for the same cores, and with another number of threads sums round differently.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not config.getoption("numprocesses", None):
        gc.disable()  # until all is imported: half of that time otherwise
        import_before_mar()


def pytest_collection_finish() -> None:
    """Lets the garbage collector look at what tests make only, not at the modules."""
    gc.freeze()
    gc.enable()


def import_before_mar() -> None:
    """Import large packages from their bytecode, which jaxtyping's import hook hides from what mar imports."""
    autoencoder, states = "diffusers.models.autoencoders.autoencoder_kl", "torch.distributed.checkpoint.state_dict"
    for name in (autoencoder, states, "rich.progress", "tyro", "typecheck"):
        importlib.import_module(name)
    sys.modules["typecheck"].check(lambda: None)  # imports all of beartype


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
