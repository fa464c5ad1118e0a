"""The reveal steps of a batch, planned when it starts: tokens, rows and settings of every step.

Schedules and orders are known then, so that all indices are computed and uploaded at once, and no step waits for the
device. Letters of shapes: n images, L tokens, T tokens to reveal in all planned steps, K steps. In one step, there are
m unfinished images, u of them also run without their condition, and g guided ones. An image has r tokens to reveal and
v visible ones; t are the tokens of all images together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mar.config import SamplingConfig
from mar.devices import upload
from mar.sampling.guidance import StepSettings, step_settings

WINDOW_BYTES = 2**25
"""Memory for the noise that is drawn ahead at a time, unless a single step needs more."""


class GroupPlan(NamedTuple):
    """Tokens of a step that are denoised together.

    Their images have the same number of diffusion steps, and all are guided or none.
    """

    step: int
    """Number of reveal steps done before."""
    diffusion_steps: int
    guided: bool
    image: Int[Tensor, " t"]
    position: Int[Tensor, " t"]
    row: Int[Tensor, " t"]
    """Row of z: index among the unfinished images."""
    column: Int[Tensor, " t"]
    """Column of z: index among the image's tokens of this step."""
    uncond_row: Int[Tensor, " t"]
    """Row of the unconditional z."""
    noise: Int[Tensor, " t"]
    """Index of the token's first noise in the window of `NoiseAhead`."""
    stride: Int[Tensor, " t"]
    """Distance to its next noise."""
    scale: Float[Tensor, "t 1"]


@dataclass(frozen=True)
class StepPlan:
    """One reveal step; its tensors are on the device."""

    step: int
    """Number of reveal steps done before."""
    groups: list[GroupPlan]
    images: Int[Tensor, " m"]
    """Unfinished images."""
    uncond_rows: Int[Tensor, " u"]
    """Rows of them that the trunk also runs without their condition."""
    guided_rows: Int[Tensor, " g"]
    """Rows of them that are guided."""
    query_idx: Int[Tensor, "m r"]
    """Positions to reveal, ascending, padded with L."""
    visible: Int[Tensor, "m v"]
    """Positions of known tokens, ascending, padded with L."""
    padded: bool
    """Some row of `visible` is padded."""


class NoiseWindow(NamedTuple):
    """Consecutive steps whose noise is drawn at once."""

    steps: range
    chunks: list[list[tuple[int, int]]]
    """(noises, tokens) of each image at each of these steps."""
    length: int
    """Number of noises of an image, the most of all."""


