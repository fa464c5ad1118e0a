"""Every unknown token is revealed exactly once, and every known one is kept, whatever the grid, K and masks."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_options import sampling_options
from tiny import noise, tiny_model
from torch import Tensor

from mar.config import MaskSchedule, Order, SamplingConfig
from mar.model.masking import apply_order, mask_schedule, masked_count, random_order, split_by_mask
from mar.model.tokens import patchify
from mar.random import make_generator
from mar.sampling.decode import init_state
from mar.sampling.generate import generate
from mar.sampling.noise import SeededNoise

GRIDS = [(1, 1), (4, 4), (2, 6), (6, 4)]
MODELS = {
    (grid, patch): tiny_model(grid=grid, patch_size=patch) for grid in GRIDS for patch in (1, 2) if grid[0] % patch == 0
}


@st.composite
def masks(draw: st.DrawFn, most: int = 3, tokens: int | None = None) -> Tensor:
    """(n, L), true where a token is to be generated; images differ."""
    length = tokens or draw(st.integers(1, 40))
    rows = st.lists(st.booleans(), min_size=length, max_size=length)
    return torch.tensor(draw(st.lists(rows, min_size=1, max_size=most)))


@given(unknown=st.integers(1, 400), steps=st.integers(1, 500))
def test_cosine_mask_schedule_matches_the_paper(unknown: int, steps: int) -> None:
    schedule = mask_schedule(unknown, steps)
    assert len(schedule) == min(steps, unknown)
    assert schedule[-1] == 0
    counts = [unknown, *schedule]
    assert all(after < before for before, after in pairwise(counts))
    steps = min(steps, unknown)
    for k in range(steps - 1):
        share = math.cos(math.pi * (k + 1) / (2 * steps))
        assert schedule[k] == max(1, min(counts[k] - 1, math.floor(unknown * share)))


def test_mask_schedule_of_no_tokens_has_no_step() -> None:
    assert mask_schedule(0, 5) == []


@given(unknown=st.integers(1, 400), steps=st.integers(1, 500))
def test_exponential_mask_schedule_ends_at_zero(unknown: int, steps: int) -> None:
    schedule = mask_schedule(unknown, steps, "exponential")
    assert len(schedule) == min(steps, unknown)
    assert schedule[-1] == 0
    assert all(after < before for before, after in pairwise([unknown, *schedule]))
    slower = sum(a >= b for a, b in zip(schedule, mask_schedule(unknown, steps), strict=True))
    assert slower == len(schedule)


@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kind=st.sampled_from(get_args(Order)),
    seed=st.integers(0, 99),
)
def test_order_of_any_kind_is_a_permutation(grid: tuple[int, int], kind: Order, seed: int) -> None:
    length = grid[0] * grid[1]
    order = apply_order(random_order(length, make_generator(seed)), grid, kind)
    assert torch.equal(order.sort().values, torch.arange(length))


@given(
    unknown=masks(),
    steps=st.integers(1, 60),
    seed=st.integers(0, 9),
    reveals=st.sampled_from(get_args(MaskSchedule)),
    order=st.sampled_from(get_args(Order)),
)
def test_decode_reveals_every_unknown_token_once(
    unknown: Tensor, steps: int, seed: int, reveals: MaskSchedule, order: Order
) -> None:
    tokens, length = noise(*unknown.shape, 2), unknown.shape[1]
    columns = next(side for side in (4, 3, 1) if length % side == 0)
    draws = SeededNoise([seed + i for i in range(len(unknown))])
    state = init_state(tokens, unknown, steps, draws, schedule=reveals, order=order, grid=(length // columns, columns))
    assert state.steps == min(steps, int(unknown.sum(1).max()))
    seen: list[Counter[int]] = [Counter() for _ in unknown]
    for step in range(state.steps + 2):  # and none after the end
        at = replace(state, step=step)
        for image, counter in enumerate(seen):
            positions = at.revealed(image).tolist()
            assert positions == sorted(positions)
            counter.update(positions)
    for counter, mask in zip(seen, unknown, strict=True):
        assert counter == Counter(mask.nonzero().flatten().tolist())


@settings(max_examples=25)
@given(
    shape=st.sampled_from(sorted(MODELS)),
    steps=st.integers(1, 40),
    way=sampling_options(),
    data=st.data(),
)
def test_generate_keeps_known_tokens(
    shape: tuple[tuple[int, int], int], steps: int, way: dict[str, Any], data: st.DataObject
) -> None:
    tiny, ((height, width), patch) = MODELS[shape], shape
    grid = (height // patch, width // patch)
    mask = data.draw(masks(tokens=grid[0] * grid[1])).view(-1, *grid)
    known = noise(len(mask), 2, height, width)
    sampling = SamplingConfig(steps=steps, diffusion_steps=2, **way)
    labels, seeds = [0, 1, -1][: len(mask)], list(range(len(mask)))
    hidden, before, given_tokens = mask, None, patchify(known, patch)
    for revealed in generate(tiny, labels, seeds, sampling, known=known, mask=mask, allow_broken=True):
        tokens = patchify(revealed.latents, patch)
        shown = revealed.known.flatten(1)
        assert torch.equal(tokens[~mask.flatten(1)], given_tokens[~mask.flatten(1)])  # kept, bitwise
        assert not tokens[~shown].any()  # nothing is said of what is hidden
        if before is not None:
            assert torch.equal(tokens[before[1]], before[0][before[1]])  # what is drawn stays
        now_hidden = ~revealed.known
        assert not (now_hidden & ~hidden).any()
        hidden, before = now_hidden, (tokens, shown)
    assert not hidden.any()
    assert revealed.step == revealed.steps == min(steps, int(mask.flatten(1).sum(1).max()))
    assert tokens[mask.flatten(1)].all()  # every generated token has been drawn


@given(length=st.integers(1, 60), ratio=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_split_by_mask_covers_every_token_once(length: int, ratio: float, seed: int) -> None:
    order = torch.stack([random_order(length, make_generator(seed, i)) for i in range(2)])
    hidden, visible = split_by_mask(order, masked_count(length, ratio))
    assert hidden.shape[1] == math.ceil(length * ratio)
    assert torch.equal(torch.cat([hidden, visible], 1).sort(1).values, torch.arange(length).expand(2, -1))


def test_decode_batch_may_hold_a_finished_image() -> None:
    tiny = MODELS[(4, 4), 1]
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[1, 0] = True
    known = noise(2, 2, 4, 4)
    *_, end = generate(tiny, [0, 1], [0, 1], SamplingConfig(steps=3, diffusion_steps=2), known=known, mask=mask)
    assert torch.equal(end.latents[0], known[0])
    assert not torch.equal(end.latents[1], known[1])


def test_generate_with_empty_mask_returns_known_tokens() -> None:
    known, mask = noise(2, 2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    (end,) = generate(MODELS[(4, 4), 1], [0, 1], [0, 1], SamplingConfig(steps=3), known=known, mask=mask)
    assert torch.equal(end.latents, known)
    assert (end.step, end.steps, bool(end.known.all())) == (0, 0, True)
