"""`mar verify`: compare runs, caches, models, statistics and tokenizers with their checksums."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mar.cli.options import interruptible, parse
from mar.terminal import print_err, print_out


@dataclass(frozen=True)
class VerifyOptions:
    """Compares every byte with the checksums that were written with it. Nothing is changed.

    Files of earlier versions have no checksums; they are opened, which says so.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, caches or tokenizers; files: models (.safetensors, .pth), statistics (.npz), notes (.json)."""


NOTES = (
    "run.json", "time.json", "pictures.json", "held-out.json", "captions.json", "validation.json",
    "mar_statistics.json", "sweep.json", "trackers.json", "watched",
)  # fmt: skip
"""JSON files that mar writes with their sha256 inside."""
TABLES = "text-*.safetensors"
"""Features of captions."""
PARTS = ("tokenizer", "vae")
"""Folders in a run or model that have parts of their own."""


@dataclass(frozen=True)
class Part:
    """Files that are compared together."""

    path: Path
    files: Sequence[Path]
    compare: Callable[[], bool]
    """Returns whether there are checksums. Raises ValueError or OSError for damage."""


def verify(arguments: Sequence[str]) -> int:
    """Runs `mar verify`."""
    options = parse(VerifyOptions, "verify", arguments)
    if not options.paths:
        raise ValueError("got nothing to verify, expected folders of runs, caches or tokenizers, or files")
    return interruptible("nothing is changed", lambda check: _verify(options.paths))


def _verify(paths: Sequence[Path]) -> int:
    from mar.checkpoint.checksums import compare_all
    from mar.checkpoint.files import size_text

    begun, files, size, damaged, missing = time.monotonic(), 0, 0, 0, 0
    with compare_all():
        for path in paths:
            if not path.exists():
                missing += 1
                _report(f"{path}: there is no such file or folder")
                continue
            parts = list(_parts(path))
            if not parts:
                damaged += 1
                _report(f"{path} is no run, cache, model, statistics or tokenizer that mar wrote")
            for part in parts:
                started = time.monotonic()
                sizes = [file.stat().st_size for file in part.files if file.is_file()]
                files, size = files + len(sizes), size + sum(sizes)
                try:
                    whole = part.compare()
                except (ValueError, OSError) as error:
                    damaged += 1
                    _report(str(error))
                else:
                    outcome = _WHOLE if whole else _OPENED
                    print_out(f"{part.path} {outcome} ({_amount(len(sizes), size_text(sum(sizes)), started)})")
    total = _amount(files, size_text(size), begun)
    outcome = f"{damaged} damaged" if damaged else "nothing is damaged"
    print_out(f"compared {total}: {outcome}{f', {missing} not found' if missing else ''}")
    return 2 if damaged or missing else 0


_WHOLE, _OPENED = "is as it was written", "opens; it has no checksums, since an earlier version or a person wrote it"


def _amount(files: int, size: str, begun: float) -> str:
    return f"{files} {'file' if files == 1 else 'files'}, {size}, {time.monotonic() - begun:.2f} s"


def _report(line: str) -> None:
    print_err(f"mar: {' '.join(line.split())}")


def _parts(path: Path) -> Iterator[Part]:
    """Yields the parts of a path."""
    from mar.data.latent_cache import is_cache

    if path.is_dir():
        yield from _parts_of_cache(path) if is_cache(path) else _parts_of_folder(path)
    else:
        yield Part(path, [path], lambda: _compare_file(path))


def _parts_of_cache(folder: Path) -> Iterator[Part]:
    from mar.data.latent_cache import verify as verify_cache

    tables = sorted(folder.glob(TABLES))
    files = [file for file in sorted(folder.glob("[!.]*")) if file.is_file() and file not in tables]
    yield Part(folder, files, lambda: len(verify_cache(folder)) >= 0)
    for table in tables:
        yield from _parts(table)


def _parts_of_folder(folder: Path) -> Iterator[Part]:
    """Yields the parts of a run, model or tokenizer."""
    from mar.checkpoint import checksums
    from mar.checkpoint.run_state import RunState
    from mar.checkpoint.tokenizers import CONFIG_FILE, WEIGHTS_FILE
    from mar.data.latent_cache import is_cache

    for state in RunState(folder).states():
        yield _part_of_state(state)
    if (folder / WEIGHTS_FILE).is_file():
        yield Part(folder / WEIGHTS_FILE, [folder / WEIGHTS_FILE, folder / CONFIG_FILE], lambda: _compare_own(folder))
    elif (folder / checksums.CHECKSUMS).is_file():
        files = [file for file in sorted(folder.glob("*")) if file.name == CONFIG_FILE or file.stem in _AUTOENCODER]
        yield Part(folder, files, lambda: checksums.check_folder(folder))
    patterns = ("model*.safetensors", TABLES, "*.npz", *NOTES)
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        yield from _parts(file)
    for part in sorted(part for part in folder.iterdir() if part.is_dir()):
        if is_cache(part) or part.name in PARTS:
            yield from _parts(part)


_AUTOENCODER = ("diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index")


def _part_of_state(state: Path) -> Part:
    from mar.checkpoint.checksums import CHECKSUMS
    from mar.checkpoint.run_state import damage

    def compare() -> bool:
        if (why := damage(state)) is not None:
            raise ValueError(why)
        return (state / CHECKSUMS).is_file()

    return Part(state, sorted(state.iterdir()), compare)


def _compare_own(folder: Path) -> bool:
    """Compares a tokenizer of ours."""
    from mar.checkpoint.tokenizers import has_checksum, load_tokenizer

    load_tokenizer(folder)
    return has_checksum(folder)


def _compare_file(path: Path) -> bool:
    from mar.checkpoint.files import check_regular

    check_regular(path)
    if path.is_dir() or not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    if path.suffix == ".json" or path.name in NOTES:
        from mar.checkpoint import checksums

        try:
            checksums.read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return checksums.is_sealed(path)
    if path.suffix == ".npz":
        from mar.evaluation.statistics import FeatureStats

        FeatureStats.load(path)
        return True  # a zip has a CRC-32 of each member
    if path.suffix in (".pth", ".pt", ".ckpt"):
        from mar.checkpoint.official import read_torch

        read_torch(path)
        return True  # likewise
    if path.match(TABLES):
        from mar.data.text_encoder import FeatureTable

        table = FeatureTable(path)
        if damaged := table.damaged():
            raise ValueError(f"{path} is damaged: the features of {len(damaged)} captions, first {damaged[0][:40]!r}")
        return table.has_checksums
    from mar.checkpoint import store

    return store.verify(path)
