"""Settings of CUDA: TF32, kernels of attention, and the precision by default."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline

from mar import zoo
from mar.backends import configure
from mar.devices import default_precision
from mar.pipeline import Pipeline

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def settings() -> dict[str, bool]:
    return {
        "products": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.allow_tf32,
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "plain": torch.backends.cuda.math_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
    }


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = settings()
    yield
    torch.backends.cuda.matmul.allow_tf32 = before["products"]
    torch.backends.cudnn.allow_tf32 = before["convolutions"]
    torch.backends.cuda.enable_cudnn_sdp(before["cudnn"])


@pytest.mark.parametrize("tf32", [False, True])
def test_configure_on_cuda_sets_tf32_and_attention(tf32: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = not tf32
    torch.backends.cudnn.allow_tf32 = not tf32
    torch.backends.cuda.enable_cudnn_sdp(True)
    configure(CUDA, tf32=tf32)
    attention = {"flash": True, "efficient": True, "plain": True, "cudnn": False}
    assert settings() == {"products": tf32, "convolutions": tf32, **attention}


def test_configure_elsewhere_changes_nothing() -> None:
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    before = settings()
    configure(CPU, tf32=False)
    assert settings() == before


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_by_default_is_bf16_on_gpus_that_multiply_in_it(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_precision(CUDA) == expected
    assert default_precision(CPU) == "fp32"
    assert default_precision(torch.device("mps")) == "fp32"


@pytest.mark.parametrize(
    ("given", "expected"), [({}, torch.bfloat16), ({"dtype": torch.float32}, torch.float32), ({"tf32": True}, None)]
)
def test_load_on_cuda_configures_it_and_casts(
    given: dict[str, Any], expected: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def to(self: Pipeline, device: torch.device, dtype: torch.dtype) -> Pipeline:
        calls.append((device, dtype))
        return self

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(zoo, "configure", lambda device, tf32: calls.append((device, tf32)))
    monkeypatch.setattr(Pipeline, "to", to)
    tiny_pipeline().save(tmp_path / "model.safetensors")
    zoo.load(tmp_path / "model.safetensors", device=CUDA, **given)
    assert calls == [(CUDA, "tf32" in given), (CUDA, expected or torch.bfloat16)]


def test_load_on_cpu_is_float32(tmp_path: Path) -> None:
    tiny_pipeline().save(tmp_path / "model.safetensors")
    model = zoo.load(tmp_path / "model.safetensors", device="cpu")
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
