"""The transformer: z depends on the visible tokens, the class and the positions, and on nothing that is hidden."""

from __future__ import annotations

import pytest
import torch
from tiny import HEAD, TRUNK, noise, tiny_config, tiny_model
from torch import Tensor, nn

from mar.config import HeadConfig, TrunkConfig
from mar.model.mar import MAR, UNCONDITIONAL
from mar.nn import set_matrix_dtype

MODERN = TrunkConfig(width=16, depth=2, num_heads=2, rotary=True)
trunks = pytest.mark.parametrize("trunk", [TRUNK, MODERN], ids=["paper", "modern"])

VISIBLE = torch.tensor([[0, 3, 7], [2, 9, 15]])
LABELS = torch.tensor([0, 2])


def changed(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-3)


@trunks
def test_mar_hidden_tokens_do_not_matter(trunk: TrunkConfig) -> None:
    of, tokens = tiny_model(encoder=trunk, decoder=trunk), noise(2, 16, 2)
    z = of(tokens, LABELS, VISIBLE)
    assert z.shape == (2, 16, 16)
    hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, VISIBLE, False).unsqueeze(-1)
    assert torch.equal(of(torch.where(hidden, torch.nan, tokens), LABELS, VISIBLE), z)
    moved = tokens.clone()
    moved[0, 3] += 0.5
    after = of(moved, LABELS, VISIBLE)
    assert not any(torch.equal(after[0, i], z[0, i]) for i in range(16))  # every position attends to it
    assert torch.equal(after[1], z[1])


@trunks
def test_mar_visible_position_matters_but_not_list_order(trunk: TrunkConfig) -> None:
    of, tokens = tiny_model(encoder=trunk, decoder=trunk), noise(1, 16, 2).expand(2, -1, -1)
    z = of(tokens, LABELS[[0, 0]], torch.tensor([[0, 3, 7], [7, 0, 3]]))
    torch.testing.assert_close(z[0], z[1])
    same = tokens.clone()
    same[:, 4] = same[:, 3]
    z = of(same, LABELS[[0, 0]], torch.tensor([[0, 3], [0, 4]]))
    assert changed(z[0], z[1])


def test_mar_class_reaches_every_condition() -> None:
    of, tokens, nothing = tiny_model(), noise(1, 16, 2).expand(4, -1, -1), torch.empty(4, 0, dtype=torch.long)
    z = of(tokens, torch.tensor([0, 1, 2, UNCONDITIONAL]), nothing)
    assert all(changed(z[i, j], z[k, j]) for i in range(4) for k in range(i) for j in range(16))


def test_mar_without_class_uses_the_null_embedding() -> None:
    of = tiny_model()
    embedded = of.embed_condition(torch.tensor([UNCONDITIONAL, 1])).squeeze(1)
    assert of.class_embed is not None
    assert torch.equal(embedded, torch.stack([of.null_class[0], of.class_embed.weight[1]]))
    unconditional = tiny_model(classes=0)
    assert unconditional.class_embed is None
    both = unconditional.embed_condition(torch.tensor([UNCONDITIONAL, 1])).squeeze(1)
    assert torch.equal(both, unconditional.null_class.expand(2, -1))


@trunks
def test_mar_padded_batch_equals_single_images(trunk: TrunkConfig) -> None:
    of, tokens = tiny_model(encoder=trunk, decoder=trunk), noise(4, 16, 2)
    each = [[1, 5, 6], [2], [], list(range(16))]
    padded = torch.tensor([positions + [16] * (16 - len(positions)) for positions in each])
    labels = torch.tensor([0, 1, 2, UNCONDITIONAL])
    z = of(tokens, labels, padded, padded=True)
    for i, positions in enumerate(each):
        row = slice(i, i + 1)
        alone = of(tokens[row], labels[row], torch.tensor([positions]).long())
        torch.testing.assert_close(z[row], alone, rtol=1e-4, atol=1e-5)


@trunks
def test_mar_query_idx_selects_conditions(trunk: TrunkConfig) -> None:
    of, tokens = tiny_model(encoder=trunk, decoder=trunk), noise(2, 16, 2)
    z, some = of(tokens, LABELS, VISIBLE), torch.tensor([[1, 5, 16], [15, 3, 4]])  # 16: padding
    found = of(tokens, LABELS, VISIBLE, query_idx=some)
    assert found.shape == (2, 3, 16)
    for image, place in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        torch.testing.assert_close(found[image, place], z[image, some[image, place]])


