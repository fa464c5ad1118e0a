"""What all configurations share: checks of their fields, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from numbers import Integral
from typing import Any, TypeVar


class ConfigError(ValueError):
    """A configuration that can't be: the message says what was got and what was expected."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def positive(record: Any, *names: str) -> None:
    """Requires fields to be whole numbers, at least 1."""
    for name in names:
        value = getattr(record, name)
        require(isinstance(value, Integral), f"{name} is {value!r}, but it must be a whole number")
        require(value >= 1, f"{name} is {value}, but it must be at least 1")


def one_of(record: Any, name: str, words: Any) -> None:
    """Requires a field to be one of a Literal's words."""
    value, known = getattr(record, name), typing.get_args(words)
    listed = f"{', '.join(known[:-1])} or {known[-1]}"
    require(value in known, f"{name} is {value!r}, but it must be {listed}")


def fraction(record: Any, *names: str) -> None:
    """Requires fields to be in [0, 1)."""
    for name in names:
        value = getattr(record, name)
        require(0 <= value < 1, f"{name} is {value}, but it must be at least 0 and less than 1")


Config = TypeVar("Config")
_GONE = (("norm", "layer"), ("mlp", "gelu"), ("timesteps", "uniform"), ("qk_norm", False))
"""Fields of older versions, and what they said where it was as it always is now."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON-able values."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A config of class `kind` from plain values; missing fields keep their defaults.

    Raises ConfigError for a field that `kind` does not have: it was written by another version, or is not a config.
    """
    hints = typing.get_type_hints(kind)
    values = {name: value for name, value in values.items() if name in hints or (name, value) not in _GONE}
    unknown = sorted(set(values) - set(hints))
    require(not unknown, f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(hints))}")
    return kind(**{name: _typed(hints[name], _spelt(name, value)) for name, value in values.items()})


def _spelt(name: str, value: Any) -> Any:
    """A value that an older version wrote, as this one spells it."""
    return {True: "full", False: "none"}[value] if name == "recompute" and isinstance(value, bool) else value


def _typed(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value)
    return tuple(value) if isinstance(value, list) else value
