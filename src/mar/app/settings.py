"""Sampling settings on the page: which there are, read from JSON, and as a command or Python."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from mar.config import SamplingConfig, to_dict
from mar.config.fields import field_docs

if TYPE_CHECKING:
    from mar.pipeline import Pipeline

MAX_NUMBER = 10**9
"""Largest number of a setting; SamplingConfig has narrower bounds."""


@functools.cache
def describe_settings() -> list[dict[str, Any]]:
    """List all sampling settings, with their kind, choices and help."""
    hints, docs = get_type_hints(SamplingConfig), field_docs(SamplingConfig)
    described = []
    for field in fields(SamplingConfig):
        kind, choices, optional = _kind(hints[field.name])
        described.append(
            {"name": field.name, "kind": kind, "choices": choices, "optional": optional, "help": docs[field.name]}
        )
    return described


def _kind(hint: Any) -> tuple[str, list[str], bool]:
    """Return (int, float, choice or pair; choices; whether None is allowed) of a field's type."""
    options = [each for each in get_args(hint) if each is not type(None)]
    if get_origin(hint) is Literal:
        return "choice", [str(each) for each in options], False
    if get_origin(hint) is tuple:
        return "pair", [], False
    optional = type(None) in get_args(hint)
    return (options[0] if optional else hint).__name__, [], optional


def read_settings(given: Any) -> dict[str, Any]:
    """Convert settings from JSON to keywords of `Pipeline.sampling_with`.

    Raises ValueError for an unknown name and for a value of another type.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"settings: got {type(given).__name__}, expected names with their values")
    known = {setting["name"]: setting for setting in describe_settings()}
    settings = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"settings: got {str(name)[:40]!r}, expected some of {', '.join(known)}")
        settings[name] = _read(name, value, known[name])
    return settings


def _read(name: str, value: Any, setting: Mapping[str, Any]) -> Any:
    kind = setting["kind"]
    if value is None and setting["optional"]:
        return None
    if kind == "choice" and isinstance(value, str):
        return value
    if kind == "pair" and isinstance(value, list | tuple) and len(value) == 2:
        return tuple(float(_number(name, each)) for each in value)
    if kind in ("int", "float"):
        number = _number(name, value)
        if kind == "float":
            return float(number)
        if number == int(number):
            return int(number)
    expected = {"pair": "two numbers", "choice": "a name", "int": "a whole number"}.get(kind, "a number")
    raise ValueError(f"{name}: got {_short(value)}, expected {expected}")


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        raise ValueError(f"{name}: got {_short(value)}, expected a number")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- a picture's settings in words


def changed_settings(pipeline: Pipeline, preset: str | None, sampling: SamplingConfig) -> dict[str, Any]:
    """Return the settings that differ from those of a preset."""
    default = to_dict(pipeline.sampling_with(preset))
    return {name: value for name, value in to_dict(sampling).items() if value != default[name]}


def command_line(
    model: str, condition: Mapping[str, str | None], seed: int, preset: str | None, changed: Mapping[str, Any],
    options: Mapping[str, Any],
) -> str:  # fmt: skip
    """Return the `mar sample` command for a picture.

    Args:
        model: name, file or folder.
        condition: `label` (class name or number; None: no class), or `prompt`.
        seed: of the picture.
        preset: of the settings.
        changed: settings of `changed_settings`.
        options: further options of `mar sample`.
    """
    if "prompt" in condition:
        prompt = condition["prompt"] or ""
        words = ["mar", "sample", model, *([f"--prompt={prompt}"] if prompt[:1] == "-" else ["--prompt", prompt])]
    else:
        words = ["mar", "sample", model, "--labels", condition["label"] or "none"]
    words += ["--seed", str(seed)]
    if preset is not None:
        words += ["--preset", preset]
    for name, value in {**changed, **options}.items():
        values = value if isinstance(value, list | tuple) else ["off" if value is None else value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def python_code(
    model: str, condition: Mapping[str, str | None], seed: int, preset: str | None, changed: Mapping[str, Any], *,
    dtype: str | None = None, grow: int | None = None,
) -> str:  # fmt: skip
    """Return Python that draws a picture.

    Args:
        model, condition, seed, preset, changed: as in `command_line`.
        dtype: precision of the model; None: the default.
        grow: tokens around the mask of a changed picture; None: the picture was drawn from nothing.
    """
    torch_name = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}.get(dtype or "")
    lines = ["import mar"]
    if torch_name:
        lines.append("import torch")
    if grow is not None:
        lines.append("from PIL import Image")
    precision = f", dtype=torch.{torch_name}" if torch_name else ""
    lines += ["", f"model = mar.load({model!r}{precision})"]
    arguments = [*(f"{name}s=[{value!r}]" for name, value in condition.items()), f"seeds=[{seed}]"]
    if preset is not None:
        arguments.append(f"preset={preset!r}")
    arguments += [f"{name}={tuple(value) if isinstance(value, list) else value!r}" for name, value in changed.items()]
    if grow is not None:
        lines.append('known, mask = Image.open("known.png"), Image.open("mask.png")')
        arguments += ["known=[known]", "mask=[mask]", f"grow={grow}"]
    lines.append(f"[image] = model.sample({', '.join(arguments)})")
    return "\n".join(lines)
