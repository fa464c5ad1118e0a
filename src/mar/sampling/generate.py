"""Conditions and seeds -> latents, with checks of request and result."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image
from torch import Tensor

from mar.backends import backend_for
from mar.config import SamplingConfig
from mar.data.images import upright
from mar.devices import read_later, upload
from mar.model.mar import MAR
from mar.model.tokens import patchify, unpatchify
from mar.sampling.decode import (
    DecodeState,
    all_masked,
    as_condition,
    init_state,
    sample_tokens,
)
from mar.sampling.inpainting import Paste
from mar.sampling.noise import NoiseSource, SeededNoise

Images = Sequence[Image.Image] | Float[Tensor, "n c H W"] | Float[np.ndarray, "n c H W"]
"""PIL images, or arrays in [-1, 1]."""
Mask = Bool[Tensor, "n rows columns"] | Bool[np.ndarray, "n rows columns"] | Sequence[Any]
"""True at tokens or pixels to generate, false at known ones; or PIL images, white where to generate."""

# ---- requests


@dataclass(frozen=True)
class Request:
    """Images to generate, after all checks."""

    condition: Shaped[Tensor, "n ..."]
    seeds: list[int]
    sampling: SamplingConfig
    known: Tensor | None
    mask: Tensor | None
    paste: Paste | None = None
    """Originals to paste results into, for masks of pixels."""
    first: int = 0
    """Index of its first image in the whole request."""

    def part(self, first: int, end: int) -> Request:
        """Return the images from `first` up to `end`."""
        known = None if self.known is None else self.known[first:end]
        mask = None if self.mask is None else self.mask[first:end]
        paste = None if self.paste is None else self.paste.part(first, end)
        return Request(self.condition[first:end], self.seeds[first:end], self.sampling, known, mask, paste, first)


def as_seeds(seeds: Iterable[SupportsIndex]) -> list[int]:
    """Convert seeds to Python integers, all 64 bits. Raises ValueError for anything else."""
    try:
        return [operator.index(seed) for seed in seeds]
    except TypeError:
        raise ValueError(f"seeds: got {reprlib.repr(seeds)}, expected whole numbers, one per picture") from None


MAX_PIXEL = 2.0
"""Larger values of known pixels are not of [-1, 1]: those of a decoder may be a little outside."""


def as_images(known: Images) -> Sequence[Image.Image] | Tensor:
    """Check known images, and turn them upright; arrays become tensors. Raises ValueError for anything else."""
    if isinstance(known, Tensor | np.ndarray):
        values = torch.as_tensor(known)
        if values.ndim == 4 and values.is_floating_point():
            if not values.isfinite().all():
                raise ValueError("known: got values that are not finite, expected numbers in [-1, 1]")
            if values.numel() and values.abs().max() > MAX_PIXEL:
                raise ValueError(f"known: got values up to {values.abs().max():g}, expected numbers in [-1, 1]")
            return values.float()
        got = f"{tuple(values.shape)} of {values.dtype}"
    elif isinstance(known, Sequence) and all(isinstance(image, Image.Image) for image in known):
        return [upright(image) for image in known]
    else:
        got = reprlib.repr(known)
    raise ValueError(f"known: got {got}, expected PIL pictures, or floats in [-1, 1], (n, channels, height, width)")


def as_mask(mask: Mask) -> Tensor:
    """Convert an array to a tensor; `generate` checks shape and type. Raises ValueError for no mask."""
    try:
        flags = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):
        flags = torch.empty(())
    if not flags.ndim:
        raise ValueError(
            f"mask: got {reprlib.repr(mask)}, expected bools (n, rows, columns), one per token or "
            "pixel, or PIL pictures"
        )
    return flags


# ---- generation

MAX_STD = 3.0
"""Latents have a standard deviation of 1; above this one an image is noise."""


class BrokenLatents(ValueError):
    """The model generated noise; the message names step, likely cause and remedy."""


@dataclass(frozen=True)
class LatentStep:
    """A batch after a reveal step."""

    step: int
    """Number of reveal steps done, from 1."""
    steps: int
    latents: Float[Tensor, "n c h w"]
    """Normalized latents; zeros where a token is still masked."""
    known: Bool[Tensor, "n rows columns"]
    """True at known tokens (CPU)."""
    revealed_at: Int[Tensor, "n rows columns"]
    """Reveal step of each token, from 1; 0: known before (CPU)."""


def generate(
    model: MAR,
    condition: Sequence[int] | Shaped[Tensor, "n ..."],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    *,
    known: Float[Tensor, "n c h w"] | None = None,
    mask: Bool[Tensor, "n rows columns"] | None = None,
    noise_source: NoiseSource | None = None,
    allow_broken: bool = False,
    first: int = 0,
) -> Iterator[LatentStep]:
    """Generate one image per condition and seed; yield after every reveal step.

    The last step has all latents. Image i depends on its own condition, seed, known latents and mask, and not on the
    batch, unless the weights are int8.

    Args:
        model: in eval mode.
        condition: class numbers, -1 for none, or another kind's (`mar.model.conditions`).
        seeds: one per condition.
        sampling: the settings.
        known: latents to keep where `mask` is false.
        mask: one flag per token, true: generate. Masks may differ between images.
        noise_source: draws orders and noise (None: from `seeds`).
        allow_broken: do not raise BrokenLatents.
        first: index of the first image, for messages.
    """
    config = model.config
    if len(condition) != len(seeds) or not len(seeds):
        raise ValueError(f"conditions and seeds: got {len(condition)} and {len(seeds)}, expected one of each per image")
    device = model.mask_token.device
    grid = config.token_grid
    tokens, unknown = _known_tokens(model, len(seeds), known, mask)
    source = noise_source if noise_source is not None else SeededNoise(seeds)
    start = init_state(
        tokens.to(device),
        unknown,
        sampling.steps,
        source,
        schedule=sampling.mask_schedule,
        order=sampling.order,
        rule=sampling.reveal,
        grid=grid,
    )
    revealed_at = start.revealed_at()
    on_grid = revealed_at.view(-1, *grid)
    if not start.steps:
        yield _latent_step(model, start, on_grid)
    check = None if allow_broken else LatentCheck(model, sampling, upload(revealed_at, device), first)
    for state in sample_tokens(model, as_condition(condition, device), start, sampling, source):
        if check is not None:
            check(state)
        yield _latent_step(model, state, on_grid)


def _latent_step(model: MAR, state: DecodeState, revealed_at: Tensor) -> LatentStep:
    latents = unpatchify(state.tokens, model.config.patch_size, model.config.grid)
    return LatentStep(state.step, state.steps, latents, ~state.unknown.view_as(revealed_at), revealed_at)


def _known_tokens(model: MAR, count: int, known: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    config = model.config
    if known is None and mask is None:
        return torch.zeros(count, config.tokens, config.token_width), all_masked(count, config.tokens)
    if known is None or mask is None:
        raise ValueError("known and mask: got only one of them, expected both (mask: true = generate)")
    expected = (count, config.channels, *config.grid)
    if known.shape != expected:
        raise ValueError(f"known latents: got shape {tuple(known.shape)}, expected {expected}")
    if not known.isfinite().all():
        raise ValueError("known latents: got values that are not finite, expected numbers")
    if mask.shape != (count, *config.token_grid) or mask.dtype != torch.bool:
        raise ValueError(
            f"mask: got {tuple(mask.shape)} of {mask.dtype}, expected {(count, *config.token_grid)} of bool, "
            "one per token; or one per pixel of the image"
        )
    return patchify(known.float(), config.patch_size), mask.flatten(1).cpu()


class LatentCheck:
    """Raises BrokenLatents for generated tokens that are noise or not finite.

    An asynchronous device is asked a step late, so that it has work meanwhile; after the last step at once.

    Args:
        model, sampling: for the remedy.
        revealed_at: step that reveals each token, from 1; 0 for the known ones (on the model's device).
        first: index of the first image, for the message.
    """

    def __init__(self, model: MAR, sampling: SamplingConfig, revealed_at: Int[Tensor, "n L"], first: int = 0) -> None:
        self.model, self.sampling, self.revealed_at, self.first = model, sampling, revealed_at, first
        self.generated = (revealed_at > 0).sum(1)
        self.late = backend_for(revealed_at.device).asynchronous
        self.last: Callable[[], None] | None = None

    @torch.no_grad()
    def __call__(self, state: DecodeState) -> None:
        """Check a state; an image's standard deviation counts once a quarter of its tokens are generated."""
        done = (self.revealed_at > 0) & (self.revealed_at <= state.step)
        count = done.sum(1) * state.tokens.shape[-1]
        values = torch.where(done.unsqueeze(-1), state.tokens, 0.0)
        finite = values.isfinite().flatten(1).all(1)
        mean = values.sum((1, 2)) / count.clamp(min=1)
        std = ((values.square().sum((1, 2)) / count.clamp(min=1)) - mean.square()).clamp(min=0).sqrt()
        broken = ~finite | ((4 * done.sum(1) >= self.generated) & (std > MAX_STD))
        flag = read_later(broken.any())

        def fail_if_broken() -> None:
            if bool(flag()):
                self._fail(broken, finite, std, state.step, state.steps)

        if self.last is not None:
            self.last()
        self.last = fail_if_broken
        if not self.late or state.step == state.steps:
            fail_if_broken()
            self.last = None

    def _fail(self, broken: Tensor, finite: Tensor, std: Tensor, step: int, steps: int) -> None:
        image = int(broken.nonzero()[0])
        fault = (
            f"have a standard deviation of {float(std[image]):,.1f}, expected 1" if finite[image] else "are not finite"
        )
        raise BrokenLatents(
            f"image {self.first + image} is broken at reveal step {step} of {steps}: its latents {fault}. "
            + _remedy(self.sampling, self.model)
        )


def _remedy(sampling: SamplingConfig, model: MAR) -> str:
    if any(not p.isfinite().all() for p in model.parameters()):
        return "Some weights are not finite: use an older checkpoint"
    advice = "Likely the model is trained too little, and errors of the noisiest steps are amplified: train it longer"
    if sampling.x0_bound is None:
        advice += ", or bound the predicted tokens (--x0-bound 3)"
    return f"{advice}; lower guidance may help; to see it all the same, allow broken images (--allow-broken)"
