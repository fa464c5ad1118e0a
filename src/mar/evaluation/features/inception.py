"""The Inception network of published FIDs and Inception Scores, from torch-fidelity.

Heusel et al. (arXiv 1706.08500) used TensorFlow's Inception graph of 2015-12-05. torch-fidelity carries its weights
over, together with its peculiar resize (bilinear, corners not aligned, no half-pixel centres, no antialiasing) to
299 x 299 and (x - 128) / 128; all of this runs inside its module, on uint8.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mar.checkpoint.download import DownloadError, Progress, RemoteFile, fetch
from mar.evaluation.features.base import ModuleExtractor, read_weights

NAME = "inception"
TAPS = {"64": 64, "192": 192, "768": 768, "2048": 2048}
"""Widths of the features by tap; published figures use the last one."""
OFFICIAL = RemoteFile(
    # not called .pth here: it may be in the format from before PyTorch 1.6, which is no zip archive
    "inception-2015-12-05-6726825d.weights",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    mebibytes=91.2,
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
RECIPE = "torch-fidelity: TensorFlow 1 bilinear to 299 x 299; (x - 128) / 128"


class FidelityNetwork(nn.Module):
    """torch-fidelity's network with one tap of features, and logits without bias."""

    def __init__(self, network: nn.Module, scores: bool) -> None:
        super().__init__()
        self.network = network
        self.scores = scores

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k"] | None]:
        """Computes features (n, d) and, at the last tap, logits (n, 1008)."""
        output = self.network(images)
        return output[0], output[1] if self.scores else None


def inception(
    weights: Path | None = None, *, tap: str = "2048", progress: Progress | None = None, fetcher: Fetcher = fetch
) -> ModuleExtractor:
    """Opens the extractor of FID: 2048 features and the 1008 logits of the Inception Score.

    The metric is called FID only with torch-fidelity's weights and all 2048 features.

    Args:
        weights: a file; by default torch-fidelity's own, downloaded once and checked (91 MiB).
        tap: width of the features; narrower ones ("64", "192", "768") have no logits.
        progress: hears of the download.
        fetcher: downloads the weights.

    Raises:
        ValueError: without the `fid` extra or the weights.
    """
    if tap not in TAPS:
        raise ValueError(f"tap: got {tap!r}, expected one of {', '.join(TAPS)}")
    network_class = _import_fidelity()
    path = weights or _fetch_weights(fetcher, progress)
    scores = tap == "2048"
    network = _load_network(network_class, [tap, "logits_unbiased"] if scores else [tap], path)
    published = scores and _sha256(path) == OFFICIAL.sha256
    return ModuleExtractor(
        FidelityNetwork(network, scores),
        NAME if scores else f"{NAME}-{tap}",
        lambda images: images,
        recipe=RECIPE,
        metric="FID" if published else f"FD (Inception, {'own weights' if scores else f'{tap} features'})",
        width=TAPS[tap],
        scores=scores,
    )


Fetcher = Callable[..., Path]
"""`mar.checkpoint.download.fetch`, or a stub."""


def _import_fidelity() -> type[nn.Module]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(
            f'features {NAME} need the extra `fid`: pip install ".[fid]" in the clone of mar ({error})'
        ) from error
    except RuntimeError as error:  # how torchvision says that it was built for another torch
        raise ValueError(
            f"features {NAME}: torchvision does not fit torch {torch.__version__} ({error}); install the torchvision "
            "that belongs to it, from the same index"
        ) from error
    network_class: type[nn.Module] = FeatureExtractorInceptionV3
    return network_class


def _fetch_weights(fetcher: Fetcher, progress: Progress | None) -> Path:
    try:
        return fetcher(OFFICIAL, progress=progress)
    except DownloadError as error:
        raise ValueError(f"{error}; fetch {OFFICIAL.url} some other way and give it as --weights PATH") from error


def _load_network(network_class: type[nn.Module], taps: list[str], path: Path) -> nn.Module:
    # torch-fidelity would unpickle anything: it gets a copy of the tensors that we have read safely
    copy = io.BytesIO()
    torch.save(read_weights(path), copy)
    copy.seek(0)
    try:
        return network_class("inception-v3-compat", taps, copy)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the weights of torch-fidelity's Inception network") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
