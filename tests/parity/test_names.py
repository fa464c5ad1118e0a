"""Every tensor of the official B, L and H has its place here, with its shape, and goes back to where it came from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mar.checkpoint.official import from_official, to_official
from mar.checkpoint.store import model_shapes, shape_differences
from mar.config import HeadConfig, ModelConfig, TrunkConfig
from tests.parity.support import config_of, drawn_state, meta, official_shapes

OFFICIAL = {
    "mar_base": (ModelConfig(), 364),
    "mar_large": (
        ModelConfig(encoder=TrunkConfig(1024, 16, 16), decoder=TrunkConfig(1024, 16, 16), head=HeadConfig(1280, 8)),
        476,
    ),
    "mar_huge": (
        ModelConfig(encoder=TrunkConfig(1280, 20, 16), decoder=TrunkConfig(1280, 20, 16), head=HeadConfig(1536, 12)),
        604,
    ),
}


def state_of(model: str) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in official_shapes(model).items()}


@pytest.mark.parametrize("model", OFFICIAL)
def test_every_official_tensor_fits_ours(model: str) -> None:
    config, count = OFFICIAL[model]
    official = state_of(model)
    ours = {name: tensor.shape for name, tensor in from_official(official).items()}
    assert len(ours) == len(official) == count
    assert shape_differences(ours, model_shapes(config)) == []


@pytest.mark.parametrize("model", OFFICIAL)
def test_to_official_keeps_the_references_order(model: str) -> None:
    ours = {name: torch.empty(shape, device="meta") for name, shape in sorted(model_shapes(OFFICIAL[model][0]).items())}
    back = {name: list(tensor.shape) for name, tensor in to_official(ours).items()}
    assert list(back.items()) == list(official_shapes(model).items())


@pytest.mark.parametrize("model", "AB")
def test_official_names_round_trip_is_exact(model: str) -> None:
    official = drawn_state(meta("mar_tiny")[model]["keys"])
    back = to_official(from_official(official))
    assert list(back) == list(official)
    for name, tensor in official.items():
        assert torch.equal(back[name], tensor), name


def test_from_official_other_models_tensor_is_refused() -> None:
    official = {**state_of("mar_base"), "encoder_blocks.0.attn.rope": torch.empty(1)}
    with pytest.raises(ValueError, match=r"1 tensors are not those of a MAR: encoder_blocks\.0\.attn\.rope"):
        from_official(official)


def test_from_official_missing_or_misshaped_tensor_is_refused() -> None:
    config = config_of(meta("mar_tiny")["A"]["config"])
    shapes = {**model_shapes(config), "mask_token": torch.Size([3])}
    del shapes["null_class"]
    differences = shape_differences(shapes, model_shapes(config))
    assert differences == ["mask_token is (3,), expected (64,)", "null_class is missing"]
