"""The reference's sampling and training on a device, reconstructed, beside ours: for `gpu.py`.

It is written from its description, not copied; its training step is `reference_step.py`'s. Both sides have weights and
latents at random, run in bfloat16 autocast or weights, and take one guided image, or one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from reference_step import Reference, ReferenceStep
from steps import mean_steps
from torch import Tensor

from mar.config import ModelConfig, SamplingConfig, TrainConfig
from mar.diffusion.gaussian import Coefficients, p_mean_variance
from mar.diffusion.schedule import Schedule, cosine, respace
from mar.model.masking import draw_mask_ratio, mask_schedule, masked_count
from mar.random import make_generator
from mar.sampling.generate import generate

if TYPE_CHECKING:
    from gpu_steps import Bench

GUIDANCE = 2.9
X0_BOUND = 3.0


def compare_sampling(bench: Bench, model: Any, images: int) -> None:
    """Report seconds of `exact` for both, second passes, and their ratio."""
    steps, diffusion_steps = bench.size((64, 100), (3, 4))
    sampling = SamplingConfig(steps, diffusion_steps, guidance_scale=GUIDANCE, x0_bound=X0_BOUND)

    def ours() -> None:
        for _ in generate(model, [1] * images, range(images), sampling, allow_broken=True):
            pass

    with torch.device(bench.device):
        reference = Reference(model.config).eval().requires_grad_(False)

    def theirs() -> None:
        with torch.device(bench.device), torch.autocast(bench.device.type, torch.bfloat16):
            tokens = reference_sample(reference, images, steps, diffusion_steps)
        assert tokens.isfinite().all()

    ours()
    seconds = {"ours": bench.timed(ours)}
    bench.report({f"exact, {images} image(s), ours s": seconds["ours"]})
    # a pass of few steps warms the reference's loop up, since a whole one is long
    with torch.device(bench.device), torch.autocast(bench.device.type, torch.bfloat16):
        reference_sample(reference, images, 2, 2)
    seconds["theirs"] = bench.timed(theirs)
    bench.report({
        f"exact, {images} image(s), the reference's loop s": seconds["theirs"],
        f"exact, {images} image(s), times as fast": seconds["theirs"] / seconds["ours"],
    })  # fmt: skip


@torch.no_grad()
def reference_sample(model: Reference, images: int, steps: int, diffusion_steps: int) -> Tensor:
    """Draw tokens as the reference does: both halves of guidance through all of the trunk, and a plain loop.

    Args:
        model: the reconstructed one, on the default device.
        images: number of images.
        steps: K, the number of reveal steps.
        diffusion_steps: of the head.
    """
    length, width = model.config.tokens, model.config.token_width
    tokens, mask = torch.zeros(images, length, width), torch.ones(images, length)
    orders = torch.rand(images, length).argsort(1)
    classes = torch.cat([model.classes(torch.ones(images, dtype=torch.long)), model.null.expand(images, -1)])
    schedule = respace(cosine(model.config.head.diffusion_steps), diffusion_steps)
    schedule = Schedule(schedule.betas, schedule.timesteps.to(mask.device))
    table = Coefficients.table(Schedule(schedule.betas.cpu(), schedule.timesteps.cpu())).to(mask.device)
    before = length
    for after in mask_schedule(length, steps):
        z = model.trunk(torch.cat([tokens, tokens]), classes, torch.cat([mask, mask]))
        new_mask = torch.zeros(images, length).scatter_(1, orders[:, :after], 1.0)
        reveal = (mask.bool() & ~new_mask.bool()).nonzero(as_tuple=True)
        both = torch.cat([each[reveal] for each in z.chunk(2)])
        scale = 1 + (GUIDANCE - 1) * (length - after) / length
        tokens[reveal] = reference_loop(model, both, schedule, table, scale)
        mask, before = new_mask, after
    assert before == 0
    return tokens


def reference_loop(model: Reference, z: Tensor, schedule: Schedule, table: Tensor, scale: float) -> Tensor:
    """Draw rows of tokens step by step, with all work of the network at every step.

    Args:
        model: has the head.
        z: conditional, then unconditional rows.
        schedule: of the diffusion steps.
        table: its coefficients.
        scale: of guidance.
    """
    x = torch.randn(len(z) // 2, model.config.token_width).repeat(2, 1)
    for index in reversed(range(len(schedule))):
        t = torch.tensor([index] * len(z))
        output = model.head(x.chunk(2)[0].repeat(2, 1), schedule.timesteps[t], z).float()
        predicted, variance = output.chunk(2, dim=-1)
        conditional, unconditional = predicted.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        rows = Coefficients(*(row[t].float().unsqueeze(-1).expand_as(x) for row in table))
        p = p_mean_variance(torch.cat([guided.repeat(2, 1), variance], dim=-1), x, rows, "noise", X0_BOUND)
        noisy = (t != 0).float().unsqueeze(-1)
        x = p.mean + noisy * (0.5 * p.log_variance).exp() * torch.randn_like(x)
    return x.chunk(2)[0]


def compare_training(bench: Bench, name: str, model: ModelConfig, count: int) -> None:
    """Report images a second of both steps in bf16 at the mean mask ratio, peaks, and the ratio.

    Args:
        bench: measures.
        name: of the model.
        model: its sizes.
        count: images of a batch.
    """

    config = TrainConfig(model=model, batch=count, precision="bf16")
    speeds = {}
    for name_of_side, make in (("ours", our_step), ("the reference's step", their_step)):
        bench.reset_peak()
        speed = speeds[name_of_side] = count / seconds_of_step(bench, make(bench, config))
        found = {"images/s": speed, "peak GB": bench.peak_gb()}
        bench.report({f"training {name}, batch {count}, {name_of_side}": found})
    ratio = speeds["ours"] / speeds["the reference's step"]
    bench.report({f"training {name}, batch {count}, times as fast": ratio})


def seconds_of_step(bench: Bench, step: Callable[[], object]) -> float:
    """Return the mean seconds of steps, after two."""
    repeats = bench.size(6, 1)
    for _ in range(2):
        step()
    return bench.timed(lambda: [step() for _ in range(repeats)]) / repeats


def our_step(bench: Bench, config: TrainConfig) -> Callable[[], object]:
    """Return our training step, at the mean mask ratio each time."""
    from gpu_steps import training_run

    run, batch = training_run(bench, config)
    number = mean_steps(config.model, 1)[0]

    def step() -> None:
        run.progress.step = number
        run.step(batch)

    return step


def their_step(bench: Bench, config: TrainConfig) -> Callable[[], object]:
    """Return the reference's training step in bfloat16, at the mean mask ratio each time."""
    model, count, number = config.model, config.batch, mean_steps(config.model, 1)[0]
    masked = masked_count(model.tokens, draw_mask_ratio(model.mask_ratio_min, make_generator(0, number)))
    with torch.device(bench.device):
        theirs = ReferenceStep(config)
        latents = torch.randn(count, model.channels, *model.grid)
        labels = torch.arange(count) % model.classes

    def step() -> float:
        with torch.device(bench.device):
            with torch.autocast(bench.device.type, torch.bfloat16):
                loss = theirs.model(latents, labels, masked)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), config.clip)
            theirs.optimizer.step()
            theirs.optimizer.zero_grad()
            theirs.update_average()
            return loss.item()

    return step
