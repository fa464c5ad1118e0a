"""The transformer block of encoder and decoder: pre-norm attention and MLP.

Source: paper, section 4; ViT (arXiv 2010.11929).
Letters of shapes: n images, s tokens in the sequence, r output tokens, e width.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mar.backends import backend_for
from mar.config import TrunkConfig
from mar.model.rotary import apply_rope
from mar.model.tokens import gather_tokens
from mar.nn import Dropout, Linear

NORM_EPS = 1e-6
"""Epsilon of the layer norms."""


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys, values."""

    def __init__(self, trunk: TrunkConfig, attention_dropout: float, projection_dropout: float) -> None:
        super().__init__()
        self.num_heads = trunk.num_heads
        self.attention_dropout = attention_dropout
        self.qkv = Linear(trunk.width, 3 * trunk.width, splits=3)
        self.out = Linear(trunk.width, trunk.width)
        self.dropout = Dropout(projection_dropout)

    def forward(
        self,
        x: Float[Tensor, "n s e"],
        key_mask: Bool[Tensor, "n 1 1 s"] | None = None,
        rope: Float[Tensor, "#n s half_d two"] | None = None,
        query_idx: Int[Tensor, "n r"] | None = None,
    ) -> Float[Tensor, "n r e"]:
        """Let the tokens at `query_idx` attend to all tokens.

        Args:
            x: the sequence.
            key_mask: true where a token may be attended to (None: everywhere).
            rope: cos/sin table of `mar.model.rotary` (None: no rotary embedding).
            query_idx: output positions (None: all, r = s); index s is padding, whose output is undefined.
        """
        qkv = self.qkv(x)
        if rope is not None:
            qkv = self._apply_rope(qkv, rope)
        attended = self._attend(qkv, key_mask)
        if query_idx is not None:
            attended = gather_tokens(attended, query_idx)
        projected: Tensor = self.dropout(self.out(attended))
        return projected

    def _apply_rope(
        self, qkv: Float[Tensor, "n s three_e"], rope: Float[Tensor, "#n s half_d two"]
    ) -> Float[Tensor, "n s three_e"]:
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = (apply_rope(x.unflatten(-1, (self.num_heads, -1)), rope).flatten(2) for x in (q, k))
        return torch.cat([q, k, v], dim=-1)

    def _attend(
        self, qkv: Float[Tensor, "n s three_e"], key_mask: Bool[Tensor, "n 1 1 s"] | None
    ) -> Float[Tensor, "n s e"]:
        """softmax(q k^T / sqrt(d)) v, the heads side by side (arXiv 1706.03762, equation 1)."""
        dropout = self.attention_dropout if self.training else 0.0
        kernel = backend_for(qkv.device).attention_with_dropout
        if kernel is not None and dropout and key_mask is None:
            return kernel(qkv, self.num_heads, dropout)
        n, s, width = qkv.shape
        q, k, v = qkv.view(n, s, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, dropout_p=dropout)
        return attended.transpose(1, 2).reshape(n, s, width // 3)


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
        key_mask: Bool[Tensor, "n 1 1 s"] | None = None,
        rope: Float[Tensor, "#n s half_d two"] | None = None,
        query_idx: Int[Tensor, "n r"] | None = None,
    ) -> Float[Tensor, "n r e"]:
        """Run the block on the tokens at `query_idx`.

        Args:
            x: the sequence.
            key_mask, rope, query_idx: as in `Attention.forward`.
        """
        # attention
        attended = self.attention(self.norm1(x), key_mask, rope, query_idx)
        x = (x if query_idx is None else gather_tokens(x, query_idx)) + attended
        # MLP
        hidden = self.dropout(functional.gelu(self.fc1(self.norm2(x))))
        return x + self.dropout(self.fc2(hidden))


def make_blocks(trunk: TrunkConfig, attention_dropout: float, projection_dropout: float) -> nn.ModuleList:
    """Create the blocks of an encoder or decoder."""
    return nn.ModuleList(Block(trunk, attention_dropout, projection_dropout) for _ in range(trunk.depth))
