"""Sampling time per image: encoder, decoder and head, compared with the reference's head loop.

    python benchmarks/sampling.py [--model mar-base] [--steps 64] [--diffusion-steps 100] [--images 1] [--threads 2]

Weights are random: time does not depend on them. Reveal steps are measured at their real numbers of visible and output
tokens. `--every` measures one of so many neighboring steps, `--full` all of them. All are measured as well if guidance
differs from step to step.

Compared times are medians of `--repeats`, measured in turns, so that a ratio is of one run. The speed of a matrix
product, measured before and after, tells the speed of the machine. `--preset exact fast` measures these presets, one
after the other, and the speedup of the second.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from mar.backends.cpu import linear as cpu_linear
from mar.backends.cpu.int8 import quantize_
from mar.backends.cpu.packed_head import pack_head
from mar.config import SamplingConfig
from mar.diffusion.gaussian import Coefficients, p_mean_variance
from mar.diffusion.head import DiffusionHead
from mar.diffusion.schedule import Schedule, cosine, respace
from mar.model.mar import MAR
from mar.nn import set_matrix_dtype
from mar.presets import SAMPLING_PRESETS, apply_preset
from mar.published import MODELS, SAMPLING
from mar.sampling.decode import DecodeState, all_masked, decode_step, init_state
from mar.sampling.guidance import guidance_scale
from mar.sampling.noise import SeededNoise

REFERENCE_LOOP = "reference's loop"
PARTS = ("encoder", "decoder", "head")
PRODUCT = (640, 768, 3072)
"""Rows, inputs and outputs of a matrix product of MAR-B's trunk: one image with and without its class."""
REFERENCE = {"encoder": 23.0, "decoder": 46.0, "head": 124.0}
"""Seconds of the reference for one image of MAR-B, K=64, 100 diffusion steps, guidance 2.9 linear, float32."""
REFERENCE_TASK = ("mar-base", 64, 100, 1)
REFERENCE_GFLOPS = 172.0
"""Speed of PRODUCT on the machine of these measurements: 2 cores with AVX-512."""
X0_BOUND = 3.0
"""Bound of x_0. Without it, random weights would give numbers that are not finite."""
REFERENCE_SHARE = 4
"""One of so many diffusion steps of the reference's head is measured, since all do the same work."""


@dataclass(frozen=True)
class Task:
    """A generation to measure."""

    labels: Tensor
    sampling: SamplingConfig
    schedule: Schedule
    measured: dict[int, int]
    """Measured reveal steps -> number of steps that each stands for."""


