"""Copies of training images: generated images nearer to a training image than held-out real images ever are.

Fréchet distances reward copies. A distance to the nearest training image says little alone: it depends on the images
and on the network. Real images that were held out of training set the scale. The idea is that of the data-copying test
of Meehan, Chaudhuri and Dasgupta, "A Non-Parametric Test to Detect Data-Copying in Generative Models" (arXiv
2004.05675); the statistic is another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float64, Int64
from PIL import Image
from torch import Tensor

from mar.data.images import image_grid
from mar.evaluation.image_sets import ImageSet
from mar.evaluation.metrics import nearest_neighbors
from mar.evaluation.statistics import FeatureStats, check_comparable

COPY_QUANTILE = 0.01
"""The share of held-out images that is as near to a training image as a copy."""
NUM_PAIRS = 8
"""Nearest pairs that are reported."""
MIN_SIDE = 112
"""Pixels of an image in the grid of pairs, at least, if a whole factor brings it there."""


class Pair(NamedTuple):
    """An image and its nearest reference image, by their numbers."""

    picture: int
    reference: int
    distance: float
    """Euclidean, in the extractor's features."""


@dataclass(frozen=True)
class HeldOut:
    """Distances of held-out real images to the training images."""

    count: int
    median: float
    """The median distance to the nearest training image."""
    copy_distance: float
    """Its 1% quantile: an image nearer than this counts as a copy."""

    @classmethod
    def of(cls, held_out: FeatureStats, reference: FeatureStats) -> HeldOut:
        """Measures `held_out` against `reference`; both need features.

        Raises ValueError for incomparable statistics, and if 1% of the held-out images are in the reference: no copy
        could be nearer.
        """
        check_comparable(held_out.provenance, reference.provenance)
        if held_out.features is None or reference.features is None:
            raise ValueError("held-out pictures: got statistics without features, expected all features on both sides")
        distances, _ = nearest_neighbors(reference.features, held_out.features)
        copy_distance = float(distances.quantile(COPY_QUANTILE))
        # the same image in another batch differs by float32's rounding
        if copy_distance <= 1e-5 * float(reference.features.double().norm(dim=1).mean()):
            names = [s.provenance.source if s.provenance else "statistics" for s in (held_out, reference)]
            raise ValueError(
                f"{COPY_QUANTILE:.0%} or more of the held-out pictures ({names[0]}) are in the reference ({names[1]}) "
                "itself; expected the training pictures as reference, and others held out"
            )
        return cls(len(distances), float(distances.quantile(0.5)), copy_distance)

    def sanity_warnings(self) -> tuple[str, ...]:
        """Returns reasons to doubt the share of copies, one line each."""
        if self.count * COPY_QUANTILE >= 1:
            return ()
        return (
            f"{self.count:,} held-out pictures: {COPY_QUANTILE:.0%} of them is less than one; copies are a rough guess",
        )


def share_of_copies(distances: Float64[Tensor, "n"], held_out: HeldOut) -> float:
    """Returns the share of images that are copies.

    A copy is nearer to a training image than 99% of the held-out images.

    `distances` are those to the nearest training image. The share is about 1% for a model of new images, and 1 for one
    that copies.
    """
    return float((distances < held_out.copy_distance).double().mean())


def closest_pairs(
    distances: Float64[Tensor, "n"], indices: Int64[Tensor, "n"], count: int = NUM_PAIRS
) -> tuple[Pair, ...]:
    """Returns the `count` images nearest to a reference image (or all there are), the nearest first.

    `indices` are the numbers of the reference images.
    """
    order = distances.argsort(stable=True)[:count].tolist()
    return tuple(Pair(i, int(indices[i]), float(distances[i])) for i in order)


def pair_grid(pairs: tuple[Pair, ...], images: ImageSet, reference: ImageSet) -> Image.Image:
    """Draws a pair a row: the image on the left, the reference image on the right.

    Images are read again one by one; a model draws them anew (in bfloat16 not the same to the last bit).
    """
    cells = [_read_image(s, i) for pair in pairs for s, i in ((images, pair.picture), (reference, pair.reference))]
    return image_grid(cells, columns=2, scale=max(1, MIN_SIDE // max(cells[0].size)))


def _read_image(images: ImageSet, index: int) -> Image.Image:
    """Reads one image of a set, in color."""
    (batch,) = images.batches(1, index, index + 1)
    return Image.fromarray(batch.images[0].expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