class RevealPlan:
    """All reveal steps of a batch from a step on.

    Args:
        orders, schedules: as in `DecodeState`.
        revealed_at: step that reveals each token, from 1; 0 for the known ones (CPU).
        sampling: the settings.
        guidable: whether any image has a condition; without one, guidance has no effect and is left out.
        steps: the steps to plan.
        device: where the indices are needed.
        num_noises: diffusion steps -> noises of a token.
        token_width: values of a token.
    """

    def __init__(
        self,
        orders: Sequence[Int[Tensor, " _M"]],
        schedules: Sequence[tuple[int, ...]],
        revealed_at: Int[Tensor, "n L"],
        sampling: SamplingConfig,
        *,
        guidable: bool,
        steps: range,
        device: torch.device,
        num_noises: Callable[[int], int],
        token_width: int,
    ) -> None:
        self.length, self.steps, self.device = revealed_at.shape[1], steps, device
        self.revealed_at_cpu = revealed_at
        # images with the same number of masked tokens before and after each step have the same settings
        masked = [(len(order), *schedule) for order, schedule in zip(orders, schedules, strict=True)]
        kinds = {each: index for index, each in enumerate(dict.fromkeys(masked))}
        self._kind_of = [kinds[each] for each in masked]
        self._settings = [_settings(sampling, each, self.length, guidable) for each in kinds]
        self._counts = [[before - after for before, after in pairwise(each)] for each in kinds]
        self.noises = {each.diffusion_steps: num_noises(each.diffusion_steps) for row in self._settings for each in row}
        self._keys = sorted({(each.diffusion_steps, each.guided) for row in self._settings for each in row})
        self._build(self._tables(), 4 * token_width)

    def __getitem__(self, step: int) -> StepPlan:
        """Return the plan of a step, from the uploaded indices."""
        index = step - self.steps.start
        images, uncond, guided = self._rows[index]
        tokens, scales = self._tokens[index]
        _, position, row, column, *_ = tokens
        query_idx = torch.full((len(images), self._queries[index]), self.length, device=self.device)
        query_idx = query_idx.index_put((row, column), position)

        groups, start = [], 0
        for (diffusion_steps, is_guided), size in zip(self._keys, self._group_sizes[index], strict=True):
            if size:
                end = start + size
                image, position, row, column, uncond_row, noise, stride = tokens[:, start:end]
                groups.append(
                    GroupPlan(
                        step, diffusion_steps, is_guided, image, position, row, column, uncond_row, noise, stride,
                        scales[start:end, None],
                    )
                )  # fmt: skip
                start = end

        fewest, most = self._known[index]
        revealed_at = self.revealed_at if len(images) == len(self.revealed_at) else self.revealed_at[images]
        visible = _positions(revealed_at <= step, most)
        return StepPlan(step, groups, images, uncond, guided, query_idx, visible, fewest != most)

    def counts(self, group: GroupPlan) -> list[tuple[int, int]]:
        """Return index and number of tokens of a group's images."""
        key = (group.diffusion_steps, group.guided)
        count_of: dict[int, int] = {}
        for kind, (settings, counts) in enumerate(zip(self._settings, self._counts, strict=True)):
            if (
                group.step < len(settings)
                and (settings[group.step].diffusion_steps, settings[group.step].guided) == key
            ):
                count_of[kind] = counts[group.step]
        return [(image, count_of[kind]) for image, kind in enumerate(self._kind_of) if kind in count_of]

    def _tables(self) -> _Tables:
        """Return the settings of every image and planned step, zeros for finished ones."""
        number = {key: index for index, key in enumerate(self._keys)}
        finished = (0, 0, 0, 0, 0, 0)
        facts: list[list[tuple[int, ...]]] = []
        scales: list[list[float]] = []
        for settings, counts in zip(self._settings, self._counts, strict=True):
            own = [(each, counts[k]) for k, each in enumerate(settings) if k in self.steps]
            rest = len(self.steps) - len(own)
            rows = [
                (1, number[each.diffusion_steps, each.guided], count, self.noises[each.diffusion_steps] * count,
                 each.guided, each.run_uncond)
                for each, count in own
            ]  # fmt: skip
            facts.append([*rows, *[finished] * rest])
            scales.append([*(each.scale for each, _ in own), *[1.0] * rest])
        shape = (len(facts), len(self.steps), len(finished))
        integers = torch.tensor(facts, dtype=torch.long).view(shape).movedim(-1, 0)
        scale_of = torch.tensor(scales, dtype=torch.float64).view(shape[:2])
        kind_of = torch.tensor(self._kind_of, dtype=torch.long)
        unfinished, group, count, noise, guided, run_uncond = integers[:, kind_of]
        return _Tables(unfinished, group, count, noise, guided, run_uncond, scale_of[kind_of])

    def _noise_windows(self, longest: Sequence[int], noise_bytes: int) -> Iterator[NoiseWindow]:
        """Divide the steps into windows of about `WINDOW_BYTES`, given the most noises of an image at each step."""
        start = total = 0
        for index, more in enumerate([*longest, 0]):
            over = (total + more) * noise_bytes * len(self._kind_of) > WINDOW_BYTES
            if index == len(longest) or (index > start and over):
                if index > start:
                    steps = range(self.steps.start + start, self.steps.start + index)
                    yield NoiseWindow(steps, self._chunks(steps), total)
                start, total = index, 0
            total += more

    def _chunks(self, steps: range) -> list[list[tuple[int, int]]]:
        chunks = [
            [(self.noises[settings[k].diffusion_steps], counts[k]) for k in steps if k < len(settings)]
            for settings, counts in zip(self._settings, self._counts, strict=True)
        ]
        return [chunks[kind] for kind in self._kind_of]

    def _build(self, tables: _Tables, noise_bytes: int) -> None:
        """Compute the indices of all steps, and upload them at once."""
        # windows of noise: the longest chunk of each step decides
        longest = tables.noise.max(0).values.tolist() if self.steps and len(tables.noise) else []
        self.windows = list(self._noise_windows(longest, noise_bytes))
        self.window_of = {step: number for number, window in enumerate(self.windows) for step in window.steps}

        # indices on the host
        z_rows = _number_z_rows(tables)
        row_lists = _list_rows(tables, z_rows)
        tokens = self._list_tokens(tables)
        per_token = self._token_indices(tokens, tables, z_rows)

        # one copy for all integers, one for the scales
        flat = self.revealed_at_cpu.flatten()
        rows = [each.values for each in row_lists]
        packed = upload(torch.cat([per_token.flatten(), flat, *rows]), self.device)
        scales = upload(tables.scale[tokens.image, tokens.step].float(), self.device)
        per_token_d, flat_d, *rows_d = packed.split([per_token.numel(), len(flat), *map(len, rows)])

        # views of a step each: its tokens by group, and its rows
        self.revealed_at = flat_d.view_as(self.revealed_at_cpu)
        self._group_sizes: list[list[int]] = self._count_groups(tokens)
        sizes = [sum(groups) for groups in self._group_sizes]
        self._tokens = list(zip(per_token_d.view(7, -1).split(sizes, dim=1), scales.split(sizes), strict=True))
        parts = [values.split(each.sizes) for values, each in zip(rows_d, row_lists, strict=True)]
        self._rows = list(zip(*parts, strict=True))

        # numbers that shapes need
        self._queries = tables.tokens.max(0).values.tolist() if sizes else []
        self._known = self._known_range(tables) if sizes else []

    def _list_tokens(self, tables: _Tables) -> _Tokens:
        """List the tokens of all planned steps: by step, group, image and position."""
        first = self.steps.start
        flat = self.revealed_at_cpu.flatten()
        revealed = ((flat > first) & (flat <= self.steps.stop)).nonzero().squeeze(1)  # by image and position
        image, position = revealed // self.length, revealed % self.length
        step = flat[revealed] - 1 - first
        group = step * len(self._keys) + tables.group[image, step]
        order = group.argsort(stable=True)  # keeps image and position in order
        return _Tokens(image[order], position[order], step[order], group[order])

    def _token_indices(self, tokens: _Tokens, tables: _Tables, z_rows: _ZRows) -> Int[Tensor, "seven T"]:
        """Return the indices of each token, as `GroupPlan` has them: seven rows, from image to stride."""
        image, position, step, _ = tokens
        column = _count_within_runs(image, step)
        noise = self._first_noises(tables)[image, step] + column
        row, uncond_row = z_rows.cond[image, step], z_rows.uncond[image, step]
        return torch.stack([image, position, row, column, uncond_row, noise, tables.tokens[image, step]])

    def _first_noises(self, tables: _Tables) -> Int[Tensor, "n K"]:
        """Return where the noise of each image and step begins in its window.

        A window holds the images one after the other, and for each of them the steps.
        """
        before = tables.noise.cumsum(1) - tables.noise
        for window in self.windows:
            steps = slice(window.steps.start - self.steps.start, window.steps.stop - self.steps.start)
            before[:, steps] -= before[:, steps][:, :1].clone()  # the window's first step begins at 0
            before[:, steps] += torch.arange(len(before)).unsqueeze(1) * window.length
        return before

    def _count_groups(self, tokens: _Tokens) -> list[list[int]]:
        """Count the tokens of every planned step and group."""
        count, keys = len(self.steps), len(self._keys)
        counts: list[list[int]] = tokens.group.bincount(minlength=count * keys).view(count, keys).tolist()
        return counts

    def _known_range(self, tables: _Tables) -> list[tuple[int, int]]:
        """Return the fewest and the most known tokens of an unfinished image, before each step."""
        masked_first = (self.revealed_at_cpu > self.steps.start).sum(1, keepdim=True)
        revealed_before = tables.tokens.cumsum(1) - tables.tokens
        known = self.length - (masked_first - revealed_before)
        unfinished = tables.unfinished.bool()
        fewest = torch.where(unfinished, known, self.length).amin(0).tolist()
        most = torch.where(unfinished, known, 0).amax(0).tolist()
        return list(zip(fewest, most, strict=True))