Seconds = dict[str, float]


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = random_model(options.model)
    sampling = SamplingConfig(
        options.steps, options.diffusion_steps, SAMPLING[options.model].guidance_scale, x0_bound=X0_BOUND
    )
    schedule = cosine(model.config.head.diffusion_steps)
    labels = torch.arange(options.images) % model.config.classes

    before = product_speed(torch.float32), product_speed(torch.bfloat16)
    bf16 = options.bf16 == "yes" or (options.bf16 == "auto" and before[1] >= before[0])
    totals: dict[str, Seconds] = {}
    for preset in options.preset:
        settings = apply_preset(sampling, model.config.tokens, preset)
        steps = min(settings.steps, model.config.tokens)
        # neighboring steps do the same work
        uniform = settings.uncond_interval == 1 and settings.guidance_interval[0] == 0.0
        measured = choose_steps(steps, options.every if uniform and not options.full else 1)
        task = Task(labels, settings, schedule, measured)
        runs = measure(model, task, options.repeats, bf16, options.int8)
        totals[preset] = {name: sum(parts.values()) for name, parts in runs.items() if name != REFERENCE_LOOP}
        after = product_speed(torch.float32)
        print_settings(options, preset, task, model)
        product = "x".join(map(str, PRODUCT))
        print(f"product {product}: fp32 {before[0]:.0f} GFLOP/s before, {after:.0f} after; bf16 {before[1]:.0f}")
        print_table(runs)
        if preset == "exact" and (options.model, steps, options.diffusion_steps, options.images) == REFERENCE_TASK:
            print_reference(runs, (before[0] + after) / 2)
        print(flush=True)
    first, *others = totals
    for preset in others:
        speedups = (f"{name} {totals[first][name] / seconds:.2f}" for name, seconds in totals[preset].items())
        print(f"speedup of {preset} over {first}: {', '.join(speedups)}")
    if not bf16:
        print("bf16 is not measured: --bf16 no, or its products are slower than fp32's here (--bf16 yes measures it)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="mar-base")
    parser.add_argument("--steps", type=int, default=64, help="reveal steps, K")
    parser.add_argument("--diffusion-steps", type=int, default=100)
    parser.add_argument(
        "--preset", choices=sorted(SAMPLING_PRESETS), nargs="+", default=["exact"], help="presets to measure"
    )
    parser.add_argument("--images", type=int, default=1, help="batch size")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's own choice by default")
    parser.add_argument("--every", type=int, default=8, help="measure one of so many reveal steps, if they are alike")
    parser.add_argument("--full", action="store_true", help="measure all reveal steps")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each median")
    parser.add_argument(
        "--bf16", choices=("auto", "yes", "no"), default="auto", help="auto: if its products are faster"
    )
    parser.add_argument("--int8", action="store_true", help="measure int8 weights, too")
    options = parser.parse_args()
    for name in ("steps", "diffusion_steps", "images", "every", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected at least 1")
    return options


def random_model(name: str) -> MAR:
    """Create a model with random weights, even those that start at zero: adding zeros might be faster."""
    torch.manual_seed(0)
    model = MAR(MODELS[name]).eval().requires_grad_(False)
    for parameter in model.head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def choose_steps(steps: int, every: int) -> dict[int, int]:
    """Return the middle step of each block of `every`, and the block's length."""
    blocks = [range(first, min(first + every, steps)) for first in range(0, steps, every)]
    return {block[len(block) // 2]: len(block) for block in blocks}


def product_speed(dtype: torch.dtype, repeats: int = 9) -> float:
    """Measure the median GFLOP/s of PRODUCT."""
    rows, inputs, outputs = PRODUCT
    x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    functional.linear(x, weight)
    seconds = [timed(lambda: functional.linear(x, weight))[1] for _ in range(repeats)]
    return 2e-9 * rows * inputs * outputs / statistics.median(seconds)


def timed(run: Callable[[], Tensor | DecodeState]) -> tuple[Tensor | DecodeState, float]:
    """Return the result of `run`, and its seconds."""
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def measure(model: MAR, task: Task, repeats: int, bf16: bool, int8: bool) -> dict[str, Seconds]:
    """Measure the seconds of all reveal steps by part, for each dtype and for the reference's loop."""
    models = {"fp32": model}
    if bf16:
        models["bf16"] = copy.deepcopy(model)
        set_matrix_dtype(models["bf16"], torch.bfloat16)
    if int8:
        models["int8"] = copy.deepcopy(model)
        quantize_(models["int8"].blocks())
    totals: dict[str, Seconds] = {name: dict.fromkeys(PARTS, 0.0) for name in models} | {REFERENCE_LOOP: {"head": 0.0}}
    for state, weight in states(model, task):
        rounds: list[dict[str, Seconds]] = []
        for _ in range(repeats):
            rounds.append({name: time_ours(m, task, state) for name, m in models.items()})
            rounds[-1][REFERENCE_LOOP] = {"head": time_reference_head(model, task, state)}
        for name, total in totals.items():
            for part in total:
                total[part] += weight * statistics.median(r[name][part] for r in rounds)
    return totals


def states(model: MAR, task: Task) -> Iterator[tuple[DecodeState, int]]:
    """Yield the states before the measured steps, with random known tokens, and their weights."""
    count, length = len(task.labels), model.config.tokens
    tokens = torch.randn(count, length, model.config.token_width)
    state = init_state(tokens, all_masked(count, length), task.sampling.steps, SeededNoise(range(count)))
    for step in range(state.steps):
        if step in task.measured:
            yield state, task.measured[step]
        unknown = state.unknown.clone()
        for image in range(count):
            unknown[image, state.revealed(image)] = False
        state = replace(state, tokens=tokens.masked_fill(unknown.unsqueeze(-1), 0.0), unknown=unknown, step=step + 1)


def time_ours(model: MAR, task: Task, state: DecodeState) -> Seconds:
    """Measure one reveal step; all but encoder and decoder counts as the head."""
    noise_source, head = SeededNoise(range(len(task.labels))), pack_head(model.head)
    with stopwatch(model) as seconds:
        after, total = timed(lambda: decode_step(model, task.labels, state, task.sampling, noise_source, head))
    assert isinstance(after, DecodeState)
    assert after.tokens.isfinite().all()
    return {**seconds, "head": total - sum(seconds.values())}


@contextmanager
def stopwatch(model: MAR) -> Iterator[Seconds]:
    """Measure the time of the model's encoder and decoder inside the block."""
    seconds = {"encoder": 0.0, "decoder": 0.0}

    def timed_method(part: str, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **kwargs: object) -> Tensor:
            result, spent = timed(lambda: method(*args, **kwargs))
            seconds[part] += spent
            assert isinstance(result, Tensor)
            return result

        return call

    model.encode = timed_method("encoder", model.encode)  # type: ignore[method-assign]
    model.decode = timed_method("decoder", model.decode)  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        del model.encode, model.decode


@torch.no_grad()
def time_reference_head(model: MAR, task: Task, state: DecodeState) -> float:
    """Measure the reference's loop for the tokens of this step, on a share of its diffusion steps."""
    rows = sum(len(state.revealed(i)) for i in range(len(task.labels)))
    z = torch.randn(2 * rows, model.config.decoder.width)
    scale = guidance_scale(task.sampling, state.schedules[0][state.step], model.config.tokens)
    schedule = respace(task.schedule, task.sampling.diffusion_steps)
    timesteps = range(len(schedule))[::-1][::REFERENCE_SHARE]
    with plain_products():
        x, seconds = timed(lambda: reference_loop(model.head, z, schedule, scale, timesteps))
    assert isinstance(x, Tensor)
    assert x.isfinite().all()
    return seconds * len(schedule) / len(timesteps)


@contextmanager
def plain_products() -> Iterator[None]:
    """Use PyTorch's own matrix products inside the block, as the reference does."""
    ours = cpu_linear.onednn_is_faster
    cpu_linear.onednn_is_faster = lambda: False
    try:
        yield
    finally:
        cpu_linear.onednn_is_faster = ours


def reference_loop(head: DiffusionHead, z: Tensor, schedule: Schedule, scale: float, indices: range) -> Tensor:
    """Sample as the reference does, with all work at every step.

    Both halves of the guidance have a state and noise of their own. Each step embeds its timestep for every row,
    projects z, computes every layer's shift, scale and gate, and looks up its coefficients for every row.
    """
    table = Coefficients.table(schedule)
    x = torch.randn(len(z) // 2, head.token_width).repeat(2, 1)
    for index in indices:
        t = torch.tensor([index] * len(z))
        output = reference_network(head, x.chunk(2)[0].repeat(2, 1), schedule.timesteps[t], z)
        predicted, variance = output.chunk(2, dim=-1)
        conditional, unconditional = predicted.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        rows = Coefficients(*(row[t].float().unsqueeze(-1).expand_as(x) for row in table))
        p = p_mean_variance(torch.cat([guided.repeat(2, 1), variance], dim=-1), x, rows, "noise", X0_BOUND)
        noisy = (t != 0).float().unsqueeze(-1)
        x = p.mean + noisy * (0.5 * p.log_variance).exp() * torch.randn_like(x)
    return x


def reference_network(head: DiffusionHead, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """Run the head as one network, with the SiLU of the condition again for every layer."""
    condition = head.time_embed(t) + head.z_embed(z)
    layers = [*(block.modulation for block in head.blocks), head.final_modulation]
    return head.denoise_embedded(head.embed_tokens(x), [layer(functional.silu(condition)) for layer in layers])


def print_settings(options: argparse.Namespace, preset: str, task: Task, model: MAR) -> None:
    sampling, images, steps = task.sampling, len(task.labels), sum(task.measured.values())
    tokens = sum(weight * len(state.revealed(i)) for state, weight in states(model, task) for i in range(images))
    print(
        f"{options.model} with random weights, {images} image(s), preset {preset}, K={steps}, "
        f"{sampling.diffusion_steps} diffusion steps, guidance {sampling.guidance_scale} {sampling.guidance_schedule}; "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}\n"
        f"measured {len(task.measured)} of {steps} reveal steps, standing for {tokens} of "
        f"{images * model.config.tokens} tokens; medians of {options.repeats}"
    )


def print_table(runs: dict[str, Seconds]) -> None:
    print(f"\n{'seconds':18}" + "".join(f"{part:>10}" for part in (*PARTS, "all")))
    for name, parts in runs.items():
        cells = [f"{parts[part]:10.1f}" if part in parts else f"{'-':>10}" for part in PARTS]
        total = f"{sum(parts.values()):10.1f}" if len(parts) == len(PARTS) else f"{'-':>10}"
        print(f"{name:18}" + "".join(cells) + total)
    theirs, ours = runs[REFERENCE_LOOP]["head"], runs["fp32"]
    total = sum(ours.values())
    print(f"\nhead, fp32: {theirs / ours['head']:.2f} times as fast as the reference's loop on the same network")
    print(f"image, fp32: {(total - ours['head'] + theirs) / total:.2f} times as fast as with that loop and our trunk")


def print_reference(runs: dict[str, Seconds], gflops: float) -> None:
    """Print estimates: the reference's seconds at this machine's speed, and ours at that machine's."""
    ratio, theirs, ours = REFERENCE_GFLOPS / gflops, sum(REFERENCE.values()), sum(runs["fp32"].values())
    parts = ", ".join(f"{name} {seconds * ratio:.0f}" for name, seconds in REFERENCE.items())
    faster = runs[REFERENCE_LOOP]["head"] / runs["fp32"]["head"]
    by_head = theirs - REFERENCE["head"] + REFERENCE["head"] / faster
    print(f"\nestimates ({REFERENCE_GFLOPS:.0f} GFLOP/s: where the reference took {theirs:.0f} s; {gflops:.0f}: here)")
    print(f"the reference here, by the product's speed: {theirs * ratio:.0f} s ({parts})")
    print(
        f"our fp32 there: {ours / ratio:.0f} s by the product's speed, {by_head:.0f} s by the ratio of the heads alone"
    )


if __name__ == "__main__":
    main()
