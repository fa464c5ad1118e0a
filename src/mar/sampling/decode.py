"""Reveals tokens step by step, by pure functions of a state.

One reveal step: the trunk computes z for each token to reveal, from the visible tokens; the diffusion head draws these
tokens. Source: paper, sections 3.4 (equation 3, figure 3c) and 4.2. Letters of shapes: n images, L tokens, d values of
a token, v visible tokens, f width of z, M tokens to generate, r tokens revealed in this step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mar.backends import backend_for
from mar.config import MaskSchedule, Order, RevealRule, SamplingConfig
from mar.diffusion.head import TokenSampler
from mar.model.conditions import NO_CONDITION, has_condition
from mar.model.mar import MAR
from mar.model.masking import apply_order, mask_schedule, random_order, reveal_probabilities, unknown_order
from mar.model.tokens import gather_tokens
from mar.random import make_generator
from mar.sampling.guidance import StepSettings, step_settings

# ---- randomness


@runtime_checkable
class NoiseSource(Protocol):
    """Randomness of sampling: each image's order, then noise for each step."""

    def order(self, image: int, length: int) -> Int[Tensor, " L"]:
        """Draw the order of an image's tokens, revealed from its end."""
        ...

    def noise(self, image: int, noises: int, count: int, width: int) -> Float[Tensor, "noises count width"]:
        """Draw noise for the tokens that an image reveals in a step.

        Args:
            image: its index in the batch.
            noises: noises per token, the first and then one for each further diffusion step.
            count: number of tokens, in ascending order of position.
            width: values of a token.
        """
        ...


@runtime_checkable
class UniformSource(NoiseSource, Protocol):
    """Randomness of sampling by a reveal rule that draws."""

    def uniforms(self, image: int, count: int) -> Float[Tensor, " count"]:
        """Draw a uniform number for each masked token of a step."""
        ...


class SeededNoise:
    """Noise from one CPU generator per image, independent of the batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [make_generator(seed) for seed in seeds]

    def order(self, image: int, length: int) -> Tensor:
        """Draw the order of an image's tokens."""
        return random_order(length, self.generators[image])

    def noise(self, image: int, noises: int, count: int, width: int) -> Tensor:
        """Draw noise for the tokens that an image reveals in a step.

        Args:
            image, noises, count, width: as in `NoiseSource.noise`.
        """
        return torch.randn(noises, count, width, generator=self.generators[image])

    def uniforms(self, image: int, count: int) -> Tensor:
        """Draw a uniform number for each masked token of an image."""
        return torch.rand(count, generator=self.generators[image])


class SharedUniforms(SeededNoise):
    """Noise per image, with the uniforms of image 0 for all.

    Every image reveals as many tokens, as in the code of eMIGM.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds)
        self._drawn: list[Tensor] = []
        self._used = [0] * len(self.generators)

    def uniforms(self, image: int, count: int) -> Tensor:
        """Return the uniforms of image 0 at this step."""
        step, self._used[image] = self._used[image], self._used[image] + 1
        if step == len(self._drawn):
            self._drawn.append(super().uniforms(0, count))
        return self._drawn[step]


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
        return max((len(schedule) for schedule in self.schedules), default=0)

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
    while state.step < state.steps:
        state = decode_step(model, condition, state, sampling, noise_source, head)
        if state.step == state.steps:
            del head  # frees its copy of the weights: the tokenizer needs memory next
        backend.free_memory(model)
        yield state


@torch.no_grad()
def decode_step(
    model: MAR,
    condition: Shaped[Tensor, "n ..."],
    state: DecodeState,
    sampling: SamplingConfig,
    noise_source: NoiseSource,
    head: TokenSampler | None = None,
) -> DecodeState:
    """Reveal the tokens of one step: trunk -> z -> head -> tokens.

    Args:
        model, condition, state, sampling, noise_source: as in `sample_tokens`.
        head: the model's, prepared by the backend for sampling (None: as it is).
    """
    # plan: tokens and settings of each image
    guidable = bool(has_condition(condition).any())
    steps = plan_step(state, sampling, model.config.tokens, guidable)

    # trunk: z of these tokens, conditional and unconditional
    conditions = compute_conditions(model, condition, state, steps, sampling.uncond_interval)

    # head: draws the tokens, all images with the same settings together
    tokens, unknown = state.tokens, state.unknown
    for _, group in groupby(sorted(steps, key=_group_key), key=_group_key):
        images = list(group)
        drawn = denoise_tokens(head or model.head, conditions, images, sampling, noise_source)
        rows = torch.tensor([step.image for step in images for _ in step.positions])
        positions = torch.cat([step.positions for step in images])
        tokens = tokens.index_put((rows.to(tokens.device), positions.to(tokens.device)), drawn)
        unknown = unknown.index_put((rows, positions), torch.tensor(False))
    return replace(state, tokens=tokens, unknown=unknown, step=state.step + 1, residual=conditions.residual)


class ImageStep(NamedTuple):
    """One image's part of a reveal step."""

    row: int
    """Index among the unfinished images."""
    image: int
    """Index in the batch."""
    positions: Int[Tensor, " r"]
    """Tokens to reveal, ascending."""
    settings: StepSettings


