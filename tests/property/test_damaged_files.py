"""Files with errors of all kinds: a clear line or the same content, since all of them have checksums.

`MAR_FUZZ=3000 pytest tests/property/test_damaged_files.py` tries so many; by default, as many as fit into seconds.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from saved_files import make_autoencoder, make_cache, make_tokenizer

from mar.autoconfig.sizes import DatasetSummary
from mar.autoconfig.summary import SUMMARY_FILE, save_summary
from mar.autoconfig.timing import TimePlan, load_time_plan, save_time_plan
from mar.checkpoint import checksums
from mar.checkpoint.official import read_torch
from mar.checkpoint.run_state import RunState
from mar.checkpoint.tokenizers import load_tokenizer
from mar.config import TrainConfig, from_dict, to_dict
from mar.data.latent_cache import LatentSource
from mar.data.splits import HELD_OUT, load_held_out
from mar.data.text_encoder import EncoderInfo, FeatureTable, write_table
from mar.evaluation.statistics import FeatureStats
from mar.pipeline import Pipeline
from mar.training.early_stopping import HISTORY_FILE, read_history, write_history
from mar.training.run import load_config, save_config

CASES = int(os.environ.get("MAR_FUZZ", "0"))
SECONDS = 2.0
"""Seconds of a kind of file without MAR_FUZZ."""
LIMIT_S, LIMIT_BYTES = 5.0, 64 * 2**20
"""A case takes at most so long, and memory beyond four times the file at most so much: PyTorch's own pools."""


def content(value: Any) -> Any:
    """A nested value with tensors as bytes, to be compared."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: content(item) for key, item in value.items()}
    return [content(item) for item in value] if isinstance(value, list | tuple) else value


def make_model(folder: Path) -> None:
    tiny.tiny_pipeline().save(folder / "m.safetensors")


def read_model(folder: Path) -> Any:
    p = Pipeline.open(folder / "m.safetensors")
    return p.fingerprint(), p.classes, p.sampling, p.weights, p.notes


def make_torch(folder: Path) -> None:
    torch.save({"a": torch.randn(30, 7), "b": torch.randn(9).bfloat16(), "epoch": 3}, folder / "m.pth")


def make_statistics(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    FeatureStats(rows.mean(0), rows.T.cov(), 40, rows.float()).save(folder / "s.npz")


def read_statistics(folder: Path) -> Any:
    read = FeatureStats.load(folder / "s.npz")
    return content([read.mean, read.covariance, read.features]), read.count, read.provenance


def state(number: int) -> dict[str, Any]:
    return {"w": torch.arange(50.0) + number, "m": {"e": torch.ones(3, 4) * number}, "images": number, "t": (1, "x")}


def make_run(folder: Path) -> None:
    for number in (1, 2):
        RunState(folder).save(number, state(number))


def read_run(folder: Path) -> Any:
    """The newer state; the older one, into which a damaged one falls back, counts as an error."""
    read = state(0)
    assert RunState(folder).load(read)
    if content(read) == content(state(1)):
        raise ValueError("fell back")
    return content(read)


def read_cache(folder: Path) -> Any:
    source = LatentSource(folder)
    rows = [content(list(source.read(i, False))) for i in range(len(source))]
    return rows, source.manifest, source.captions


def read_tokenizer(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder, local_files_only=True)
    return tokenizer.config(), content(tokenizer.state_dict())


INFO = EncoderInfo("some/encoder", None, "0" * 64, 4, 6)


def make_captions(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    features = {f"picture {n}": torch.randn(n % 4 + 1, 6, generator=generator) for n in range(9)}
    write_table(folder / INFO.table_file, INFO, features)


def read_captions(folder: Path) -> Any:
    """The features; a damaged one is embedded anew, which counts as an error."""
    table = FeatureTable(folder / INFO.table_file, INFO)
    features = [(caption, table.get(caption)) for caption in [*table.numbers]]
    if any(each is None for _, each in features):
        raise ValueError("is embedded anew")
    return content(features)


PLAN, SUMMARY = TimePlan(3600.0, 128_000, 512_000, 5), DatasetSummary(100, 48, 3, ("a", "b"), 2.5, 1.5)


def make_notes(folder: Path) -> None:
    save_time_plan(PLAN, folder)
    save_summary(folder, SUMMARY)
    checksums.write_json(folder / HELD_OUT, {"names": ["Łódź.png", "b/2.png", "\udcff.png"]})
    write_history(folder / HISTORY_FILE, {"of": 3}, {100: 0.5, 200: math.nan, 300: 0.25})


def read_notes(folder: Path) -> Any:
    notes = load_time_plan(folder), load_held_out(folder), read_history(folder / HISTORY_FILE, {"of": 3})
    return str(notes), from_dict(DatasetSummary, checksums.read_json(folder / SUMMARY_FILE))


@dataclass(frozen=True)
class Kind:
    """A kind of file: how it is made and read."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]


