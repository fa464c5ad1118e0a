"""Where the randomness of sampling comes from: one generator per image, so that a picture depends on its seed alone.

Generation as a function over an explicit state: reveal tokens step by step until none is hidden.

Source: paper, section 3.4 (equation 3, figure 3c) and 4.2. Letters of shapes: n images, L tokens, d values of a token,
v visible tokens, f width of z, r rows (tokens revealed in this step, row-major over image and position).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from mar.backends.cpu.packed_head import PackedHead, packed
from mar.backends.cpu.threads import trim_heap
from mar.backends.cuda import RowSampler, sample_rows, sampler_for
from mar.config import MaskSchedule, ModelConfig, Order, SamplingConfig
from mar.diffusion.head import DiffusionHead
from mar.diffusion.schedule import Schedule, respace, training_schedule
from mar.diffusion.solvers import num_noises
from mar.model.mar import MAR, UNCONDITIONAL
from mar.model.masking import apply_order, mask_schedule, random_order, unknown_order
from mar.model.tokens import gather_tokens
from mar.random import make_generator
from mar.sampling.guidance import StepSettings, step_settings


@runtime_checkable
class NoiseSource(Protocol):
    """A source of draws: for each image first its order, then its noise at each reveal step."""

    def order(self, image: int, length: int) -> Int[Tensor, " L"]:
        """The order of an image's tokens; they are revealed from its end."""
        ...

    def noise(self, image: int, steps: int, count: int, width: int) -> Float[Tensor, "steps count width"]:
        """For `count` tokens, by ascending position: the noise that each starts from, then that of each step."""
        ...


class SeededNoise:
    """Draws of CPU generators, one per image, from its seed."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [make_generator(seed) for seed in seeds]

    def order(self, image: int, length: int) -> Tensor:
        """Draw a random order from the image's generator."""
        return random_order(length, self.generators[image])

    def noise(self, image: int, steps: int, count: int, width: int) -> Tensor:
        """Draw noise from the image's generator."""
        return torch.randn(steps, count, width, generator=self.generators[image])


CACHED_BYTES = 2**24
"""How much the activations of a transformer block's MLP may take."""
WIDE = 512
"""Width of a trunk beside whose products other work does not show: free memory is given back after every step, and
few shapes are made of many."""
VISIBLE, ASKED = 32, 8
"""Wide trunks on a CPU are shown so many tokens, and asked for so many, or a multiple: oneDNN writes a program for each
new shape of a product, which takes time, and keeps it."""


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
    residual: Float[Tensor, "n L f"] | None = None
    """z without the class minus z with it, where that is kept from one step to the next."""

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


class ImageStep(NamedTuple):
    """What an image does in a reveal step."""

    row: int
    """Its place among those that are not finished."""
    image: int
    positions: Int[Tensor, " r"]
    """The tokens that it reveals, ascending."""
    pace: StepSettings


class Conditions(NamedTuple):
    """z of the tokens that a reveal step reveals."""

    z: Float[Tensor, "n_and_g r f"]
    """For each turn, padded; then, for each that is guided, without the class."""
    without: dict[int, int]
    """Row of a guided turn -> row of z without the class."""
    residual: Float[Tensor, "n L f"] | None
    """What the next step is to know of the difference, for all images of the batch."""


def init_state(
    tokens: Float[Tensor, "n L d"],
    unknown: Bool[Tensor, "n L"],
    steps: int,
    draws: NoiseSource,
    *,
    reveals: MaskSchedule = "cosine",
    order: Order = "random",
    grid: tuple[int, int] | None = None,
) -> DecodeState:
    """The state before the first step: `tokens` are kept where `unknown` is false.

    `grid` says in how many rows and columns the tokens stand (by default, in a row), for orders that ask for it.
    """
    unknown = unknown.cpu()
    length = unknown.shape[1]
    drawn = [apply_order(draws.order(i, length), grid or (1, length), order) for i in range(len(unknown))]
    orders = tuple(unknown_order(each, mask) for each, mask in zip(drawn, unknown, strict=True))
    schedules = tuple(tuple(mask_schedule(len(each), steps, reveals)) for each in orders)
    kept = torch.where(unknown.unsqueeze(-1).to(tokens.device), 0.0, tokens)
    return DecodeState(kept, unknown, orders, schedules)


