"""The Inception network of published FID and Inception Scores, by torch-fidelity.

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
"""Layers of features and their widths; published figures are of the last one."""
OFFICIAL = RemoteFile(
    # not called .pth here: it may be in the format from before PyTorch 1.6, which is no zip archive
    "inception-2015-12-05-6726825d.weights",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    mebibytes=91.2,
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
RECIPE = "torch-fidelity: TensorFlow 1 bilinear to 299 x 299; (x - 128) / 128"


class FidelityNetwork(nn.Module):
    """torch-fidelity's network: one tap of features, and the logits without their bias."""

    def __init__(self, network: nn.Module, scores: bool) -> None:
        super().__init__()
        self.network = network
        self.scores = scores

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k"] | None]:
        """Return features (n, d) and, at the last tap, logits (n, 1008)."""
        answer = self.network(images)
        return answer[0], answer[1] if self.scores else None


def inception(
    weights: Path | None = None, *, tap: str = "2048", progress: Progress | None = None, fetcher: Fetcher = fetch
) -> ModuleExtractor:
    """Create the extractor of FID: 2048 features and the 1008 logits of the Inception Score.

    Only with torch-fidelity's weights and all 2048 features is the metric called FID. Raises ValueError, one line,
    without the `fid` extra or the weights.

    Args:
        weights: a file; by default torch-fidelity's own, downloaded once and checked (91 MiB).
        tap: layer of the features; the narrower "64", "192" and "768" have no logits.
        fetcher: downloads the weights.
        progress: hears of the download.
    """
    if tap not in TAPS:
        raise ValueError(f"tap: got {tap!r}, expected one of {', '.join(TAPS)}")
    kind = _fidelity()
    path = weights or _fetched(fetcher, progress)
    scores = tap == "2048"
    network = _with_weights(kind, [tap, "logits_unbiased"] if scores else [tap], path)
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
"""`mar.checkpoint.download.fetch`, or what stands in for it in a test."""


def _fidelity() -> type[nn.Module]:
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
    kind: type[nn.Module] = FeatureExtractorInceptionV3
    return kind


def _fetched(fetcher: Fetcher, progress: Progress | None) -> Path:
    try:
        return fetcher(OFFICIAL, progress=progress)
    except DownloadError as error:
        raise ValueError(f"{error}; fetch {OFFICIAL.url} some other way and give it as --weights PATH") from error


def _with_weights(kind: type[nn.Module], taps: list[str], path: Path) -> nn.Module:
    # torch-fidelity unpickles whatever a file asks for: it is handed a copy of what we have read without doing that
    copy = io.BytesIO()
    torch.save(read_weights(path), copy)
    copy.seek(0)
    try:
        return kind("inception-v3-compat", taps, copy)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the weights of torch-fidelity's Inception network") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
