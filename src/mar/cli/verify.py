"""`mar verify`: compare runs, caches, models and statistics with their checksums."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mar.cli.options import interruptible, parse


@dataclass(frozen=True)
class VerifyOptions:
    """Compares every byte with the checksums that were written with it. Nothing is changed.

    Files of earlier versions have no checksums; they are opened, which says so.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs or caches; files of models (.safetensors, .pth) or statistics (.npz)."""


def verify(arguments: Sequence[str]) -> int:
    """Runs `mar verify`."""
    options = parse(VerifyOptions, "verify", arguments)
    if not options.paths:
        raise ValueError("got nothing to verify, expected folders of runs or caches, or files")
    return interruptible("nothing is changed", lambda check: _verify(options.paths))


def _verify(paths: Sequence[Path]) -> int:
    damaged = 0
    for path in paths:
        parts = 0
        for part, outcome in _outcomes(path):
            parts += 1
            damaged += isinstance(outcome, ValueError | OSError)
            if isinstance(outcome, str):
                print(f"{part} {outcome}")
            else:
                print(f"mar: {' '.join(str(outcome).split())}", file=sys.stderr)
        if not parts:
            raise ValueError(f"{path} is no run, cache, model or statistics that mar wrote")
    return 2 if damaged else 0


_WHOLE, _OPENED = "is as it was written", "opens; it has no checksums, since an earlier version wrote it"


def _outcomes(path: Path) -> Iterator[tuple[Path, str | Exception]]:
    """Yields each part of a path, with a line on it or its error."""
    from mar.data.latent_cache import is_cache

    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    if path.is_file():
        yield path, _outcome_of_file(path)
    elif is_cache(path):
        yield path, _outcome_of_cache(path)
    else:
        yield from _outcomes_of_run(path)


def _outcome_of_file(path: Path) -> str | Exception:
    try:
        if path.suffix == ".npz":
            from mar.evaluation.statistics import FeatureStats

            FeatureStats.load(path)
            return _WHOLE
        if path.suffix in (".pth", ".pt", ".ckpt"):
            from mar.checkpoint.official import read_torch

            read_torch(path)
            return "is as it was written, by its zip's checksums"
        from mar.checkpoint import store

        return _WHOLE if store.verify(path) else _OPENED
    except (ValueError, OSError) as error:
        return error


def _outcome_of_cache(path: Path) -> str | Exception:
    from mar.checkpoint.files import size_text
    from mar.data.latent_cache import verify as verify_cache

    try:
        latents = verify_cache(path)
    except (ValueError, OSError) as error:
        return error
    size = size_text(sum(latents.index.sizes))
    return f"{_WHOLE}: {len(latents):,} pictures, {size} in {latents.manifest.shards} shards"


def _outcomes_of_run(folder: Path) -> Iterator[tuple[Path, str | Exception]]:
    from mar.checkpoint.checksums import CHECKSUMS
    from mar.checkpoint.files import CheckpointError
    from mar.checkpoint.run_state import RunState, damage
    from mar.checkpoint.tokenizers import WEIGHTS_FILE
    from mar.data.latent_cache import is_cache

    for state in RunState(folder).states():
        why = damage(state, always=True)
        if why is not None:
            yield state, CheckpointError(why if str(state) in why else f"{state}: {why}")
        else:
            yield state, _WHOLE if (state / CHECKSUMS).is_file() else _OPENED
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.npz")]):
        if file.name.startswith("model") or file.suffix == ".npz":
            yield file, _outcome_of_file(file)
    if (folder / WEIGHTS_FILE).is_file():
        yield folder / WEIGHTS_FILE, _outcome_of_tokenizer(folder)
    for part in sorted(path for path in folder.iterdir() if path.is_dir() and is_cache(path)):
        yield part, _outcome_of_cache(part)
    if (folder / "tokenizer").is_dir():
        yield from _outcomes_of_run(folder / "tokenizer")


def _outcome_of_tokenizer(folder: Path) -> str | Exception:
    from mar.checkpoint.tokenizers import load_tokenizer

    try:
        load_tokenizer(folder)
    except (ValueError, OSError) as error:
        return error
    return "opens"
