"""Extractors that people bring: a function in a file of theirs, or in an installed module."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from mar.evaluation.features.base import Extractor, ModuleExtractor


def custom(name: str, weights: Path | None) -> Extractor:
    """What the function named by "FILE.py:function" or "package.module:function" makes of `weights`.

    It may return an Extractor, or a module, which becomes one called like the function (`ModuleExtractor`). Raises
    ValueError, one line, where there is no such function or it returns something else; what happens inside it is its
    own affair.
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
