"""What is computed from features and logits. Pure functions in float64; the sums over pictures can be gathered."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from mar.evaluation.statistics import FeatureStats, Moments, grouped, sum_over_ranks
from mar.random import make_generator

CHUNK = 2**23
"""How many distances or kernel values there are at a time: 64 MiB of float64."""

_PARTS = 0x15C0


def frechet_distance(a: FeatureStats | Moments, b: FeatureStats | Moments) -> float:
    """The squared Fréchet distance of two Gaussians, |μa - μb|² + Tr(Σa) + Tr(Σb) - 2 Tr((Σa Σb)^½).

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", eq. 6: FID for
    features of the FID Inception network. Never negative; covariances may be singular. Raises ValueError where the
    widths differ.
    """
    mean_a, mean_b, covariance_a, covariance_b = a.mean, b.mean, a.covariance, b.covariance
    if len(mean_a) != len(mean_b):
        raise ValueError(f"Fréchet distance: got features {len(mean_a)} and {len(mean_b)} wide, expected the same")
    # Tr((Σa Σb)^½) is the sum of the singular values of Σa^½ Σb^½: the roots of the eigenvalues of Σa^½ Σb Σa^½, but
    # without a root's magnified rounding where these are zero. A rotation on either side changes no singular value.
    trace = torch.linalg.svdvals(_root(covariance_a).T @ _root(covariance_b)).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * trace
    return max(0.0, float(distance))


def _root(covariance: Tensor) -> Tensor:
    """F (d, rank) with F F^T = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    # what is left of a zero after rounding would look like a direction with a little variance
    kept = values > len(values) * torch.finfo(values.dtype).eps * values.max()
    return vectors[:, kept] * values[kept].sqrt()


