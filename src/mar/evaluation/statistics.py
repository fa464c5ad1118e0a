"""Mean and covariance of image features: computed in one pass over any number of ranks, and kept in `.npz` files.

`Moments` accumulates; `FeatureStats` is the result with its provenance, and reads and writes the files.
"""

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
from jaxtyping import Float, Float64
from torch import Tensor

from mar import distributed
from mar.checkpoint import checksums
from mar.checkpoint.files import check_regular, is_zip, parse_json, write_atomically

BLOCK = 512
"""Rows that are summed at a time. Blocks do not depend on the batches that the rows came in."""
FORMAT = 1
"""The version of our statistics files; ADM's have none."""
REMAKE = "make it again with `mar stats`"
"""Advice at the end of error messages."""


# ---- Accumulation


@dataclass(frozen=True, eq=False)
class _CenteredSums:
    """Sums over some rows: their number, their mean (d), and the scatter matrix around the mean (d, d)."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _CenteredSums:
        mean = rows.mean(0)
        centered = rows - mean
        return cls(len(rows), mean, centered.T @ centered)

    def plus(self, other: _CenteredSums) -> _CenteredSums:
        """Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = torch.outer(delta, delta * (self.count * other.count / count)) + self.scatter + other.scatter
        return _CenteredSums(count, self.mean + delta * (other.count / count), scatter)


class Moments:
    """Running mean and covariance of feature batches, in float64, in constant memory.

    Rows are summed in blocks of 512 whatever the batches were: the batch size changes nothing. The sums are made on
    `device` (it needs float64: CPU or CUDA); results are on the CPU.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        self._sums = _CenteredSums(0, zeros, zeros.new_zeros(width, width))
        self._block = zeros.new_zeros(BLOCK, width)
        self._in_block = 0

    def update(self, values: Float[Tensor, "n d"]) -> None:
        """Adds a batch of n features; n may be 0. Raises ValueError where d is not the width."""
        self._check_width(values.shape[1])
        values = values.detach()
        while len(values):
            count = min(BLOCK - self._in_block, len(values))
            self._block[self._in_block : self._in_block + count] = values[:count]
            values = values[count:]
            self._in_block += count
            if self._in_block == BLOCK:
                self._sums, self._in_block = self._total(), 0

    def merge(self, other: Moments) -> None:
        """Adds all rows of `other`, which stays as it is. Raises ValueError for another width."""
        self._check_width(other.width)
        added, device = other._total(), self._sums.mean.device
        self._sums = self._sums.plus(_CenteredSums(added.count, added.mean.to(device), added.scatter.to(device)))

    def gather(self) -> Moments:
        """Returns the moments of all ranks' rows together, the same on each; itself without a process group."""
        if not distributed.in_group():
            return self
        own = self._total()
        merged = Moments(self.width, own.mean.device)
        if count := sum(distributed.all_gather_object(own.count)):
            mean = distributed.sum_over_ranks(own.mean * (own.count / count))
            delta = own.mean - mean
            scatter = distributed.sum_over_ranks(own.scatter + torch.outer(delta, delta * own.count))
            merged._sums = _CenteredSums(count, mean, scatter)
        return merged

    @property
    def count(self) -> int:
        """Returns the number of rows that were added."""
        return self._sums.count + self._in_block

    @property
    def mean(self) -> Float64[Tensor, "d"]:
        """Returns their mean. Raises ValueError without rows, or where one was not finite."""
        if not self.count:
            raise ValueError("moments: got no images, expected at least 1 for a mean")
        return _require_finite(self._total().mean.cpu())

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """Returns their covariance, divided by count - 1. Raises ValueError with fewer than two rows, or one not
        finite."""
        if self.count < 2:
            raise ValueError(f"moments: got {self.count} image(s), expected at least 2 for a covariance")
        return _require_finite(self._total().scatter.cpu()) / (self.count - 1)

    def _check_width(self, width: int) -> None:
        if width != self.width:
            raise ValueError(f"moments: got features {width} wide, expected {self.width}")

    def _total(self) -> _CenteredSums:
        """Returns the sums with the rows of the unfinished block; changes nothing."""
        return self._sums.plus(_CenteredSums.of(self._block[: self._in_block])) if self._in_block else self._sums


