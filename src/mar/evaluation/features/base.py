"""What turns pictures into numbers: the contract of a feature extractor, and how a module becomes one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

LUMA = (19595, 38470, 7471)
"""ITU-R 601 weights of red, green and blue in 1/65536, as Pillow's grey; a grey picture comes back as it was."""
PROBE = 64
"""Side of the black picture on which the width of a module's features is found where nobody said it."""


@dataclass(frozen=True)
class Features:
    """What a network says of n pictures, both in float32 on the network's device."""

    values: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"] | None = None
    """Unnormalised log-probabilities of classes, where the network has them."""


@runtime_checkable
class Extractor(Protocol):
    """Pictures -> features, with the metric's whole preprocessing inside; each picture on its own."""

    @property
    def name(self) -> str:
        """What it is called in files of statistics."""
        ...

    @property
    def metric(self) -> str:
        """What a Fréchet distance of its features is called: "FID" only for the network of published figures."""
        ...

    @property
    def width(self) -> int:
        """d, how many features a picture has."""
        ...

    @property
    def scores(self) -> bool:
        """Whether the Inception Score is computed from its logits."""
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
        """Features of pictures with one channel (grey) or three (RGB), without gradients."""
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
        """Features of pictures with one or three channels; ValueError for other pictures or answers of the module."""
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
    """uint8 -> float32 in [0, 1]."""
    return images.float() / 255


def with_channels(images: UInt8[Tensor, "n c h w"], channels: int) -> UInt8[Tensor, "n channels h w"]:
    """Pictures with one or three channels as they are to be: grey is repeated, colours become their luma."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    weighted = (plane.int() * weight for plane, weight in zip(images.unbind(1), LUMA, strict=True))
    return ((sum(weighted, torch.tensor(1 << 15)) >> 16).to(torch.uint8)).unsqueeze(1)


def fingerprint(name: str, recipe: str, weights: Mapping[str, Shaped[Tensor, "..."]]) -> str:
    """SHA-256 (hex) of a name, a preprocessing and all tensors, by their names, types, shapes and bytes."""
    found = hashlib.sha256()
    for text in (name, recipe):
        found.update(f"{len(text)}:{text};".encode())
    for key in sorted(weights):
        tensor = weights[key].detach().cpu().contiguous()
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    # through a view of bytes, since NumPy has no bfloat16
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