def sample_tokens(
    model: MAR, labels: Int[Tensor, " n"], state: DecodeState, sampling: SamplingConfig, draws: NoiseSource
) -> Iterator[DecodeState]:
    """Yields the state after every reveal step, the last with nothing hidden.

    Image i of the batch depends on its label, its draws and its known tokens alone.
    """
    sampling.check(model.config)
    schedule, head = training_schedule(model.config.head), packed(model.head)
    loop = sampler_for(model.head, state.tokens.device)
    while state.step < state.steps:
        state = decode_step(model, labels, state, sampling, schedule, draws, head, loop)
        if state.step == state.steps:
            del head  # with its packed weights: next comes the tokenizer, which needs room
        if wide(model, state.tokens.device):
            trim_heap()
        yield state


def wide(model: MAR, device: torch.device) -> bool:
    """Whether a model is on a CPU, and its trunk `WIDE`."""
    return device.type == "cpu" and max(model.config.encoder.width, model.config.decoder.width) >= WIDE


@torch.no_grad()
def decode_step(
    model: MAR,
    labels: Int[Tensor, " n"],
    state: DecodeState,
    sampling: SamplingConfig,
    schedule: Schedule,
    draws: NoiseSource,
    head: DiffusionHead | PackedHead | None = None,
    loop: RowSampler = sample_rows,
) -> DecodeState:
    """One reveal step: conditions from the visible tokens, then the diffusion of the tokens to be revealed.

    `schedule` is the one that the diffusion's timesteps are taken from, `head` the model's, as it may be packed for all
    steps (by default, as it is), and `loop` what draws with it. Images that take as many diffusion steps, and are
    guided alike, are diffused together: all of them, unless known tokens made their reveals differ.
    """
    device = state.tokens.device
    turns = plan_step(state, sampling, model.config.tokens, guidable=bool((labels != UNCONDITIONAL).any()))
    found = compute_conditions(model, labels, state, turns, sampling.guidance_refresh)
    tokens, unknown = state.tokens, state.unknown
    for _, alike in groupby(sorted(turns, key=_kind), key=_kind):
        group = list(alike)
        drawn = denoise_tokens(head or model.head, found, group, sampling, schedule, draws, loop)
        images = torch.tensor([turn.image for turn in group for _ in turn.positions])
        places = torch.cat([turn.positions for turn in group])
        tokens = tokens.index_put((images.to(device), places.to(device)), drawn)
        unknown = unknown.index_put((images, places), torch.tensor(False))
    return replace(state, tokens=tokens, unknown=unknown, step=state.step + 1, residual=found.residual)


def _kind(turn: ImageStep) -> tuple[int, bool]:
    return turn.pace.diffusion_steps, turn.pace.guided


def plan_step(state: DecodeState, sampling: SamplingConfig, tokens: int, guidable: bool) -> list[ImageStep]:
    """What each image that is not finished does in the next step; without guidance unless `guidable`."""
    turns: list[ImageStep] = []
    for image, schedule in enumerate(state.schedules):
        if state.step < len(schedule):
            pace = step_settings(sampling, schedule, tokens)[state.step]
            if not guidable:
                pace = StepSettings(pace.diffusion_steps, 1.0, False)
            turns.append(ImageStep(len(turns), image, state.revealed(image), pace))
    return turns


def compute_conditions(
    model: MAR, labels: Int[Tensor, " n"], state: DecodeState, turns: Sequence[ImageStep], guidance_refresh: int
) -> Conditions:
    """z with and without the class; what is not refreshed without it is taken to differ as it did before."""
    device = state.tokens.device
    active = [turn.image for turn in turns]
    images = torch.tensor(active, device=device)
    length = state.unknown.shape[1]
    wanted = pad_sequence([turn.positions for turn in turns], batch_first=True, padding_value=length)
    if wide(model, device) and wanted.shape[1] > ASKED:
        wanted = functional.pad(wanted, (0, round_up(wanted.shape[1], ASKED) - wanted.shape[1]), value=length)
    wanted = wanted.to(device)
    every = torch.arange(length, device=device).expand(len(turns), -1)
    fresh = torch.tensor([turn.row for turn in turns if turn.pace.refresh], dtype=torch.long, device=device)
    keeps = guidance_refresh > 1 and len(fresh) > 0  # a difference that is kept is one of all tokens
    asked = every if keeps else wanted
    z = run_trunk(model, state.tokens[images], labels[images], state.unknown[active], fresh, asked)
    guided = [turn.row for turn in turns if turn.pace.guided]
    without = {row: len(turns) + place for place, row in enumerate(guided)}
    if guidance_refresh == 1:
        return Conditions(z, without, None)
    conditional, residual = z[: len(turns)], state.residual
    if residual is None:
        residual = z.new_zeros(len(state.orders), state.unknown.shape[1], z.shape[-1])
    if keeps:
        residual = residual.index_copy(0, images[fresh], z[len(turns) :] - conditional[fresh])
        conditional = gather_tokens(conditional, wanted)
    rows = torch.tensor(guided, dtype=torch.long, device=device)
    unconditional = conditional[rows] + gather_tokens(residual[images[rows]], wanted[rows])
    return Conditions(torch.cat([conditional, unconditional]), without, residual)