class _ZRows(NamedTuple):
    """Row of z of every image (n) and planned step (K); of no use where the image has none."""

    cond: Int[Tensor, "n K"]
    uncond: Int[Tensor, "n K"]


class _RowList(NamedTuple):
    """Images or rows of z of all planned steps, one step after the other, and how many each step has."""

    values: Int[Tensor, " k"]
    sizes: list[int]


class _Tokens(NamedTuple):
    """Tokens to reveal in all planned steps."""

    image: Int[Tensor, " T"]
    position: Int[Tensor, " T"]
    step: Int[Tensor, " T"]
    """Planned steps before it."""
    group: Int[Tensor, " T"]
    """Number of its step and group; ascending."""


def _number_z_rows(tables: _Tables) -> _ZRows:
    """Number the rows of z at each step: unfinished images, then the guided ones again."""
    cond = tables.unfinished.cumsum(0) - 1
    uncond = tables.unfinished.sum(0) + tables.guided.cumsum(0) - 1
    return _ZRows(cond, uncond)


def _list_rows(tables: _Tables, z_rows: _ZRows) -> tuple[_RowList, _RowList, _RowList]:
    """List, by step, the unfinished images, and the rows of those that run without condition and are guided."""
    lists: list[_RowList] = []
    for flags in (tables.unfinished.bool(), tables.run_uncond.bool(), tables.guided.bool()):
        step, image = flags.T.nonzero().unbind(1)
        values = z_rows.cond[image, step] if lists else image
        lists.append(_RowList(values, flags.sum(0).tolist()))
    images, uncond, guided = lists
    return images, uncond, guided


