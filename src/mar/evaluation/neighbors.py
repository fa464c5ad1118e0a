"""Does a model draw copies of what it learned from? Fréchet distances reward that; the nearest learned picture tells.

The distance to the nearest learned picture says little alone: how near is near depends on the pictures and on the
network. Real pictures that were not learned from ("held out") are the measure, as in the data-copying test of Meehan,
Chaudhuri and Dasgupta, "A Non-Parametric Test to Detect Data-Copying in Generative Models" (arXiv 2004.05675); of
which this is the idea, not the statistic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float64, Int64
from PIL import Image
from torch import Tensor

from mar.data.images import image_grid
from mar.evaluation.image_sets import PictureSet
from mar.evaluation.metrics import nearest
from mar.evaluation.statistics import FeatureStats, check_comparable

RARE = 0.01
"""The share of held-out pictures that may be as near to a learned one as what is called a copy."""
SHOWN = 8
"""How many of the nearest pairs are reported."""
SIDE = 112
"""Pixels that a picture of a sheet has at least, where a whole factor brings it there."""


class Pair(NamedTuple):
    """A picture and the reference picture nearest to it, by their numbers in their sets."""

    picture: int
    reference: int
    distance: float
    """Euclidean, in the extractor's features."""


@dataclass(frozen=True)
class HeldOut:
    """How near real pictures that were not learned from come to those that were."""

    count: int
    median: float
    """Of the distances to the nearest learned picture."""
    near: float
    """The distance that all but 1% of them keep: what comes nearer is called a copy."""

    @classmethod
    def of(cls, held_out: FeatureStats, reference: FeatureStats) -> HeldOut:
        """From statistics with features. ValueError where they can't be compared, features are missing, or 1% of the
        held-out pictures are in the reference themselves, so that no copy could be nearer."""
        if held_out.about is not None and reference.about is not None:
            check_comparable(held_out.about, reference.about)
        if held_out.features is None or reference.features is None:
            raise ValueError("held-out pictures: the features of all pictures are needed, on both sides")
        distances = nearest(reference.features, held_out.features)
        near = float(distances.quantile(RARE))
        # the same picture in another batch differs by float32's rounding
        if near <= 1e-5 * float(reference.features.double().norm(dim=1).mean()):
            names = [of.about.source if of.about else "statistics" for of in (held_out, reference)]
            raise ValueError(
                f"{RARE:.0%} or more of the held-out pictures ({names[0]}) are in the reference ({names[1]}) itself; "
                "the reference has to be what the model learned from, and the held-out pictures others"
            )
        return cls(len(distances), float(distances.quantile(0.5)), near)

    def doubts(self) -> tuple[str, ...]:
        """Why the share of copies is not what it seems, one line each."""
        if self.count * RARE >= 1:
            return ()
        return (f"{self.count:,} held-out pictures: {RARE:.0%} of them is less than one; copies are a rough guess",)


def share_of_copies(distances: Float64[Tensor, "n"], held_out: HeldOut) -> float:
    """The share of pictures at these distances from the nearest learned one that are nearer than all but 1% of the
    held-out pictures are. About 1% for a model whose pictures are new, 1 for one that draws copies."""
    return float((distances < held_out.near).double().mean())


def closest(distances: Float64[Tensor, "n"], numbers: Int64[Tensor, "n"], count: int = SHOWN) -> tuple[Pair, ...]:
    """The `count` pictures nearest to a reference picture (or all there are), the nearest first; `numbers` are those
    of the reference pictures."""
    order = distances.argsort(stable=True)[:count].tolist()
    return tuple(Pair(i, int(numbers[i]), float(distances[i])) for i in order)


def sheet(pairs: tuple[Pair, ...], pictures: PictureSet, reference: PictureSet) -> Image.Image:
    """A pair a row: on the left the picture, on the right the reference picture. Both sets have pictures of one size.

    Pictures are fetched again one by one; a model draws them anew (in bfloat16 not the same to the last bit).
    """
    found = [_picture(of, n) for pair in pairs for of, n in ((pictures, pair.picture), (reference, pair.reference))]
    return image_grid(found, columns=2, scale=max(1, SIDE // max(found[0].size)))


def _picture(pictures: PictureSet, number: int) -> Image.Image:
    """Picture `number`, in colours."""
    (part,) = pictures.batches(1, number, number + 1)
    return Image.fromarray(part.images[0].expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
