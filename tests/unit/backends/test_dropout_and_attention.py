"""Dropout and attention as computed on a CPU in training: the definitions, value by value and gradient by gradient."""

from __future__ import annotations

import pytest
import torch
from tiny import noise

from mar.backends.cpu.attention import attention_with_dropout
from mar.backends.cpu.dropout import dropout_mask, keep_prob
from mar.config import TrunkConfig
from mar.model.blocks import Attention
from mar.nn import Dropout


def test_dropout_mask_keeps_the_expected_share() -> None:
    torch.manual_seed(0)
    drawn = dropout_mask((1_000_003,), 0.1)
    assert drawn.float().mean() == pytest.approx(0.9, abs=1e-3)  # its deviation is 3e-4
    for neighbor in (1, 2, 3, 4):  # of a word, and of the next one
        together = (drawn[neighbor:] & drawn[:-neighbor]).float().mean()
        assert together == pytest.approx(0.81, abs=2e-3)
    torch.manual_seed(0)
    assert torch.equal(dropout_mask((1_000_003,), 0.1), drawn)
    assert not torch.equal(dropout_mask((1_000_003,), 0.1), drawn)


@pytest.mark.parametrize(("rate", "stays"), [(0.0, 1.0), (0.5, 0.5), (0.999, 0.001)])
def test_dropout_at_any_rate_is_unbiased(rate: float, stays: float) -> None:
    torch.manual_seed(1)
    assert keep_prob(rate) == pytest.approx(stays, abs=1 / 2**16)
    assert dropout_mask((300, 301), rate).float().mean() == pytest.approx(stays, abs=0.01)


def test_dropout_zeroes_and_scales() -> None:
    drop, x = Dropout(0.25), noise(40, 50).requires_grad_()
    torch.manual_seed(2)
    out = drop(x)
    torch.manual_seed(2)
    stays = dropout_mask((40, 50), 0.25)
    torch.testing.assert_close(out, torch.where(stays, x / 0.75, 0.0))
    assert torch.equal(out == 0, ~stays)
    out.sum().backward()
    torch.testing.assert_close(x.grad, stays / 0.75)
    assert drop.eval()(x) is x


@pytest.mark.parametrize("rate", [1e-9, 0.3])
def test_attention_with_dropout_matches_the_formula(rate: float) -> None:
    heads, d = 3, 4
    qkv = noise(2, 7, 3 * heads * d).double().requires_grad_()
    towards = noise(2, 7, heads * d, seed=1).double()
    torch.manual_seed(3)
    got = attention_with_dropout(qkv, heads, rate)
    torch.manual_seed(3)
    stays = dropout_mask((2, heads, 7, 7), rate)
    q, k, v = qkv.view(2, 7, 3, heads, d).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / d**0.5).softmax(-1) * stays / keep_prob(rate)
    expected = (weights @ v).transpose(1, 2).reshape(2, 7, heads * d)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(out, qkv, towards)[0] for out in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_attention_without_dropout_matches_pytorch() -> None:
    attention, x = Attention(TrunkConfig(12, 1, 3), 1e-9, 0.0), noise(2, 7, 12)
    torch.testing.assert_close(attention.train()(x), attention.eval()(x))


def test_attention_in_bfloat16_is_close_to_float32() -> None:
    attention, x = Attention(TrunkConfig(12, 1, 3), 0.1, 0.0).train(), noise(2, 7, 12).requires_grad_()
    torch.manual_seed(4)
    expected = attention(x)
    torch.manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(x)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.02)
    gradients = [torch.autograd.grad(out.float().sum(), x)[0] for out in (got, expected)]
    torch.testing.assert_close(*gradients, atol=0.05, rtol=0.05)


def test_dropout_off_the_cpu_is_pytorchs() -> None:
    assert Dropout(0.5)(torch.ones(3, device="meta")).device.type == "meta"
