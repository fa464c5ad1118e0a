"""What a tokenizer's reconstruction may be judged by beside its pixels: features of a network, and a discriminator."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

TAPS = (0, 2, 4, 10)
"""Blocks of EfficientNet-Lite0 after which features are compared: the last of each size of map, from 1/2 to 1/16."""
SMALLEST = 64
"""Pixels of the short side that smaller pictures are enlarged to."""
_EPSILON = 1e-10


class PerceptualDistance(nn.Module):
    """Distances between features of EfficientNet-Lite0, in the manner of LPIPS, without its learned weights.

    Zhang et al. (arXiv 1801.03924), equation 1 with all weights the same: features of unit length at each place, their
    squared differences summed over channels and averaged over places and taps. Gradients reach the pictures; the
    network learns nothing.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "n c h w"], others: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        """The mean distance of pairs of pictures in [-1, 1]; grey ones are repeated."""
        both = zip(self._features(images), self._features(others), strict=True)
        distances = [(a - b).square().sum(1).mean() for a, b in both]
        return torch.stack(distances).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        x = (127.5 * images.expand(-1, 3, -1, -1) + 0.5) / 128  # pixels as the network was trained: (x - 127) / 128
        short = min(x.shape[2:])
        if short < SMALLEST:
            x = functional.interpolate(x, scale_factor=SMALLEST / short, mode="bilinear", align_corners=False)
        network, found = self.network, []
        x = network._swish(network._bn0(network._conv_stem(x)))
        for number, block in enumerate(network._blocks[: TAPS[-1] + 1]):
            x = block(x)
            if number in TAPS:
                found.append(x * (x.square().sum(1, keepdim=True) + _EPSILON).rsqrt())
        return found


class PatchDiscriminator(nn.Module):
    """Says of each patch of a picture how real it looks (Isola et al., arXiv 1611.07004, section 3.2.2)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in itertools.pairwise(widths):
            stride = 2 if after == widths[1] else 1
            layers += [nn.Conv2d(before, after, 4, stride, 1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1 p q"]:
        """A number for each patch: high where it looks real."""
        return self.layers(images)


def hinge(real: Float[Tensor, "n 1 p q"], fake: Float[Tensor, "n 1 p q"]) -> Float[Tensor, ""]:
    """The discriminator's loss: nothing to learn from patches judged beyond 1 and -1 (Lim and Ye, arXiv 1705.02894)."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def balance(loss: Float[Tensor, ""], adversarial: Float[Tensor, ""], last: Tensor) -> Float[Tensor, ""]:
    """The factor that makes both losses pull equally hard at the decoder's `last` weights, at most 10^4.

    Esser et al., "Taming transformers" (arXiv 2012.09841), equation 7.
    """
    (one,) = torch.autograd.grad(loss, last, retain_graph=True)
    (other,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (one.norm() / (other.norm() + 1e-4)).clamp(max=1e4).detach()