@trunks
def test_mar_undeclared_padding_is_refused(trunk: TrunkConfig) -> None:
    of, tokens = tiny_model(encoder=trunk, decoder=trunk), noise(1, 16, 2)
    visible = torch.tensor([[1, 5, 16]])
    z = [of(tokens, LABELS[:1], visible, padded=padded) for padded in (True, False)]
    assert changed(*z)  # `padded` keeps padding out of the attention


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": (2, 6)},
        {"grid": (4, 8), "patch_size": 2, "channels": 3},
        {"encoder": TrunkConfig(8, 2, 2), "decoder": TrunkConfig(24, 1, 3)},
        {"head": HeadConfig(32, 3, diffusion_steps=10), "buffer_size": 7, "classes": 0},
        {"encoder": MODERN, "decoder": MODERN, "grid": (4, 8), "patch_size": 2},
    ],
)
def test_mar_forward_works_for_any_shape(changes: dict[str, object]) -> None:
    of = tiny_model(**changes)
    tokens, d, f = of.config.tokens, of.config.token_width, of.config.decoder.width
    z = of(noise(2, tokens, d), torch.tensor([UNCONDITIONAL, 0]), torch.tensor([[0], [tokens - 1]]))
    assert z.shape == (2, tokens, f)
    assert of.head(noise(2, d), torch.tensor([0, 9]), z[:, 0]).shape == (2, 2 * d)


def test_mar_dropout_in_training_only() -> None:
    of, tokens = tiny_model(attention_dropout=0.3, projection_dropout=0.0), noise(2, 16, 2)
    z = of(tokens, LABELS, VISIBLE)
    assert torch.equal(of(tokens, LABELS, VISIBLE), z)
    assert changed(of.train()(tokens, LABELS, VISIBLE), z)
    without = tiny_model(attention_dropout=0.0, projection_dropout=0.0).train()
    torch.testing.assert_close(without(tokens, LABELS, VISIBLE), z)
    assert changed(tiny_model(attention_dropout=0.0, projection_dropout=0.3).train()(tokens, LABELS, VISIBLE), z)


def test_mar_init_matches_the_reference() -> None:
    torch.manual_seed(0)
    of = MAR(tiny_config(encoder=TrunkConfig(64, 1, 2), buffer_size=32, classes=50, head=HeadConfig(64, 2)))
    qkv = of.encoder[0].attention.qkv  # type: ignore[union-attr,index]
    bound = (6 / (64 + 3 * 64)) ** 0.5  # Xavier on the fused matrix
    assert bound * 0.99 < float(qkv.weight.detach().abs().max()) <= bound
    assert not qkv.bias.any()
    assert of.class_embed is not None
    for embedding in (of.class_embed.weight, of.encoder_position, of.head.time_embed.fc1.weight):
        embedding = embedding.detach()
        assert float(embedding.std()) == pytest.approx(0.02, rel=0.1)
        assert float(embedding.abs().max()) > 0.05  # a normal, not a uniform
    zero = {name for name, p in of.named_parameters() if p.ndim > 1 and not p.any()}
    assert zero == {f"head.{n}.weight" for n in
                    ("blocks.0.modulation", "blocks.1.modulation", "final_modulation", "output")}  # fmt: skip
    assert all(not p.any() for name, p in of.named_parameters() if name.endswith("bias"))


@torch.no_grad()
def test_mar_bf16_casts_matrices_only() -> None:
    of, tokens = tiny_model(), noise(2, 16, 2)
    before = {name: p.clone() for name, p in of.named_parameters()}
    z = of(tokens, LABELS, VISIBLE)
    noisy, t = noise(2, 2, seed=1), torch.tensor([3, 900])
    out = of.head(noisy, t, z[:, 0])
    set_matrix_dtype(of, torch.bfloat16)
    linear = {
        f"{name}.{part}" for name, m in of.named_modules() if isinstance(m, nn.Linear) for part in ("weight", "bias")
    }
    assert linear
    for name, p in of.named_parameters():
        assert p.dtype == (torch.bfloat16 if name in linear else torch.float32), name
        assert torch.equal(p, before[name]) == (name not in linear), name
    z16 = of(tokens, LABELS, VISIBLE)
    assert z16.dtype == torch.float32
    assert z16.isfinite().all()
    assert 1e-4 < float((z16 - z).abs().max() / z.std()) < 0.1
    out16 = of.head(noisy, t, z16[:, 0])
    assert out16.dtype == torch.float32
    assert 1e-4 < float((out16 - out).abs().max() / out.std()) < 0.1
    set_matrix_dtype(of, torch.float32)
    assert of(tokens, LABELS, VISIBLE).dtype == torch.float32


@torch.no_grad()
def test_bf16_norms_take_float32() -> None:
    of, seen = tiny_model(encoder=MODERN, decoder=MODERN), set()
    set_matrix_dtype(of, torch.bfloat16)
    for norm in (module for module in of.modules() if isinstance(module, nn.LayerNorm)):
        norm.register_forward_pre_hook(lambda norm, given: seen.add(given[0].dtype))
    of(noise(2, 16, 2), LABELS, VISIBLE)
    assert seen == {torch.float32}


@trunks
def test_mar_every_parameter_matters(trunk: TrunkConfig) -> None:
    of = tiny_model(encoder=trunk, decoder=trunk).train()
    z = of(noise(3, 16, 2), torch.tensor([0, 1, UNCONDITIONAL]), torch.tensor([[0, 3], [4, 5], [6, 9]]))
    t = torch.arange(48).view(3, 16)
    of.head(noise(3, 16, 2), t, z).square().sum().backward()
    silent = {name for name, p in of.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == set()
    assert TRUNK.depth == HEAD.depth == 1
