"""Devices by name, streams of random numbers by key, products, and memory that is given back."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from mar import devices, distributed
from mar.backends.cpu import linear as mar_linear
from mar.backends.cpu import memory
from mar.backends.cpu.linear import has_onednn
from mar.backends.cpu.memory import trim_heap
from mar.config import ConfigError
from mar.model.mar import MAR
from mar.nn import Linear, init_empty_weights, set_matrix_dtype
from mar.random import make_generator


def test_device_cpu_is_always_available() -> None:
    assert devices.choose_device("cpu") == torch.device("cpu")
    assert devices.choose_device(None) == devices.choose_device("auto")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_device_auto_chooses_the_best(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if cuda else 0)
    assert devices.choose_device().type == expected
    if cuda:
        assert devices.choose_device("cuda:1").index == 1
        with pytest.raises(ConfigError, match="'cuda:2', expected cuda:0 to cuda:1"):
            devices.choose_device("cuda:2")
    else:
        with pytest.raises(ConfigError, match="got 'cuda', which this machine lacks"):
            devices.choose_device("cuda")
    for name in ("gpu", "xpu", "meta", "hpu", "cuda:-1"):
        with pytest.raises(ConfigError, match=f"'{name}', expected auto, cpu, cuda"):
            devices.choose_device(name)


def test_generator_follows_the_key_and_its_order() -> None:
    keys = [(), (0,), (1,), (12,), (1, 2), (2, 1), (0, 0), (1, 0), (0, 1), (1, 2, 0), (-1,), (2**63,), (1, 2, 3)]
    first = {key: tuple(torch.rand(4, generator=make_generator(*key)).tolist()) for key in keys}
    for one, other in itertools.combinations(keys, 2):
        assert first[one] != first[other], (one, other)
    assert tuple(torch.rand(4, generator=make_generator(1, 2)).tolist()) == first[1, 2]


def test_generator_neighboring_keys_are_uncorrelated() -> None:
    values = torch.stack([torch.randn(1000, generator=make_generator(7, 1, i)) for i in range(20)])
    assert torch.corrcoef(values).fill_diagonal_(0).abs().max() < 0.17  # five standard deviations
    starts = torch.tensor([float(torch.rand((), generator=make_generator(7, 1, i))) for i in range(2000)])
    assert abs(float(starts.mean()) - 0.5) < 0.03
    assert abs(float((starts < 0.1).float().mean()) - 0.1) < 0.03


def test_generator_leaves_the_global_rng_alone() -> None:
    state = torch.get_rng_state()
    torch.rand(3, generator=make_generator(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_dtype_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="float16 overflows"):
        set_matrix_dtype(torch.nn.Identity(), torch.float16)


def test_rank_and_world_size_follow_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (distributed.rank(), distributed.world_size()) == (3, 4)


def test_init_empty_weights_gives_the_models_shapes() -> None:
    made = tiny_model()
    with init_empty_weights():
        hollow = MAR(made.config)
    assert {n: t.shape for n, t in hollow.state_dict().items()} == {n: t.shape for n, t in made.state_dict().items()}
    assert all(t.is_meta for t in hollow.state_dict().values())
    assert torch.nn.Linear(2, 2).weight.abs().sum() > 0  # what is made later is filled


def test_model_loads_without_importing_the_compiler() -> None:
    """Whose import takes longer than all else in front of a first picture."""
    code = "import sys, mar; mar.load('fashion'); print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products, on whatever processor, for sizes of a test."""
    if not has_onednn():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(mar_linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(mar_linear, "MIN_MULTIPLICATIONS", 1)


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)])
def test_onednn_linear_matches_pytorch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Linear(24, 7).requires_grad_(False)
    x = torch.randn(*shape, generator=make_generator(1))
    found = linear(x)
    assert found.shape == (*shape[:-1], 7)
    torch.testing.assert_close(found, x @ linear.weight.T + linear.bias, rtol=1e-5, atol=1e-6)
    across = torch.randn(24, 6, generator=make_generator(2)).T  # not as it lies in memory
    torch.testing.assert_close(linear(across), across @ linear.weight.T + linear.bias, rtol=1e-5, atol=1e-6)
    taken: list[torch.dtype] = []
    monkeypatch.setattr(mar_linear.functional, "linear", lambda x, weight, bias: taken.append(weight.dtype) or x)
    linear(x)
    assert taken == ([] if x.numel() else [torch.float32])
    linear.double()(x.double())
    linear.bfloat16()(x)
    assert taken[-2:] == [torch.float64, torch.bfloat16]


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
def test_onednn_linear_gradients_match_pytorch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = Linear(24, 7), torch.randn(*shape, generator=make_generator(1)).requires_grad_()
    weights = [x, linear.weight, linear.bias]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear(x).square().sum(), weights)

    ours = gradients()
    monkeypatch.setattr(mar_linear, "onednn_is_faster", lambda: False)
    for own, theirs in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("by_onednn")
def test_onednn_linear_computes_requested_gradients_only() -> None:
    linear, x = Linear(24, 7), torch.randn(5, 24, generator=make_generator(1))
    linear.bias.requires_grad_(False)
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    assert linear.bias.grad is None
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(7, 24))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype is torch.bfloat16


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_trim_heap_returns_free_memory() -> None:
    code = """
import torch
from pathlib import Path
from mar.backends.cpu.memory import trim_heap
def resident(): return 4096 * int(Path("/proc/self/statm").read_text().split()[1])
blocks = [torch.ones(2**14) for _ in range(1500)]  # 94 MiB, each block too small for a mapping of its own
kept, full = blocks[-1], resident()
del blocks
held = resident()
trim_heap()
print(full - held, held - resident())
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    by_itself, by_us = map(int, ran.stdout.split())
    assert by_itself < 2**23
    assert by_us > 80 * 2**20


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_trim_heap_without_malloc_trim_does_nothing(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    trim_heap()
