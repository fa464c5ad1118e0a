"""The diffusion head with packed weights, for sampling on a CPU.

For one image, a product of the head has about eight rows and is bound by reading its weights. oneDNN reads its own
layout twice as fast as PyTorch's. The rest is the cost of calls: SiLU is fused with the product before it, and
multiplications with the additions after them. Letters of shapes as in `mar.diffusion.head`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.nn import functional

from mar.backends.cpu.linear import has_onednn, onednn_is_faster

PACKED_ROWS = 8
"""Number of rows for which oneDNN chooses the layout of packed weights."""
MANY_ROWS = 64
"""From this number of rows on, PyTorch's product in float32 is mostly as fast (measured)."""


class PackedLinear:
    """Linear layer by oneDNN on packed weights, with an optional SiLU."""

    def __init__(self, linear: nn.Linear, silu: bool = False) -> None:
        self.plain, self.bias = linear.weight.detach(), linear.bias.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.plain, PACKED_ROWS)
        self.silu, self.dtype = silu, self.plain.dtype
        self.always = self.dtype is torch.bfloat16 or onednn_is_faster()

    def __call__(self, x: Float[Tensor, "r i"]) -> Float[Tensor, "r o"]:
        """Multiply rows x (r, i) by the weights."""
        x = x.to(self.dtype)
        if self.always or len(x) < MANY_ROWS:
            activation = "swish" if self.silu else "none"
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "")
            return product
        product = functional.linear(x, self.plain, self.bias)
        return functional.silu(product, inplace=True) if self.silu else product


class PackedHead:
    """A `DiffusionHead` for sampling; later changes of the weights have no effect."""

    def __init__(self, head: Any) -> None:
        self.head, self.config, self.token_width = head, head.config, head.token_width
        self.num_noises = head.num_noises
        self.norms = [(block.norm.weight.detach(), block.norm.bias.detach()) for block in head.blocks]
        self.eps = head.blocks[0].norm.eps
        self.mlps = [(PackedLinear(block.fc1, silu=True), PackedLinear(block.fc2)) for block in head.blocks]
        self.output = PackedLinear(head.output)
        self.layers: list[nn.Linear] = head.modulation_layers()
        self.buffers = [layer.weight.new_empty(0, layer.out_features) for layer in self.layers]

    def sample(self, *args: Any) -> Float[Tensor, "r d"]:
        """Draw tokens as `DiffusionHead.sample` does, by this object's layers."""
        tokens: Tensor = type(self.head).sample(self, *args)
        return tokens

    def embed_times(self, t: Real[Tensor, "..."]) -> Float[Tensor, "... w"]:
        """Embed timesteps as the head does."""
        embedded: Tensor = self.head.embed_times(t)
        return embedded

    def embed_conditions(self, z: Float[Tensor, "... f"]) -> Float[Tensor, "... w"]:
        """Embed z as the head does."""
        embedded: Tensor = self.head.embed_conditions(z)
        return embedded

    def embed_tokens(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... w"]:
        """Embed noisy tokens as the head does."""
        embedded: Tensor = self.head.embed_tokens(x)
        return embedded

    def modulations(self, condition: Float[Tensor, "... w"]) -> list[Tensor]:
        """Compute shift, 1 + scale and gate of every layer.

        They overwrite those of the last call: allocating memory of this size is slow.
        """
        rows, width = condition.flatten(0, -2), self.config.width
        modulations = []
        for buffer, layer in zip(self.buffers, self.layers, strict=True):
            if onednn_is_faster() or rows.dtype is not layer.weight.dtype:
                out = layer(rows)
            else:
                if buffer.shape[0] < len(rows):
                    buffer.resize_(len(rows), layer.out_features)
                out = torch.addmm(layer.bias, rows, layer.weight.T, out=buffer[: len(rows)])
            out[:, width : 2 * width] += 1
            modulations.append(out.unflatten(0, condition.shape[:-1]))
        return modulations

    def denoise_embedded(self, h: Float[Tensor, "r w"], modulations: list[Tensor]) -> Float[Tensor, "r two_d"]:
        """Run the residual blocks and the last layer on embedded tokens."""
        for (weight, bias), (fc1, fc2), modulation in zip(self.norms, self.mlps, modulations, strict=False):
            shift, factor, gate = modulation.chunk(3, dim=-1)
            normed = functional.layer_norm(h, h.shape[-1:], weight, bias, self.eps)
            h = torch.addcmul(h, gate, fc2(fc1(torch.addcmul(shift, normed, factor))))
        shift, factor = modulations[-1].chunk(2, dim=-1)
        last = torch.addcmul(shift, functional.layer_norm(h, h.shape[-1:], eps=self.eps), factor)
        return self.output(last).float()


def pack_head(head: Any) -> Any:
    """Pack a head's weights; return the head itself if unsupported.

    Supported are plain parameters in float32 or bfloat16, on a CPU on which oneDNN has products for them.
    """
    if not hasattr(head, "modulation_layers"):  # another kind of head
        return head
    weights = [parameter for name, parameter in head.named_parameters() if name.endswith("weight")]
    plain = all(isinstance(block.fc1, nn.Linear) for block in head.blocks)  # int8 layers are none
    plain &= all(type(w) is nn.Parameter and w.device.type == "cpu" for w in weights)
    dtypes = {w.dtype for w in weights if w.ndim == 2}
    supported = dtypes in ({torch.float32}, {torch.bfloat16}) and has_onednn(*dtypes)
    return PackedHead(head) if plain and supported else head
