"""Optimizers: parameter groups, learning rate, and the updates of Muon."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import noise, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from mar.config import ConfigError, TrainConfig
from mar.config.tokenizer import TokenizerKind, TokenizerTrainConfig
from mar.training.optim import (
    Muon,
    decays,
    learning_rate,
    make_adamw,
    make_optimizers,
    make_tokenizer_optimizers,
    orthogonalize,
)
from mar.training.tokenizer import OBJECTIVES

CONFIG = TrainConfig(images=10_000, batch=64, lr=1e-3, warmup=1000, decay=2000)
MUON = TrainConfig(images=10_000, batch=64, lr=1e-2, optimizer="muon")


def test_optimizer_groups_match_the_reference() -> None:
    of = tiny_model()
    (optimizer,) = make_optimizers(of, CONFIG)
    names = {id(p): name for name, p in of.named_parameters()}
    still, decaying = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.02]
    assert still | decaying == set(names.values())
    assert not still & decaying
    assert not any(name.startswith("head.") or name.endswith(".bias") or "norm" in name for name in decaying)
    # In the reference the learned embeddings are parameters of two and more dimensions, the mask token among them.
    assert {"mask_token", "null_class", "class_embed.weight", "encoder_position", "decoder_position"} <= decaying
    assert {"diffusion_position", "token_embed.weight", "decoder_embed.weight", "encoder.0.fc1.weight"} <= decaying
    assert all(decays(of, name, p) == (name in decaying) for name, p in of.named_parameters())
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def test_adamw_on_cuda_is_fused_with_its_state_there() -> None:
    with FakeTensorMode():  # tensors without memory, of any device
        weight = nn.Parameter(torch.empty(3, 2, device="cuda"))
        optimizer = make_adamw([{"params": [weight]}], 1e-3, (0.9, 0.95))
    assert optimizer.param_groups[0]["fused"] is True
    state = optimizer.state[weight]
    assert {value.device.type for value in state.values()} == {"cuda"}
    assert state["step"].dtype is torch.float32


def test_optimizer_state_dict_makes_no_step() -> None:
    one, other = tiny_model(), tiny_model()
    (asked,), plain = make_optimizers(one, CONFIG), torch.optim.AdamW(other.parameters(), weight_decay=0.0)
    state = get_optimizer_state_dict(one, asked)["state"]
    assert {float(moments["step"]) for moments in state.values()} == {0.0}
    for group in (*asked.param_groups, *plain.param_groups):
        group.update(lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for of, optimizer in ((one, asked), (other, plain)):
        for p in of.parameters():
            p.grad = torch.full_like(p, 0.3)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(asked.state[a]["step"], plain.state[b]["step"])
               for a, b in zip(one.parameters(), other.parameters(), strict=True))  # fmt: skip


def test_lr_schedule_warms_up_and_decays() -> None:
    full = 1e-3 * 64 / 256
    assert CONFIG.scaled_lr == full
    assert learning_rate(CONFIG, 0) == pytest.approx(full * 64 / 1000)  # the first step is not lost
    assert learning_rate(CONFIG, 436) == pytest.approx(full / 2)
    assert learning_rate(CONFIG, 936) == learning_rate(CONFIG, 5000) == learning_rate(CONFIG, 8000) == full
    assert learning_rate(CONFIG, 9000) == pytest.approx(full / 2)
    assert 0 < learning_rate(CONFIG, 9999) < full / 1000
    assert learning_rate(CONFIG, 10_000) == learning_rate(CONFIG, 10_640) == 0.0


def test_lr_schedule_without_warmup_is_constant() -> None:
    config = TrainConfig(images=100, batch=256, lr=3e-4)
    assert {learning_rate(config, images) for images in (0, 50, 99)} == {3e-4}


@pytest.mark.parametrize("shape", [(24, 24), (8, 32), (32, 8)])
def test_muon_orthogonalizes_matrices(shape: tuple[int, int]) -> None:
    u, s, v = torch.linalg.svd(noise(3, *shape), full_matrices=False)
    made = orthogonalize(u @ torch.diag_embed(s * 1e-3) @ v)
    values = torch.linalg.svdvals(made)
    assert values.max() < 1.3
    assert values.median() > 0.6
    inside = u.mT @ made @ v.mT  # diagonal where the singular vectors are the same
    assert (inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


def test_muon_zero_gradient_gives_zero_update() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def test_muon_splits_fused_matrices() -> None:
    fused = nn.Parameter(noise(12, 4))
    apart = [nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    gradient = noise(12, 4, seed=1) * torch.tensor([1.0, 100.0, 1e-3]).repeat_interleave(4)[:, None]
    fused.grad = gradient
    for p, part in zip(apart, gradient.chunk(3), strict=True):
        p.grad = part.clone()
    Muon([{"params": [fused], "parts": 3}], 0.1).step()
    Muon([{"params": apart}], 0.1).step()
    assert torch.allclose(fused.detach(), torch.cat([p.detach() for p in apart]), atol=1e-6)


def test_muon_kernel_equals_its_matrix() -> None:
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1).clone()
    for p in (kernel, matrix):
        Muon([{"params": [p]}], 0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


@pytest.mark.parametrize(("kind", "rest"), [("residual", 2), ("kl", 4)])
def test_tokenizer_optimizers_muon_takes_the_hidden_kernels(kind: TokenizerKind, rest: int) -> None:
    config = TokenizerTrainConfig(kind=kind, width=8, optimizer="muon")
    module = OBJECTIVES[kind].make(config)
    adamw, muon = make_tokenizer_optimizers(module, OBJECTIVES[kind].hidden_kernels(module), config)
    held = [{id(p) for g in o.param_groups for p in g["params"]} for o in (adamw, muon)]
    assert held[0] | held[1] == {id(p) for p in module.parameters()}
    assert not held[0] & held[1]
    kernels = [p for p in module.parameters() if p.ndim == 4]
    assert len(kernels) - len(held[1]) == rest  # those that make latents, moments or pixels
    assert len(make_tokenizer_optimizers(module, [], replace(config, optimizer="adamw"))) == 1


def test_muon_update_size_matches_adamw() -> None:
    for scale in (1e-6, 1e3):
        p = nn.Parameter(torch.zeros(64, 64))
        p.grad = noise(64, 64) * scale
        Muon([{"params": [p]}], 0.01, factor=3.0).step()
        assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.2 * 0.03, rel=0.2)


def test_muon_weight_decay_follows_the_rate() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.zeros(4, 4)
    Muon([{"params": [p]}], 0.1, factor=2.0, weight_decay=0.5).step()
    assert torch.allclose(p.detach(), torch.full((4, 4), 1 - 0.2 * 0.5))


def test_muon_minimizes_and_restores_its_state() -> None:
    target, p = noise(6, 6), nn.Parameter(torch.zeros(6, 6))
    optimizer = Muon([{"params": [p]}], 0.05)
    before = float(target.square().sum())
    for _ in range(100):
        p.grad = p.detach() - target
        optimizer.step()
    assert float((p.detach() - target).square().sum()) < 0.3 * before
    assert optimizer.state[p]["momentum"].abs().max() > 0


def test_muon_takes_the_matrices_of_blocks() -> None:
    of = tiny_model()
    adamw, muon = make_optimizers(of, MUON)
    names = {id(p): name for name, p in of.named_parameters()}
    held = {name: {names[id(p)] for g in o.param_groups for p in g["params"]}
            for name, o in (("adamw", adamw), ("muon", muon))}  # fmt: skip
    assert held["adamw"] | held["muon"] == set(names.values())
    assert not held["adamw"] & held["muon"]
    assert {"encoder.0.attention.qkv.weight", "decoder.0.fc2.weight", "head.blocks.0.modulation.weight"} <= held["muon"]
    assert {"token_embed.weight", "head.output.weight", "encoder.0.fc1.bias", "mask_token"} <= held["adamw"]
    three = {names[id(p)] for g in muon.param_groups if g["parts"] == 3 for p in g["params"]}
    assert three == {name for name in held["muon"] if "qkv" in name or "modulation" in name}
    still = {names[id(p)] for g in muon.param_groups if not g["weight_decay"] for p in g["params"]}
    assert still == {name for name in held["muon"] if name.startswith("head.")}


def test_muon_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 3\), expected 3 matrices"):
        Muon([{"params": [nn.Parameter(torch.zeros(4, 3))], "parts": 3}], 0.1)
    with pytest.raises(ConfigError, match="muon_factor is 0"):
        TrainConfig(muon_factor=0)
