"""The transformer block of the encoder and the decoder: pre-norm attention and MLP (paper, section 4; ViT).

Letters of shapes: n images, s tokens in the sequence, r of them that are asked for, e width.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mar.backends.cpu.attention import attention_with_dropout
from mar.backends.cpu.dropout import Dropout, use_cpu_kernel
from mar.config import TrunkConfig
from mar.model.rotary import apply_rope
from mar.model.tokens import gather_tokens
from mar.nn import Linear

NORM_EPS = 1e-6
"""Epsilon of the layer norms."""


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values, in this order."""

    def __init__(self, trunk: TrunkConfig, attention_dropout: float, projection_dropout: float) -> None:
        super().__init__()
        self.heads = trunk.heads
        self.attention_dropout = attention_dropout
        self.qkv = Linear(trunk.width, 3 * trunk.width)
        self.out = Linear(trunk.width, trunk.width)
        self.dropout = Dropout(projection_dropout)

    def forward(
        self,
        x: Float[Tensor, "n s e"],
        keys: Bool[Tensor, "n 1 1 s"] | None = None,
        turns: Float[Tensor, "#n s half_d two"] | None = None,
        only: Int[Tensor, "n r"] | None = None,
    ) -> Float[Tensor, "n r e"]:
        """`keys` says which tokens may be attended to (all where None), `turns` where each stands (`rotary`), and
        `only` which ones are asked for (all where None: r = s; an index of s gives what is to be thrown away)."""
        qkv = self.qkv(x)
        mixed = self.mix(qkv if turns is None else self.turned(qkv, turns), keys)
        projected: Tensor = self.dropout(self.out(mixed if only is None else gather_tokens(mixed, only)))
        return projected

    def turned(
        self, qkv: Float[Tensor, "n s three_e"], turns: Float[Tensor, "#n s half_d two"]
    ) -> Float[Tensor, "n s three_e"]:
        """With the queries and keys turned to where they stand."""
        q, k, v = qkv.chunk(3, dim=-1)
        return torch.cat(
            [*(apply_rope(x.unflatten(-1, (self.heads, -1)), turns).flatten(2) for x in (q, k)), v], dim=-1
        )

    def mix(self, qkv: Float[Tensor, "n s three_e"], keys: Bool[Tensor, "n 1 1 s"] | None) -> Float[Tensor, "n s e"]:
        """Values mixed by attention, the heads side by side."""
        dropout = self.attention_dropout if self.training else 0.0
        if dropout and keys is None and use_cpu_kernel(qkv):
            return attention_with_dropout(qkv, self.heads, dropout)
        n, s, width = qkv.shape
        q, k, v = qkv.view(n, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=dropout)
        return mixed.transpose(1, 2).reshape(n, s, width // 3)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout after each projection in training."""

    def __init__(self, trunk: TrunkConfig, attention_dropout: float, projection_dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(trunk.width, eps=NORM_EPS)
        self.attention = Attention(trunk, attention_dropout, projection_dropout)
        self.norm2 = nn.LayerNorm(trunk.width, eps=NORM_EPS)
        self.fc1 = Linear(trunk.width, trunk.hidden)
        self.fc2 = Linear(trunk.hidden, trunk.width)
        self.dropout = Dropout(projection_dropout)

    def forward(
        self,
        x: Float[Tensor, "n s e"],
        keys: Bool[Tensor, "n 1 1 s"] | None = None,
        turns: Float[Tensor, "#n s half_d two"] | None = None,
        only: Int[Tensor, "n r"] | None = None,
    ) -> Float[Tensor, "n r e"]:
        """All as in `Attention`: the tokens that are asked for, which attend to all."""
        gathered = self.attention(self.norm1(x), keys, turns, only)
        x = (x if only is None else gather_tokens(x, only)) + gathered
        hidden = self.dropout(functional.gelu(self.fc1(self.norm2(x))))
        return x + self.dropout(self.fc2(hidden))


def make_blocks(trunk: TrunkConfig, attention_dropout: float, projection_dropout: float) -> nn.ModuleList:
    """The blocks of an encoder or decoder."""
    return nn.ModuleList(Block(trunk, attention_dropout, projection_dropout) for _ in range(trunk.depth))
