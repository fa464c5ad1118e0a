"""Feature extractors: their contract, a module as an extractor, weights, and functions of users.

Weights of other networks are read without running code of their files.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mar.checkpoint.files import check_regular
from mar.checkpoint.official import read_torch

LUMA = (19595, 38470, 7471)
"""ITU-R 601 weights of red, green and blue in 1/65536, as in Pillow; they leave a gray image as it is."""
PROBE_SIDE = 64
"""Side of the black image that measures the width of a module's features."""


@dataclass(frozen=True)
class Features:
    """A network's output for n images, in float32 on its device."""

    values: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"] | None = None
    """Unnormalized log-probabilities of classes, if the network has them."""


@runtime_checkable
class Extractor(Protocol):
    """Maps images to features, each alone, with the metric's preprocessing inside."""

    @property
    def name(self) -> str:
        """Returns the name for files of statistics."""
        ...

    @property
    def metric(self) -> str:
        """Returns the name of its Fréchet distance: "FID" only for the network of published figures."""
        ...

    @property
    def width(self) -> int:
        """Returns d, the number of features of an image."""
        ...

    @property
    def scores(self) -> bool:
        """Tells whether the Inception Score is computed from its logits."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Returns the names of its logits; () unless these are classes of the data."""
        ...

    @property
    def fingerprint(self) -> str:
        """Returns the SHA-256 of name, weights and preprocessing: only features of equal ones compare."""
        ...

    def to(self, device: torch.device | str) -> Extractor:
        """Moves the network to a device; returns itself."""
        ...

    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Features:
        """Computes the features of images with one channel (gray) or three (RGB), without gradients."""
        ...


class ModuleExtractor:
    """A module as an extractor, in evaluation mode and without gradients.

    Args:
        module: maps images to features (n, d), or to a pair of these and logits (n, k).
        name: for files of statistics.
        preprocess: turns uint8 images (n, `channels`, h, w) into the module's input; by default float32 in [0, 1].
        recipe: names the preprocessing. It is part of the fingerprint, as are name and weights: change one of them
            with the arithmetic.
        metric: the name of its Fréchet distance.
        width: d; by default measured on a black image of 64 x 64.
        channels: of the images for `preprocess`, 1 (gray) or 3 (RGB).
        scores: compute the Inception Score from the logits.
        classes: names of the logits, if they are classes of the data.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        *,
        recipe: str = "",
        metric: str = "",
        width: int | None = None,
        channels: int = 3,
        scores: bool = False,
        classes: tuple[str, ...] = (),
    ) -> None:
        if not name:
            raise ValueError("name: got '', expected a name for the feature extractor")
        if channels not in (1, 3):
            raise ValueError(f"channels: got {channels}, expected 1 (gray) or 3 (RGB)")
        self.name, self.metric, self.scores, self.classes = name, metric or f"FD ({name})", scores, classes
        self.module = module.eval().requires_grad_(False)
        self.channels = channels
        self._preprocess = preprocess or to_unit
        self.recipe = recipe or f"{self._preprocess.__module__}.{self._preprocess.__qualname__}"
        self.fingerprint = fingerprint(name, f"{self.recipe}; {channels} channels", module.state_dict())
        first = next(iter(module.state_dict().values()), torch.zeros(0))
        self._device = first.device
        self.width = self._measure_width() if width is None else width

    def to(self, device: torch.device | str) -> ModuleExtractor:
        """Moves the module to a device; returns itself."""
        self.module.to(device)
        self._device = torch.device(device)
        return self

    def _measure_width(self) -> int:
        black = torch.zeros(1, self.channels, PROBE_SIDE, PROBE_SIDE, dtype=torch.uint8)
        try:
            return self(black).values.shape[1]
        except RuntimeError as error:  # torch's, of shapes that do not fit
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.name}: give its width; a {PROBE_SIDE} x {PROBE_SIDE} picture does not do ({reason})"
            ) from error

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Features:
        """Computes features. Raises ValueError for images, or outputs of the module, of other shapes."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"{self.name}: got pictures {images.dtype} {tuple(images.shape)}, expected uint8 (n, 1 or 3, h, w)"
            )
        output = self.module(self._preprocess(convert_channels(images.to(self._device), self.channels)))
        values, logits = output if isinstance(output, tuple) else (output, None)
        for tensor, expected in ((values, "features (n, d)"), (logits, "logits (n, k)")):
            if tensor is not None and (tensor.ndim != 2 or len(tensor) != len(images)):
                raise ValueError(f"{self.name}: the module returned {tuple(tensor.shape)}, expected {expected}")
        if logits is not None and self.classes and logits.shape[1] != len(self.classes):
            raise ValueError(
                f"{self.name}: got {logits.shape[1]} logits an image, expected {len(self.classes)}, as classes"
            )
        return Features(values.float(), None if logits is None else logits.float())


