"""Check configs, carry them to JSON and back, read old names."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import logging
import os
import types
import typing
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, TypeVar

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A value that a configuration can't have."""


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
"""Fields removed before version 0.1, with the one value that is read: an older file with another is refused."""
RENAMED: dict[str, dict[str, str]] = {
    "SamplingConfig": {
        "guidance": "guidance_scale",
        "guidance_from": "guidance_interval[0]",
        "guidance_until": "guidance_interval[1]",
        "guidance_refresh": "uncond_interval",
        "spacing": "timestep_spacing",
        "noisiest": "start_t",
        "reveal_schedule": "mask_schedule",
    },
    "TrunkConfig": {"heads": "num_heads"},
    "ModelConfig": {"patch": "patch_size", "buffer": "buffer_size"},
    "TrainConfig": {"recompute": "activation_checkpointing", "colours": "image_channels"},
    "TokenizerTrainConfig": {"colours": "image_channels"},
    "DatasetSummary": {"colours": "image_channels", "reach": "max_abs_z"},
    "ConvertOptions": {"heads": "num_heads", "patch": "patch_size"},
    "EvaluateOptions": {"neighbours": "neighbors", "neighbours_grid": "neighbors_grid"},
}
"""Old names of fields by class, and their new ones; `name[i]` is element i of a tuple.

Files, the command line and Python all read old names by this table (`rename_old_keys`, `renamed_fields`).
"""
_LATER_FIELDS = {
    "ModelConfig": ("words", "text_width", "mask_schedule", "tie_null"),
    "SamplingConfig": ("guidance_time", "reveal"),
}
"""Fields added since digests were first written; digests leave them out where they have their default."""
_HUGE = 1e300
"""No number of a config is larger."""
_noted: set[tuple[str, str]] = set()
"""Old and new names that this process has told its user of."""


def renamed_fields(kind: type) -> dict[str, str]:
    """Returns old field names of a class, with the new ones."""
    return {old: new for base in reversed(kind.__mro__) for old, new in RENAMED.get(base.__name__, {}).items()}


def rename_old_keys(kind: type, values: Mapping[str, Any], base: Any = None) -> dict[str, Any]:
    """Renames the old field names of `kind` in plain values.

    Args:
        kind: The config class whose names changed; its nested configs are left to `from_dict`.
        values: Fields and values, of a file or of a caller. Keys that are no old names stay as they are.
        base: A config of this kind, which completes a tuple of which `values` has one element; by default the defaults.

    Returns:
        The values under new names, in their order. Where no old name occurs, they are equal to `values`.

    Raises:
        ConfigError: The values hold an old name and its new one.
    """
    names, renamed = renamed_fields(kind), dict[str, Any]()
    for old, value in values.items():
        if old not in names:
            renamed[old] = value
            continue
        new, _, index = names[old].rstrip("]").partition("[")
        if new in values:
            raise ConfigError(f"got both {old} and {new}, expected {new} alone; leave {old} out")
        if index:
            whole = list(renamed[new] if new in renamed else getattr(base or kind, new))
            whole[int(index)] = value
            value = tuple(whole)
        renamed[new] = value
    return renamed


def later_defaults(kind: type) -> dict[str, Any]:
    """Returns fields that earlier files lack, with their defaults."""
    later = _LATER_FIELDS.get(kind.__name__, ())
    return {f.name: _plain(f.default) for f in dataclasses.fields(kind) if f.name in later}


