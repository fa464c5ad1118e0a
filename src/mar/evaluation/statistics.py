"""Mean and covariance of features, in one pass, over any number of processes; and the files they are kept in."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from mar import distributed
from mar.checkpoint.files import write_atomically

BLOCK = 512
"""How many rows are summed at a time: the blocks do not depend on the batches that the rows came in."""
FORMAT = 1
"""The version of our statistics files; ADM's have none."""
REMAKE = "make it again with `mar stats`"
"""Hint of errors about statistics that have to be made again."""


def grouped() -> bool:
    """Whether this process belongs to a group, so that there is something to gather."""
    return dist.is_available() and dist.is_initialized()


def _wire() -> torch.device:
    """Where tensors have to be for the process group to carry them."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def sum_over_ranks(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The sum of all processes' tensors of one shape, the same on each; `tensor` itself without a process group."""
    if not grouped():
        return tensor
    total = tensor.to(_wire(), copy=True).contiguous()
    distributed.run_collective(lambda: dist.all_reduce(total))
    return total.to(tensor.device)


def gather_rows(tensor: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "m d"]:
    """The rows (n, d) of all processes below each other in the order of ranks, the same on each process.

    Processes may have different n, 0 too, but the same d and dtype. Gives `tensor` itself without a process group.
    """
    if not grouped():
        return tensor
    sizes = distributed.all_gather_object(len(tensor))
    # all_gather wants equal shapes, so that short shares are filled up
    padded = torch.zeros(max(sizes), tensor.shape[1], dtype=tensor.dtype, device=_wire())
    padded[: len(tensor)] = tensor
    shares = [torch.empty_like(padded) for _ in sizes]
    distributed.run_collective(lambda: dist.all_gather(shares, padded))
    return torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)]).to(tensor.device)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Of some rows: how many, their mean (d), and the sum of outer products of what differs from the mean (d, d)."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Sums:
        mean = rows.mean(0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def plus(self, other: _Sums) -> _Sums:
        """Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = torch.outer(delta, delta * (self.count * other.count / count)) + self.scatter + other.scatter
        return _Sums(count, self.mean + delta * (other.count / count), scatter)


class Moments:
    """Mean and covariance of rows that come in batches, in float64, in memory that does not grow with their number.

    Rows are summed in blocks of 512 whatever the batches were, so that the batch size changes nothing. `device` is
    where that happens (it needs float64: CPU or CUDA); results are on the CPU.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        self._sums = _Sums(0, zeros, zeros.new_zeros(width, width))
        self._rows = zeros.new_zeros(BLOCK, width)
        self._waiting = 0

    def update(self, values: Float[Tensor, "n d"]) -> None:
        """Adds a batch of n features; n may be 0. Raises ValueError where d is not the width."""
        self._require(values.shape[1])
        values = values.detach()
        while len(values):
            fits = min(BLOCK - self._waiting, len(values))
            self._rows[self._waiting : self._waiting + fits] = values[:fits]
            values = values[fits:]
            self._waiting += fits
            if self._waiting == BLOCK:
                self._sums, self._waiting = self._total(), 0

    def merge(self, other: Moments) -> None:
        """Adds all that `other` has seen; `other` stays as it is. Raises ValueError for another width."""
        self._require(other.width)
        theirs, device = other._total(), self._sums.mean.device
        self._sums = self._sums.plus(_Sums(theirs.count, theirs.mean.to(device), theirs.scatter.to(device)))

    def gather(self) -> Moments:
        """Those of all processes' rows together, the same on each; itself without a process group."""
        if not grouped():
            return self
        own = self._total()
        merged = Moments(self.width, own.mean.device)
        if count := sum(distributed.all_gather_object(own.count)):
            mean = sum_over_ranks(own.mean * (own.count / count))
            delta = own.mean - mean
            merged._sums = _Sums(count, mean, sum_over_ranks(own.scatter + torch.outer(delta, delta * own.count)))
        return merged

    @property
    def count(self) -> int:
        """How many rows were added."""
        return self._sums.count + self._waiting

    @property
    def mean(self) -> Float64[Tensor, "d"]:
        """Their mean. Raises ValueError without rows, or where one was not finite."""
        if not self.count:
            raise ValueError("moments: there are no pictures to take the mean of")
        return _finite(self._total().mean.cpu())

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """Their covariance, divided by count - 1. Raises ValueError with fewer than two rows, or one not finite."""
        if self.count < 2:
            raise ValueError(f"moments: got {self.count} picture(s), expected at least 2 for a covariance")
        return _finite(self._total().scatter.cpu()) / (self.count - 1)

    def _require(self, width: int) -> None:
        if width != self.width:
            raise ValueError(f"moments: got features {width} wide, expected {self.width}")

    def _total(self) -> _Sums:
        """With the rows that wait for their block to be full; nothing is changed."""
        return self._sums.plus(_Sums.of(self._rows[: self._waiting])) if self._waiting else self._sums


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ValueError("moments: a picture's features were not finite: look at what the feature network was given")
    return values


@dataclass(frozen=True)
class StatsProvenance:
    """What statistics were made of and with; two that differ in more than `source` can't be compared."""

    extractor: str
    """The name of the feature network."""
    fingerprint: str
    """sha256 (hex) of its name, weights and preprocessing."""
    size: tuple[int, int]
    """Height and width of the pictures before the extractor's own preprocessing."""
    source: str
    """The pictures, in words."""


def check_comparable(a: StatsProvenance, b: StatsProvenance) -> None:
    """Raises ValueError where features of `a` and `b` come from other extractors, weights or resolutions."""
    pair = f"{a.source} and {b.source} can't be compared"
    if a.extractor != b.extractor:
        raise ValueError(f"{pair}: features of {a.extractor} and of {b.extractor}; make both with one extractor")
    if a.fingerprint != b.fingerprint:
        raise ValueError(
            f"{pair}: both have features of {a.extractor}, but of other weights or preprocessing "
            f"({a.fingerprint[:12]}, {b.fingerprint[:12]}); make both with the same"
        )
    if a.size != b.size:
        raise ValueError(f"{pair}: pictures of {a.size} and {b.size} (height, width); make both at one resolution")


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """Of a set of pictures' features. Raises ValueError where shapes do not fit or a number is not finite."""

    mean: Float64[Tensor, "d"]
    covariance: Float64[Tensor, "d d"]
    count: int | None = None
    """How many pictures; None where a file does not say."""
    features: Float[Tensor, "n d"] | None = None
    """All of them, where they were kept, for KID, precision and recall."""
    about: StatsProvenance | None = None
    """What they were made of; None where a file does not say."""

    def __post_init__(self) -> None:
        _check(self.mean, self.covariance, self.count, self.features)

    def digest(self) -> str:
        """sha256, in hex, of mean and covariance: of what distances are measured to."""
        held = hashlib.sha256()
        for values in (self.mean, self.covariance):
            held.update(values.cpu().contiguous().numpy().tobytes())
        return held.hexdigest()

    def save(self, path: Path) -> None:
        """Writes an npz file, at once or not at all: mu, sigma, and count, about (JSON), features where known.

        `mu` and `sigma` are the names that ADM's published files, pytorch-fid and torch-fidelity use. Raises
        CheckpointError where the disk refuses.
        """
        arrays = {"format": np.array(FORMAT), "mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy()}
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        if self.features is not None:
            arrays["features"] = self.features.cpu().numpy()
        if self.about is not None:
            arrays["about"] = np.array(json.dumps(asdict(self.about)))

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)

        write_atomically(path, write, sum(array.nbytes for array in arrays.values()))

    @classmethod
    def load(cls, path: Path, features: bool = True) -> FeatureStats:
        """Reads what `save` wrote, or ADM's published files, of which only mu and sigma are taken.

        `features=False` leaves a file's features on the disk. Raises ValueError, in one line, for what is no such file.
        """
        arrays = _read(path, features)
        try:
            mean, covariance = (_floats(arrays[name]).double() for name in ("mu", "sigma"))
            count = int(arrays["count"]) if "count" in arrays else None
            kept = _floats(arrays["features"]) if "features" in arrays else None
            _check(mean, covariance, count, kept)
            return cls(mean, covariance, count, kept, _provenance(str(arrays["about"])) if "about" in arrays else None)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {error}; {REMAKE}") from None


def _check(mean: Tensor, covariance: Tensor, count: int | None, features: Tensor | None) -> None:
    width = mean.numel()
    if not width or mean.shape != (width,) or covariance.shape != (width, width):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise ValueError(f"statistics: got a mean and a covariance of shapes {shapes}, expected (d,) and (d, d)")
    if count is not None and count < 2:
        raise ValueError(f"statistics: got a count of {count}, expected at least 2 pictures")
    if features is not None and (features.ndim != 2 or features.shape[1] != width or len(features) != (count or -1)):
        expected = f"{count or 'count'}, {width}"
        raise ValueError(f"statistics: got features of shape {tuple(features.shape)}, expected ({expected})")
    for name, values in (("mean", mean), ("covariance", covariance), ("features", features)):
        if values is not None and not values.isfinite().all():
            raise ValueError(f"statistics: the {name} has values that are not finite")
    uneven = (covariance - covariance.T).abs().max() > 1e-5 * covariance.abs().max()
    if uneven or covariance.diagonal().min() < 0:
        raise ValueError("statistics: the covariance is not symmetric, or has a negative variance")


def _read(path: Path, features: bool) -> dict[str, np.ndarray]:
    """The arrays of a statistics file, with nothing said about their shapes yet."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such file; `mar stats` makes one")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: damaged, or no npz file of statistics; {REMAKE}")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:  # np.load leaves damaged ones open
            names = set(file.files)
            if missing := sorted({"mu", "sigma"} - names):
                held = "pictures" if "arr_0" in names else ", ".join(sorted(names)) or "nothing"
                raise ValueError(f"it has no {' and no '.join(missing)}, but {held}")
            if "format" in names and int(file["format"]) > FORMAT:
                raise ValueError(f"it has format {int(file['format'])}, and this mar knows {FORMAT}: take a newer mar")
            wanted = {"mu", "sigma", "count", "about"} | ({"features"} if features else set())
            return {name: file[name] for name in names & wanted}
    except (OSError, EOFError, TypeError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: can't be read as statistics ({reason}); {REMAKE}") from None


def _floats(array: np.ndarray) -> Tensor:
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(f"statistics: got numbers of {array.dtype}, expected float32 or float64")
    return torch.from_numpy(array)


def _provenance(text: str) -> StatsProvenance:
    """What `save` wrote as JSON."""
    fields = json.loads(text)
    if not isinstance(fields, Mapping) or set(fields) != {"extractor", "fingerprint", "size", "source"}:
        raise ValueError(f"statistics: got about = {text[:80]}, expected extractor, fingerprint, size, source")
    height, width = fields["size"]
    return StatsProvenance(
        str(fields["extractor"]), str(fields["fingerprint"]), (int(height), int(width)), str(fields["source"])
    )
