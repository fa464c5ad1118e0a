"""Every source by every form of labels by broken parts: none is silent, and an error is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from shard_files import png_bytes, write_tar

from mar.cli import main
from mar.data import accounts
from mar.data.images import UnreadableImage
from mar.data.sources import open_data

COUNT = 4

Outcome = tuple[tuple[str, ...], list[int]] | str
"""Classes and labels of the pictures; or a pattern of the error."""

NO_LABELS: Outcome = ((), [-1, -1, -1, -1])
FORMS: dict[str, tuple[list[Any], Outcome]] = {
    "none": ([], NO_LABELS),
    "int": ([1, 0, 1, 0], (("0", "1"), [1, 0, 1, 0])),
    "float": ([1.0, 0.0, 1.0, 0.0], (("0", "1"), [1, 0, 1, 0])),
    "fraction": ([0.5, 0.0, 1.0, 0.0], r"has the label 0\.5 \(float\), expected a whole number or a name"),
    "text": (["cat", "ant", "cat", "ant"], (("ant", "cat"), [1, 0, 1, 0])),
    "bytes": ([b"cat", b"ant", b"cat", b"ant"], (("ant", "cat"), [1, 0, 1, 0])),
    "latin": ([b"caf\xe9", b"ant", b"cat", b"ant"], "is not in UTF-8"),
    "null": ([None, None, None, None], NO_LABELS),
    "missing": ([1, None, 0, None], (("0", "1"), [1, -1, 0, -1])),
    "large": ([10**9, 0, 1, 0], "has the label 1000000000, but"),
    "list": ([[1], [0], [1], [0]], r"the label \[1\]|holds labels of the type|is of the type"),
}
STREAMED = {  # a stream has numbers, and is told how many classes there are
    "int": (("0", "1"), [1, 0, 1, 0]), "float": (("0", "1"), [1, 0, 1, 0]), "missing": (("0", "1"), [1, -1, 0, -1]),
    "null": (("0", "1"), [-1, -1, -1, -1]), "text": "a name, which has no number|labels of .* are names",
    "bytes": "a name, which has no number|labels of .* are names",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache of tables, and says all lines again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
    monkeypatch.setattr(accounts, "_logged", set())
    datasets.disable_progress_bars()


def pictures(broken: bool) -> list[bytes]:
    return [b"no picture" if broken and i == 1 else png_bytes(i) for i in range(COUNT)]


def make(source: str, folder: Path, labels: list[Any], broken: bool) -> str:
    """Write a source; return its name for --data."""
    if source.endswith(("parquet", "saved")):
        columns: dict[str, Any] = {"image": [{"bytes": data, "path": None} for data in pictures(broken)]}
        path = folder / "x.parquet"
        parquet.write_table(pa.table(columns | ({"label": labels} if labels else {})), path)
        if source == "saved":
            datasets.load_dataset("parquet", data_files=str(path), split="train").save_to_disk(folder / "saved")
            return str(folder / "saved")
    else:
        members = []
        for i, data in enumerate(pictures(broken)):
            members.append((f"{i}.png", data))
            label = labels[i] if labels else None
            if source.endswith("json") and labels:
                content = b'{"label": "' + label + b'"}' if isinstance(label, bytes) else json.dumps({"label": label})
                members.append((f"{i}.json", content if isinstance(content, bytes) else content.encode()))
            elif label is not None:
                members.append((f"{i}.cls", label if isinstance(label, bytes) else str(label).encode()))
        path = write_tar(folder / "x.tar", members)
    return f"stream:{path}" if source.startswith("stream") else str(path)


def require(source: Any, expected: Outcome, broken: bool) -> None:
    """Compare classes and labels; a broken picture is named as it is read."""
    assert not isinstance(expected, str)
    assert source.classes == expected[0]
    assert len(source) == COUNT
    for i, label in enumerate(expected[1]):
        if broken and i == 1:
            with pytest.raises(UnreadableImage, match="can't read the picture"):
                source[i]
        else:
            assert source[i].label == label
    assert source.account.without_label == expected[1].count(-1)
    assert f"{COUNT} pictures, " in source.account.line


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["parquet", "saved", "tar cls", "tar json"])
def test_source_of_any_labels_gives_them_or_one_line(tmp_path: Path, source: str, form: str, broken: bool) -> None:
    labels, expected = FORMS[form]
    if (source, form) == ("tar cls", "list"):
        expected = (("[0]", "[1]"), [1, 0, 1, 0])  # it is text
    if (source, form) == ("tar json", "latin"):
        expected = "left out"
    name = make(source, tmp_path, labels, broken)
    if expected == "left out":  # JSON of other encodings is no JSON: counted and named
        opened: Any = open_data(name)
        assert opened.account.counts == {"labels or captions that can't be read": 1}
        assert "0.json" in opened.account.line
    elif isinstance(expected, str):
        with pytest.raises(ValueError, match=rf"^data: [^\n]*({expected})[^\n]*$"):
            open_data(name)
    else:
        require(open_data(name), expected, broken)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["stream parquet", "stream json"])
def test_stream_of_any_labels_gives_them_or_one_line(tmp_path: Path, source: str, form: str, broken: bool) -> None:
    labels, expected = FORMS[form]
    expected = STREAMED.get(form, expected)
    if (source, form) == ("stream json", "latin"):
        expected = "labels of .* are names"  # those of the others; JSON of other encodings is no JSON
    name = make(source, tmp_path, labels, broken)

    def read() -> list[int]:
        stream: Any = open_data(name, 2)
        found = []
        for sample in stream.preview():
            try:
                found.append(stream.example(sample).label)
            except UnreadableImage:
                found.append(-2)
        return found

    if isinstance(expected, str):
        with pytest.raises(ValueError, match=rf"^[^\n]*({expected})[^\n]*$"):
            read()
    else:
        assert read() == [-2 if broken and i == 1 else label for i, label in enumerate(expected[1])]


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("source", ["flat", "classes", "parts", "tar cls", "cache"])
def test_source_of_any_kind_accounts_for_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str, broken: bool
) -> None:
    caplog.set_level("INFO", "mar.data")
    data = tmp_path / "data"
    places = {"flat": "", "parts": "train/"}
    for i, content in enumerate(pictures(broken)):
        place = places.get(source, f"{'ab'[i % 2]}/")
        path = data / place / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if source == "parts":
        (data / "val").mkdir()
        (data / "val" / "v.png").write_bytes(png_bytes(5))
    name = make(source, tmp_path, [0, 1, 0, 1], broken) if source == "tar cls" else str(data)
    if source == "cache":
        out = tmp_path / "cache"
        assert main(["cache", name, "--out", str(out), "--tokenizer", "pixels", "--image-size", "8",
                     "--device", "cpu"]) == 0  # fmt: skip
        name = str(out)
    opened: Any = open_data(name)
    count = COUNT - (broken and source == "cache")
    labels = "no labels" if source in places else "labels of 2 classes"
    lines = [message for message in caplog.messages if message.startswith(f"data: {name}")]
    assert len(lines) == 1
    assert f": {count} pictures, {labels}" in lines[0]
    assert len(opened) == COUNT
    assert ("pictures that could not be read: 1" in lines[0]) == (broken and source == "cache")
    assert ("pictures of other parts: 1 (val/v.png)" in lines[0]) == (source == "parts")