KINDS = {
    "model": Kind(make_model, read_model),
    "torch": Kind(make_torch, lambda folder: content(read_torch(folder / "m.pth"))),
    "statistics": Kind(make_statistics, read_statistics),
    "run": Kind(make_run, read_run),
    "cache": Kind(make_cache, read_cache),
    "tokenizer": Kind(make_tokenizer, read_tokenizer),
    "autoencoder": Kind(make_autoencoder, read_tokenizer),
    "captions": Kind(make_captions, read_captions),
    "notes": Kind(make_notes, read_notes),
    "settings": Kind(
        lambda folder: save_config(TrainConfig(), folder),
        lambda folder: to_dict(load_config(TrainConfig, folder)),
    ),
}
DEEP: Any = "DEEP"
VALUES: list[Any] = [None, True, -1, 0, 3, 10**9, 2**63, 10**400, 1.5, -1e308, "", "x", [], [1], {}, {"a": 1}, DEEP]


def edit_json(text: str, dice: random.Random) -> str:
    """Put another value at a random place of JSON, as a person or a program could."""
    tree = json.loads(text)
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return "[]"
        key = dice.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and dice.random() < 0.8:
            node = node[key]
            continue
        if isinstance(node[key], str) and node[key].startswith("{") and dice.random() < 0.8:
            node[key] = edit_json(node[key], dice)  # a header in a header
        elif dice.random() < 0.2:
            del node[key]
        else:
            node[key] = dice.choice(VALUES)
        return json.dumps(tree).replace('"DEEP"', "[" * 50_000 + "]" * 50_000)


def damage(whole: bytes, name: str, dice: random.Random) -> bytes:
    """Return a file with one error."""
    kind = dice.choice(["bit", "bit", "bit", "cut", "zeros", "insert", "remove", "length", "json", "json", "json"])
    if kind == "json" and name.endswith(".json"):
        return edit_json(whole.decode(), dice).encode()
    if kind in ("json", "length") and name.endswith(".safetensors"):
        end = 8 + int.from_bytes(whole[:8], "little")
        if kind == "length":
            return dice.choice([0, 1, end, 2**31, 2**63, len(whole)]).to_bytes(8, "little") + whole[8:]
        header = edit_json(whole[8:end].decode(), dice).encode()
        return len(header).to_bytes(8, "little") + header + whole[end:]
    place = dice.randrange(len(whole))
    data = bytearray(whole)
    if kind == "cut":
        return whole[:place]
    if kind == "zeros":
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    elif kind == "insert":
        data[place:place] = dice.randbytes(dice.choice([1, 8, 64]))
    elif kind == "remove":
        del data[place : place + dice.choice([1, 8, 64])]
    elif kind == "length":
        data[place : place + 4] = dice.choice([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f"])
    else:
        data[place] ^= 1 << dice.randrange(8)
    return bytes(data)


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    resource = pytest.importorskip("resource")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


@pytest.mark.parametrize("name", KINDS)
def test_damaged_file_is_refused_or_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kind, dice = KINDS[name], random.Random(f"{name} {os.environ.get('MAR_FUZZ_SEED', 0)}")
    folder = tmp_path / name
    folder.mkdir()
    kind.make(folder)
    expected = kind.read(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "state-000000000001" not in path.parts]
    counts = {"refused": 0, "same": 0, "other": 0}
    started, target = time.monotonic(), -(-CASES // len(KINDS))
    while sum(counts.values()) < target or (not CASES and time.monotonic() - started < SECONDS):
        path = dice.choice(files)
        whole = path.read_bytes()
        changed = damage(whole, path.name, dice)
        path.write_bytes(changed)
        before, begun = peak(), time.monotonic()
        try:
            read = kind.read(folder)
        except (ValueError, OSError):
            outcome = "refused"
        else:
            outcome = "same" if read == expected else "other"
        seconds, grown = time.monotonic() - begun, peak() - before
        case = f"{path.name} after {sum(counts.values())} cases"
        assert seconds < LIMIT_S, case
        assert grown < 4 * len(changed) + LIMIT_BYTES, case
        assert outcome != "other", case
        counts[outcome] += 1
        path.write_bytes(whole)
    print(name, counts)
    assert counts["refused"] > sum(counts.values()) // 4