def plan_step(state: DecodeState, sampling: SamplingConfig, tokens: int, guidable: bool) -> list[ImageStep]:
    """Plan the next step of each unfinished image.

    Args:
        state: before the step.
        sampling: the settings.
        tokens: number of tokens of an image.
        guidable: whether any image has a condition; without one, guidance has no effect and is left out.
    """
    steps: list[ImageStep] = []
    for image, schedule in enumerate(state.schedules):
        if state.step < len(schedule):
            settings = step_settings(sampling, schedule, tokens)[state.step]
            if not guidable:
                settings = StepSettings(settings.diffusion_steps, scale=1.0, run_uncond=False)
            steps.append(ImageStep(len(steps), image, state.revealed(image), settings))
    return steps


def _group_key(step: ImageStep) -> tuple[int, bool]:
    return step.settings.diffusion_steps, step.settings.guided


# ---- trunk


class Conditions(NamedTuple):
    """z of the tokens that a reveal step reveals."""

    z: Float[Tensor, "n_and_g r f"]
    """Conditional z of each image step, padded; then the unconditional z of each guided one."""
    uncond_rows: dict[int, int]
    """Row of a guided image step -> row of its unconditional z."""
    residual: Float[Tensor, "n L f"] | None
    """Residual (uncond - cond) for the next step to reuse, of all images of the batch."""


def compute_conditions(
    model: MAR, condition: Shaped[Tensor, "n ..."], state: DecodeState, steps: Sequence[ImageStep], uncond_interval: int
) -> Conditions:
    """Compute conditional and unconditional z of the tokens to reveal.

    Between unconditional runs, `uncond_interval` guided steps apart, the last residual (uncond - cond) is reused
    (LazyMAR, arXiv 2503.12450).

    Args:
        model, condition, state: as in `sample_tokens`.
        steps: of `plan_step`.
        uncond_interval: of `SamplingConfig`.
    """
    device, length = state.tokens.device, state.unknown.shape[1]
    unfinished = [step.image for step in steps]
    images = torch.tensor(unfinished, device=device)
    query_idx = pad_sequence([step.positions for step in steps], batch_first=True, padding_value=length).to(device)
    uncond = [step.row for step in steps if step.settings.run_uncond]
    uncond_rows = torch.tensor(uncond, dtype=torch.long, device=device)
    guided = [step.row for step in steps if step.settings.guided]
    rows_of_guided = {row: len(steps) + index for index, row in enumerate(guided)}

    # a residual for later steps needs z of all tokens
    keep_residual = uncond_interval > 1 and len(uncond) > 0
    all_positions = torch.arange(length, device=device).expand(len(steps), -1)
    z = run_trunk(
        model, state.tokens[images], condition[images], state.unknown[unfinished], uncond_rows,
        all_positions if keep_residual else query_idx,
    )  # fmt: skip
    if uncond_interval == 1:
        return Conditions(z, rows_of_guided, None)

    # unconditional z = conditional z + residual
    cond, residual = z[: len(steps)], state.residual
    if residual is None:
        residual = z.new_zeros(len(state.orders), length, z.shape[-1])
    if keep_residual:
        residual = residual.index_copy(0, images[uncond_rows], z[len(steps) :] - cond[uncond_rows])
        cond = gather_tokens(cond, query_idx)
    rows = torch.tensor(guided, dtype=torch.long, device=device)
    uncond_z = cond[rows] + gather_tokens(residual[images[rows]], query_idx[rows])
    return Conditions(torch.cat([cond, uncond_z]), rows_of_guided, residual)


