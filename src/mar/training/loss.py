"""Compute the training loss: the diffusion loss of masked tokens given z.

Source: paper, section 3.2 (equation 1) and section 4.2. Letters of shapes: n images, c x h x w latents, L tokens,
m masked tokens of an image, k timesteps a token (`batch_mul`), d values of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mar.config import ModelConfig
from mar.model.conditions import drop_condition
from mar.model.mar import MAR
from mar.model.masking import draw_masked_count, random_order, split_by_mask
from mar.model.tokens import gather_tokens, patchify
from mar.random import make_generator


@dataclass(frozen=True)
class StepRandomness:
    """All random numbers of one batch's loss, except dropout."""

    order: Int[Tensor, "n L"]
    """A permutation of the tokens; the first `masked` are masked."""
    masked: int
    drop_label: Bool[Tensor, " n"]
    """Images trained without their condition, for classifier-free guidance."""
    timestep: Int[Tensor, "k n m"]
    noise: Float[Tensor, "k n m d"]

    def to(self, device: torch.device) -> StepRandomness:
        """Copy to a device; from pinned memory, without waiting for it."""
        return StepRandomness(
            self.order.to(device, non_blocking=True),
            self.masked,
            self.drop_label.to(device, non_blocking=True),
            self.timestep.to(device, non_blocking=True),
            self.noise.to(device, non_blocking=True),
        )

    def rows(self) -> dict[str, Tensor]:
        """Return the tensors by name, a row for each image."""
        timestep, noise = self.timestep.transpose(0, 1), self.noise.transpose(0, 1)
        return {"order": self.order, "drop_label": self.drop_label, "timestep": timestep, "noise": noise}

    @classmethod
    def from_rows(cls, rows: Mapping[str, Tensor]) -> StepRandomness:
        """Read the tensors of `rows`."""
        timestep, noise = (rows[name].transpose(0, 1).contiguous() for name in ("timestep", "noise"))
        return cls(rows["order"], timestep.shape[2], rows["drop_label"], timestep, noise)


def sample_randomness(config: ModelConfig, seed: int, step: int, positions: Sequence[int]) -> StepRandomness:
    """Draw random numbers for a batch, however the global batch is split.

    Args:
        config: the model.
        seed: the run's.
        step: keys the mask ratio, the same for all images of a step.
        positions: global sample positions, one an image, which key all else.
    """
    masked, k = draw_masked_count(config, make_generator(seed, step)), config.head.batch_mul
    orders, drops, timesteps, noises = [], [], [], []
    for position in positions:
        generator = make_generator(seed, 1, position)
        orders.append(random_order(config.tokens, generator))
        drops.append(torch.rand((), generator=generator) < config.label_drop)
        timesteps.append(torch.randint(config.head.diffusion_steps, (k, masked), generator=generator))
        noises.append(torch.randn(k, masked, config.token_width, generator=generator))
    return StepRandomness(
        torch.stack(orders), masked, torch.stack(drops), torch.stack(timesteps, 1), torch.stack(noises, 1)
    )


class DiffusionLoss(nn.Module):
    """Training loss of a MAR.

    It is one `forward`, so that DDP and FSDP see every parameter used.
    """

    def __init__(self, model: MAR) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, latents: Float[Tensor, "n c h w"], condition: Shaped[Tensor, "n ..."], draws: StepRandomness
    ) -> Float[Tensor, ""]:
        """Average the loss over timesteps, images and masked tokens."""
        return self.per_token_loss(latents, condition, draws).mean()

    def per_token_loss(
        self, latents: Float[Tensor, "n c h w"], condition: Shaped[Tensor, "n ..."], draws: StepRandomness
    ) -> Float[Tensor, " rows"]:
        """Compute the loss of each masked token and timestep, ordered like `draws.timestep`."""
        tokens = patchify(latents, self.model.config.patch_size)
        condition = drop_condition(condition, draws.drop_label)
        masked, visible = split_by_mask(draws.order, draws.masked)
        z = self.model(tokens, condition, visible, query_idx=masked)
        return self.model.head.loss(gather_tokens(tokens, masked), z, draws.timestep, draws.noise)
