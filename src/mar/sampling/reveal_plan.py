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
        self._settings = [_settings(sampling, each[1:], self.length, guidable) for each in kinds]
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
        first, count = self.steps.start, len(self.steps)
        unfinished, guided, run_uncond = tables.unfinished.bool(), tables.guided.bool(), tables.run_uncond.bool()
        # rows of z: of unfinished images, then of guided ones
        row_of = tables.unfinished.cumsum(0) - 1
        uncond_row_of = tables.unfinished.sum(0) + tables.guided.cumsum(0) - 1
        lists = [unfinished.T.nonzero()[:, 1]]
        for flags in (run_uncond, guided):
            index, image = flags.T.nonzero().unbind(1)
            lists.append(row_of[image, index])
        # place of the noise: windows of images, steps one after the other
        longest = tables.noise.max(0).values.tolist() if count and len(tables.noise) else []
        self.windows = list(self._noise_windows(longest, noise_bytes))
        self.window_of = {step: number for number, window in enumerate(self.windows) for step in window.steps}
        noise_of = tables.noise.cumsum(1) - tables.noise
        for window in self.windows:
            steps = slice(window.steps.start - first, window.steps.stop - first)
            noise_of[:, steps] -= noise_of[:, steps][:, :1].clone()
            noise_of[:, steps] += torch.arange(len(noise_of)).unsqueeze(1) * window.length

        # tokens by step, group, image and position
        flat = self.revealed_at_cpu.flatten()
        tokens = ((flat > first) & (flat <= self.steps.stop)).nonzero().squeeze(1)
        image, position = tokens // self.length, tokens % self.length
        index = flat[tokens] - 1 - first
        key = index * len(self._keys) + tables.group[image, index]
        order = key.argsort(stable=True)
        image, position, index = image[order], position[order], index[order]
        place = torch.arange(len(order))
        change = torch.ones(len(order), dtype=torch.bool)  # where another image or step begins
        change[1:] = (image[1:] != image[:-1]) | (index[1:] != index[:-1])
        column = place - torch.where(change, place, 0).cummax(0).values if len(order) else place
        row, uncond_row, noise, stride = (
            each[image, index] for each in (row_of, uncond_row_of, noise_of, tables.tokens)
        )
        per_token = torch.stack([image, position, row, column, uncond_row, noise + column, stride])

        # one copy for all integers, one for the scales
        packed = upload(torch.cat([per_token.flatten(), flat, *lists]), self.device)
        scales = upload(tables.scale[image, index].float(), self.device)
        tokens_d, flat_d, *lists_d = packed.split([per_token.numel(), len(flat), *map(len, lists)])
        self.revealed_at = flat_d.view_as(self.revealed_at_cpu)
        group_sizes = key.bincount(minlength=count * len(self._keys)).view(count, len(self._keys))
        self._group_sizes: list[list[int]] = group_sizes.tolist()
        sizes = group_sizes.sum(1).tolist()
        self._tokens = list(zip(tokens_d.view(7, -1).split(sizes, dim=1), scales.split(sizes), strict=True))
        numbers = [flags.sum(0).tolist() for flags in (unfinished, run_uncond, guided)]
        parts = [each.split(own) for each, own in zip(lists_d, numbers, strict=True)]
        self._rows = list(zip(*parts, strict=True))

        # what the host needs to know of each step: most tokens to reveal, fewest and most known ones
        self._queries = tables.tokens.max(0).values.tolist() if sizes else []
        remaining = (self.revealed_at_cpu > first).sum(1, keepdim=True) - (tables.tokens.cumsum(1) - tables.tokens)
        known = self.length - remaining
        fewest = torch.where(unfinished, known, self.length).amin(0).tolist() if sizes else []
        most = torch.where(unfinished, known, 0).amax(0).tolist() if sizes else []
        self._known = list(zip(fewest, most, strict=True))


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
    sampling: SamplingConfig, schedule: tuple[int, ...], tokens: int, guidable: bool
) -> tuple[StepSettings, ...]:
    settings = step_settings(sampling, schedule, tokens)
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
