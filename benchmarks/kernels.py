"""Kernels of a guided diffusion step, plain and compiled, and a model of a GPU's time for one image.

    python benchmarks/kernels.py [--model mar-base] [--rows 4] [--tiny]

Plain: operations that PyTorch launches, views left out. Compiled: kernels and library calls in Inductor's code for the
CPU; it fuses as for GPUs, up to details. The model is of one image at batch 1 (`exact`: K = 64, 100 diffusion steps,
bfloat16 matrices). A kernel takes 2.2 us, or its bytes at 2.9 TB/s (5 TB/s below 40 MB) or its products at 650 TFLOP/s,
if more. These figures are assumed for an H100, not measured. Nothing else takes time: CUDA graphs hide the host's. Each
compiled kernel counts 2.2 us: at so few rows none has more to do.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mar.config import HeadConfig, SamplingConfig
from mar.diffusion.head import CFGDenoiser, DiffusionHead, compiled_step, guided_step
from mar.model.mar import MAR
from mar.model.masking import mask_schedule
from mar.nn import Linear, set_matrix_dtype
from mar.published import MODELS

KERNEL_S, BYTES_PER_S, L2_BYTES_PER_S, L2_BYTES, FLOPS = 2.2e-6, 2.9e12, 5.0e12, 40e6, 650e12
CALL = re.compile(r"^\s+(?:\w+ = )?(extern_kernels\.\w+|cpp_fused\w*|torch\.ops\.[\w.]+)\(", re.MULTILINE)
VIEWS = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select",
    "split", "chunk", "unbind", "alias", "detach", "narrow", "as_strided", "unfold", "_reshape_alias", "lift_fresh",
    "split_with_sizes", "empty", "empty_like", "new_empty", "device",
}  # fmt: skip
STEPS, DIFFUSION_STEPS = 64, 100


class Cost(TorchDispatchMode):
    """Counts kernels, and their modeled seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.seconds = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
            size = sum(each.numel() * each.element_size() for each in tensors)
            products = 0
            if name in ("mm", "addmm"):
                a, b = tensors[-3:-1]
                products = 2 * a.shape[0] * a.shape[1] * b.shape[1]
            bandwidth = L2_BYTES_PER_S if size < L2_BYTES else BYTES_PER_S
            self.kernels += 1
            self.seconds += max(KERNEL_S, size / bandwidth, products / FLOPS)
        return out


def randomize(head: DiffusionHead) -> DiffusionHead:
    """Draw the weights that start at zero, too."""
    for module in head.modules():
        if isinstance(module, Linear):
            torch.nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    return head.eval().requires_grad_(False)


@torch.no_grad()
def count(head: DiffusionHead, z_width: int, rows: int) -> dict[str, float]:
    """Count the kernels of a step, and compare samples of both ways."""
    z, scale = torch.randn(2 * rows, z_width), torch.rand(rows, 1) + 1
    sampling = SamplingConfig(diffusion_steps=8, x0_bound=3.0)
    schedule = head.schedule(8, sampling, z.device)
    denoiser = CFGDenoiser(head, z, schedule.timesteps, scale)
    arguments = (
        head, torch.randn(rows, head.token_width), denoiser.modulations(3), scale,
        torch.randn(8, rows, head.token_width)[1], torch.rand(8, 8)[3], 1.0, 3.0,
    )  # fmt: skip
    with Cost() as plain:
        guided_step(*arguments)
    _, codes = run_and_get_code(compiled_step(), *arguments)
    calls = [call for code in codes for call in CALL.findall(code)]

    noise = torch.randn(8, rows, head.token_width)
    expected = head.sample(z, noise, scale, 8, sampling)
    head.compile_steps = True
    differences = [float((head.sample(z, noise, scale, 8, sampling) - expected).abs().max() / expected.std())]
    more = torch.randn(2 * rows + 6, z_width), torch.randn(8, rows + 3, head.token_width), torch.rand(rows + 3, 1) + 1
    compiled = head.sample(*more, 8, sampling)
    assert head.compile_steps, "compiling failed"
    head.compile_steps = False
    expected = head.sample(*more, 8, sampling)
    differences.append(float((compiled - expected).abs().max() / expected.std()))
    return {"plain": plain.kernels, "compiled": len(calls), "difference": max(differences)}


@torch.no_grad()
def modeled(name: str, kernels: int) -> dict[str, float]:
    """Model the seconds of one image: trunk, and head by plain and by compiled steps."""
    with torch.device("meta"):
        model = MAR(MODELS[name]).eval().requires_grad_(False)
    set_matrix_dtype(model, torch.bfloat16)
    length, sampling = model.config.tokens, SamplingConfig(STEPS, DIFFUSION_STEPS)
    trunk = plain = modulations = 0.0
    masked, heads = length, dict[int, tuple[float, float]]()
    for after in mask_schedule(length, STEPS):
        rows, known, masked = masked - after, length - masked, after
        index = torch.zeros(2, known, dtype=torch.long, device="meta")
        tokens = torch.zeros(2, length, model.config.token_width, device="meta")
        with Cost() as cost:
            condition = torch.zeros(2, dtype=torch.long, device="meta")
            model(tokens, condition, index, query_idx=torch.zeros(2, rows, dtype=torch.long, device="meta"))
        trunk += cost.seconds
        if rows not in heads:
            z = torch.zeros(2 * rows, model.config.decoder.width, device="meta")
            noise = torch.zeros(DIFFUSION_STEPS, rows, model.config.token_width, device="meta")
            scale = torch.zeros(rows, 1, device="meta")
            with Cost() as cost:
                model.head.sample(z, noise, scale, DIFFUSION_STEPS, sampling)
            times = torch.zeros(DIFFUSION_STEPS, dtype=torch.long, device="meta")
            with Cost() as chunk:
                denoiser = CFGDenoiser(model.head, z, times, scale)
                for step in reversed(range(DIFFUSION_STEPS)):
                    denoiser.modulations(step)
            heads[rows] = cost.seconds, chunk.seconds
        plain, modulations = plain + heads[rows][0], modulations + heads[rows][1]
    compiled = modulations + STEPS * DIFFUSION_STEPS * kernels * KERNEL_S
    return {"trunk_s": trunk, "plain_s": trunk + plain, "compiled_s": trunk + compiled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="mar-base")
    parser.add_argument("--rows", type=int, default=4, help="tokens of a reveal step")
    parser.add_argument("--tiny", action="store_true", help="a head 32 wide, without the model of time")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = MODELS[options.model]
    width = 32 if options.tiny else config.head.width
    z_width = 32 if options.tiny else config.decoder.width
    head_config = HeadConfig(width=width, depth=config.head.depth)
    found = count(randomize(DiffusionHead(config.token_width, z_width, head_config)), z_width, options.rows)
    print(json.dumps(found if options.tiny else found | modeled(options.model, int(found["compiled"]))))


if __name__ == "__main__":
    main()
