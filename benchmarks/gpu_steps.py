"""The steps of `gpu.py`, by value. Each runs in a process of its own and reports results as it has them."""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mar.backends import configure
from mar.backends.cuda.settings import set_tf32

ROOT = Path(__file__).resolve().parents[1]
X0_BOUND = 3.0
"""Bound of x_0. Without it, random weights would give numbers that are not finite."""
FP32_ERROR = 1e-4
"""Relative error of z in float32 against float64 on the CPU, at most."""


class Bench:
    """What a step gets: the device, its time, and a way to report.

    Args:
        device: name of the device.
        options: of `gpu.py`.
    """

    def __init__(self, device: str, options: argparse.Namespace) -> None:
        self.device, self.options, self.rehearse = torch.device(device), options, bool(options.rehearse)
        self.deadline = time.monotonic() + options.seconds
        self.cuda = self.device.type == "cuda"
        configure(self.device)  # as `mar` does: attention without cuDNN's plans, no TF32
        if self.rehearse:
            torch.set_num_threads(1)
            # what Inductor makes takes longer to compile than a rehearsal may last
            compile_module = nn.Module.compile
            nn.Module.compile = lambda module, **how: compile_module(module, **{**how, "backend": "eager"})  # type: ignore[method-assign]

    def __call__(self, **results: Any) -> None:
        """Report results; names with underscores are written with spaces."""
        self.report({name.replace("_", " "): value for name, value in results.items()})

    def report(self, results: dict[str, Any]) -> None:
        """Report results by name."""
        print("RESULT " + json.dumps(results), flush=True)

    def size(self, full: Any, tiny: Any) -> Any:
        """Choose a size for this run."""
        return tiny if self.rehearse else full

    def left(self) -> float:
        """Return the seconds that the step has left."""
        return self.deadline - time.monotonic()

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], object]) -> float:
        """Return the seconds of one call."""
        self.sync()
        begun = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - begun

    def median(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Return the median seconds of calls after a first one."""
        work()
        return statistics.median(self.timed(work) for _ in range(self.size(repeats, 1)))

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """Return the peak of allocated memory since `reset_peak`, in GB; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note an error of one part of a step, and go on with the next."""
        try:
            yield
        except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or [""])[0]
            self.report({name: f"failed: {type(error).__name__}: {reason[:200]}"})
            if self.rehearse:
                raise
            self.reset_peak()


@dataclass(frozen=True)
class Step:
    """A step and its limit."""

    seconds: float
    run: Callable[[Bench], None]


STEPS: dict[str, Step] = {}


def step(name: str, seconds: float) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    """Register a step; steps run in the order of this file."""

    def register(run: Callable[[Bench], None]) -> Callable[[Bench], None]:
        STEPS[name] = Step(seconds, run)
        return run

    return register


# ---- what the steps share


def model_config(bench: Bench, name: str) -> Any:
    from mar.config import HeadConfig, ModelConfig, TrunkConfig
    from mar.published import MODELS

    if not bench.rehearse:
        return MODELS[name]
    trunk = TrunkConfig(width=32, depth=2, num_heads=2)
    return ModelConfig(grid=(4, 4), encoder=trunk, decoder=trunk, head=HeadConfig(width=32, depth=2), buffer_size=4)


def random_model(bench: Bench, name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Create a model with random weights, also those that start at zero."""
    from mar.model.mar import MAR
    from mar.nn import set_matrix_dtype

    torch.manual_seed(0)
    with torch.device(bench.device):
        model = MAR(model_config(bench, name)).eval().requires_grad_(False)
    for parameter in model.head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    set_matrix_dtype(model, dtype)
    return model


def training_run(bench: Bench, config: Any) -> tuple[Any, Any]:
    """Return a run that is never saved, and a batch of random cached latents."""
    from steps import NoTokenizer

    from mar.data.loader import LatentBatch
    from mar.model.mar import MAR
    from mar.tokenizer.base import LatentMoments
    from mar.training.speed import _NoImages
    from mar.training.trainer import Run

    torch.manual_seed(0)
    with torch.device(bench.device):
        model = MAR(config.model)
    classes = tuple(map(str, range(config.model.classes)))
    folder = Path(tempfile.gettempdir(), "never-saved")
    run = Run(config, folder, _NoImages(classes), NoTokenizer(), model, bench.device)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(config.batch, config.model.channels, *config.model.grid, generator=generator)
    labels = torch.arange(config.batch) % config.model.classes
    moments = LatentMoments(latents, torch.zeros_like(latents))
    return run, LatentBatch(labels, torch.arange(config.batch), (), moments)


# ---- checks


@step("machine", 40)
def machine(bench: Bench) -> None:
    """Versions, and the speed of products and copies."""
    import mar

    bench(mar=mar.__version__, torch=torch.__version__, python=platform.python_version(), cpus=os.cpu_count())
    if bench.cuda:
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        bench(gpu=name, memory_gb=memory / 1e9, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    n = bench.size(8192, 64)
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False)
    ):  # fmt: skip
        set_tf32(tf32)
        a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
        bench.report({f"TFLOP/s {name}": 2e-12 * n**3 / bench.median(lambda: a @ b)})  # noqa: B023
    x = torch.randn(4 * n * n, device=bench.device)
    y = torch.empty_like(x)
    bench.report({"copy GB/s, read and written": 2e-9 * x.numel() * 4 / bench.median(lambda: y.copy_(x))})


