"""Nested state, taken apart into JSON and named tensors, and put together again.

{"step": 3, "model": {"w": tensor}, "betas": (0.9, 0.95)}
<-> {"step": 3, "model": {"w": {"$tensor": "model/w"}}, "betas": {"$tuple": [0.9, 0.95]}} and {"model/w": tensor}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mar.checkpoint.files import CheckpointError


def flatten(state: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """A state as JSON-able values, and its tensors by path. ValueError for anything that is neither."""
    tensors: dict[str, Tensor] = {}
    return _flatten(state, "", tensors), tensors


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if path in tensors:
            raise ValueError(f"state: two tensors are called {path}; give them different names")
        tensors[path] = value.detach()
        return {"$tensor": path}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        items = [(key, _flatten(item, _join(path, key), tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$pairs": [[key, item] for key, item in items]}
    if isinstance(value, list | tuple):
        items = [_flatten(item, _join(path, i), tensors) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    raise ValueError(
        f"state: {path} is a {type(value).__name__}, but only tensors, numbers, strings, None, "
        "and dicts, lists and tuples of these can be stored"
    )


def _join(path: str, key: Any) -> str:
    if type(key) not in (str, int):
        raise ValueError(f"state: {path} has the key {key!r}, but keys have to be strings or whole numbers")
    return f"{path}/{key}" if path else str(key)


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`. CheckpointError for a tensor that is not among `tensors`."""
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        if tree["$tensor"] not in tensors:
            raise CheckpointError(f"the tensor {tree['$tensor']} of a saved state is missing")
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(unflatten(tree["$tuple"], tensors))
    if "$pairs" in tree:
        return {key: unflatten(item, tensors) for key, item in tree["$pairs"]}
    return {key: unflatten(item, tensors) for key, item in tree.items()}


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines that say which settings of two nested configs differ: `model.encoder.width 64 -> 96`."""
    before, after = _leaves(saved), _leaves(now)
    names = [name for name in before if name in after and before[name] != after[name]]
    return [f"{name} {before[name]} -> {after[name]}" for name in names]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = list(value) if isinstance(value, tuple) else value
    return leaves