def to_unit(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Scales uint8 to float32 in [0, 1]."""
    return images.float() / 255


def convert_channels(images: UInt8[Tensor, "n c h w"], channels: int) -> UInt8[Tensor, "n channels h w"]:
    """Converts images to one or three channels: gray is repeated, colors become their luma."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    weighted = (plane.int() * weight for plane, weight in zip(images.unbind(1), LUMA, strict=True))
    return ((sum(weighted, torch.tensor(1 << 15)) >> 16).to(torch.uint8)).unsqueeze(1)


def fingerprint(name: str, recipe: str, weights: Mapping[str, Shaped[Tensor, "..."]]) -> str:
    """Returns the SHA-256 (hex) of a name, a preprocessing and all tensors with their names, types and shapes."""
    sha = hashlib.sha256()
    for text in (name, recipe):
        sha.update(f"{len(text)}:{text};".encode())
    for key in sorted(weights):
        tensor = weights[key].detach().cpu().contiguous()
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
        sha.update(_bytes(tensor))
    return sha.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    # through a view of bytes, since NumPy has no bfloat16
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


# ---- Weights


def read_weights(path: Path) -> dict[str, Shaped[Tensor, "..."]]:
    """Reads the tensors of a .safetensors file, or of one by `torch.save`.

    Formats from before PyTorch 1.6 are read too. Raises ValueError, one line, for anything else.
    """
    check_regular(path)
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({_one_line(error)})") from error
    tensors = read_torch(path) if _is_zip(path) else _read_legacy(path)
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: expected tensors by name, as of a module's state_dict()")
    return tensors


def load_weights(module: nn.Module, weights: dict[str, Shaped[Tensor, "..."]], source: str) -> None:
    """Loads weights into a module. Raises ValueError, one line, for other names or shapes."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{source}: not the weights of {type(module).__name__} ({_one_line(error)})") from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _read_legacy(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: not a file of weights, or a damaged one; copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    return dict(content)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2])[:160]


# ---- Extractors of users


def open_custom(name: str, weights: Path | None) -> Extractor:
    """Calls the function named by "FILE.py:function" or "package.module:function" with `weights`.

    It may return an Extractor, or a module for `ModuleExtractor`, which is called like the function. Raises ValueError,
    one line, for a missing function or another result. Errors of the function itself are passed on.
    """
    place, _, attribute = name.rpartition(":")
    extractor = _import_function(place, attribute)(weights)
    if isinstance(extractor, Extractor):
        return extractor
    if isinstance(extractor, nn.Module):
        return ModuleExtractor(extractor, attribute)
    kind = type(extractor).__name__
    raise ValueError(f"features {name}: returned a {kind}, expected an Extractor or a torch.nn.Module")


def _import_function(place: str, attribute: str) -> Callable[[Path | None], Any]:
    if not place or (place.startswith(".") and not place.endswith(".py")):
        raise ValueError(f"features: got {place!r} before the colon, expected FILE.py or a module's whole name")
    check_regular(place)
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"features: there is no file {place}")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"features: can't import {place} ({type(error).__name__}: {error})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"features: {place} has no function {attribute!r}")
    return function


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mar_features_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it is being made
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
