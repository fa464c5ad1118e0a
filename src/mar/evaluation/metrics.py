"""Metrics of features and logits, in float64: Fréchet distance, Inception Score, KID, precision, recall, neighbors.

`real` are features of reference images (m, d), `fake` those of the images that are evaluated (n, d).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from mar import distributed
from mar.evaluation.statistics import FeatureStats, Moments
from mar.random import make_generator

CHUNK = 2**23
"""Distances or kernel values that are computed at a time: 64 MiB of float64."""

_PARTS = 0x15C0  # the random stream of the Inception Score's splits


def frechet_distance(a: FeatureStats | Moments, b: FeatureStats | Moments) -> float:
    """Computes the squared Fréchet distance of two Gaussians: |μa - μb|² + Tr(Σa) + Tr(Σb) - 2 Tr((Σa Σb)^½).

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", eq. 6: FID for
    features of the FID Inception network. Never negative; covariances may be singular. Raises ValueError for unequal
    widths.
    """
    mean_a, mean_b, covariance_a, covariance_b = a.mean, b.mean, a.covariance, b.covariance
    if len(mean_a) != len(mean_b):
        raise ValueError(f"Fréchet distance: got features {len(mean_a)} and {len(mean_b)} wide, expected the same")
    # Tr((Σa Σb)^½) is the sum of the singular values of Σa^½ Σb^½. The roots of the eigenvalues of Σa^½ Σb Σa^½ are
    # the same, but magnify the rounding of zeros. A rotation on either side changes no singular value.
    trace = torch.linalg.svdvals(_matrix_root(covariance_a).T @ _matrix_root(covariance_b)).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * trace
    return max(0.0, float(distance))


def _matrix_root(covariance: Tensor) -> Tensor:
    """Returns F (d, rank) with F F^T = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    # an eigenvalue that is only the rounding of zero would add a little variance
    kept = values > len(values) * torch.finfo(values.dtype).eps * values.max()
    return vectors[:, kept] * values[kept].sqrt()


