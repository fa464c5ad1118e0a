"""Measure how well a model explains each token of an image."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mar.model.mar import MAR
from mar.model.tokens import gather_tokens, patchify
from mar.random import make_generator

PARTS = 4
"""Each token is hidden once, together with a quarter of the others."""
TIMESTEPS = (0.1, 0.3, 0.5, 0.7)
"""Noise levels of the loss, as shares of the trained timesteps."""


@torch.no_grad()
def token_losses(
    model: MAR, latents: Float[Tensor, "n c h w"], condition: Shaped[Tensor, "n ..."], seed: int = 0
) -> Float[Tensor, "n rows columns"]:
    """Return the diffusion loss of every token, given the others.

    A high loss means that the model would draw something else there.

    Args:
        model: in eval mode.
        latents: normalized.
        condition: class numbers, or another kind's (`mar.model.conditions`).
        seed: of the noise and of the parts that are hidden together.
    """
    tokens = patchify(latents, model.config.patch_size)
    n, length, width = tokens.shape
    generator = make_generator(seed)
    order = torch.randperm(length, generator=generator)
    levels = [round(share * (model.config.head.diffusion_steps - 1)) for share in TIMESTEPS]
    noise = torch.randn(len(levels), 1, length, width, generator=generator).to(tokens.device)
    losses = torch.zeros(n, length)
    for part in range(min(PARTS, length)):
        # trunk: z of the hidden tokens
        hidden = order[part::PARTS].sort().values
        visible = torch.cat([order[i::PARTS] for i in range(PARTS) if i != part]).sort().values
        query_idx, visible_idx = (positions.expand(n, -1).to(tokens.device) for positions in (hidden, visible))
        z = model(tokens, condition, visible_idx, query_idx=query_idx)
        # head: their loss at each noise level
        timestep = torch.tensor(levels, device=tokens.device).view(-1, 1, 1).expand(-1, n, len(hidden))
        part_noise = noise[:, :, hidden.to(tokens.device)].expand(-1, n, -1, -1)
        loss = model.head.loss(gather_tokens(tokens, query_idx), z, timestep, part_noise)
        losses[:, hidden] = loss.view(-1, n, len(hidden)).mean(0).float().cpu()
    return losses.view(n, *model.config.token_grid)
