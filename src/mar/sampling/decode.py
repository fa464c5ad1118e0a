"""Reveals tokens step by step, by pure functions of a state.

One reveal step: the trunk computes z for each token to reveal, from the visible tokens; the diffusion head draws these
tokens. Source: paper, sections 3.4 (equation 3, figure 3c) and 4.2. Letters of shapes: n images, L tokens, d values of
a token, v visible tokens, f width of z, M tokens to generate, r tokens revealed in this step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mar.backends import backend_for
from mar.config import MaskSchedule, Order, RevealRule, SamplingConfig
from mar.diffusion.head import TokenSampler
from mar.model.conditions import NO_CONDITION, has_condition
from mar.model.mar import MAR
from mar.model.masking import apply_order, mask_schedule, reveal_probabilities, unknown_order
from mar.model.tokens import gather_tokens
from mar.sampling.noise import NoiseAhead, NoiseSource, SeededNoise, UniformSource, group_noise
from mar.sampling.reveal_plan import RevealPlan, StepPlan

# ---- state


@dataclass(frozen=True)
class DecodeState:
    """State of a batch between two reveal steps."""

    tokens: Float[Tensor, "n L d"]
    """Values of the known tokens; zeros elsewhere."""
    unknown: Bool[Tensor, "n L"]
    """True at tokens that are still masked (CPU)."""
    orders: tuple[Int[Tensor, " _M"], ...]
    """Positions to generate of each image, M its own; revealed from the end (CPU)."""
    schedules: tuple[tuple[int, ...], ...]
    """Number of tokens of each image that are still masked after each step."""
    step: int = 0
    """Number of reveal steps done."""
    residual: Float[Tensor, "n L f"] | None = None
    """Last residual (uncond - cond) of z; None if the sampler does not reuse it."""

    @property
    def steps(self) -> int:
        """Number of reveal steps; images with few tokens to generate finish sooner."""
        return max(map(len, self.schedules), default=0)

    def revealed(self, image: int) -> Int[Tensor, " r"]:
        """Return the positions of the next step, ascending; none after the last."""
        schedule = self.schedules[image]
        if self.step >= len(schedule):
            return self.orders[image][:0]
        masked_before = schedule[self.step - 1] if self.step else len(self.orders[image])
        return self.orders[image][schedule[self.step] : masked_before].sort().values

    def revealed_at(self) -> Int[Tensor, "n L"]:
        """Return the step that reveals each token, from 1; 0 for the known ones."""
        steps = torch.zeros(self.unknown.shape, dtype=torch.long)
        for image, (order, schedule) in enumerate(zip(self.orders, self.schedules, strict=True)):
            counts = [before - after for before, after in pairwise([len(order), *schedule])]
            each = torch.arange(1, len(schedule) + 1).repeat_interleave(torch.tensor(counts, dtype=torch.long))
            steps[image, order] = each.flip(0)  # orders are revealed from the end
        return steps


def init_state(
    tokens: Float[Tensor, "n L d"],
    unknown: Bool[Tensor, "n L"],
    steps: int,
    noise_source: NoiseSource,
    *,
    schedule: MaskSchedule = "cosine",
    order: Order = "random",
    rule: RevealRule = "counted",
    grid: tuple[int, int] | None = None,
) -> DecodeState:
    """Create the state before the first step.

    Args:
        tokens: the known ones; others are not read.
        unknown: true at tokens to generate.
        steps: K, the number of reveal steps.
        noise_source: draws the order of each image.
        schedule: kind of mask schedule.
        order: kind of order.
        rule: how many tokens a step reveals, by the schedule.
        grid: rows and columns of the tokens, for orders that need them (None: one row).
    """
    unknown = unknown.cpu()
    length = unknown.shape[1]
    random_orders = [noise_source.order(image, length) for image in range(len(unknown))]
    full_orders = [apply_order(each, grid or (1, length), order) for each in random_orders]
    orders = tuple(unknown_order(each, mask) for each, mask in zip(full_orders, unknown, strict=True))
    reveal = REVEAL_RULES[rule]
    schedules = tuple(reveal(image, len(each), steps, schedule, noise_source) for image, each in enumerate(orders))
    known = torch.where(unknown.unsqueeze(-1).to(tokens.device), 0.0, tokens)
    return DecodeState(known, unknown, orders, schedules)


def _counted(image: int, unknown: int, steps: int, kind: MaskSchedule, noise_source: NoiseSource) -> tuple[int, ...]:
    """Reveal as many tokens as the mask schedule says."""
    return _mask_schedule(unknown, steps, kind)


@lru_cache(maxsize=256)
def _mask_schedule(unknown: int, steps: int, kind: MaskSchedule) -> tuple[int, ...]:
    return tuple(mask_schedule(unknown, steps, kind))


def _binomial(image: int, unknown: int, steps: int, kind: MaskSchedule, noise_source: NoiseSource) -> tuple[int, ...]:
    """Reveal each masked token with a probability, at least one a step, and all in the last (eMIGM).

    As orders are random, only the number of tokens is drawn. Fewer steps are made if all tokens are revealed sooner.
    """
    if not isinstance(noise_source, UniformSource):
        raise TypeError(f"reveal binomial: got {type(noise_source).__name__} as noise, expected one with `uniforms`")
    masked, schedule = unknown, list[int]()
    for probability in reveal_probabilities(steps, kind):
        if not masked:
            break
        revealed = int((noise_source.uniforms(image, masked) < probability).sum())
        masked -= min(masked, max(1, revealed))
        schedule.append(masked)
    return tuple(schedule)


REVEAL_RULES: dict[RevealRule, Callable[[int, int, int, MaskSchedule, NoiseSource], tuple[int, ...]]] = {
    "counted": _counted,
    "binomial": _binomial,
}
"""Reveal rules by their names in `SamplingConfig`: tokens still masked after each step of an image."""


# ---- sampling


def sample_tokens(
    model: MAR,
    condition: Shaped[Tensor, "n ..."],
    state: DecodeState,
    sampling: SamplingConfig,
    noise_source: NoiseSource,
) -> Iterator[DecodeState]:
    """Yield the state after every reveal step, until nothing is masked.

    Args:
        model: in eval mode.
        condition: class numbers, or another kind's (`mar.model.conditions`).
        state: of `init_state`.
        sampling: the settings.
        noise_source: image i depends on its condition, its noise and its known tokens alone.
    """
    sampling.check(model.config)
    backend = backend_for(state.tokens.device)
    head = backend.sampling_head(model.head)
    plan = plan_steps(head, condition, state, sampling)
    # a device that works by itself must not wait for the host's random numbers
    seeded = isinstance(noise_source, SeededNoise) and type(noise_source).noise is SeededNoise.noise
    ahead = backend.asynchronous and seeded and state.step < state.steps
    noise = NoiseAhead(noise_source, plan, head.token_width) if ahead else noise_source  # type: ignore[arg-type]
    try:
        while state.step < state.steps:
            state = decode_step(model, condition, state, sampling, noise, head, plan)
            if state.step == state.steps:
                del head  # frees its copy of the weights: the tokenizer needs memory next
            backend.free_memory(model)
            yield state
    finally:
        if isinstance(noise, NoiseAhead):
            noise.close()


def plan_steps(
    head: TokenSampler,
    condition: Shaped[Tensor, "n ..."],
    state: DecodeState,
    sampling: SamplingConfig,
    count: int | None = None,
) -> RevealPlan:
    """Plan the next `count` reveal steps, or all that are left.

    Args:
        head: the model's.
        condition, state, sampling: as in `sample_tokens`.
        count: number of steps (None: all).
    """
    end = state.steps if count is None else min(state.steps, state.step + count)
    return RevealPlan(
        state.orders,
        state.schedules,
        state.revealed_at(),
        sampling,
        guidable=bool(has_condition(condition).any()),
        steps=range(state.step, end),
        device=state.tokens.device,
        num_noises=lambda steps: head.num_noises(steps, sampling),
        token_width=head.token_width,
    )


@torch.no_grad()
def decode_step(
    model: MAR,
    condition: Shaped[Tensor, "n ..."],
    state: DecodeState,
    sampling: SamplingConfig,
    noise_source: NoiseSource | NoiseAhead,
    head: TokenSampler | None = None,
    plan: RevealPlan | None = None,
) -> DecodeState:
    """Reveal the tokens of one step: trunk -> z -> head -> tokens.

    Args:
        model, condition, state, sampling, noise_source: as in `sample_tokens`.
        head: the model's, prepared by the backend for sampling (None: as it is).
        plan: of the batch (None: this step is planned alone).
    """
    sampler = head or model.head
    plan = plan or plan_steps(sampler, condition, state, sampling, count=1)
    step = plan[state.step]

    # trunk: z of these tokens, conditional and unconditional
    conditions = compute_conditions(model, condition, state, step, sampling.uncond_interval)

    # head: draws the tokens, all images with the same settings together
    tokens = state.tokens
    for group in step.groups:
        # z of each token; with guidance, then its unconditional z
        z = conditions.z[group.row, group.column]
        if group.guided:
            z = torch.cat([z, conditions.z[group.uncond_row, group.column]])
        noise = group_noise(noise_source, group, plan, sampler.token_width)
        drawn = sampler.sample(z, noise, group.scale if group.guided else None, group.diffusion_steps, sampling)
        tokens = tokens.index_put((group.image, group.position), drawn)
    unknown = state.unknown & (plan.revealed_at_cpu > state.step + 1)
    return replace(state, tokens=tokens, unknown=unknown, step=state.step + 1, residual=conditions.residual)


# ---- trunk


class Conditions(NamedTuple):
    """z of the tokens that a reveal step reveals."""

    z: Float[Tensor, "m_and_g r f"]
    """Conditional z of each unfinished image, padded; then the unconditional z of each guided one."""
    residual: Float[Tensor, "n L f"] | None
    """Residual (uncond - cond) for the next step to reuse, of all images of the batch."""


def compute_conditions(
    model: MAR, condition: Shaped[Tensor, "n ..."], state: DecodeState, step: StepPlan, uncond_interval: int
) -> Conditions:
    """Compute conditional and unconditional z of the tokens to reveal.

    Between unconditional runs, `uncond_interval` guided steps apart, the last residual (uncond - cond) is reused
    (LazyMAR, arXiv 2503.12450).

    Args:
        model, condition, state: as in `sample_tokens`.
        step: its plan.
        uncond_interval: of `SamplingConfig`.
    """
    device, length = state.tokens.device, state.unknown.shape[1]
    images, query_idx, uncond_rows, guided = step.images, step.query_idx, step.uncond_rows, step.guided_rows
    count = len(images)
    tokens = state.tokens
    if count < len(tokens):
        tokens, condition = tokens[images], condition[images]

    # a residual for later steps needs z of all tokens
    keep_residual = uncond_interval > 1 and len(uncond_rows) > 0
    outputs = torch.arange(length, device=device).expand(count, -1) if keep_residual else query_idx
    z = run_trunk(model, tokens, condition, step, outputs)
    if uncond_interval == 1:
        return Conditions(z, None)

    # unconditional z = conditional z + residual
    cond, residual = z[:count], state.residual
    if residual is None:
        residual = z.new_zeros(len(state.orders), length, z.shape[-1])
    if keep_residual:
        residual = residual.index_copy(0, images[uncond_rows], z[count:] - cond[uncond_rows])
        cond = gather_tokens(cond, query_idx)
    uncond_z = cond[guided] + gather_tokens(residual[images[guided]], query_idx[guided])
    return Conditions(torch.cat([cond, uncond_z]), residual)


def run_trunk(
    model: MAR,
    tokens: Float[Tensor, "m L d"],
    condition: Shaped[Tensor, "m ..."],
    step: StepPlan,
    query_idx: Int[Tensor, "m r"],
) -> Float[Tensor, "m_and_u r f"]:
    """Compute z of unfinished images, then of rows without condition.

    The latter are the step's `uncond_rows`.

    Args:
        model: in eval mode.
        tokens: of the unfinished images.
        condition: class numbers, or another kind's (`mar.model.conditions`).
        step: its plan.
        query_idx: positions of the output, padded with L.
    """
    visible, uncond_rows = step.visible, step.uncond_rows
    if len(uncond_rows):
        condition = torch.cat([condition, torch.full_like(condition[uncond_rows], NO_CONDITION)])
        tokens, visible, query_idx = (torch.cat([each, each[uncond_rows]]) for each in (tokens, visible, query_idx))
    trunk = backend_for(tokens.device).trunk(model)
    return trunk(tokens, condition, visible, padded=step.padded, query_idx=query_idx)


def all_masked(count: int, tokens: int) -> Bool[Tensor, "n L"]:
    """Return a mask with all tokens unknown."""
    return torch.ones(count, tokens, dtype=torch.bool)


def as_condition(condition: Sequence[int] | Shaped[Tensor, "n ..."], device: torch.device) -> Shaped[Tensor, "n ..."]:
    """Return conditions on a device; class numbers become a tensor."""
    if isinstance(condition, Tensor):
        return condition.to(device)
    return torch.tensor(list(condition), dtype=torch.long, device=device)