def _require_finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ValueError(
            "moments: got features that are not finite, expected numbers; check the input of the feature network"
        )
    return values


# ---- Statistics and their provenance


@dataclass(frozen=True)
class StatsProvenance:
    """The origin of statistics. Two that differ in more than `source` can't be compared."""

    extractor: str
    """The name of the feature network."""
    fingerprint: str
    """sha256 (hex) of its name, weights and preprocessing."""
    size: tuple[int, int]
    """Height and width of the images before the extractor's own preprocessing."""
    source: str
    """The images, in words."""


def check_comparable(a: StatsProvenance | None, b: StatsProvenance | None) -> None:
    """Raises ValueError for features of other extractors, weights or resolutions. None is unknown, and passes."""
    if a is None or b is None:
        return
    pair = f"{a.source} and {b.source} can't be compared"
    if a.extractor != b.extractor:
        raise ValueError(f"{pair}: features of {a.extractor} and of {b.extractor}; make both with one extractor")
    if a.fingerprint != b.fingerprint:
        raise ValueError(
            f"{pair}: both have features of {a.extractor}, but of other weights or preprocessing "
            f"({a.fingerprint[:12]}, {b.fingerprint[:12]}); make both with the same"
        )
    if a.size != b.size:
        raise ValueError(f"{pair}: images of {a.size} and {b.size} (height, width); make both at one resolution")


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """Statistics of a set's features. Raises ValueError for shapes that do not fit, or numbers that are not finite."""

    mean: Float64[Tensor, "d"]
    covariance: Float64[Tensor, "d d"]
    count: int | None = None
    """Number of images; None for a file without it."""
    features: Float[Tensor, "n d"] | None = None
    """All features, where they were kept: for KID, precision, recall and neighbors."""
    provenance: StatsProvenance | None = None
    """None for a file without it."""

    def __post_init__(self) -> None:
        _check(self.mean, self.covariance, self.count, self.features)

    def digest(self) -> str:
        """Returns the sha256, in hex, of mean and covariance."""
        sha = hashlib.sha256()
        for values in (self.mean, self.covariance):
            sha.update(values.cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def save(self, path: Path) -> None:
        """Writes an npz file, whole or not at all: mu, sigma; count, about (JSON) and features where known.

        `mu` and `sigma` are the names of ADM's published files, pytorch-fid and torch-fidelity. Raises
        CheckpointError where the disk refuses.
        """
        arrays = {"format": np.array(FORMAT), "mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy()}
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        if self.features is not None:
            arrays["features"] = self.features.cpu().numpy()
        if self.provenance is not None:
            arrays["about"] = np.array(json.dumps(asdict(self.provenance)))
        arrays["sha256"] = np.array(json.dumps({name: _array_digest(array) for name, array in arrays.items()}))

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)

        write_atomically(path, write, sum(array.nbytes for array in arrays.values()))

    @classmethod
    def load(cls, path: Path, features: bool = True) -> FeatureStats:
        """Reads a file of `save`, or ADM's published mu and sigma.

        Without `features` the features are left on the disk. Raises ValueError, one line, for anything else.
        """
        arrays = _read_arrays(path, features)
        try:
            mean, covariance = (_to_tensor(arrays[name]).double() for name in ("mu", "sigma"))
            count = int(arrays["count"]) if "count" in arrays else None
            kept = _to_tensor(arrays["features"]) if "features" in arrays else None
            _check(mean, covariance, count, kept)
            provenance = _parse_provenance(str(arrays["about"])) if "about" in arrays else None
            return cls(mean, covariance, count, kept, provenance)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {error}; {REMAKE}") from None


def _check(mean: Tensor, covariance: Tensor, count: int | None, features: Tensor | None) -> None:
    width = mean.numel()
    if not width or mean.shape != (width,) or covariance.shape != (width, width):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise ValueError(f"statistics: got a mean and a covariance of shapes {shapes}, expected (d,) and (d, d)")
    if count is not None and count < 2:
        raise ValueError(f"statistics: got a count of {count}, expected at least 2 images")
    if features is not None and (features.ndim != 2 or features.shape[1] != width or len(features) != (count or -1)):
        expected = f"{count or 'count'}, {width}"
        raise ValueError(f"statistics: got features of shape {tuple(features.shape)}, expected ({expected})")
    for name, values in (("mean", mean), ("covariance", covariance), ("features", features)):
        if values is not None and not values.isfinite().all():
            raise ValueError(f"statistics: got a {name} with values that are not finite, expected numbers")
    asymmetric = (covariance - covariance.T).abs().max() > 1e-5 * covariance.abs().max()
    if asymmetric or covariance.diagonal().min() < 0:
        kind = "is not symmetric" if asymmetric else "has a negative variance"
        raise ValueError(f"statistics: got a covariance that {kind}, expected a covariance matrix")


# ---- Files


def _read_arrays(path: Path, features: bool) -> dict[str, np.ndarray]:
    """Reads the arrays of a statistics file, without a check of their shapes."""
    check_regular(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file; `mar stats` makes one")
    if not is_zip(path):
        raise ValueError(f"{path}: damaged, or no npz file of statistics; {REMAKE}")
    try:
        _check_expansion(path, features)
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:  # np.load leaves damaged ones open
            names = set(file.files)
            if missing := sorted({"mu", "sigma"} - names):
                content = "images" if "arr_0" in names else ", ".join(sorted(names)) or "nothing"
                raise ValueError(f"it has no {' and no '.join(missing)}, but {content}")
            if "format" in names and int(file["format"]) > FORMAT:
                raise ValueError(
                    f"a newer mar made it: got format {int(file['format'])}, expected at most {FORMAT}; upgrade mar"
                )
            known = {"mu", "sigma", "count", "about"} | ({"features"} if features else set())
            arrays = {name: file[name] for name in names & known}
            ours = {"format", "count", "about", "features", "sha256", "mu", "sigma"}
            if "format" in names and (strange := sorted(names - ours)):
                raise ValueError(f"it holds {strange[0]}, which mar does not write")
            if "sha256" in names and checksums.enabled():
                digests = parse_json(str(file["sha256"]))
                if set(digests) != names - {"sha256"}:
                    raise ValueError("its parts are not those that were written")
                for name, array in {**arrays, "format": file["format"]}.items():
                    if _array_digest(array) != digests[name]:
                        raise ValueError(f"{name} is not as it was written")
            return arrays
    except (
        OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, OverflowError, NotImplementedError,
        MemoryError, SyntaxError, RecursionError, RuntimeError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: can't be read as statistics ({reason[:200]}); {REMAKE}") from None


_MAX_EXPANSION = 4
_SMALL = 2**20


def _check_expansion(path: Path, features: bool) -> None:
    """Raise ValueError for arrays that would unpack to far more than the file."""
    with zipfile.ZipFile(path) as archive:
        sizes = {record.filename.removesuffix(".npy"): record.file_size for record in archive.infolist()}
    read = {"format", "mu", "sigma", "count", "about", "sha256"} | ({"features"} if features else set())
    needed, size = sum(sizes.get(name, 0) for name in read), path.stat().st_size
    if needed > max(_MAX_EXPANSION * size, _SMALL):
        raise ValueError(f"its arrays unpack to {needed:,} bytes, more than {_MAX_EXPANSION} times the file")


def _array_digest(array: np.ndarray) -> str:
    """Return the sha256, in hex, of an array's type, shape and values."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _to_tensor(array: np.ndarray) -> Tensor:
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(f"statistics: got numbers of {array.dtype}, expected float32 or float64")
    return torch.from_numpy(array)


def _parse_provenance(text: str) -> StatsProvenance:
    fields = parse_json(text)
    if not isinstance(fields, Mapping) or set(fields) != {"extractor", "fingerprint", "size", "source"}:
        raise ValueError(f"statistics: got about = {text[:80]}, expected extractor, fingerprint, size, source")
    height, width = fields["size"]
    return StatsProvenance(
        str(fields["extractor"]), str(fields["fingerprint"]), (int(height), int(width)), str(fields["source"])
    )
