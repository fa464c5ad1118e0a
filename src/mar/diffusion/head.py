"""The diffusion head: a small MLP with adaptive layer norm that denoises one token, given its condition z.

Source: paper, sections 3.2 and 4.1 ("Denoising MLP"). Letters of shapes: ... any leading dimensions, d values of
a token, f width of z, w width of the head.

What does not depend on the noisy token is a call of its own: `condition` (from timestep and z) and `modulations`
(shift, scale and gate of every layer, 62% of the arithmetic), so that a sampler computes them for many steps in one
product.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mar.config import HeadConfig
from mar.nn import Linear, to_float32

FREQUENCIES = 256
"""Number of sinusoidal frequencies of a timestep."""
MAX_PERIOD = 10000
"""Longest period of the sinusoids."""
NORM_EPS = 1e-6
"""Epsilon of the layer norms."""

Modulations = list[Tensor]
"""For each residual block (..., 3w): shift, scale and gate; for the last layer (..., 2w): shift and scale."""


class TimeEmbedding(nn.Module):
    """Timestep numbers -> (..., w): sinusoids, cos then sin, and a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(FREQUENCIES, width)
        self.fc2 = Linear(width, width)

    def forward(self, t: Int[Tensor, "..."]) -> Float[Tensor, "... w"]:
        """Embed timestep numbers."""
        half = FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float().unsqueeze(-1) * torch.exp(-math.log(MAX_PERIOD) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc1.weight.dtype)
        embedded: Tensor = self.fc2(functional.silu(self.fc1(waves)))
        return embedded


class ResidualBlock(nn.Module):
    """x + gate * mlp(norm(x) * (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)
        self.modulation = Linear(width, 3 * width)

    def forward(self, x: Float[Tensor, "... w"], condition: Float[Tensor, "... w"]) -> Float[Tensor, "... w"]:
        """Apply the block, modulated by the condition."""
        return self.modulated(x, self.modulation(condition))

    def modulated(self, x: Float[Tensor, "... w"], modulation: Float[Tensor, "... three_w"]) -> Float[Tensor, "... w"]:
        """The block with its shift, scale and gate already computed."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        hidden = functional.silu(self.fc1(self.norm(x) * (1 + scale) + shift))
        return x + gate * self.fc2(hidden)


class DiffusionHead(nn.Module):
    """Noisy token, timestep and z -> prediction and variance value: (..., 2d)."""

    def __init__(self, token_width: int, z_width: int, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.token_width = token_width
        self.time_embed = TimeEmbedding(config.width)
        self.z_embed = Linear(z_width, config.width)
        self.input = Linear(token_width, config.width)
        self.blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.depth))
        self.final_modulation = Linear(config.width, 2 * config.width)
        self.output = Linear(config.width, 2 * token_width)
        self.initialise()

    def initialise(self) -> None:
        """Every block starts as the identity and the output at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.fc1, self.time_embed.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        for last in (*self.modulation_layers(), self.output):
            nn.init.zeros_(cast(Linear, last).weight)

    def forward(
        self, x: Float[Tensor, "... d"], t: Int[Tensor, "..."], z: Float[Tensor, "... f"]
    ) -> Float[Tensor, "... two_d"]:
        """The whole network at once, as in training; `t` are timestep numbers of the trained schedule."""
        condition = self.condition(self.embed_times(t), self.embed_conditions(z))
        h = self.embed_tokens(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.final(h, self.final_modulation(condition))

    def embed_times(self, t: Int[Tensor, "..."]) -> Float[Tensor, "... w"]:
        """Time embeddings; where there are more rows than timesteps, each timestep is embedded once."""
        steps = self.config.diffusion_steps
        if t.numel() <= steps:
            embedded: Tensor = self.time_embed(t)
            return embedded
        table = self.time_embed(torch.arange(steps, device=t.device))
        return functional.embedding(t, table)

    def embed_conditions(self, z: Float[Tensor, "... f"]) -> Float[Tensor, "... w"]:
        """z as the modulations take it."""
        embedded: Tensor = self.z_embed(z)
        return embedded

    def embed_tokens(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... w"]:
        """Noisy tokens as the first block takes them."""
        return to_float32(self.input(x))

    @staticmethod
    def condition(time: Float[Tensor, "... w"], z: Float[Tensor, "... w"]) -> Float[Tensor, "... w"]:
        """What the modulations are computed from: SiLU(time + z), both already embedded."""
        return functional.silu(time + z)

    def modulations(self, condition: Float[Tensor, "... w"]) -> Modulations:
        """Shift, scale and gate of every layer."""
        return [layer(condition) for layer in self.modulation_layers()]

    def modulation_layers(self) -> list[nn.Module]:
        """The linear layers that compute them: of each block, and the last."""
        return [*(cast(ResidualBlock, block).modulation for block in self.blocks), self.final_modulation]

    def denoise_embedded(self, h: Float[Tensor, "... w"], modulations: Modulations) -> Float[Tensor, "... two_d"]:
        """The part that depends on noisy tokens, embedded already: callers run one x under several conditions."""
        for block, modulation in zip(self.blocks, modulations, strict=False):
            h = cast(ResidualBlock, block).modulated(h, modulation)
        return self.final(h, modulations[-1])

    def final(self, h: Float[Tensor, "... w"], modulation: Float[Tensor, "... two_w"]) -> Float[Tensor, "... two_d"]:
        """The last layer."""
        shift, scale = modulation.chunk(2, dim=-1)
        h = functional.layer_norm(h, h.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift
        out: Tensor = self.output(h)
        return to_float32(out)