def _count_within_runs(image: Int[Tensor, " T"], step: Int[Tensor, " T"]) -> Int[Tensor, " T"]:
    """Count tokens from 0 on, anew where another image or step begins."""
    place = torch.arange(len(image))
    if not len(image):
        return place
    begins = torch.ones(len(image), dtype=torch.bool)
    begins[1:] = (image[1:] != image[:-1]) | (step[1:] != step[:-1])
    return place - torch.where(begins, place, 0).cummax(0).values


class _Tables(NamedTuple):
    """Facts of every image (n) and planned step (K)."""

    unfinished: Int[Tensor, "n K"]
    group: Int[Tensor, "n K"]
    tokens: Int[Tensor, "n K"]
    """Tokens to reveal."""
    noise: Int[Tensor, "n K"]
    """Noises of all these tokens."""
    guided: Int[Tensor, "n K"]
    run_uncond: Int[Tensor, "n K"]
    scale: Float[Tensor, "n K"]


def _settings(
    sampling: SamplingConfig, masked: tuple[int, ...], tokens: int, guidable: bool
) -> tuple[StepSettings, ...]:
    """Return the settings of every step; `masked` are the tokens that are unknown before and after each."""
    settings = step_settings(sampling, masked[1:], tokens, masked[0])
    if guidable:
        return settings
    return tuple(StepSettings(each.diffusion_steps, scale=1.0, run_uncond=False) for each in settings)


def _positions(mask: Tensor, count: int) -> Int[Tensor, "m v"]:
    """Return the true columns of each row, ascending, padded to `count` with the row's length.

    Nothing waits for the device, as `nonzero` would.
    """
    length = mask.shape[1]
    rank = torch.where(mask, mask.cumsum(1) - 1, count)
    padded = torch.full((len(mask), count + 1), length, device=mask.device)
    return padded.scatter(1, rank, torch.arange(length, device=mask.device).expand_as(rank))[:, :count]
