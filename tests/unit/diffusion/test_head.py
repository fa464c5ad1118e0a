"""The head: what it computes ahead is what it computes at once."""

from __future__ import annotations

import pytest
import torch
from tiny import noise, randomize

from mar.config import HeadConfig
from mar.diffusion.head import DiffusionHead

CONFIG = HeadConfig(width=12, depth=2, diffusion_steps=40)


def head() -> DiffusionHead:
    return randomize(DiffusionHead(3, 5, CONFIG))  # type: ignore[arg-type,return-value]


def test_time_embedding_table_equals_single_times() -> None:
    of, t = head(), torch.randint(40, (3, 30), generator=torch.Generator().manual_seed(0))
    assert t.numel() > CONFIG.diffusion_steps  # so that a table is made
    table = of.embed_times(t)
    assert table.shape == (3, 30, 12)
    torch.testing.assert_close(table, of.time_embed(t), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(table[1, :7], of.embed_times(t[1, :7]), rtol=1e-5, atol=1e-6)
    times = of.embed_times(torch.arange(40))
    assert (times.unsqueeze(0) - times.unsqueeze(1)).abs().amax(-1).fill_diagonal_(1).min() > 1e-4  # no two alike


def test_time_embedding_table_has_gradients() -> None:
    of, t = head(), torch.randint(40, (100,), generator=torch.Generator().manual_seed(0))
    parameters = list(of.time_embed.parameters())
    by_table = torch.autograd.grad(of.embed_times(t).square().sum(), parameters)
    directly = torch.autograd.grad(of.time_embed(t).square().sum(), parameters)
    for one, other in zip(by_table, directly, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_head_parts_compose_to_forward() -> None:
    of, x, z, t = head(), noise(6, 3), noise(6, 5, seed=1), torch.arange(6) * 7 % 40
    modulations = of.modulations(of.condition(of.embed_times(t), of.z_embed(z)))
    assert [m.shape[-1] for m in modulations] == [36, 36, 24]
    assert torch.equal(of.denoise_embedded(of.embed_tokens(x), modulations), of(x, t, z))
    assert torch.equal(of.denoise_embedded(of.input(x), modulations), of(x, t, z))
    assert of(x, t, z).shape == (6, 6)


@pytest.mark.parametrize("what", ["x", "t", "z"])
def test_head_output_depends_on_every_input(what: str) -> None:
    of, x, z, t = head(), noise(6, 3), noise(6, 5, seed=1), torch.arange(6)
    before = of(x, t, z)
    changed = {"x": (x + 0.1, t, z), "t": (x, t + 20, z), "z": (x, t, z + 0.1)}[what]
    assert ((of(*changed) - before).abs().amax(-1) > 1e-4).all()


def test_new_head_output_is_zero() -> None:
    of = DiffusionHead(3, 5, CONFIG)
    assert not of(noise(4, 3), torch.arange(4), noise(4, 5)).any()
