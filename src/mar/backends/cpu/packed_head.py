"""The head for drawing on a CPU: the same network as `head`, its weights laid out once for few rows.

At one picture a product of the head has about eight rows, and is bound by reading its weights; PyTorch's own
arrangement of them takes twice as long for that as oneDNN's. What is left is the cost of calling, so that SiLU is part
of a product, and a multiplication goes together with the addition behind it. Letters of shapes as in `head`.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mar.backends.cpu.linear import has_onednn, onednn_is_faster
from mar.diffusion.head import NORM_EPS, DiffusionHead, Modulations, ResidualBlock
from mar.nn import Linear, to_float32

ROWS, MANY = 8, 64
"""For how many rows weights are laid out, and from how many on PyTorch's own product in float32 is mostly as fast
(measured)."""


class PackedLinear:
    """A linear layer, and SiLU behind it where asked for, by oneDNN on weights in its own order."""

    def __init__(self, linear: Linear, silu: bool = False) -> None:
        self.plain, self.bias = linear.weight.detach(), linear.bias.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.plain, ROWS)
        self.silu, self.dtype = silu, self.plain.dtype
        self.always = self.dtype is torch.bfloat16 or onednn_is_faster()

    def __call__(self, x: Float[Tensor, "r i"]) -> Float[Tensor, "r o"]:
        x = x.to(self.dtype)
        if self.always or len(x) < MANY:
            behind = "swish" if self.silu else "none"
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, behind, [], "")
            return product
        product = functional.linear(x, self.plain, self.bias)
        return functional.silu(product, inplace=True) if self.silu else product


class PackedHead:
    """What a sampler needs of a `DiffusionHead`. It follows no later change of the weights."""

    def __init__(self, head: DiffusionHead) -> None:
        self.head, self.config, self.token_width = head, head.config, head.token_width
        blocks = [cast(ResidualBlock, block) for block in head.blocks]
        self.norms = [(block.norm.weight.detach(), block.norm.bias.detach()) for block in blocks]
        self.products = [(PackedLinear(block.fc1, silu=True), PackedLinear(block.fc2)) for block in blocks]
        self.output = PackedLinear(head.output)
        self.layers = [cast(Linear, layer) for layer in head.modulation_layers()]
        self.buffers = [layer.weight.new_empty(0, layer.out_features) for layer in self.layers]

    def embed_times(self, t: Int[Tensor, "..."]) -> Float[Tensor, "... w"]:
        return self.head.embed_times(t)

    def embed_conditions(self, z: Float[Tensor, "... f"]) -> Float[Tensor, "... w"]:
        return self.head.embed_conditions(z)

    def embed_tokens(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... w"]:
        return self.head.embed_tokens(x)

    def modulations(self, condition: Float[Tensor, "... w"]) -> Modulations:
        """As the head's, but that scales have 1 added. Those of the last call are written over: memory of this size is
        costly to get."""
        rows, width = condition.flatten(0, -2), self.config.width
        found = []
        for buffer, layer in zip(self.buffers, self.layers, strict=True):
            if onednn_is_faster() or rows.dtype is not layer.weight.dtype:
                out = layer(rows)
            else:
                if buffer.shape[0] < len(rows):
                    buffer.resize_(len(rows), layer.out_features)
                out = torch.addmm(layer.bias, rows, layer.weight.T, out=buffer[: len(rows)])
            out[:, width : 2 * width] += 1
            found.append(out.unflatten(0, condition.shape[:-1]))
        return found

    def denoise_embedded(self, h: Float[Tensor, "r w"], modulations: Modulations) -> Float[Tensor, "r two_d"]:
        """As the head's."""
        for (weight, bias), (first, second), modulation in zip(self.norms, self.products, modulations, strict=False):
            shift, factor, gate = modulation.chunk(3, dim=-1)
            normed = functional.layer_norm(h, h.shape[-1:], weight, bias, NORM_EPS)
            h = torch.addcmul(h, gate, second(first(torch.addcmul(shift, normed, factor))))
        shift, factor = modulations[-1].chunk(2, dim=-1)
        last = torch.addcmul(shift, functional.layer_norm(h, h.shape[-1:], eps=NORM_EPS), factor)
        return to_float32(self.output(last))


def packed(head: DiffusionHead) -> DiffusionHead | PackedHead:
    """The head, packed where that serves: plain weights on a CPU, of float32 or of bfloat16 where it has that."""
    weights = [parameter for name, parameter in head.named_parameters() if name.endswith("weight")]
    plain = all(type(cast(ResidualBlock, block).fc1) is Linear for block in head.blocks)
    plain &= all(type(w) is torch.nn.Parameter and w.device.type == "cpu" for w in weights)
    dtypes = {w.dtype for w in weights if w.ndim == 2}
    known = dtypes in ({torch.float32}, {torch.bfloat16}) and has_onednn(*dtypes)
    return PackedHead(head) if plain and known else head
