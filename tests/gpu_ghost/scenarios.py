"""What runs on the ghost: `GHOST_LIBRARY=guard.so python scenarios.py NAME...` prints what was recorded, as JSON.

Each scenario returns the largest difference between the results on the CPU and on the ghost, and further counts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ghost
import torch
from torch import Tensor

Result = dict[str, Any]
CPU, GHOST = torch.device("cpu"), torch.device("cuda")


def main() -> None:
    ghost.install()
    torch.set_num_threads(1)
    from mar.backends.cuda import graphs

    graphs.cuda_recorder = lambda device: ghost.record
    for name in sys.argv[1:]:
        extra = SCENARIOS[name]()
        trace = ghost.TRACE
        counts = {field: dict(getattr(trace, field)) for field in ("mixed", "waits", "forbidden")}
        found = {"kernels": trace.kernels, "replays": trace.replays, **counts, **extra}
        print(json.dumps({"name": name, **found}), flush=True)


def difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference of two lists of tensors or numbers, nested in the same way."""
    if isinstance(ours, Tensor):
        ours, theirs = ghost.on_cpu(ours.detach()), ghost.on_cpu(theirs.detach())
        return float((ours.double() - theirs.double()).abs().max())
    if isinstance(ours, float):
        return abs(ours - theirs)
    return max(difference(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- sampling


def sample(device: torch.device, dtype: torch.dtype | None = None, **changes: Any) -> tuple[Tensor, list[int]]:
    """Return latents, and how often the host waited in each reveal step."""
    from tiny import tiny_model

    from mar.config import SamplingConfig
    from mar.nn import set_matrix_dtype
    from mar.sampling.generate import generate

    model = tiny_model()
    if dtype is not None:
        set_matrix_dtype(model, dtype)
    model = model.to(device)
    sampling = SamplingConfig(**{"steps": 8, "diffusion_steps": 5, "guidance_scale": 2.5, "x0_bound": 1.0, **changes})
    waits, latents = [], torch.empty(0)
    for _ in range(2):  # graphs are recorded the second time
        before = ghost.TRACE.waits.total()
        waits.clear()
        for step in generate(model, [0, 1, 2, -1, 0], range(5), sampling):
            waits.append(ghost.TRACE.waits.total() - before)
            before, latents = ghost.TRACE.waits.total(), step.latents
    return latents, waits


def sampling(**changes: Any) -> Result:
    expected, _ = sample(CPU, **changes)
    with ghost.watch():
        latents, waits = sample(GHOST, **changes)
    return {"difference": difference(latents, expected), "waits_of_steps": waits}


# ---- pipeline


def tiny_kl(channels: int = 2) -> Any:
    from mar.tokenizer.kl import from_config

    torch.manual_seed(0)
    tokenizer = from_config({
        "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2, "block_out_channels": [8, 16], "layers_per_block": 1,
        "latent_channels": channels, "norm_num_groups": 4,
    })  # fmt: skip
    tokenizer.set_statistics(0.0, 1.0)
    return tokenizer


def pipeline() -> Result:
    from tiny import FAST, tiny_model, tiny_pipeline, tiny_words_pipeline

    from mar.pipeline import Pipeline

    def kl() -> Pipeline:
        return Pipeline(tiny_model(), tiny_kl(), classes=("ant", "bee", "cat"), sampling=FAST)

    def draw(make: Callable[[], Pipeline], device: torch.device) -> list[Tensor]:
        drawn = make().to(device)
        settings: dict[str, Any] = {"x0_bound": 1.0, "guidance_scale": 2.0}
        asks = {drawn.condition_argument: [0, 1, None] if drawn.condition_argument == "labels" else ["cat", "", None]}
        first = drawn.sample(seeds=[0, 1, 2], output="tensor", **asks, **settings)
        mask = torch.zeros(3, 4, 4, dtype=torch.bool)
        mask[0, 2:], mask[1], mask[2, :1] = True, True, True
        second = drawn.sample(
            seeds=[5, 6, 7], known=first, mask=mask, output="tensor", uncond_interval=2, steps=6, **asks, **settings
        )
        streamed = torch.cat([*drawn.stream(seeds=[1, 2, 3], batch=2, **asks, **settings)])
        one = {name: values[:1] for name, values in asks.items()}
        images = [step.images for step in drawn.reveal(seeds=[3], x0_bound=1.0, **one)]
        assert images
        with tempfile.TemporaryDirectory() as folder:
            drawn.save(Path(folder) / "model.safetensors")
        return [first, second, streamed]

    makes = (tiny_pipeline, kl, tiny_words_pipeline)
    expected = [draw(make, CPU) for make in makes]
    with ghost.watch():
        images = [draw(make, GHOST) for make in makes]
    return {"difference": difference(images, expected)}


# ---- training


def training(**changes: Any) -> Result:
    from tiny import randomize, tiny_config

    from mar.config import TrainConfig
    from mar.data.loader import LatentBatch
    from mar.model.mar import MAR
    from mar.tokenizer import Tokenizer
    from mar.tokenizer.base import LatentMoments
    from mar.training.run import make_pipeline
    from mar.training.trainer import Run

    class Latents(Tokenizer):
        """A tokenizer whose latents are cached."""

        def __init__(self) -> None:
            super().__init__(3, 2, 1, 0.0, 1.0)

        def encode(self, images: Tensor) -> Any:
            raise AssertionError

        def decode(self, latents: Tensor) -> Tensor:
            raise AssertionError

        @classmethod
        def from_config(cls, config: Any) -> Any:
            raise AssertionError

    model = tiny_config(attention_dropout=0.0, projection_dropout=0.0)
    config = TrainConfig(model=model, batch=4, images=100, log_to=(), **changes)

    def losses(device: torch.device) -> tuple[list[Any], list[int]]:
        source = SimpleNamespace(classes=("a", "b", "c"))
        run = Run(config, Path("never"), source, Latents(), randomize(MAR(model)), device)  # type: ignore[arg-type]
        found, waits = [], []
        for number in range(3):
            before = ghost.TRACE.waits.total()
            latents = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(number))
            moments = LatentMoments(latents, torch.zeros_like(latents) - 2)
            labels, positions = torch.tensor([0, 1, 2, -1]), torch.arange(4 * number, 4 * number + 4)
            found.append([*map(float, run.step(LatentBatch(labels, positions, (), moments)))])
            waits.append(ghost.TRACE.waits.total() - before)
        make_pipeline(run)
        return found, waits

    expected, _ = losses(CPU)
    with ghost.watch():
        found, waits = losses(GHOST)
    return {"difference": difference(found, expected), "waits_of_steps": waits}


# ---- cache and tokenizer


def cache() -> Result:
    from mar.data.cache_writer import _Encoder, _Image

    manifest: Any = SimpleNamespace(classes=("a", "b"), dtype="fp16", flips=True, size=(16, 16))
    images = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(number)) for number in range(3)]
    read = [_Image(image, number % 2, str(number)) for number, image in enumerate(images)]
    expected = _Encoder(tiny_kl(), CPU, manifest)(read)
    with ghost.watch():
        moments = _Encoder(tiny_kl(), GHOST, manifest)(read)
    return {"difference": difference(moments, expected)}