def new_names(kind: type, names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns old and new names of renamed fields, once per process.

    Only rank 0 gets any.
    """
    renamed = renamed_fields(kind)
    pairs = [(old, renamed[old]) for old in names if old in renamed and (old, renamed[old]) not in _noted]
    _noted.update(pairs)
    return pairs if os.environ.get("RANK", "0") == "0" else []  # `mar.distributed.rank`, without torch


def log_new_names(kind: type, names: Iterable[str]) -> None:
    """Logs the new names of renamed fields, each once per process."""
    for old, new in new_names(kind, names):
        logger.warning("%s is now called %s; the old name still works", old, new)


def accept_old_names(kind: type[Config]) -> type[Config]:
    """Decorates a dataclass, so that its constructor takes old field names.

    The new ones are logged.
    """
    init: Any = kind.__init__
    old_names = renamed_fields(kind).keys()

    @functools.wraps(init)
    def renaming(self: Any, *args: Any, **fields: Any) -> None:
        if old_names & fields.keys():
            log_new_names(kind, fields)
            fields = rename_old_keys(kind, fields)
        init(self, *args, **fields)

    kind.__init__ = renaming  # type: ignore[method-assign]
    return kind


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as plain JSON-able values."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)} | _kind_of_subclass(config)


def _kind_of_subclass(config: Any) -> dict[str, str]:
    """Returns the `kind` of a config whose base class is a config with a `kind`; nothing for others."""
    base = type(config).__mro__[1]
    is_kind_of_class = dataclasses.is_dataclass(base) and hasattr(base, "kind") and not _is_field(base, "kind")
    return {"kind": config.kind} if is_kind_of_class else {}


def _is_field(kind: Any, name: str) -> bool:
    return name in {field.name for field in dataclasses.fields(kind)}


def _class_of_kind(base: type[Config], name: str) -> type[Config]:
    """Returns the class among `base` and its subclasses that is called `name`."""
    classes: list[Any] = [base]
    for each in classes:
        classes += each.__subclasses__()
    known = {each.kind: each for each in classes}
    require(name in known, f"{base.__name__}: got kind {name!r}, expected {' or '.join(known)}")
    return typing.cast(type[Config], known[name])


def to_dict_for_hash(config: Any) -> dict[str, Any]:
    """Returns a config as plain values under its first field names.

    Renaming a field changes no digest of them, nor does adding one of `_LATER_FIELDS`.
    """
    first = {new: old for old, new in renamed_fields(type(config)).items()}
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default and field.name in _LATER_FIELDS.get(type(config).__name__, ()):
            continue
        values[first.get(field.name, field.name)] = (
            to_dict_for_hash(value) if dataclasses.is_dataclass(value) else _plain(value)
        )
    return values | _kind_of_subclass(config)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Builds a config from plain values; missing fields keep their defaults.

    Old field names are read as the new ones (`RENAMED`). ConfigError for a field that `kind` never had.
    """
    require(isinstance(values, Mapping), f"{kind.__name__}: got {_shown(values)}, expected its fields")
    if hasattr(kind, "kind") and "kind" in values and not _is_field(kind, "kind"):
        kind = _class_of_kind(kind, values["kind"])
        values = {name: value for name, value in values.items() if name != "kind"}
    every_hint = typing.get_type_hints(kind)
    hints = {field.name: every_hint[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = rename_old_keys(kind, values)
    values = {name: value for name, value in values.items() if name in hints or (name, value) not in _GONE}
    unknown = sorted(set(values) - set(hints))
    require(not unknown, f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(hints))}")
    return kind(
        **{
            name: _typed(hints[name], _respell(name, value), f"{kind.__name__}.{name}")
            for name, value in values.items()
        }
    )


def _respell(name: str, value: Any) -> Any:
    """Returns a value of an older version as this one spells it."""
    if name == "activation_checkpointing" and isinstance(value, bool):
        return "full" if value else "none"
    return value


def _typed(hint: Any, value: Any, name: str) -> Any:
    """Returns a plain value as its field has it. ConfigError for one of another type."""
    require(_fits(hint, value), f"{name}: got {_shown(value)}, expected {_describe(hint)}")
    if value is None:
        return None
    for each in _alternatives(hint):
        if dataclasses.is_dataclass(each) and isinstance(each, type) and isinstance(value, Mapping):
            return from_dict(each, value)
    return tuple(value) if isinstance(value, list) else value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(hint: Any, value: Any) -> bool:
    """Tells if a plain value may be a field of this type; nested configs are looked at by `from_dict`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(each, value) for each in typing.get_args(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        items = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        return len(items) == len(value) and all(map(_fits, items, value))
    if origin is typing.Literal:
        return value is None or isinstance(value, tuple({type(each) for each in arguments}))  # which, `one_of` says
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64
    if origin is dict:
        return isinstance(value, dict)
    return not isinstance(hint, type) or isinstance(value, hint)


def _describe(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint) or str(
        hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """Return the docstrings of a dataclass's fields, each in one line."""
    [body] = [node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef)]
    docs = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return docs