class ScoreSums:
    """Sums for the Inception Score of `total` pictures in `splits` parts of one size, or one picture apart.

    Which part picture i goes to is drawn, always the same for the same `total`: a set may come class by class, and a
    part of a few classes would have a low score. There are kept each picture's part and, for each part, a count, the
    sum of p(y|x), and the sum of p(y|x) log p(y|x). `device` is where the sums are made (it needs float64: CPU or
    CUDA).
    """

    def __init__(self, splits: int, classes: int, total: int, device: torch.device | str = "cpu") -> None:
        if not 1 <= splits <= total:
            raise ValueError(f"Inception Score: got {splits} splits, expected 1 to the number of pictures, {total}")
        self.splits, self.classes, self.total = splits, classes, total
        places = torch.randperm(total, generator=make_generator(_PARTS))
        self._parts = places * splits // total
        self._counts = torch.zeros(splits, dtype=torch.float64, device=device)
        self._certainty = torch.zeros_like(self._counts)
        self._sums = self._counts.new_zeros(splits, classes)

    @property
    def count(self) -> int:
        """How many pictures were added."""
        return int(self._counts.sum())

    def update(self, logits: Float[Tensor, "n k"], indices: Int[Tensor, "n"] | None = None) -> None:
        """Adds n pictures by their logits; `indices` are their numbers i, without it those after the last.

        Raises ValueError where k is not `classes` or a number is not in [0, total).
        """
        if logits.shape[1] != self.classes:
            raise ValueError(f"Inception Score: got {logits.shape[1]} logits a picture, expected {self.classes}")
        if not len(logits):
            return
        numbers = self.count + torch.arange(len(logits)) if indices is None else indices.cpu().long()
        if numbers.min() < 0 or numbers.max() >= self.total:
            worst = int(numbers.min() if numbers.min() < 0 else numbers.max())
            raise ValueError(f"Inception Score: got picture number {worst}, expected 0 to {self.total - 1}")
        part = self._parts[numbers].to(self._sums.device)
        p = logits.detach().to(self._sums.device, torch.float64).softmax(1)
        self._counts.index_add_(0, part, torch.ones_like(p[:, 0]))
        self._certainty.index_add_(0, part, -torch.special.entr(p).sum(1))
        self._sums.index_add_(0, part, p)

    def gather(self) -> ScoreSums:
        """Those of all processes' pictures together, the same on each; itself without a process group."""
        if not grouped():
            return self
        merged = ScoreSums(self.splits, self.classes, self.total, self._sums.device)
        merged._counts = sum_over_ranks(self._counts)
        merged._certainty = sum_over_ranks(self._certainty)
        merged._sums = sum_over_ranks(self._sums)
        return merged

    def score(self) -> tuple[float, float]:
        """Mean and (population) standard deviation over the parts of exp(E KL(p(y|x) || p(y))).

        Salimans et al., "Improved Techniques for Training GANs" (arXiv 1606.03498), section 4. Raises ValueError
        where a part has no pictures, or one had logits that are not finite.
        """
        if not self._counts.all():
            raise ValueError(
                f"Inception Score: got {self.count} of {self.total} pictures, expected some in each of {self.splits} "
                "splits; take fewer splits"
            )
        if not self._sums.isfinite().all():
            raise ValueError("Inception Score: a picture's logits were not finite: look at what the network was given")
        marginal = self._sums / self._counts[:, None]
        scores = (self._certainty / self._counts + torch.special.entr(marginal).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


def inception_score(logits: Float[Tensor, "n k"], splits: int = 1) -> tuple[float, float]:
    """Mean and standard deviation over splits of pictures; see `ScoreSums`."""
    sums = ScoreSums(splits, logits.shape[1], len(logits))
    sums.update(logits)
    return sums.score()


def kernel_distance(
    real: Float[Tensor, "m d"], fake: Float[Tensor, "n d"], subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """KID: the mean over random subsets of the unbiased squared MMD, and the standard error of that mean.

    Bińkowski et al., "Demystifying MMD GANs" (arXiv 1801.01401), kernel (x·y/d + 1)³. A subset has `subset_size`
    pictures of each side, without repetition; subset i depends on (seed, i) and the order of rows. The standard error
    is that of drawing subsets (nan for one subset); subsets of one set overlap, so that it knows nothing of drawing
    the set. Raises ValueError for subsets larger than a set, or of fewer than two.
    """
    smaller = min(len(real), len(fake))
    if not 2 <= subset_size <= smaller:
        raise ValueError(f"KID: got subsets of {subset_size}, expected 2 to {smaller}, all the pictures of one side")
    if subsets < 1:
        raise ValueError(f"KID: got {subsets} subsets, expected at least 1")
    values = []
    for subset in range(subsets):
        draws = make_generator(seed, subset)
        x, y = (side[torch.randperm(len(side), generator=draws)[:subset_size].to(side.device)] for side in (real, fake))
        values.append(_squared_mmd(x.double(), y.double()))
    mean = math.fsum(values) / subsets
    spread = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(spread / (subsets - 1) / subsets) if subsets > 1 else math.nan


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimator of two sets of n: pairs of a picture with itself are left out."""
    n, width = x.shape

    def kernel(products: Tensor) -> Tensor:
        return (products / width + 1).pow(3)

    def total(a: Tensor, b: Tensor) -> float:
        return math.fsum(float(kernel(rows @ b.T).sum()) for rows in a.split(_rows(*b.shape)))

    def pairs(a: Tensor) -> float:
        return total(a, a) - float(kernel(a.square().sum(1)).sum())

    return (pairs(x) + pairs(y)) / (n * (n - 1)) - 2 * total(x, y) / n**2


def precision_recall(real: Float[Tensor, "m d"], fake: Float[Tensor, "n d"], k: int = 3) -> tuple[float, float]:
    """Precision: the share of fake features within a ball of the real ones; recall: of real within a fake one's.

    Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (arXiv 1904.06991),
    eq. 1 and 2: the ball of a feature reaches to, and includes, its k-th nearest neighbour in its own set. All
    distances are compared, 64 MiB of them at a time. Raises ValueError where a set has no k-th neighbours.
    """
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            f"precision and recall: got k = {k} with {len(real)} real and {len(fake)} fake pictures, expected "
            "1 <= k < the smaller number"
        )
    real, fake = real.double(), fake.double()
    return _covered(fake, real, _radii(real, k)), _covered(real, fake, _radii(fake, k))


def _radii(points: Tensor, k: int) -> Tensor:
    """Squared distance (n) of each point to its k-th nearest other one."""
    radii = []
    size = _rows(*points.shape)
    for start in range(0, len(points), size):
        rows = points[start : start + size]
        squared = _squared_distances(rows, points)
        squared.diagonal(start).fill_(math.inf)  # a point is not its own neighbour
        nearest_neighbors = squared.topk(k, dim=1, largest=False).indices
        radii.append(torch.stack([_exact(rows, points[column]) for column in nearest_neighbors.T]).amax(0))
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of points that lie within the ball of at least one centre."""
    inside = 0
    for rows in points.split(_rows(*centres.shape)):
        ball = (_squared_distances(rows, centres) - radii).argmin(1)
        # a point on the edge is inside, which rounding in the matrix product must not decide
        inside += int((_exact(rows, centres[ball]) <= radii[ball]).sum())
    return inside / len(points)


def nearest(real: Float[Tensor, "m d"], fake: Float[Tensor, "n d"]) -> Float64[Tensor, "n"]:
    """The Euclidean distance of each fake feature to the nearest real one; 0 for a copy. ValueError without real."""
    return nearest_neighbors(real, fake)[0]


def nearest_neighbors(
    real: Float[Tensor, "m d"], fake: Float[Tensor, "n d"]
) -> tuple[Float64[Tensor, "n"], Int64[Tensor, "n"]]:
    """For each fake feature the Euclidean distance to the nearest real one, and which one that is.

    All distances are compared, 64 MiB of them at a time. Raises ValueError without real features.
    """
    if not len(real):
        raise ValueError("nearest: there are no real features to be near to")
    real, fake = real.double(), fake.double()
    chunks = fake.split(_rows(*real.shape))
    numbers = torch.cat([_squared_distances(rows, real).argmin(1) for rows in chunks])
    found = zip(chunks, numbers.split([len(rows) for rows in chunks]), strict=True)
    return torch.cat([_exact(rows, real[nearest]) for rows, nearest in found]).sqrt(), numbers


def class_accuracy(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> float:
    """The share of pictures whose largest logit is that of their label. Raises ValueError without pictures."""
    if not len(logits):
        raise ValueError("class agreement: there are no pictures")
    return float((logits.argmax(1) == labels).double().mean())


def _rows(others: int, width: int) -> int:
    """How many rows to take at a time: each makes `others` values, and copies of itself, `width` values."""
    return max(1, CHUNK // max(others, width))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """All squared distances (n, m), to the rounding of |a|² + |b|²."""
    return torch.addmm(b.square().sum(1) + a.square().sum(1, keepdim=True), a, b.T, alpha=-2)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """The squared distance (n) of each row of `a` to that of `b`, 0 for equal ones."""
    return (a - b).square().sum(1)