def tokenizer() -> Result:
    from mar.config.tokenizer import TokenizerTrainConfig
    from mar.data.loader import ImageBatch
    from mar.training.tokenizer import OBJECTIVES, TokenizerRun

    def losses(device: torch.device, kind: Any) -> list[Any]:
        settings: dict[str, Any] = {"kind": kind, "image_size": 16, "stride": 4, "channels": 4, "width": 8, "depth": 1}
        config = TokenizerTrainConfig(data="none", batch=2, perceptual=0.0, images=100, **settings).resolved()
        torch.manual_seed(0)
        module = OBJECTIVES[config.kind].make(config)
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(2, 3, 16, 16, generator=generator).clamp(-1, 1)
        OBJECTIVES[config.kind].fit(module, iter([images]))
        run = TokenizerRun(config, Path("never"), None, None, module, device)  # type: ignore[arg-type]
        batch = ImageBatch(torch.tensor([0, 1]), torch.arange(2), (), images)
        return [[*map(float, run.step(batch))] for _ in range(2)]

    kinds = ("kl", "residual")
    expected = [losses(CPU, kind) for kind in kinds]
    with ghost.watch():
        found = [losses(GHOST, kind) for kind in kinds]
    return {"difference": difference(found, expected)}


def faults() -> Result:
    """Commit each fault once."""
    with ghost.watch() as trace:
        values = torch.arange(4.0).to(GHOST)
        pinned = torch.arange(4.0).pin_memory()
        before = trace.waits.total()
        pinned.to(GHOST, non_blocking=True)
        pinned.copy_(values, non_blocking=True)
        waits = trace.waits.total() - before
        values.sum().item()
        values[values > 1]
        values + torch.arange(4.0)
        ghost.record(lambda: values + torch.arange(4.0).to(GHOST))
    return {"waits_of_pinned_copies": waits}


SCENARIOS: dict[str, Callable[[], Result]] = {
    "sampling": sampling,
    "sampling of residuals": lambda: sampling(uncond_interval=2, guidance_interval=(0.1, 1.0)),
    "sampling by dpm++": lambda: sampling(solver="dpm++2m-sde", timestep_spacing="log-snr", start_t=0.95),
    "sampling of fewer diffusion steps": lambda: sampling(order="halton", diffusion_steps_end=3),
    "sampling in bf16": lambda: sampling(dtype=torch.bfloat16),
    "pipeline": pipeline,
    "training": training,
    "training in bf16": lambda: training(precision="bf16"),
    "training with checkpointing": lambda: training(activation_checkpointing="selective"),
    "training by muon": lambda: training(optimizer="muon", accumulate=2, ema_others=(0.9,)),
    "cache": cache,
    "tokenizer": tokenizer,
    "faults": faults,
}

if __name__ == "__main__":
    main()
