"""The two kernels of PyTorch that round differently on the machine that recorded the golden samples.

Sampling the trained tiny model turns a difference of one rounding (1e-7) in a condition into 1e-3 to 1e-1 of a standard
deviation, so golden latents can be reached only where every rounding is the recording machine's. It had AVX-512; its
products, norms and SiLU round as they do with AVX2, its attention and GELU do not. Here both, from elementary
operations: GELU as in oneDNN (Apache-2.0, src/cpu/x64/injectors: piecewise polynomials, whose coefficients by degree
and piece are in `golden/avx512_gelu.safetensors`), attention's softmax as in ATen (blocks of 16, its own exponential).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.parity.support import golden

LANES = 16
ERF_IS_ONE = 5.542594
"""From here on, erf(x / sqrt(2)) is 1 in float32 (0x40b15cee)."""
PIECE_BIAS = 0xC21FFFFF - 2**32
LOG2_E = 1.4426950216293335
LN_2 = 0.6931471824645996
EXP = (0.00828929059, 0.0418978221, 0.166676521, 0.499991506, 0.999999701, 1.0)


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c with one rounding: the product of two float32 is exact in float64."""
    return (a.double() * b + c).float()


def gelu(x: Tensor) -> Tensor:
    """x/2 (1 + erf(x / sqrt(2))), erf by a polynomial of degree 5 for each quarter of an octave."""
    table = golden("avx512_gelu")["coefficients"].double()
    size = x.abs()
    piece = ((size.view(torch.int32) + PIECE_BIAS) >> 21).clamp(1, 24)
    piece = torch.where(size > ERF_IS_ONE, 23, piece)
    erf = table[5][piece].float()
    for degree in range(4, -1, -1):
        erf = fma(erf, size.double(), table[degree][piece])
    return x * (torch.where(x.signbit(), -erf, erf) + 1) * 0.5


def exp(x: Tensor) -> Tensor:
    """e^x for x <= 0, by a polynomial of degree 5 (relative error 1e-6)."""
    power = fma(x, LOG2_E, 0.5).floor()
    rest = fma(power, -LN_2, x.double())
    result = torch.full_like(x, _float(EXP[0]))
    for coefficient in EXP[1:]:
        result = fma(rest, result.double(), _float(coefficient))
    return torch.ldexp(result, power.int())


def attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (n, heads, s, d), one head after the other."""
    heads = zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), strict=True)
    mixed = [_one_head(*head) for head in heads]
    return torch.stack(mixed).view(q.shape)


def _one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.mm(q, k.t()) * _float(1 / math.sqrt(q.shape[-1]))
    scores = scores - scores.amax(-1, keepdim=True)
    blocks = scores.shape[-1] // LANES * LANES
    weights = torch.cat([exp(scores[:, :blocks]), scores[:, blocks:].double().exp().float()], dim=-1)
    lanes = torch.zeros(len(q), LANES)
    for block in range(0, blocks, LANES):
        lanes = lanes + weights[:, block : block + LANES]
    while lanes.shape[-1] > 1:
        left, right = lanes.chunk(2, dim=-1)
        lanes = left + right
    total = lanes[:, 0]
    for weight in weights[:, blocks:].unbind(-1):
        total = total + weight
    return torch.mm(weights, v) * (1 / total).unsqueeze(-1)


def _float(value: float) -> float:
    """The nearest float32."""
    return float(torch.tensor(value, dtype=torch.float32))
