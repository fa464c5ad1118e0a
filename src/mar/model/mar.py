"""MAR, the masked autoregressive model: encoder, decoder and diffusion head.

The encoder reads the visible tokens, the decoder computes a condition z for each token, and the head draws it given z.
Source: paper (arXiv 2406.11838), section 3.4 and figure 2b. Letters of shapes: n images, L tokens, d values of a token,
b buffer tokens, v visible tokens, r output tokens, s = b + v, e encoder width, f decoder width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from mar.config import ModelConfig, TrunkConfig
from mar.diffusion.head import build_head
from mar.model.blocks import NORM_EPS, make_blocks
from mar.model.conditions import NO_CONDITION, Conditioner, build_conditioner, has_condition
from mar.model.positions import resize_positions
from mar.model.rotary import rope_cache
from mar.model.tokens import gather_tokens, scatter_tokens
from mar.nn import Linear

UNCONDITIONAL = NO_CONDITION
"""The label of an image without a class."""


class MAR(nn.Module):
    """Visible tokens, their positions and the image's condition -> z of all tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder_rope: Tensor | None
        self.decoder_rope: Tensor | None
        e, f, length = config.encoder.width, config.decoder.width, config.tokens
        dropouts = (config.attention_dropout, config.projection_dropout)

        # embeddings of conditions and tokens, encoder
        self._conditioner, conditioner = build_conditioner(config)
        self.add_module(self._conditioner, conditioner)
        if not config.tie_null:
            self.null_class = nn.Parameter(torch.empty(1, e))
        self.token_embed = Linear(config.token_width, e)
        self.encoder_position = nn.Parameter(torch.empty(config.buffer_size + length, e))
        self.embed_norm = nn.LayerNorm(e, eps=NORM_EPS)
        self.encoder = make_blocks(config.encoder, *dropouts)
        self.encoder_norm = nn.LayerNorm(e, eps=NORM_EPS)

        # decoder
        self.decoder_embed = Linear(e, f)
        self.mask_token = nn.Parameter(torch.empty(f))
        self.decoder_position = nn.Parameter(torch.empty(config.buffer_size + length, f))
        self.decoder = make_blocks(config.decoder, *dropouts)
        self.decoder_norm = nn.LayerNorm(f, eps=NORM_EPS)
        self.diffusion_position = nn.Parameter(torch.empty(length, f))

        for name, cache in _rope_caches(config).items():
            self.register_buffer(name, cache, persistent=False)

        self.head = build_head(config.token_width, f, config.head)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw matrices Xavier-uniform and embeddings normal(0.02); the head draws its own weights."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embeddings: list[Tensor] = [self.mask_token] if self.config.tie_null else [self.null_class, self.mask_token]
        embeddings += [self.encoder_position, self.decoder_position, self.diffusion_position]
        for embedding in embeddings:
            nn.init.normal_(embedding, std=0.02)
        if self.conditioner is not None:
            self.conditioner.init_weights()
        self.head.init_weights()

    @property
    def conditioner(self) -> Conditioner | None:
        """The module that embeds conditions; None for an unconditional model."""
        module: Conditioner | None = getattr(self, self._conditioner)
        return module

    @property
    def null_embedding(self) -> Float[Tensor, "1 e"]:
        """Embedding of images without a condition of any kind."""
        return self.mask_token.unsqueeze(0) if self.config.tie_null else self.null_class

    @torch.no_grad()
    def with_grid(self, grid: tuple[int, int], rotary: Literal["interpolated", "continued"] = "interpolated") -> MAR:
        """Return this model on another grid of latent cells, for sampling.

        All weights but the positions are shared, and learned positions are interpolated (`mar.model.positions`). This
        model stays as it is; its own grid returns itself.

        Args:
            grid: height and width of the latents, in latent cells.
            rotary: spread rotary positions over the trained grid, as learned ones; or keep the distances of tokens.
        """
        if grid == self.config.grid:
            return self
        other = copy.copy(self)
        for names in ("_parameters", "_buffers", "_modules"):  # the copy's own entries, of the same tensors
            other.__dict__[names] = dict(self.__dict__[names])
        other.config = config = replace(self.config, grid=grid)
        for name, buffer_size in (("encoder", config.buffer_size), ("decoder", config.buffer_size), ("diffusion", 0)):
            learned = self.get_parameter(f"{name}_position")
            position = resize_positions(learned, buffer_size, self.config.token_grid, config.token_grid)
            other.register_parameter(f"{name}_position", nn.Parameter(position, requires_grad=learned.requires_grad))
        trained = self.config.token_grid if rotary == "interpolated" else None
        for name, cache in _rope_caches(config, trained).items():
            here = None if cache is None else cache.to(self.mask_token.device)
            other.register_buffer(name, here, persistent=False)
        return other

    def blocks(self) -> list[nn.Module]:
        """Return all blocks, the units to compile, recompute or quantize."""
        return [*self.encoder, *self.decoder, *self.head.blocks]

    def forward(
        self,
        tokens: Float[Tensor, "n L d"],
        condition: Shaped[Tensor, "n ..."],
        visible: Int[Tensor, "n v"],
        *,
        padded: bool = False,
        query_idx: Int[Tensor, "n r"] | None = None,
    ) -> Float[Tensor, "n r f"]:
        """Compute z from the visible tokens.

        Args:
            tokens: only those at `visible` positions are read.
            condition: class numbers, or another kind's (`mar.model.conditions`).
            visible: positions of the visible tokens.
            padded: whether rows of `visible` are padded to one length with L.
            query_idx: positions of the output, padded with L (None: all, r = L).
        """
        encoded = self.encode(tokens, condition, visible, padded=padded)
        return self.decode(encoded, visible, query_idx)

    def encode(
        self,
        tokens: Float[Tensor, "n L d"],
        condition: Shaped[Tensor, "n ..."],
        visible: Int[Tensor, "n v"],
        *,
        padded: bool = False,
    ) -> Float[Tensor, "n s e"]:
        """Encode the buffer tokens, which carry the condition, and the visible tokens.

        Args:
            tokens, condition, visible, padded: as in `forward`.
        """
        b, length, n = self.config.buffer_size, self.config.tokens, len(tokens)

        # buffer tokens, then visible tokens, each with its position embedding
        buffer_tokens = self.embed_condition(condition) + self.encoder_position[:b]
        positions = self.encoder_position[b:].expand(n, -1, -1)
        visible_tokens = self.token_embed(gather_tokens(tokens, visible)) + gather_tokens(positions, visible)
        x = self.embed_norm(torch.cat([buffer_tokens, visible_tokens], dim=1))

        # attention ignores padding
        key_mask = None
        if padded:
            key_mask = nn.functional.pad(visible < length, (b, 0), value=True)[:, None, None, :]

        # rotary angles of these tokens
        rope = None
        if self.encoder_rope is not None:
            buffer_rope = self.encoder_rope[:b].expand(n, -1, -1, -1)
            grid_rope = self.encoder_rope[b:].flatten(1).expand(n, -1, -1)
            rope = torch.cat([buffer_rope, gather_tokens(grid_rope, visible).unflatten(-1, (-1, 2))], dim=1)

        # encoder blocks
        for block in self.encoder:
            x = block(x, key_mask, rope)
        encoded: Tensor = self.encoder_norm(x)
        return encoded

    def decode(
        self, encoded: Float[Tensor, "n s e"], visible: Int[Tensor, "n v"], query_idx: Int[Tensor, "n r"] | None = None
    ) -> Float[Tensor, "n r f"]:
        """Put mask tokens at masked positions, and compute z at `query_idx`.

        Every block but the last needs all tokens; the last computes those at `query_idx` alone.
        """
        b, length = self.config.buffer_size, self.config.tokens

        # mask tokens everywhere, encoded tokens at visible positions, buffer tokens in front
        x = self.decoder_embed(encoded)
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), length, -1)
        x = torch.cat([x[:, :b], scatter_tokens(mask_tokens, visible, x[:, b:])], dim=1) + self.decoder_position

        # decoder blocks
        rope = None if self.decoder_rope is None else self.decoder_rope.unsqueeze(0)
        if query_idx is None:
            query_idx = torch.arange(length, device=x.device).expand(len(x), -1)
        *blocks, last = self.decoder
        for block in blocks:
            x = block(x, rope=rope)
        x = last(x, rope=rope, query_idx=b + query_idx)

        # z: the output plus the position embedding for the head
        positions = self.diffusion_position.expand(len(x), -1, -1)
        z: Tensor = self.decoder_norm(x) + gather_tokens(positions, query_idx)
        return z

    def embed_condition(self, condition: Shaped[Tensor, "n ..."]) -> Float[Tensor, "n _ e"]:
        """Return buffer tokens; the learned null embedding for images without a condition."""
        null = self.null_embedding.expand(len(condition), 1, -1)
        if self.conditioner is None:
            return null
        return torch.where(has_condition(condition)[:, None, None], self.conditioner(condition), null)


def _rope_caches(config: ModelConfig, trained: tuple[int, int] | None = None) -> dict[str, Tensor | None]:
    """Compute the rotary tables of encoder and decoder; None for one without rotary positions."""

    def table(trunk: TrunkConfig) -> Tensor | None:
        if not trunk.rotary:
            return None
        return rope_cache(config.buffer_size, config.token_grid, trunk.head_width, trained=trained)

    return {"encoder_rope": table(config.encoder), "decoder_rope": table(config.decoder)}
