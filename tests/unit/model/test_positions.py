"""A model on another grid: interpolated positions, all else shared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import TRUNK, tiny_model
from torch import Tensor

from mar.backends.cpu.int8 import quantize_
from mar.config import ConfigError
from mar.model.mar import MAR
from mar.model.positions import resize_positions
from mar.model.rotary import rope_cache
from mar.nn import set_matrix_dtype

ROTARY = replace(TRUNK, rotary=True)
NAMES = ("encoder_position", "decoder_position", "diffusion_position")


def forward(model: MAR, n: int = 2) -> Tensor:
    """z of all tokens of one model, from every third token."""
    length, width = model.config.tokens, model.config.token_width
    tokens = torch.linspace(-1, 1, n * length * width).view(n, length, width)
    visible = torch.arange(0, length, 3).expand(n, -1)
    with torch.no_grad():
        return model(tokens, torch.tensor([0, -1][:n]), visible)


def test_resize_positions_keeps_linear_ones_linear() -> None:
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    position = torch.cat([torch.tensor([[9.0, 9.0]]), torch.stack([rows, columns], -1).flatten(0, 1)])
    resized = resize_positions(position, 1, (6, 8), (12, 8))
    assert resized[0].tolist() == [9.0, 9.0]
    cells = resized[1:].view(12, 8, 2)
    # half as far apart, from a quarter of a token before the first; PyTorch's bicubic is near linear inside
    expected = (torch.arange(12) + 0.5) / 2 - 0.5
    assert cells[4:8, 3, 0].tolist() == pytest.approx(expected[4:8].tolist(), abs=0.05)
    assert torch.allclose(cells[5, :, 1], torch.arange(8.0), atol=1e-5)


def test_resize_positions_three_times_has_the_trained_ones_in_the_middle() -> None:
    position = torch.randn(2 + 12, 5)
    cells = resize_positions(position, 2, (3, 4), (9, 12))[2:].view(9, 12, 5)
    assert torch.allclose(cells[1::3, 1::3], position[2:].view(3, 4, 5), atol=1e-6)


def test_rope_cache_spread_three_times_has_the_trained_angles_in_the_middle() -> None:
    trained = rope_cache(2, (3, 4), 8)
    spread = rope_cache(2, (9, 12), 8, trained=(3, 4))
    assert torch.equal(spread[:2], trained[:2])
    assert torch.allclose(spread[2:].view(9, 12, 4, 2)[1::3, 1::3], trained[2:].view(3, 4, 4, 2), atol=1e-6)
    assert torch.equal(rope_cache(2, (3, 4), 8, trained=(3, 4)), trained)


@pytest.mark.parametrize("trunk", [TRUNK, ROTARY])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_with_grid_computes_as_a_model_of_that_grid(trunk: object, patch_size: int) -> None:
    model = tiny_model(encoder=trunk, decoder=trunk, patch_size=patch_size)
    other = model.with_grid((6, 10), rotary="continued")
    fresh = MAR(replace(model.config, grid=(6, 10))).eval()
    state = dict(model.state_dict())
    old, new = model.config.token_grid, fresh.config.token_grid
    for name, buffer in zip(NAMES, (2, 2, 0), strict=True):
        state[name] = resize_positions(state[name], buffer, old, new)
    fresh.load_state_dict(state)
    assert torch.equal(forward(other), forward(fresh))
    if model.encoder_rope is not None:
        assert not torch.equal(forward(model.with_grid((6, 10))), forward(fresh))


def test_with_grid_shares_weights_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model(encoder=ROTARY, decoder=ROTARY)
    before, state = forward(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = model.with_grid((8, 4))
    assert forward(other).shape == (2, 32, 16)
    own = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert (parameter is own[name]) == (name not in NAMES), name
    assert other.head is model.head
    assert torch.equal(forward(model), before)
    assert model.config.grid == (4, 4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.with_grid((4, 4)) is model
    assert other.training is model.training is False


def test_with_grid_twice_from_the_same_model_is_equal() -> None:
    model = tiny_model()
    assert torch.equal(forward(model.with_grid((2, 8))), forward(model.with_grid((2, 8))))


def test_with_grid_not_of_whole_patches_is_refused() -> None:
    with pytest.raises(ConfigError, match="5x4 cells can't be cut into patches of 2x2"):
        tiny_model(patch_size=2).with_grid((5, 4))


def test_with_grid_of_bf16_and_int8_weights_follows_them() -> None:
    model, exact = tiny_model(), forward(tiny_model().with_grid((6, 6)))
    set_matrix_dtype(model, torch.bfloat16)
    assert model.with_grid((6, 6)).encoder_position.dtype is torch.float32
    assert 0 < float((forward(model.with_grid((6, 6))) - exact).abs().max()) < 0.1
    eight = tiny_model()
    quantize_(eight.blocks())
    assert 0 < float((forward(eight.with_grid((6, 6))) - exact).abs().max()) < 0.3
