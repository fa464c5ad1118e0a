"""KL-16: the reference's tensors, converted, give the reference's moments and pictures."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mar.checkpoint.official_kl16 import to_diffusers, to_official, training_only
from mar.tokenizer import KLTokenizer, build
from mar.tokenizer.kl import kl16

GOLDEN = Path(__file__).parent / "golden"
SHAPES: dict[str, list[int]] = json.loads((GOLDEN / "official_keys.json").read_text())["kl16"]
SCALE = 0.2325


def drawn(name: str, shape: list[int]) -> Tensor:
    """The tensor that the golden files' recipe draws from a name."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if not name.endswith(".weight"):
        return 0.02 * values
    return 1 + 0.02 * values if len(shape) == 1 else values / values[0].numel() ** 0.5


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return {name: drawn(name, shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def tokenizer(official: dict[str, Tensor]) -> KLTokenizer:
    made = kl16()
    made.autoencoder.load_state_dict(to_diffusers(official))
    return made.requires_grad_(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, tokenizer: KLTokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The tokenizer on each device, in full float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tokenizer.to(request.param)
    yield request.param
    tokenizer.cpu()


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "kl16.safetensors")


def test_kl16_moments_match_the_reference(tokenizer: KLTokenizer, golden: dict[str, Tensor], device: str) -> None:
    mean, log_variance = golden["moments"].chunk(2, dim=1)
    posterior = tokenizer.encode(golden["image"].to(device))
    torch.testing.assert_close(posterior.mean.cpu() / SCALE, mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(2 * (posterior.std.cpu() / SCALE).log(), log_variance, atol=1e-4, rtol=0)


def test_kl16_decoded_image_matches_the_reference(
    tokenizer: KLTokenizer, golden: dict[str, Tensor], device: str
) -> None:
    image = tokenizer.decode(golden["latent"].to(device) * SCALE).cpu()
    torch.testing.assert_close(image, golden["decoded"].clamp(-1, 1), atol=1e-4, rtol=0)
    # Most of the golden picture lies inside the clip, so that the comparison says something.
    assert (golden["decoded"].abs() < 1).float().mean() > 0.5


def test_kl16_all_312_tensors_convert_both_ways(official: dict[str, Tensor]) -> None:
    ours = to_diffusers(official)
    expected = {name: tensor.shape for name, tensor in kl16().autoencoder.state_dict().items()}
    assert len(official) == 312
    assert sum(tensor.numel() for tensor in official.values()) == 66_456_019
    assert {name: tensor.shape for name, tensor in ours.items()} == expected
    back = to_official(ours)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in official)


def test_kl16_training_tensors_are_left_out(official: dict[str, Tensor]) -> None:
    extra = {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(1)}
    assert sorted(training_only({**official, **extra})) == sorted(extra)
    assert to_diffusers({**official, **extra}).keys() == to_diffusers(official).keys()


def test_kl16_unknown_tensors_are_refused(official: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"1 tensors are not of a reference KL-16: encoder\.surprise"):
        to_diffusers({**official, "encoder.surprise": torch.zeros(1)})
    with pytest.raises(ValueError, match="not of a diffusers KL-16"):
        to_official({"encoder.down.0.block.0.conv1.weight": torch.zeros(1)})


def test_kl16_from_config_and_state_is_equal(tokenizer: KLTokenizer, golden: dict[str, Tensor]) -> None:
    again = build(json.loads(json.dumps(tokenizer.config())))
    again.load_state_dict(tokenizer.state_dict())
    assert torch.equal(again.decode(golden["latent"]), tokenizer.decode(golden["latent"]))
    assert again.has_stats
    assert (again.channels, again.stride, again.image_channels) == (16, 16, 3)
    assert again.std.tolist() == pytest.approx([1 / SCALE])