def run_trunk(
    model: MAR,
    tokens: Float[Tensor, "n L d"],
    condition: Shaped[Tensor, "n ..."],
    unknown: Bool[Tensor, "n L"],
    uncond_rows: Int[Tensor, " u"],
    query_idx: Int[Tensor, "n r"],
) -> Float[Tensor, "n_and_u r f"]:
    """Compute z of all images, then of `uncond_rows` without their condition.

    Args:
        model: in eval mode.
        tokens: of the unfinished images.
        condition: class numbers, or another kind's (`mar.model.conditions`).
        unknown: true at masked tokens (CPU).
        uncond_rows: images to run without their condition as well.
        query_idx: positions of the output, padded with L.
    """
    visible, padded = visible_positions(unknown)
    visible = visible.to(tokens.device)
    if len(uncond_rows):
        condition = torch.cat([condition, torch.full_like(condition[uncond_rows], NO_CONDITION)])
        tokens, visible, query_idx = (torch.cat([each, each[uncond_rows]]) for each in (tokens, visible, query_idx))
    trunk = backend_for(tokens.device).trunk(model)
    return trunk(tokens, condition, visible, padded=padded, query_idx=query_idx)


def visible_positions(unknown: Bool[Tensor, "n L"]) -> tuple[Int[Tensor, "n v"], bool]:
    """Return the positions of known tokens, ascending, and whether any is padded.

    The padding is L.
    """
    length = unknown.shape[1]
    counts = (~unknown).sum(1)
    longest = int(counts.max())
    positions = torch.where(unknown, length, torch.arange(length)).sort(dim=1).values
    return positions[:, :longest], bool((counts != longest).any())


# ---- head


def denoise_tokens(
    head: TokenSampler,
    conditions: Conditions,
    group: Sequence[ImageStep],
    sampling: SamplingConfig,
    noise_source: NoiseSource,
) -> Float[Tensor, "r d"]:
    """Draw the tokens that a group of image steps reveals, row-major.

    Args:
        head: the model's.
        conditions: of the reveal step.
        group: image steps with the same number of diffusion steps, all guided or none.
        sampling: the settings.
        noise_source: gives each image its noise.
    """
    device = conditions.z.device
    diffusion_steps, guided = _group_key(group[0])
    # z of each token; with guidance, then its unconditional z
    columns = torch.cat([torch.arange(len(step.positions)) for step in group]).to(device)
    rows = torch.tensor([step.row for step in group for _ in step.positions], device=device)
    z, scale = conditions.z[rows, columns], None
    if guided:
        uncond = [conditions.uncond_rows[step.row] for step in group for _ in step.positions]
        z = torch.cat([z, conditions.z[torch.tensor(uncond, device=device), columns]])
        scale = torch.tensor([[step.settings.scale] for step in group for _ in step.positions], device=device)

    # noise of each image, on its positions ascending
    noises, width = head.num_noises(diffusion_steps, sampling), head.token_width
    noise = torch.cat([noise_source.noise(s.image, noises, len(s.positions), width) for s in group], dim=1)
    return head.sample(z, noise.to(device), scale, diffusion_steps, sampling)


def all_masked(count: int, tokens: int) -> Bool[Tensor, "n L"]:
    """Return a mask with all tokens unknown."""
    return torch.ones(count, tokens, dtype=torch.bool)


def as_condition(condition: Sequence[int] | Shaped[Tensor, "n ..."], device: torch.device) -> Shaped[Tensor, "n ..."]:
    """Return conditions on a device; class numbers become a tensor."""
    if isinstance(condition, Tensor):
        return condition.to(device)
    return torch.tensor(list(condition), dtype=torch.long, device=device)
