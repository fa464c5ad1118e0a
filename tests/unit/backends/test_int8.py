"""Weights of 8 bits: exact where 8 bits are enough, near elsewhere, and never by accident."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tiny import noise, tiny_model

from mar.backends.cpu.int8 import Int8Linear, is_quantized, quantize_
from mar.config import ConfigError, TrunkConfig
from mar.nn import Linear
from mar.random import make_generator

LABELS, VISIBLE = torch.tensor([0, 2]), torch.tensor([[0, 3, 7], [2, 9, 15]])


def whole(low: int, high: int, *shape: int) -> torch.Tensor:
    """Whole numbers of which the smallest and the largest are in every row."""
    numbers = torch.randint(low, high + 1, shape, generator=make_generator(5)).float()
    numbers[..., 0], numbers[..., 1] = low, high
    return numbers


@torch.no_grad()
def test_int8_linear_of_representable_values_is_exact() -> None:
    linear = Linear(24, 7)
    linear.weight.copy_(whole(-127, 127, 7, 24) * torch.linspace(0.5, 2, 7).unsqueeze(1))
    x = whole(-64, 63, 2, 3, 24)  # 7 bits
    torch.testing.assert_close(Int8Linear(linear)(x), linear(x), rtol=1e-5, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("trunk", [tiny.TRUNK, TrunkConfig(16, 2, 2, rotary=True)])
def test_int8_model_outputs_stay_close(trunk: TrunkConfig) -> None:
    of = tiny_model(encoder=trunk, decoder=trunk)
    tokens, x, t = noise(2, 16, 2), noise(2, 2, seed=1), torch.tensor([10, 900])

    def found() -> tuple[torch.Tensor, torch.Tensor]:
        z = of(tokens, LABELS, VISIBLE)
        return z, of.head(x, t, noise(2, 16, seed=2))

    plain, count = found(), sum(p.numel() for p in of.parameters())
    quantize_(of.blocks())
    assert is_quantized(of)
    assert sum(p.numel() for p in of.parameters()) < 0.7 * count  # what is outside of blocks is most of a tiny model
    for rough, exact in zip(found(), plain, strict=True):
        assert 1e-6 < float((rough - exact).std() / exact.std()) < 0.1


def test_int8_pipeline_draws() -> None:
    exact, rough = (tiny.tiny_pipeline().sample(["ant", "cat"], [1, 2], output="tensor") for _ in range(2))
    assert torch.equal(exact, rough)
    pipeline = tiny.tiny_pipeline().to(dtype=torch.int8)
    rough = pipeline.sample(["ant", "cat"], [1, 2], output="tensor")
    assert rough.shape == exact.shape
    assert not torch.equal(rough, exact)
    assert torch.equal(rough, pipeline.sample(["ant", "cat"], [1, 2], output="tensor"))


def test_int8_weights_keep_dtype_and_device(tmp_path: Path) -> None:
    pipeline = tiny.tiny_pipeline().to("cpu", torch.int8)
    assert pipeline.to("cpu", torch.int8) is pipeline  # once more is no more
    with pytest.raises(ConfigError, match=r"load the model again for torch\.float32"):
        pipeline.to(dtype=torch.float32)
    with pytest.raises(ConfigError, match="load the model again for meta"):
        pipeline.to("meta")
    with pytest.raises(ConfigError, match="can't be saved: save the model as it was loaded"):
        pipeline.save(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_int8_on_other_devices_is_refused() -> None:
    with pytest.raises(ConfigError, match="got a model on meta, expected one on the CPU"):
        quantize_(tiny_model().to("meta").blocks())
    pipeline = tiny.tiny_pipeline()
    with pytest.raises(ConfigError, match="got a model on meta, expected one on the CPU"):
        pipeline.to("meta", torch.int8)
    assert pipeline.device.type == "cpu"  # it stays where it was
    assert not is_quantized(pipeline.model)
