"""The transformer block of the encoder and the decoder: pre-norm attention and MLP (paper, section 4; ViT).

Letters of shapes: n images, s tokens in the sequence, e width.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from mar.config import TrunkConfig
from mar.model.attention import attend
from mar.model.dropout import Dropout, by_hand
from mar.runtime import Linear

NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values, in this order."""

    def __init__(self, width: int, heads: int, attention_dropout: float, projection_dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.dropout = Dropout(projection_dropout)

    def forward(self, x: Float[Tensor, "n s e"], keys: Bool[Tensor, "n 1 1 s"] | None = None) -> Float[Tensor, "n s e"]:
        """`keys` says which tokens may be attended to (all where None)."""
        projected: Tensor = self.dropout(self.out(self.mix(self.qkv(x), keys)))
        return projected

    def mix(self, qkv: Float[Tensor, "n s three_e"], keys: Bool[Tensor, "n 1 1 s"] | None) -> Float[Tensor, "n s e"]:
        """Values mixed by attention, the heads side by side."""
        dropout = self.attention_dropout if self.training else 0.0
        if dropout and keys is None and by_hand(qkv):
            return attend(qkv, self.heads, dropout)
        n, s, width = qkv.shape
        q, k, v = qkv.view(n, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=dropout)
        return mixed.transpose(1, 2).reshape(n, s, width // 3)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout after each projection in training."""

    def __init__(self, trunk: TrunkConfig, attention_dropout: float, projection_dropout: float) -> None:
        super().__init__()
        hidden = int(trunk.width * trunk.mlp_ratio)
        self.norm1 = nn.LayerNorm(trunk.width, eps=NORM_EPS)
        self.attention = Attention(trunk.width, trunk.heads, attention_dropout, projection_dropout)
        self.norm2 = nn.LayerNorm(trunk.width, eps=NORM_EPS)
        self.fc1 = Linear(trunk.width, hidden)
        self.fc2 = Linear(hidden, trunk.width)
        self.dropout = Dropout(projection_dropout)

    def forward(self, x: Float[Tensor, "n s e"], keys: Bool[Tensor, "n 1 1 s"] | None = None) -> Float[Tensor, "n s e"]:
        x = x + self.attention(self.norm1(x), keys)
        hidden = self.dropout(functional.gelu(self.fc1(self.norm2(x))))
        return x + self.dropout(self.fc2(hidden))


def stack(trunk: TrunkConfig, attention_dropout: float, projection_dropout: float) -> nn.ModuleList:
    """The blocks of an encoder or decoder."""
    return nn.ModuleList(Block(trunk, attention_dropout, projection_dropout) for _ in range(trunk.depth))
