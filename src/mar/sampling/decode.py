"""Generation as a function over an explicit state: reveal tokens step by step until none is hidden.

Source: paper, section 3.4 (equation 3, figure 3c) and 4.2. Letters of shapes: n images, L tokens, d values of a token,
v visible tokens, r rows (tokens revealed in this step, row-major over image and position).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mar.config import SamplingConfig
from mar.diffusion.schedule import Schedule, cosine, respace
from mar.diffusion.solvers import ancestral
from mar.model.mar import MAR, UNCONDITIONAL
from mar.model.masking import reveal_schedule, unknown_order
from mar.sampling.draws import Draws
from mar.sampling.guidance import GuidedHead, guidance_scale


@dataclass(frozen=True)
class DecodeState:
    """Where the generation of a batch stands."""

    tokens: Float[Tensor, "n L d"]
    """Values of the tokens that are known; zeros elsewhere."""
    unknown: Bool[Tensor, "n L"]
    """Which tokens are still hidden (CPU)."""
    orders: tuple[Int[Tensor, " _M"], ...]
    """For each image the M positions to generate, M its own; revealed from the end (CPU)."""
    schedules: tuple[tuple[int, ...], ...]
    """For each image how many stay hidden after each of its steps."""
    step: int = 0
    """How many reveal steps are done."""

    @property
    def steps(self) -> int:
        """Reveal steps in all; images with fewer unknown tokens are finished sooner."""
        return max((len(schedule) for schedule in self.schedules), default=0)

    def revealed(self, image: int) -> Int[Tensor, " r"]:
        """Positions of `image` that the next step reveals, ascending; none where the image is finished."""
        schedule = self.schedules[image]
        if self.step >= len(schedule):
            return self.orders[image][:0]
        before = schedule[self.step - 1] if self.step else len(self.orders[image])
        return self.orders[image][schedule[self.step] : before].sort().values


def start(tokens: Float[Tensor, "n L d"], unknown: Bool[Tensor, "n L"], steps: int, draws: Draws) -> DecodeState:
    """The state before the first step: `tokens` are kept where `unknown` is false."""
    unknown = unknown.cpu()
    orders = tuple(unknown_order(draws.order(i, unknown.shape[1]), mask) for i, mask in enumerate(unknown))
    schedules = tuple(tuple(reveal_schedule(len(order), steps)) for order in orders)
    kept = torch.where(unknown.unsqueeze(-1).to(tokens.device), 0.0, tokens)
    return DecodeState(kept, unknown, orders, schedules)


def decode(
    model: MAR, labels: Int[Tensor, " n"], state: DecodeState, sampling: SamplingConfig, draws: Draws
) -> Iterator[DecodeState]:
    """Yields the state after every reveal step, the last with nothing hidden.

    Image i of the batch depends on its label, its draws and its known tokens alone.
    """
    sampling.check(model.config)
    schedule = respace(cosine(model.config.head.diffusion_steps), sampling.diffusion_steps)
    while state.step < state.steps:
        state = reveal(model, labels, state, sampling, schedule, draws)
        yield state


@torch.no_grad()
def reveal(
    model: MAR,
    labels: Int[Tensor, " n"],
    state: DecodeState,
    sampling: SamplingConfig,
    schedule: Schedule,
    draws: Draws,
) -> DecodeState:
    """One reveal step: conditions from the visible tokens, then the diffusion of the tokens to be revealed."""
    device = state.tokens.device
    positions = [state.revealed(i) for i in range(len(state.orders))]
    active = [i for i, revealed in enumerate(positions) if len(revealed)]
    images = torch.tensor([i for i in active for _ in positions[i]])
    places = torch.cat([positions[i] for i in active])
    scales = [guidance_scale(sampling, state.schedules[i][state.step], model.config.tokens) for i in active]
    guided = sampling.guidance != 1.0 and bool((labels != UNCONDITIONAL).any())

    batch = torch.tensor(active, device=device)
    z = conditions(model, state.tokens[batch], labels[batch], state.unknown[active], guided)
    rows = torch.tensor([row for row, i in enumerate(active) for _ in positions[i]], device=device)
    z = z[:, rows, places.to(device)].flatten(0, 1)
    scale = torch.tensor([[s] for s, i in zip(scales, active, strict=True) for _ in positions[i]], device=device)

    network = GuidedHead(model.head, z, schedule.timesteps, scale if guided else None)
    count = (len(schedule), model.config.token_width)
    noise = torch.cat([draws.noise(i, count[0], len(positions[i]), count[1]) for i in active], dim=1)
    drawn = ancestral(
        network,
        noise.to(device),
        schedule,
        model.config.head.prediction,
        temperature=sampling.temperature,
        x0_bound=sampling.x0_bound,
    )
    tokens = state.tokens.index_put((images.to(device), places.to(device)), drawn)
    unknown = state.unknown.index_put((images, places), torch.tensor(False))
    return replace(state, tokens=tokens, unknown=unknown, step=state.step + 1)


def conditions(
    model: MAR,
    tokens: Float[Tensor, "n L d"],
    labels: Int[Tensor, " n"],
    unknown: Bool[Tensor, "n L"],
    guided: bool,
) -> Float[Tensor, "halves n L f"]:
    """z from the visible tokens; the second half, where guided, without the class."""
    visible, ragged = visible_positions(unknown)
    visible = visible.to(tokens.device)
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, UNCONDITIONAL)])
        tokens, visible = tokens.repeat(2, 1, 1), visible.repeat(2, 1)
    z = model(tokens, labels, visible, ragged=ragged)
    return z.unflatten(0, (2 if guided else 1, -1))


def visible_positions(unknown: Bool[Tensor, "n L"]) -> tuple[Int[Tensor, "n v"], bool]:
    """Positions of known tokens, ascending, padded with L; and whether any is padding."""
    length = unknown.shape[1]
    counts = (~unknown).sum(1)
    longest = int(counts.max())
    position = torch.where(unknown, length, torch.arange(length)).sort(dim=1).values
    return position[:, :longest], bool((counts != longest).any())


def all_unknown(count: int, tokens: int) -> Bool[Tensor, "n L"]:
    """The mask of a generation from nothing."""
    return torch.ones(count, tokens, dtype=torch.bool)


def as_labels(labels: Sequence[int], device: torch.device) -> Int[Tensor, " n"]:
    """Class numbers as a tensor; UNCONDITIONAL for none."""
    return torch.tensor(list(labels), dtype=torch.long, device=device)