@step("tests", 90)
def tests(bench: Bench) -> None:
    """Tests marked gpu, the goldens of tests/parity among them."""
    files = [str(file) for file in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in file.read_text("utf-8")]
    assert files
    words = ["-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "-rfE"]
    if bench.rehearse:  # there is no device to run them on
        words += ["--collect-only", "--noconftest", "-o", "addopts=--import-mode=importlib"]
    command = [sys.executable, *words, *files]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    lines = done.stdout.strip().splitlines()
    bench(tests=lines[-1] if lines else "no output", files=len(files))
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            name, _, why = line.partition(" - ")
            bench.report({name: why[:200]})
    assert done.returncode == 0, f"pytest ended with {done.returncode}"


@step("parity", 60)
@torch.no_grad()
def parity(bench: Bench) -> None:
    """Errors of z by precision against float64 on the CPU, and pictures of the bundled models against the CPU's."""
    import mar
    from mar.nn import set_matrix_dtype

    model = random_model(bench, "mar-base", torch.float32)
    exact = copy.deepcopy(model).cpu().double()
    length, generator = model.config.tokens, torch.Generator().manual_seed(0)
    tokens = torch.randn(2, length, model.config.token_width, generator=generator)
    visible, hidden = torch.arange(length // 4).expand(2, -1), torch.arange(length // 2, length).expand(2, -1)
    labels = torch.tensor([1, -1])
    expected = exact(tokens.double(), labels, visible, query_idx=hidden)
    errors = {}
    for name, tf32, dtype in (("fp32", False, torch.float32), ("tf32", True, torch.float32),
                              ("bf16", False, torch.bfloat16)):  # fmt: skip
        set_tf32(tf32)
        set_matrix_dtype(model, dtype)
        inputs = (each.to(bench.device) for each in (tokens, labels, visible))
        z = model(*inputs, query_idx=hidden.to(bench.device)).cpu().double()
        errors[name] = float((z - expected).norm() / expected.norm())
        bench.report({f"relative error of z, {name}": errors[name]})
    set_tf32(False)
    del model, exact
    steps = {"steps": 3} if bench.rehearse else {}
    for name, asks in (("fashion", {"labels": ["Dress", 3, None]}), ("emoji", {"prompts": ["cat", "red heart", None]})):
        with bench.part(name):
            pipelines = [mar.load(name, device=device, dtype=torch.float32) for device in ("cpu", str(bench.device))]
            pipelines.append(mar.load(name, device=str(bench.device), dtype=torch.bfloat16))
            images = [p.sample(seeds=[0, 1, 2], output="tensor", **asks, **steps).cpu() for p in pipelines]
            found = {}
            for precision, drawn in zip(("fp32", "bf16"), images[1:], strict=True):
                difference = (images[0] - drawn).abs()
                found[precision] = {"mean": float(difference.mean()), "most": float(difference.max())}
            single = {word: values[1:2] for word, values in asks.items()}
            alone = pipelines[1].sample(seeds=[1], output="tensor", **single, **steps).cpu()
            bench.report({
                f"{name}, device against CPU, of [-1, 1]": found["fp32"],
                f"{name}, device in bf16 against CPU, of [-1, 1]": found["bf16"],
                f"{name}, alone against in a batch, most": float((alone[0] - images[1][1]).abs().max()),
            })  # fmt: skip
    assert errors["fp32"] < FP32_ERROR, f"got a relative error of {errors['fp32']:.2g}, expected less than {FP32_ERROR}"


@step("graphs", 45)
@torch.no_grad()
def graphs(bench: Bench) -> None:
    """The head as the backend prepares it against the plain one, with guidance: difference and time."""
    from mar.backends import backend_for
    from mar.config import SamplingConfig

    model = random_model(bench, "mar-base")
    steps = bench.size(100, 5)
    sampling = SamplingConfig(diffusion_steps=steps, x0_bound=X0_BOUND)
    head, prepared = model.head, backend_for(bench.device).sampling_head(model.head)
    for rows in bench.size((4, 64, 1024), (4,)):
        z = torch.randn(2 * rows, model.config.decoder.width, device=bench.device)
        noise = torch.randn(head.num_noises(steps, sampling), rows, head.token_width, device=bench.device)
        scale = torch.full((rows, 1), 2.0, device=bench.device)
        arguments = (z, noise, scale, steps, sampling)
        plain = head.sample(*arguments)
        for _ in range(3):
            prepared_result = prepared.sample(*arguments)
        bench.report({
            f"{rows} rows": {
                "most difference": float((prepared_result - plain).abs().max()),
                "plain ms": 1e3 * bench.median(lambda a=arguments: head.sample(*a)),
                "prepared ms": 1e3 * bench.median(lambda a=arguments: prepared.sample(*a)),
            }
        })  # fmt: skip


@step("compiled", 60)
@torch.no_grad()
def compiled(bench: Bench) -> None:
    """A guided diffusion step of the head, compiled by torch.compile against plain: difference, time, kernels."""
    from torch.profiler import ProfilerActivity, profile

    from mar.config import SamplingConfig
    from mar.diffusion.head import CFGDenoiser

    model, steps = random_model(bench, "mar-base"), bench.size(100, 5)
    head = model.head
    schedule = head.schedule(steps, SamplingConfig(diffusion_steps=steps), bench.device)

    def plain(x: Tensor, scale: Tensor, modulations: list[Tensor]) -> Tensor:
        embedded = head.embed_tokens(x)
        output = head.denoise_embedded(torch.cat([embedded, embedded]), modulations)
        conditional, unconditional = output.chunk(2)
        cond, variance = conditional.chunk(2, dim=-1)
        uncond = unconditional[:, : cond.shape[-1]]
        return torch.cat([uncond + scale * (cond - uncond), variance], dim=-1)

    def kernels(work: Callable[[], object]) -> int:
        if not bench.cuda:
            return 0
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work()
            bench.sync()
        return sum(row.count for row in profiler.key_averages() if row.self_device_time_total > 0)

    fast = torch.compile(plain, dynamic=True, backend="eager" if bench.rehearse else "inductor")
    for rows in bench.size((4, 64, 1024), (4,)):
        z = torch.randn(2 * rows, model.config.decoder.width, device=bench.device)
        x = torch.randn(rows, head.token_width, device=bench.device)
        scale = torch.full((rows, 1), 2.0, device=bench.device)
        arguments = (x, scale, CFGDenoiser(head, z, schedule.timesteps, scale).modulations(0))
        first = bench.timed(lambda a=arguments: fast(*a))
        expected, found = plain(*arguments), fast(*arguments)
        bench.report({
            f"{rows} rows": {
                "most difference": float((found - expected).abs().max()),
                "plain ms": 1e3 * bench.median(lambda a=arguments: plain(*a), 20),
                "compiled ms": 1e3 * bench.median(lambda a=arguments: fast(*a), 20),
                "plain kernels": kernels(lambda a=arguments: plain(*a)),
                "compiled kernels": kernels(lambda a=arguments: fast(*a)),
                "first call s": first,
            }
        })  # fmt: skip


@step("group", 60)
def group(bench: Bench) -> None:
    """DDP and FSDP in a group of one, by NCCL on a GPU: the losses of a run without a group."""
    import torch.distributed as dist

    from mar.config import TrainConfig

    model = replace(model_config(bench, "mar-base"), attention_dropout=0.0, projection_dropout=0.0)
    if not bench.rehearse:
        trunk = replace(model.encoder, depth=2)
        model = replace(model, encoder=trunk, decoder=trunk)

    def losses(strategy: Any) -> list[tuple[float, float]]:
        run, batch = training_run(bench, TrainConfig(model=model, batch=4, strategy=strategy, lr=1e-2))
        return [tuple(run.step(batch)) for _ in range(3)]  # type: ignore[misc]

    alone = losses("ddp")
    bench.report({"losses and norms without a group": str([[round(x, 5) for x in pair] for pair in alone])})
    backend = "gloo"
    if bench.cuda:
        torch.cuda.set_device(bench.device)
        bench.device = torch.device("cuda", torch.cuda.current_device())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    worst = {}
    for strategy in ("ddp", "fsdp"):
        with bench.part(strategy):
            pairs = zip(alone, losses(strategy), strict=True)
            worst[strategy] = max(abs(a - b) / abs(a) for x, y in pairs for a, b in zip(x, y, strict=True))
            bench.report({f"{strategy}, most relative difference": worst[strategy]})
    dist.destroy_process_group()
    assert len(worst) == 2, f"got {worst}, expected both strategies"
    assert max(worst.values()) < 1e-4, f"got {worst}, expected both below 1e-4"


@step("resume", 45)
def resume(bench: Bench) -> None:
    """Six steps in one go, and three, saved, and three more, with dropout: how far apart are the weights?"""
    from mar.presets import FASHION
    from mar.training.log import Log
    from mar.training.run import open_run
    from mar.training.trainer import train

    model = replace(FASHION.model, attention_dropout=0.1, projection_dropout=0.1)
    if bench.rehearse:
        trunk = replace(model.encoder, width=20, depth=1)
        model = replace(model, encoder=trunk, decoder=trunk, head=replace(model.head, width=16, depth=1))
    config = replace(FASHION, model=model, batch=8, warmup=0, decay=0, sample_every=0, validate_every=0, log_to=())

    def nothing(name: str) -> Any:
        raise AssertionError(f"{name} is not to be loaded")

    def weights(folder: Path, images: int, precision: Any) -> dict[str, Tensor]:
        settings = replace(config, images=images, precision=precision)
        run = open_run(settings, folder, device=bench.device, load_tokenizer=nothing, load_model=nothing)
        train(run, Log())
        return {name: parameter.detach().cpu().clone() for name, parameter in run.model.named_parameters()}

    images = 6 * config.batch
    for precision in bench.size(("fp32", "bf16"), ("fp32",)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            whole, again = weights(folder / "a", images, precision), weights(folder / "again", images, precision)
            weights(folder / "b", images // 2, precision)
            resumed = weights(folder / "b", images, precision)
        for what, other in (("twice the same run", again), ("resumed against in one go", resumed)):
            difference = max(float((whole[name] - other[name]).abs().max()) for name in whole)
            bench.report({f"{what}, {precision}, most difference of a weight": difference})


# ---- sampling


def measure_sampling(bench: Bench, name: str, cases: tuple[tuple[str, int], ...]) -> None:
    """Measure batches of a model: first and second pass, peak memory. A case that would take too long is left out."""
    from mar.config import SamplingConfig
    from mar.presets import apply_preset
    from mar.published import SAMPLING
    from mar.sampling.generate import generate

    model = random_model(bench, name)
    base = SamplingConfig(
        bench.size(64, 3), bench.size(100, 4), guidance_scale=SAMPLING[name].guidance_scale, x0_bound=X0_BOUND
    )
    for preset, count in cases[: bench.size(None, 2)]:
        case = f"{preset}, batch {count}"
        images = bench.size(count, min(count, 2))
        sampling = apply_preset(base, model.config.tokens, preset)

        def draw(images: int = images, sampling: Any = sampling) -> None:
            for _ in generate(model, [i % 1000 for i in range(images)], range(images), sampling, allow_broken=True):
                pass

        with bench.part(case):
            bench.reset_peak()
            first = bench.timed(draw)
            found = {"first s": first, "images/s": images / first, "peak GB": bench.peak_gb()}
            bench.report({case: found})
            if bench.left() > 1.2 * first:
                second = bench.timed(draw)
                bench.report({case: {**found, "second s": second, "images/s": images / second,
                                     "peak GB": bench.peak_gb()}})  # fmt: skip


@step("sampling-base", 75)
def sampling_base(bench: Bench) -> None:
    """MAR-B: exact and fast, batches of 1, 32 and 256."""
    cases = (("exact", 1), ("fast", 1), ("fast", 256), ("exact", 256), ("fast", 32), ("exact", 32))
    measure_sampling(bench, "mar-base", cases)


# ---- training


@step("training", 110)
def training(bench: Bench) -> None:
    """MAR-L batch 64 plain, compiled, with activation checkpointing; MAR-B batch 128: speed, peak, estimate."""
    from mar.config import TrainConfig

    cases: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("mar-large", 64, {}),
        ("mar-large", 64, {"compile": True}),
        ("mar-base", 128, {}),
        ("mar-large", 64, {"activation_checkpointing": "selective", "compile": True}),
        ("mar-large", 64, {"activation_checkpointing": "selective"}),
        ("mar-large", 64, {"activation_checkpointing": "full"}),
    )
    if bench.rehearse:
        cases = (cases[0], cases[3])
    for name, count, how in cases:
        case = ", ".join([f"{name} batch {count}", *(f"{key} {value}" for key, value in how.items())])
        if bench.left() < 5:
            bench.report({case: "left out: no time was left"})
            continue
        with bench.part(case):
            config = TrainConfig(model=model_config(bench, name), batch=bench.size(count, 4), precision="bf16", **how)
            bench.report({case: measure_training(bench, config)})


def measure_training(bench: Bench, config: Any) -> dict[str, float]:
    """Measure training steps of a configuration: speed, peak and estimate of memory, loss."""
    from mar.training.preflight import estimate

    bench.reset_peak()
    run, batch = training_run(bench, config)
    first = bench.timed(lambda: run.step(batch))
    for _ in range(bench.size(12 if config.compile else 3, 1)):  # several mask ratios are compiled
        run.step(batch)
    steps = bench.size(8, 2)
    seconds = bench.timed(lambda: [run.step(batch) for _ in range(steps)]) / steps
    needs = estimate(config)
    return {
        "images/s": config.batch / seconds,
        "step s": seconds,
        "first step s": first,
        "peak GB": bench.peak_gb(),
        "estimated GB": (needs.weights + needs.activations) / 1e9,
        "loss": run.forward_backward(batch),
    }


# ---- the reference's loop, reconstructed


@step("reference", 75)
def reference(bench: Bench) -> None:
    """The reference's sampling and training, as reconstructed, beside ours on this device: ratios."""
    from gpu_reference import compare_sampling, compare_training

    name = "mar-base"
    with bench.part("sampling"):
        compare_sampling(bench, random_model(bench, name), bench.size(1, 1))
    for name, count in bench.size((("mar-large", 64), ("mar-base", 64)), (("mar-base", 4),)):
        with bench.part(f"training {name}"):
            compare_training(bench, name, model_config(bench, name), count)


# ---- tokenizer, attention, larger models, profiles


@step("kl16", 45)
@torch.no_grad()
def kl16(bench: Bench) -> None:
    """KL-16 with random weights: images a second of encoding and decoding by precision, and errors."""
    from mar.tokenizer.kl import KL16_CONFIG, KL16_STD, from_config

    config = {**KL16_CONFIG, "block_out_channels": [32] * 5, "layers_per_block": 1} if bench.rehearse else KL16_CONFIG
    torch.manual_seed(0)
    tokenizer = from_config(config)
    tokenizer.set_statistics(0.0, KL16_STD)
    tokenizer.to(bench.device).eval().requires_grad_(False)
    count, side = bench.size(32, 1), bench.size(16, 2)
    latents = torch.randn(count, 16, side, side, device=bench.device)
    images = torch.rand(count, 3, 16 * side, 16 * side, device=bench.device) * 2 - 1
    bench.reset_peak()
    set_tf32(False)
    exact = tokenizer.decode(latents)

    def measure(name: str, channels_last: bool = False, bf16: bool = False) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        tokenizer.autoencoder.to(memory_format=layout)

        def decode() -> Tensor:
            if not bf16:
                return tokenizer.decode(latents)
            with torch.autocast(bench.device.type, torch.bfloat16):
                raw = tokenizer.denormalize(latents)
                decoded: Tensor = tokenizer.autoencoder.decode(raw).sample.float().clamp(-1, 1)
                return decoded

        bench.report({
            f"decoding, {name}": {
                "images/s": count / bench.median(decode, 3), "mean error": float((decode() - exact).abs().mean()),
                "most": float((decode() - exact).abs().max()),
            }
        })  # fmt: skip

    measure("fp32")
    bench.report({"encoding, fp32": {"images/s": count / bench.median(lambda: tokenizer.encode(images), 3)}})
    bench(peak_gb=bench.peak_gb())
    set_tf32(True)
    measure("tf32")
    bench.report({"encoding, tf32": {"images/s": count / bench.median(lambda: tokenizer.encode(images), 3)}})
    measure("tf32, channels last", channels_last=True)
    measure("bf16, channels last", channels_last=True, bf16=True)


@step("attention", 30)
@torch.no_grad()
def attention(bench: Bench) -> None:
    """Attention of MAR-L by backend and length: the first call, which may build a plan, and later ones."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
                "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
    shapes = bench.size(((64, 16, 320), (64, 16, 97), (64, 16, 98), (2, 16, 321)), ((2, 2, 8),))
    for count, heads, length in shapes:
        q, k, v = torch.randn(3, count, heads, length, 64, device=bench.device, dtype=torch.bfloat16).unbind(0)
        found: dict[str, Any] = {}

        def attend(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return scaled_dot_product_attention(q, k, v)

        found["default"] = {"first ms": 1e3 * bench.timed(attend), "then ms": 1e3 * bench.median(attend)}
        for name, backend in backends.items():
            try:
                with sdpa_kernel([backend]):
                    first = bench.timed(attend)
                    found[name] = {"first ms": 1e3 * first, "then ms": 1e3 * bench.median(attend)}
            except RuntimeError as error:
                found[name] = f"not available ({str(error).splitlines()[0][:60]})"
        bench.report({f"{count} x {heads} heads x {length} tokens, {name}": value for name, value in found.items()})


@step("sampling-large", 75)
def sampling_large(bench: Bench) -> None:
    """MAR-L: fast and exact at 256, and one image."""
    measure_sampling(bench, "mar-large", (("fast", 256), ("exact", 1), ("exact", 256), ("fast", 1), ("exact", 32)))


@step("sampling-huge", 110)
def sampling_huge(bench: Bench) -> None:
    """MAR-H: fast and exact at 256, and one image."""
    measure_sampling(bench, "mar-huge", (("fast", 256), ("exact", 1), ("exact", 256), ("fast", 1), ("exact", 32)))


@step("profile", 60)
def profile(bench: Bench) -> None:
    """Tables of kernels: a `fast` batch of MAR-B, and a training step of MAR-L."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    from mar.config import SamplingConfig, TrainConfig
    from mar.presets import apply_preset
    from mar.sampling.generate import generate

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    key = "cuda_time_total" if bench.cuda else "cpu_time_total"

    def table(name: str, work: Callable[[], object]) -> None:
        work()
        bench.sync()
        with record(activities=activities) as profiler:
            work()
            bench.sync()
        averages = profiler.key_averages()
        print(f"\n{name}\n{averages.table(sort_by=key, row_limit=bench.size(30, 5), max_name_column_width=80)}")
        attribute = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
        rows = sorted(averages, key=lambda row: -getattr(row, attribute))[:8]
        bench.report({f"{name}, ms": {row.key[:60]: round(getattr(row, attribute) / 1e3, 2) for row in rows}})

    base = SamplingConfig(bench.size(64, 2), bench.size(100, 3), guidance_scale=2.9, x0_bound=X0_BOUND)
    images = bench.size(32, 1)

    def sampling() -> None:
        model = random_model(bench, "mar-base")
        fast = apply_preset(base, model.config.tokens, "fast")
        labels = [i % 1000 for i in range(images)]
        table(f"fast, {images} images", lambda: [*generate(model, labels, range(images), fast, allow_broken=True)])

    with bench.part("sampling"):
        sampling()
    with bench.part("training"):
        config = TrainConfig(model=model_config(bench, "mar-large"), batch=bench.size(64, 2), precision="bf16")
        run, batch = training_run(bench, config)
        run.step(batch)
        table("training step", lambda: run.step(batch))


# ---- training a recipe for a stated time


@step("train", 420)
def train_recipe(bench: Bench) -> None:
    """Train `--train`'s recipe for `--minutes`, and export it."""
    from gpu_train import train_for

    train_for(bench)
