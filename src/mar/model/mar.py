"""MAR: an encoder of the visible tokens, a decoder of all, a condition z per token, and the head that draws tokens.

Source: paper (arXiv 2406.11838), section 3.4 and figure 2b. Letters of shapes: n images, L tokens, d values of a token,
b buffer tokens, v visible tokens, r tokens that are asked for, s = b + v, e encoder width, f decoder width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mar.config import ModelConfig
from mar.diffusion.head import DiffusionHead
from mar.model.blocks import NORM_EPS, make_blocks
from mar.model.rotary import rope_cache
from mar.model.tokens import gather_tokens, scatter_tokens
from mar.nn import Linear

UNCONDITIONAL = -1
"""The label of an image without a class."""


class MAR(nn.Module):
    """tokens (n, L, d), labels (n,) and the positions of the visible tokens -> conditions z (n, L, f)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder_turns: Tensor | None
        self.decoder_turns: Tensor | None
        e, f, length = config.encoder.width, config.decoder.width, config.tokens
        dropouts = (config.attention_dropout, config.projection_dropout)

        self.class_embed = nn.Embedding(config.classes, e) if config.classes else None
        self.null_class = nn.Parameter(torch.empty(1, e))
        self.token_embed = Linear(config.token_width, e)
        self.encoder_position = nn.Parameter(torch.empty(config.buffer + length, e))
        self.embed_norm = nn.LayerNorm(e, eps=NORM_EPS)
        self.encoder = make_blocks(config.encoder, *dropouts)
        self.encoder_norm = nn.LayerNorm(config.encoder.width, eps=NORM_EPS)

        self.decoder_embed = Linear(e, f)
        self.mask_token = nn.Parameter(torch.empty(f))
        self.decoder_position = nn.Parameter(torch.empty(config.buffer + length, f))
        self.decoder = make_blocks(config.decoder, *dropouts)
        self.decoder_norm = nn.LayerNorm(config.decoder.width, eps=NORM_EPS)
        self.diffusion_position = nn.Parameter(torch.empty(length, f))

        for name, trunk in (("encoder_turns", config.encoder), ("decoder_turns", config.decoder)):
            patches = (config.grid[0] // config.patch, config.grid[1] // config.patch)
            table = rope_cache(config.buffer, patches, trunk.head_width) if trunk.rotary else None
            self.register_buffer(name, table, persistent=False)

        self.head = DiffusionHead(config.token_width, f, config.head)
        self.initialise()

    def initialise(self) -> None:
        """Xavier-uniform matrices, normal(0.02) embeddings; the head sees to its own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embeddings: list[Tensor] = [self.null_class, self.mask_token]
        embeddings += [self.encoder_position, self.decoder_position, self.diffusion_position]
        if self.class_embed is not None:
            embeddings.append(self.class_embed.weight)
        for embedding in embeddings:
            nn.init.normal_(embedding, std=0.02)
        self.head.initialise()

    def forward(
        self,
        tokens: Float[Tensor, "n L d"],
        labels: Int[Tensor, " n"],
        visible: Int[Tensor, "n v"],
        *,
        ragged: bool = False,
        only: Int[Tensor, "n r"] | None = None,
    ) -> Float[Tensor, "n r f"]:
        """tokens -> z. Only tokens at `visible` positions are read.

        Labels are class numbers, or UNCONDITIONAL. `ragged`: images see different numbers of tokens; their positions
        are padded to one length with L. `only`: at these positions, padded with L; at all where None (r = L).
        """
        return self.decode(self.encode(tokens, labels, visible, ragged=ragged), visible, only)

    def encode(
        self,
        tokens: Float[Tensor, "n L d"],
        labels: Int[Tensor, " n"],
        visible: Int[Tensor, "n v"],
        *,
        ragged: bool = False,
    ) -> Float[Tensor, "n s e"]:
        """The encoder's view of the buffer, which carries the class, and of the visible tokens."""
        buffer, length = self.config.buffer, self.config.tokens
        n = len(tokens)
        positions = self.encoder_position[buffer:].expand(n, -1, -1)
        seen = self.token_embed(gather_tokens(tokens, visible)) + gather_tokens(positions, visible)
        carriers = self.embed_labels(labels).unsqueeze(1) + self.encoder_position[:buffer]
        x = self.embed_norm(torch.cat([carriers, seen], dim=1))
        keys = None
        if ragged:
            keys = nn.functional.pad(visible < length, (buffer, 0), value=True)[:, None, None, :]
        stands = None
        if self.encoder_turns is not None:
            carried, placed = self.encoder_turns[:buffer].expand(n, -1, -1, -1), self.encoder_turns[buffer:].flatten(1)
            stands = torch.cat(
                [carried, gather_tokens(placed.expand(n, -1, -1), visible).unflatten(-1, (-1, 2))], dim=1
            )
        for block in self.encoder:
            x = block(x, keys, stands)
        encoded: Tensor = self.encoder_norm(x)
        return encoded

    def decode(
        self, encoded: Float[Tensor, "n s e"], visible: Int[Tensor, "n v"], only: Int[Tensor, "n r"] | None = None
    ) -> Float[Tensor, "n r f"]:
        """Fills in mask tokens at hidden positions, and gives every position its condition z; `only` as in `forward`.

        All tokens are needed by all blocks but the last: there, only those that are asked for.
        """
        buffer, length = self.config.buffer, self.config.tokens
        x = self.decoder_embed(encoded)
        hidden = self.mask_token.to(x.dtype).expand(len(x), length, -1)
        x = torch.cat([x[:, :buffer], scatter_tokens(hidden, visible, x[:, buffer:])], dim=1) + self.decoder_position
        stands = None if self.decoder_turns is None else self.decoder_turns.unsqueeze(0)
        if only is None:
            only = torch.arange(length, device=x.device).expand(len(x), -1)
        *blocks, last = self.decoder
        for block in blocks:
            x = block(x, turns=stands)
        x = last(x, turns=stands, only=buffer + only)
        z: Tensor = self.decoder_norm(x) + gather_tokens(self.diffusion_position.expand(len(x), -1, -1), only)
        return z

    def embed_labels(self, labels: Int[Tensor, " n"]) -> Float[Tensor, "n e"]:
        """Class embeddings, the learned null embedding for UNCONDITIONAL."""
        null = self.null_class.expand(len(labels), -1)
        if self.class_embed is None:
            return null
        known = (labels != UNCONDITIONAL).unsqueeze(1)
        return torch.where(known, self.class_embed(labels.clamp(min=0)), null)