def denoise_tokens(
    head: DiffusionHead | PackedHead,
    found: Conditions,
    group: Sequence[ImageStep],
    sampling: SamplingConfig,
    schedule: Schedule,
    draws: NoiseSource,
    loop: RowSampler,
) -> Float[Tensor, "r d"]:
    """The tokens that the turns of a group, alike in their pace, reveal."""
    device = found.z.device
    steps, guided = _kind(group[0])
    places = torch.cat([torch.arange(len(turn.positions)) for turn in group]).to(device)
    rows = torch.tensor([turn.row for turn in group for _ in turn.positions], device=device)
    z, scale = found.z[rows, places], None
    if guided:
        others = torch.tensor([found.without[turn.row] for turn in group for _ in turn.positions], device=device)
        z = torch.cat([z, found.z[others, places]])
        scale = torch.tensor([[turn.pace.scale] for turn in group for _ in turn.positions], device=device)

    respaced = respace(schedule, steps, sampling.spacing, sampling.noisiest)
    count, width = num_noises(sampling.solver, steps), head.token_width
    noise = torch.cat([draws.noise(turn.image, count, len(turn.positions), width) for turn in group], dim=1)
    return loop(head, z, noise.to(device), scale, respaced, sampling)


def run_trunk(
    model: MAR,
    tokens: Float[Tensor, "n L d"],
    labels: Int[Tensor, " n"],
    unknown: Bool[Tensor, "n L"],
    without: Int[Tensor, " u"],
    asked: Int[Tensor, "n r"],
) -> Float[Tensor, "n_and_u r f"]:
    """z of the tokens that are `asked` for, from the visible tokens: of all images, and then of the images `without`
    once more, without the class."""
    visible, ragged = visible_positions(unknown, VISIBLE if wide(model, tokens.device) else 1)
    visible = visible.to(tokens.device)
    if len(without):
        labels = torch.cat([labels, torch.full_like(without, UNCONDITIONAL)])
        tokens, visible, asked = (torch.cat([each, each[without]]) for each in (tokens, visible, asked))
    some = images_at_once(model.config) if tokens.device.type == "cpu" else len(tokens)
    groups = zip(*(each.split(some) for each in (tokens, labels, visible, asked)), strict=True)
    return torch.cat([model(*group[:3], ragged=ragged, only=group[3]) for group in groups])


def images_at_once(config: ModelConfig) -> int:
    """How many images a CPU runs through the trunk together: more gain nothing in its products, and leave its cache."""
    widest = max(trunk.hidden for trunk in (config.encoder, config.decoder))
    return max(1, CACHED_BYTES // (4 * widest * (config.buffer + config.tokens)))


def visible_positions(unknown: Bool[Tensor, "n L"], multiple: int = 1) -> tuple[Int[Tensor, "n v"], bool]:
    """Positions of known tokens, ascending, padded with L to a `multiple` or to L; and whether any is padding."""
    length = unknown.shape[1]
    counts = (~unknown).sum(1)
    longest = min(round_up(int(counts.max()), multiple), length)
    position = torch.where(unknown, length, torch.arange(length)).sort(dim=1).values
    return position[:, :longest], bool((counts != longest).any())


def round_up(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def all_masked(count: int, tokens: int) -> Bool[Tensor, "n L"]:
    """The mask of a generation from nothing."""
    return torch.ones(count, tokens, dtype=torch.bool)


def as_labels(labels: Sequence[int], device: torch.device) -> Int[Tensor, " n"]:
    """Class numbers as a tensor; UNCONDITIONAL for none."""
    return torch.tensor(list(labels), dtype=torch.long, device=device)
