"""Feature extractors: their contract, a module as an extractor, weights from files, and functions of users.

Files of weights are read without running what is in them.
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

from mar.checkpoint.official import read_torch

LUMA = (19595, 38470, 7471)
"""ITU-R 601 weights of red, green and blue in 1/65536, as Pillow's grey; a grey picture comes back as it was."""
PROBE = 64
"""Side of the black picture on which the width of a module's features is measured by default."""


@dataclass(frozen=True)
class Features:
    """Features and logits of n images, in float32 on the network's device."""

    values: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"] | None = None
    """Unnormalised log-probabilities of classes, where the network has them."""


@runtime_checkable
class Extractor(Protocol):
    """Pictures -> features, with the metric's whole preprocessing inside; each picture on its own."""

    @property
    def name(self) -> str:
        """Its name in files of statistics."""
        ...

    @property
    def metric(self) -> str:
        """Name of a Fréchet distance of its features: "FID" only for the network of published figures."""
        ...

    @property
    def width(self) -> int:
        """d, how many features a picture has."""
        ...

    @property
    def scores(self) -> bool:
        """True where the Inception Score is computed from its logits."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of its logits where these are the classes of the data; else ()."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of name, weights and preprocessing: features compare only between equal ones."""
        ...

    def to(self, device: torch.device | str) -> Extractor:
        """Moves the network, and returns this."""
        ...

    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Features:
        """Compute features of images with one channel (gray) or three (RGB), without gradients."""
        ...


class ModuleExtractor:
    """Any module as an extractor: float pictures -> features (n, d), or a pair of these and logits (n, k).

    `preprocess` turns uint8 pictures (n, `channels`, h, w) into the module's input; without it they become float32
    in [0, 1]. `recipe` names what it does, and goes into the fingerprint with the name and the weights: change one of
    them when the arithmetic changes. `width` is d; without it, a black picture of 64 x 64 is tried. The module is
    put into evaluation mode and asked for no gradients.
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
            raise ValueError("name: got '', but a feature extractor needs one")
        if channels not in (1, 3):
            raise ValueError(f"channels: got {channels}, expected 1 (grey) or 3 (RGB)")
        self.name, self.metric, self.scores, self.classes = name, metric or f"FD ({name})", scores, classes
        self.module = module.eval().requires_grad_(False)
        self.channels = channels
        self._preprocess = preprocess or to_unit
        self.recipe = recipe or f"{self._preprocess.__module__}.{self._preprocess.__qualname__}"
        self.fingerprint = fingerprint(name, f"{self.recipe}; {channels} channels", module.state_dict())
        first = next(iter(module.state_dict().values()), torch.zeros(0))
        self._device = first.device
        self.width = self._measured_width() if width is None else width

    def to(self, device: torch.device | str) -> ModuleExtractor:
        """Moves the module, and returns this."""
        self.module.to(device)
        self._device = torch.device(device)
        return self

    def _measured_width(self) -> int:
        black = torch.zeros(1, self.channels, PROBE, PROBE, dtype=torch.uint8)
        try:
            return self(black).values.shape[1]
        except RuntimeError as error:  # torch's, of shapes that do not fit
            why = str(error).splitlines()[0]
            raise ValueError(f"{self.name}: say its width; a {PROBE} x {PROBE} picture does not do ({why})") from error

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Features:
        """Compute features of images; ValueError for other images, or other results of the module."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"{self.name}: got pictures {images.dtype} {tuple(images.shape)}, expected uint8 (n, 1 or 3, h, w)"
            )
        answer = self.module(self._preprocess(with_channels(images.to(self._device), self.channels)))
        values, logits = answer if isinstance(answer, tuple) else (answer, None)
        for said, what in ((values, "features (n, d)"), (logits, "logits (n, k)")):
            if said is not None and (said.ndim != 2 or len(said) != len(images)):
                raise ValueError(f"{self.name}: the module returned {tuple(said.shape)}, expected {what}")
        if logits is not None and self.classes and logits.shape[1] != len(self.classes):
            raise ValueError(f"{self.name}: {logits.shape[1]} logits a picture for {len(self.classes)} classes")
        return Features(values.float(), None if logits is None else logits.float())


def to_unit(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Convert uint8 to float32 in [0, 1]."""
    return images.float() / 255


def with_channels(images: UInt8[Tensor, "n c h w"], channels: int) -> UInt8[Tensor, "n channels h w"]:
    """Convert images to one or three channels: gray is repeated, colors become their luma."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    weighted = (plane.int() * weight for plane, weight in zip(images.unbind(1), LUMA, strict=True))
    return ((sum(weighted, torch.tensor(1 << 15)) >> 16).to(torch.uint8)).unsqueeze(1)


def fingerprint(name: str, recipe: str, weights: Mapping[str, Shaped[Tensor, "..."]]) -> str:
    """Hash (SHA-256, hex) a name, a preprocessing and all tensors: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for text in (name, recipe):
        digest.update(f"{len(text)}:{text};".encode())
    for key in sorted(weights):
        tensor = weights[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    # through a view of bytes, since NumPy has no bfloat16
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def read_weights(path: Path) -> dict[str, Shaped[Tensor, "..."]]:
    """Read the tensors of a .safetensors file or of one by `torch.save`.

    Files from before PyTorch 1.6 are read, too.

    Raises ValueError, one line, for anything else.
    """
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({_line(error)})") from error
    holder = read_torch(path) if _is_zip(path) else _read_old(path)
    if not all(isinstance(tensor, Tensor) for tensor in holder.values()):
        raise ValueError(f"{path}: expected tensors by name, as of a module's state_dict()")
    return holder


def load_weights(module: nn.Module, weights: dict[str, Shaped[Tensor, "..."]], source: str) -> None:
    """Puts weights into a module; ValueError, one line, where names or shapes are not the module's."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{source}: not the weights of {type(module).__name__} ({_line(error)})") from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _read_old(path: Path) -> dict[str, Tensor]:
    try:
        holder = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: not a file of weights, or a damaged one; copy or download it again") from error
    if not isinstance(holder, dict):
        raise ValueError(f"{path}: holds a {type(holder).__name__}, expected tensors by name")
    return dict(holder)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2])[:160]


def custom(name: str, weights: Path | None) -> Extractor:
    """Call the function named by "FILE.py:function" or "package.module:function" with `weights`.

    It may return an Extractor, or a module: that becomes a `ModuleExtractor` with the name of the function. Raises
    ValueError, one line, if there is no such function or it returns something else. Its own errors pass.
    """
    place, _, attribute = name.rpartition(":")
    made = _function(place, attribute)(weights)
    if isinstance(made, Extractor):
        return made
    if isinstance(made, nn.Module):
        return ModuleExtractor(made, attribute)
    raise ValueError(f"features {name}: returned a {type(made).__name__}, expected an Extractor or a torch.nn.Module")


def _function(place: str, attribute: str) -> Callable[[Path | None], Any]:
    if not place or (place.startswith(".") and not place.endswith(".py")):
        raise ValueError(f"features: got {place!r} before the colon, expected FILE.py or a module's whole name")
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"features: there is no file {place}")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"features: can't import {place} ({type(error).__name__}: {error})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"features: {place} has no function {attribute!r}")
    return function


def _from_file(path: Path) -> ModuleType:
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
