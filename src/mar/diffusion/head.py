"""The diffusion head: a small MLP that denoises one token, given z.

Source: paper, sections 3.2 and 4.1 ("Denoising MLP").

The layer norms are adaptive. Shift, scale and gate depend on timestep and z, but not on the noisy token, and are 62% of
the arithmetic. `modulations` computes them alone, so that a sampler does it for many steps in one product.

Letters of shapes: ... any leading dimensions, d values of a token, f width of z, w width of the head.
In sampling: r rows (tokens to draw), s noises a token, t diffusion steps, g = r, or 2r with guidance.
In training: n images, m masked tokens, k timesteps a token.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor, nn
from torch.nn import functional

from mar.config import HeadConfig, SamplingConfig
from mar.diffusion.gaussian import Coefficients, diffusion_loss, q_sample
from mar.diffusion.schedule import Schedule, respace, training_schedule
from mar.diffusion.single_step import SingleStepSchedule
from mar.diffusion.solvers import SCHEDULES, SOLVERS, ancestral_update, num_noises
from mar.nn import Linear, to_float32

NUM_FREQUENCIES = 256
"""Sines and cosines of the timestep embedding."""
MAX_PERIOD = 10000
"""Longest period of the timestep embedding."""
NORM_EPS = 1e-6
"""Epsilon of the layer norms."""
MODULATION_BYTES = 128 * 2**20
"""Memory for shift, scale and gate of one chunk of diffusion steps."""

Modulations = list[Tensor]
"""Shift, scale and gate (..., 3w) of each residual block, then shift and scale (..., 2w) of the last layer."""


@runtime_checkable
class TokenSampler(Protocol):
    """Interface of a head in sampling; a backend may have another."""

    token_width: int

    def num_noises(self, steps: int, sampling: SamplingConfig) -> int:
        """Return how many noises `sample` needs for a token."""
        ...

    def sample(self, z: Tensor, noise: Tensor, scale: Tensor | None, steps: int, sampling: SamplingConfig) -> Tensor:
        """Draw tokens from noise, given z.

        Args:
            z, noise, scale, steps, sampling: as in `DiffusionHead.sample`.
        """
        ...


@runtime_checkable
class Head(TokenSampler, Protocol):
    """Interface of a head in the model and in training: p(token | z)."""

    weight_decay: bool
    """Weight decay applies to its weights."""

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Units to compile, recompute or quantize."""
        ...

    def init_weights(self) -> None:
        """Draw the weights before training."""
        ...

    def loss(self, x0: Tensor, z: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of every (timestep, noise) of every token: k n m values, flattened.

        A head without timesteps repeats its loss k times.

        Args:
            x0, z, timestep, noise: as in `DiffusionHead.loss`.
        """
        ...


@runtime_checkable
class DenoisingLayers(Protocol):
    """Layers that `CFGDenoiser` calls; a backend may have faster ones."""

    config: HeadConfig

    def embed_times(self, t: Tensor) -> Tensor:
        """Embed timesteps."""
        ...

    def embed_conditions(self, z: Tensor) -> Tensor:
        """Embed z."""
        ...

    def embed_tokens(self, x: Tensor) -> Tensor:
        """Embed noisy tokens."""
        ...

    def modulations(self, condition: Tensor) -> Modulations:
        """Compute shift, scale and gate of every layer."""
        ...

    def denoise_embedded(self, h: Tensor, modulations: Modulations) -> Tensor:
        """Run residual blocks and last layer on embedded tokens."""
        ...


class TimeEmbedding(nn.Module):
    """Timesteps -> (..., w): sinusoids, cos then sin, and a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(NUM_FREQUENCIES, width)
        self.fc2 = Linear(width, width)

    def forward(self, t: Real[Tensor, "..."]) -> Float[Tensor, "... w"]:
        """Embed timesteps."""
        half = NUM_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float().unsqueeze(-1) * torch.exp(-math.log(MAX_PERIOD) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc1.weight.dtype)
        embedded: Tensor = self.fc2(functional.silu(self.fc1(waves)))
        return embedded


class ResidualBlock(nn.Module):
    """x + gate * mlp(norm(x) * (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)
        self.modulation = Linear(width, 3 * width, splits=3)

    def forward(self, x: Float[Tensor, "... w"], condition: Float[Tensor, "... w"]) -> Float[Tensor, "... w"]:
        """Run the block with the shift, scale and gate of `condition`."""
        return self.modulated(x, self.modulation(condition))

    def modulated(self, x: Float[Tensor, "... w"], modulation: Float[Tensor, "... three_w"]) -> Float[Tensor, "... w"]:
        """Run the block with a given shift, scale and gate."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        hidden = functional.silu(self.fc1(self.norm(x) * (1 + scale) + shift))
        return x + gate * self.fc2(hidden)


class DiffusionHead(nn.Module):
    """Noisy token, timestep and z -> prediction and variance value: (..., 2d)."""

    weight_decay = False  # as in the reference

    def __init__(self, token_width: int, z_width: int, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.token_width = token_width
        self.compile_steps = os.environ.get("MAR_COMPILE_HEAD") == "1"
        """Compile the guided diffusion steps of `sample` (torch.compile; solver `ancestral`)."""
        self.time_embed = TimeEmbedding(config.width)
        self.z_embed = Linear(z_width, config.width)
        self.input = Linear(token_width, config.width)
        self.blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.depth))
        self.final_modulation = Linear(config.width, 2 * config.width)
        self.output = Linear(config.width, 2 * token_width)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights; blocks start as the identity, the output at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.fc1, self.time_embed.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        for last in (*self.modulation_layers(), self.output):
            nn.init.zeros_(cast(Linear, last).weight)

    def forward(
        self, x: Float[Tensor, "... d"], t: Int[Tensor, "..."], z: Float[Tensor, "... f"]
    ) -> Float[Tensor, "... two_d"]:
        """Run the whole network; `t` are timesteps of the training schedule."""
        condition = self.condition(self.embed_times(t), self.embed_conditions(z))
        h = self.embed_tokens(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.final(h, self.final_modulation(condition))

    # ---- layers

    def embed_times(self, t: Real[Tensor, "..."]) -> Float[Tensor, "... w"]:
        """Embed timesteps: all of the schedule, where `t` has more values."""
        steps = self.config.diffusion_steps
        if t.numel() <= steps or t.is_floating_point():
            embedded: Tensor = self.time_embed(t)
            return embedded
        table = self.time_embed(torch.arange(steps, device=t.device))
        return functional.embedding(t, table)

    def embed_conditions(self, z: Float[Tensor, "... f"]) -> Float[Tensor, "... w"]:
        """Embed z."""
        embedded: Tensor = self.z_embed(z)
        return embedded

    def embed_tokens(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... w"]:
        """Embed noisy tokens."""
        return to_float32(self.input(x))

    @staticmethod
    def condition(time: Float[Tensor, "... w"], z: Float[Tensor, "... w"]) -> Float[Tensor, "... w"]:
        """Return SiLU(time + z), the input of all modulations, from embeddings."""
        return functional.silu(time + z)

    def modulations(self, condition: Float[Tensor, "... w"]) -> Modulations:
        """Compute shift, scale and gate of every layer."""
        return [layer(condition) for layer in self.modulation_layers()]

    def modulation_layers(self) -> list[nn.Module]:
        """Return the modulations' linear layers: of each block, then the last."""
        return [*(cast(ResidualBlock, block).modulation for block in self.blocks), self.final_modulation]

    def denoise_embedded(self, h: Float[Tensor, "... w"], modulations: Modulations) -> Float[Tensor, "... two_d"]:
        """Run the residual blocks and the last layer on embedded tokens."""
        for block, modulation in zip(self.blocks, modulations, strict=False):
            h = cast(ResidualBlock, block).modulated(h, modulation)
        return self.final(h, modulations[-1])

    def final(self, h: Float[Tensor, "... w"], modulation: Float[Tensor, "... two_w"]) -> Float[Tensor, "... two_d"]:
        """Run the last layer."""
        shift, scale = modulation.chunk(2, dim=-1)
        h = functional.layer_norm(h, h.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift
        return to_float32(self.output(h))

    # ---- training and sampling

    def loss(
        self,
        x0: Float[Tensor, "n m d"],
        z: Float[Tensor, "n m f"],
        timestep: Int[Tensor, "k n m"],
        noise: Float[Tensor, "k n m d"],
    ) -> Float[Tensor, " rows"]:
        """Return the loss of every (timestep, noise) of every token.

        Source: paper, equation 1.

        Args:
            x0: clean tokens.
            z: their conditions.
            timestep: timesteps of the training schedule, k for each token.
            noise: standard normal noise for each timestep.
        """
        c = Coefficients.at(_training_coefficients(self.config, x0.device), timestep.flatten())
        x0, noise = x0.expand_as(noise).flatten(0, -2), noise.flatten(0, -2)
        x = q_sample(x0, noise, c)
        output = self(x.view(*timestep.shape, -1), timestep, z).flatten(0, -2)
        return diffusion_loss(output, x0, x, noise, timestep.flatten() == 0, c, self.config.prediction)

    def schedule(self, steps: int, sampling: SamplingConfig, device: torch.device) -> Schedule | SingleStepSchedule:
        """Return the solver's own schedule, or the training schedule respaced to `steps`."""
        if sampling.solver in SCHEDULES:
            return _own_schedule(self.config, steps, sampling, device)
        return _respaced(self.config, steps, sampling.timestep_spacing, sampling.start_t, device)

    def num_noises(self, steps: int, sampling: SamplingConfig) -> int:
        """Return the noises per token: one, or one per step."""
        return num_noises(sampling.solver, steps)

    def sample(
        self,
        z: Float[Tensor, "g f"],
        noise: Float[Tensor, "s r d"],
        scale: Float[Tensor, "r 1"] | None,
        steps: int,
        sampling: SamplingConfig,
    ) -> Float[Tensor, "r d"]:
        """Draw tokens by the solver of `sampling`, in `steps` diffusion steps.

        Args:
            z: the condition of each row; with a `scale`, then the unconditional one of each row.
            noise: `num_noises` standard normal noises of each row.
            scale: guidance scale of each row (None: no guidance).
            steps: number of diffusion steps.
            sampling: solver, spacing of the timesteps, temperature and bound of x_0.
        """
        # `self` may be a backend's head, which has these layers but not this class
        schedule = DiffusionHead.schedule(self, steps, sampling, z.device)
        denoiser = CFGDenoiser(self, z, schedule.timesteps, scale)
        if getattr(self, "compile_steps", False) and scale is not None and sampling.solver == "ancestral":
            try:
                return compiled_ancestral(denoiser, noise, steps, sampling)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # of Dynamo, Inductor, Triton or a C++ compiler
                warnings.warn(f"can't compile the head, sampling without: {_first_line(error)}", stacklevel=2)
                self.compile_steps = False
        return SOLVERS[sampling.solver](
            denoiser,
            noise,
            schedule,
            self.config.prediction,
            temperature=sampling.temperature,
            x0_bound=sampling.x0_bound,
        )


class CFGDenoiser:
    """The head under classifier-free guidance, as a solver calls it.

    Both conditions of a row are evaluated at the same x. The prediction is uncond + scale (cond - uncond), and the
    variance is the conditional one (paper, appendix B).

    Args:
        head: the layers.
        z: the condition of each row; with a `scale`, then the unconditional one of each row.
        timesteps: of each diffusion step.
        scale: guidance scale of each row (None: no guidance).
        budget: bytes for the modulations of one chunk of diffusion steps.
    """

    def __init__(
        self,
        head: DenoisingLayers,
        z: Float[Tensor, "g f"],
        timesteps: Real[Tensor, " t"],
        scale: Float[Tensor, "r 1"] | None = None,
        budget: int = MODULATION_BYTES,
    ) -> None:
        self.head = head
        self.scale = scale
        self.times = head.embed_times(timesteps.to(z.device))
        self.z = head.embed_conditions(z)
        width, depth = head.config.width, head.config.depth
        step_bytes = len(z) * width * (3 * depth + 2) * self.z.element_size()
        self.chunk_steps = max(1, budget // max(step_bytes, 1))
        self.first = self.end = 0  # `cached` holds the modulations of steps [first, end)
        self.cached: Modulations = []

    def modulations(self, index: int) -> Modulations:
        """Return those of one step, computed in chunks."""
        if not self.first <= index < self.end:
            # solvers go from the last step to the first
            self.first, self.end = max(0, index + 1 - self.chunk_steps), index + 1
            times = self.times[self.first : self.end]
            self.cached = []  # frees the last chunk before the next is made
            self.cached = self.head.modulations(DiffusionHead.condition(times.unsqueeze(1), self.z.unsqueeze(0)))
        return [layer[index - self.first] for layer in self.cached]

    def __call__(self, x: Float[Tensor, "r d"], index: int) -> Float[Tensor, "r two_d"]:
        """Evaluate the head at x: prediction and variance values."""
        return denoise_guided(self.head, x, self.modulations(index), self.scale)


def denoise_guided(
    head: DenoisingLayers, x: Float[Tensor, "r d"], modulations: Modulations, scale: Float[Tensor, "r 1"] | None
) -> Float[Tensor, "r two_d"]:
    """Evaluate the head at x, guided: prediction and variance values.

    Args:
        head: the layers.
        x: noisy tokens.
        modulations: of this diffusion step.
        scale: guidance scale of each row (None: no guidance).
    """
    embedded = head.embed_tokens(x)
    if scale is None:
        return head.denoise_embedded(embedded, modulations)
    output = head.denoise_embedded(torch.cat([embedded, embedded]), modulations)
    conditional, unconditional = output.chunk(2)
    cond, variance = conditional.chunk(2, dim=-1)
    uncond = unconditional[:, : cond.shape[-1]]
    return torch.cat([uncond + scale * (cond - uncond), variance], dim=-1)


# ---- the guided step, compiled


def guided_step(
    head: DenoisingLayers,
    x: Float[Tensor, "r d"],
    modulations: Modulations,
    scale: Float[Tensor, "r 1"],
    noise: Float[Tensor, "r d"],
    coefficients: Float[Tensor, " 8"],
    temperature: float,
    x0_bound: float | None,
) -> Float[Tensor, "r d"]:
    """Run one guided diffusion step of the solver `ancestral`: network, guidance and update.

    Args:
        head: the layers.
        x: before the step.
        modulations, scale: as in `denoise_guided`.
        noise: to add.
        coefficients: of the step, on the device: a number of Python's would be compiled into each step.
        temperature, x0_bound: as in `ancestral`.
    """
    output = denoise_guided(head, x, modulations, scale)
    c = Coefficients(*coefficients.unbind())
    return ancestral_update(output, x, c, noise, head.config.prediction, temperature, x0_bound)


@lru_cache(maxsize=1)
def compiled_step() -> Callable[..., Tensor]:
    """Return `guided_step` compiled for any number of rows."""
    return torch.compile(guided_step, dynamic=True)


def compiled_ancestral(
    denoiser: CFGDenoiser, noise: Float[Tensor, "s r d"], steps: int, sampling: SamplingConfig
) -> Float[Tensor, "r d"]:
    """Sample as the solver `ancestral` does, by compiled steps: equal up to rounding.

    Args:
        denoiser: of a `DiffusionHead`, with guidance.
        noise: one for each step.
        steps: number of diffusion steps.
        sampling: the settings.
    """
    head, step = denoiser.head, compiled_step()
    table = _sampling_coefficients(head.config, steps, sampling.timestep_spacing, sampling.start_t, noise.device)
    x = noise[0]
    import torch.fx.experimental._config as fx  # late: `import mar` stays fast

    with fx.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # equal sizes are a coincidence: no new compilation
        for j, index in enumerate(reversed(range(1, steps)), start=1):
            x = step(
                head, x, denoiser.modulations(index), denoiser.scale, noise[j], table[index], sampling.temperature,
                sampling.x0_bound,
            )  # fmt: skip
    # the last step adds no noise: another function, and not worth another compilation
    c = Coefficients(*table[0].unbind())
    return ancestral_update(denoiser(x, 0), x, c, None, head.config.prediction, sampling.temperature, sampling.x0_bound)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


HEADS: dict[type[HeadConfig], Callable[..., nn.Module]] = {HeadConfig: DiffusionHead}
"""The head of each kind of configuration. A new head is a class that implements `Head`, and a line here."""


def build_head(token_width: int, z_width: int, config: HeadConfig) -> Any:
    """Create the head of a configuration: a module that fulfills `Head`.

    `token_width` is the number of values of a token, `z_width` that of features of z.
    """
    return HEADS[type(config)](token_width, z_width, config)


@lru_cache(maxsize=16)
def _training_coefficients(config: HeadConfig, device: torch.device) -> Float[Tensor, "8 T"]:
    return Coefficients.table(training_schedule(config)).float().to(device)


@lru_cache(maxsize=64)
def _sampling_coefficients(
    config: HeadConfig, steps: int, spacing: str, start_t: float, device: torch.device
) -> Float[Tensor, "T 8"]:
    schedule = respace(training_schedule(config), steps, spacing, start_t)  # type: ignore[arg-type]
    return Coefficients.table(schedule).float().T.contiguous().to(device)


@lru_cache(maxsize=256)
def _respaced(config: HeadConfig, steps: int, spacing: str, start_t: float, device: torch.device) -> Schedule:
    schedule = respace(training_schedule(config), steps, spacing, start_t)  # type: ignore[arg-type]
    return Schedule(schedule.betas, schedule.timesteps.to(device))


@lru_cache(maxsize=256)
def _own_schedule(config: HeadConfig, steps: int, sampling: SamplingConfig, device: torch.device) -> SingleStepSchedule:
    schedule = SCHEDULES[sampling.solver](config, steps, sampling)
    return replace(schedule, timesteps=schedule.timesteps.to(device))