class ScoreSums:
    """Running sums for the Inception Score of images in parts.

    Image i goes to a random part, always the same for the same `total`: in a set sorted by class, parts in order would
    hold few classes and score low. Each part keeps a count, the sum of p(y|x), and the sum of p(y|x) log p(y|x).

    Args:
        splits: number of parts, of one size or one image apart.
        classes: number of logits of an image.
        total: number of images.
        device: for the sums; it needs float64: CPU or CUDA.
    """

    def __init__(self, splits: int, classes: int, total: int, device: torch.device | str = "cpu") -> None:
        if not 1 <= splits <= total:
            raise ValueError(f"Inception Score: got {splits} splits, expected 1 to the number of images, {total}")
        self.splits, self.classes, self.total = splits, classes, total
        positions = torch.randperm(total, generator=make_generator(_PARTS))
        self._parts = positions * splits // total
        self._counts = torch.zeros(splits, dtype=torch.float64, device=device)
        self._neg_entropy = torch.zeros_like(self._counts)
        self._prob_sums = self._counts.new_zeros(splits, classes)

    @property
    def count(self) -> int:
        """Returns the number of images that were added."""
        return int(self._counts.sum())

    @property
    def has_empty_split(self) -> bool:
        """Tells whether a split has no images, and the set no score."""
        return not bool(self._counts.all())

    def update(self, logits: Float[Tensor, "n k"], indices: Int[Tensor, "n"] | None = None) -> None:
        """Adds n images by their logits; `indices` are their numbers i, by default those after the last.

        Raises ValueError for k other than `classes`, or a number outside [0, total).
        """
        if logits.shape[1] != self.classes:
            raise ValueError(f"Inception Score: got {logits.shape[1]} logits an image, expected {self.classes}")
        if not len(logits):
            return
        numbers = self.count + torch.arange(len(logits)) if indices is None else indices.cpu().long()
        if numbers.min() < 0 or numbers.max() >= self.total:
            worst = int(numbers.min() if numbers.min() < 0 else numbers.max())
            raise ValueError(f"Inception Score: got image number {worst}, expected 0 to {self.total - 1}")
        part = self._parts[numbers].to(self._prob_sums.device)
        p = logits.detach().to(self._prob_sums.device, torch.float64).softmax(1)
        self._counts.index_add_(0, part, torch.ones_like(p[:, 0]))
        self._neg_entropy.index_add_(0, part, -torch.special.entr(p).sum(1))
        self._prob_sums.index_add_(0, part, p)

    def gather(self) -> ScoreSums:
        """Returns the sums of all ranks' images together, the same on each; itself without a process group."""
        if not distributed.in_group():
            return self
        merged = ScoreSums(self.splits, self.classes, self.total, self._prob_sums.device)
        merged._counts = distributed.sum_over_ranks(self._counts)
        merged._neg_entropy = distributed.sum_over_ranks(self._neg_entropy)
        merged._prob_sums = distributed.sum_over_ranks(self._prob_sums)
        return merged

    def score(self) -> tuple[float, float]:
        """Returns mean and (population) standard deviation over the parts of exp(E KL(p(y|x) || p(y))).

        Salimans et al., "Improved Techniques for Training GANs" (arXiv 1606.03498), section 4. Raises ValueError for
        a part without images, or logits that are not finite.
        """
        if self.has_empty_split:
            raise ValueError(
                f"Inception Score: got {self.count} of {self.total} images, expected some in each of {self.splits} "
                "splits; take fewer splits"
            )
        if not self._prob_sums.isfinite().all():
            raise ValueError(
                "Inception Score: got logits that are not finite, expected numbers; check the network's input"
            )
        marginal = self._prob_sums / self._counts[:, None]
        scores = (self._neg_entropy / self._counts + torch.special.entr(marginal).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


def inception_score(logits: Float[Tensor, "n k"], splits: int = 1) -> tuple[float, float]:
    """Computes mean and standard deviation of the Inception Score over splits; see `ScoreSums`."""
    sums = ScoreSums(splits, logits.shape[1], len(logits))
    sums.update(logits)
    return sums.score()


def kernel_distance(
    real: Float[Tensor, "m d"], fake: Float[Tensor, "n d"], subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """Computes KID: the mean over random subsets of the unbiased squared MMD, and its standard error.

    Bińkowski et al., "Demystifying MMD GANs" (arXiv 1801.01401), kernel (x·y/d + 1)³. The standard error is that of
    drawing subsets: subsets of one set overlap, and it knows nothing of drawing the set.

    Args:
        real: reference features.
        fake: features of the evaluated images.
        subsets: number of subsets.
        subset_size: images of each side in a subset, drawn without repetition.
        seed: subset i depends on (seed, i) and the order of rows.

    Returns:
        The mean and its standard error (nan for one subset).

    Raises:
        ValueError: for subsets larger than a set, or of fewer than two images.
    """
    smaller = min(len(real), len(fake))
    if not 2 <= subset_size <= smaller:
        raise ValueError(f"KID: got subsets of {subset_size}, expected 2 to {smaller}, all the images of one side")
    if subsets < 1:
        raise ValueError(f"KID: got {subsets} subsets, expected at least 1")
    values = []
    for subset in range(subsets):
        rng = make_generator(seed, subset)
        x, y = (side[torch.randperm(len(side), generator=rng)[:subset_size].to(side.device)] for side in (real, fake))
        values.append(_squared_mmd(x.double(), y.double()))
    mean = math.fsum(values) / subsets
    spread = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(spread / (subsets - 1) / subsets) if subsets > 1 else math.nan


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Estimates the squared MMD of two sets of n without bias: pairs of an image with itself are left out."""
    n, width = x.shape

    def kernel(products: Tensor) -> Tensor:
        return (products / width + 1).pow(3)

    def total(a: Tensor, b: Tensor) -> float:
        return math.fsum(float(kernel(rows @ b.T).sum()) for rows in a.split(_rows(*b.shape)))

    def pairs(a: Tensor) -> float:
        return total(a, a) - float(kernel(a.square().sum(1)).sum())

    return (pairs(x) + pairs(y)) / (n * (n - 1)) - 2 * total(x, y) / n**2


def precision_recall(real: Float[Tensor, "m d"], fake: Float[Tensor, "n d"], k: int = 3) -> tuple[float, float]:
    """Computes precision (share of fake features in a ball of the real ones) and recall (the reverse).

    Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (arXiv 1904.06991),
    eq. 1 and 2: the ball of a feature reaches to, and includes, its k-th nearest neighbor in its own set. All
    distances are compared, 64 MiB of them at a time. Raises ValueError for a set of k images or fewer.
    """
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            f"precision and recall: got k = {k} with {len(real)} real and {len(fake)} fake images, expected "
            "1 <= k < the smaller number"
        )
    real, fake = real.double(), fake.double()
    return _covered(fake, real, _radii(real, k)), _covered(real, fake, _radii(fake, k))


def _radii(points: Tensor, k: int) -> Tensor:
    """Returns the squared distance (n) of each point to its k-th nearest other one."""
    radii = []
    size = _rows(*points.shape)
    for start in range(0, len(points), size):
        rows = points[start : start + size]
        squared = _squared_distances(rows, points)
        squared.diagonal(start).fill_(math.inf)  # a point is not its own neighbor
        neighbors = squared.topk(k, dim=1, largest=False).indices
        radii.append(torch.stack([_squared_distance(rows, points[column]) for column in neighbors.T]).amax(0))
    return torch.cat(radii)


def _covered(points: Tensor, centers: Tensor, radii: Tensor) -> float:
    """Returns the share of points inside the ball of at least one center."""
    inside = 0
    for rows in points.split(_rows(*centers.shape)):
        ball = (_squared_distances(rows, centers) - radii).argmin(1)
        # a point on the edge is inside: the rounding of a matrix product must not decide that
        inside += int((_squared_distance(rows, centers[ball]) <= radii[ball]).sum())
    return inside / len(points)


def nearest_neighbors(
    real: Float[Tensor, "m d"], fake: Float[Tensor, "n d"]
) -> tuple[Float64[Tensor, "n"], Int64[Tensor, "n"]]:
    """Returns each fake feature's Euclidean distance to the nearest real one (0 for a copy), and that one's index.

    All distances are compared, 64 MiB of them at a time. Raises ValueError without real features.
    """
    if not len(real):
        raise ValueError("nearest neighbors: got no reference features, expected at least one")
    real, fake = real.double(), fake.double()
    chunks = fake.split(_rows(*real.shape))
    indices = torch.cat([_squared_distances(rows, real).argmin(1) for rows in chunks])
    pairs = zip(chunks, indices.split([len(rows) for rows in chunks]), strict=True)
    return torch.cat([_squared_distance(rows, real[index]) for rows, index in pairs]).sqrt(), indices


def _rows(others: int, width: int) -> int:
    """Returns how many rows fit into a chunk: each makes `others` values, and copies of its own `width` values."""
    return max(1, CHUNK // max(others, width))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Returns all squared distances (n, m), to the rounding of |a|² + |b|²."""
    return torch.addmm(b.square().sum(1) + a.square().sum(1, keepdim=True), a, b.T, alpha=-2)


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Returns the squared distance (n) of each row of `a` to that of `b`, exactly 0 for equal ones."""
    return (a - b).square().sum(1)
