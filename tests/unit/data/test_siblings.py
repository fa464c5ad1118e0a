"""Data of odd kinds, siblings of those that were reported: nothing is lost, mixed up or renamed without a word."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from shard_files import png_bytes, write_tar

from mar.data import accounts
from mar.data.images import UnreadableImage, decode_image
from mar.data.sources import open_data, open_source

PNG = [png_bytes(i) for i in range(5)]


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache of tables, and says all lines again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
    monkeypatch.setattr(accounts, "_logged", set())
    datasets.disable_progress_bars()


def write(folder: Path, *names: str) -> Path:
    """Pictures of these names; the shade follows from the last digit of a name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG[int(path.stem[-1])] if path.suffix == ".png" and path.stem[-1].isdigit() else b"x")
    return folder


def labels(source: Any) -> list[int]:
    return [source[i].label for i in range(len(source))]


def streamed(path: Path, classes: int = 3) -> list[int]:
    stream: Any = open_data(f"stream:{path}", classes)
    return [stream.example(sample).label for sample in stream.preview()]


# ---- tar files


@pytest.mark.parametrize(
    ("members", "numbers"),
    [
        ([("./a.png", 1), ("a.cls", b"1"), ("./b.png", 2), (".//b.cls", b"0")], [1, 0]),
        ([("a.b/x.1.png", 1), ("a.b/x.1.cls", b"1"), ("c/x.1.png", 2), ("c/x.1.cls", b"0")], [1, 0]),
        ([("a.png", 1), ("a.label.cls", b"1"), ("b.png", 2), ("b.label.cls", b"0")], [1, 0]),
        ([("d/" * 60 + "a.png", 1), ("d/" * 60 + "a.cls", b"1")], [1]),
        ([("a\nb\x1b.png", 1), ("a\nb\x1b.cls", b"1")], [1]),
        ([("caf\xe9.png", 1), ("caf\xe9.cls", b"1")], [1]),
    ],
)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_and_stream_match_labels_of_odd_names(
    tmp_path: Path, members: list[tuple[str, Any]], numbers: list[int], form: int
) -> None:
    content = [(name, data if isinstance(data, bytes) else PNG[data]) for name, data in members]
    path = write_tar(tmp_path / "a.tar", content, form)
    source: Any = open_source(path)
    assert (labels(source), source.account.counts) == (numbers, {})
    assert streamed(path) == numbers


def test_tar_files_put_together_are_read_whole(tmp_path: Path) -> None:
    parts = [write_tar(tmp_path / f"{i}", [(f"{i}.png", PNG[i]), (f"{i}.cls", b"%d" % i)]) for i in range(3)]
    path = tmp_path / "all.tar"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert labels(open_source(path)) == streamed(path) == [0, 1, 2]


def test_tar_without_an_end_mark_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", PNG[i]) for i in range(3)])
    whole = path.read_bytes()
    path.write_bytes(whole[: 2 * 2 * 512])  # two pictures of two blocks each, as if a writer had been killed
    source: Any = open_source(path)
    reason = "shards without an end mark, maybe cut short"
    assert (len(source), source.account.counts) == (2, {reason: 1})
    assert len(streamed(path)) == 2
    assert f"left out: {reason}, the first of them a.tar" in caplog.text
    path.write_bytes(whole[: 6 * 512] + b"\0" * 512)
    whole_source: Any = open_source(path)
    assert (len(whole_source), whole_source.account.counts) == (3, {})


@pytest.mark.parametrize("damage", ["gzip", "zip", "junk", "empty", "cut"])
def test_tar_that_is_none_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.tar"
    whole = write_tar(path, [("a.png", PNG[1]), ("b.png", PNG[2])]).read_bytes()
    if damage == "gzip":
        with tarfile.open(path, "w:gz") as shard:
            shard.addfile(tarfile.TarInfo("a.png"))
    else:
        path.write_bytes({"zip": b"PK\3\4" * 200, "junk": b"x" * 5000, "empty": b"", "cut": whole[:800]}[damage])
    for name in (str(path), f"stream:{path}"):
        with pytest.raises(ValueError, match=rf"^data: {path} is cut short or no plain tar \([^\n]*\); fetch it again"):
            open_data(name)


def test_stream_opens_where_a_later_shard_is_broken(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", PNG[1]), ("a.cls", b"1")])
    (tmp_path / "1.tar").write_bytes(b"junk" * 300)
    assert streamed(tmp_path) == [1]
    with pytest.raises(ValueError, match=r"1\.tar is cut short or no plain tar"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("member", "outcome"),
    [
        (("a.cls", b"1\n0\n"), r"a\.cls has 2 lines, such as 1, expected one whole number or name; correct it"),
        (("a.json", b'{"class": 1}'), {".json without a label or captions": 1}),
        (("a.json", b"[1]"), {".json without a label or captions": 1}),
        (("a.json", b'{"label": null}'), {}),
        (("z.heic", b"x"), {"pictures of kinds that are not read": 1}),
    ],
)
def test_tar_member_without_a_use_is_named(tmp_path: Path, member: tuple[str, bytes], outcome: Any) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", PNG[1]), member])
    if isinstance(outcome, str):
        for name in (str(path), f"stream:{path}"):
            with pytest.raises(ValueError, match=rf"^data: [^\n]*{outcome}$"):
                open_data(name, 3)
    else:
        source: Any = open_source(path)
        assert (len(source), source.account.counts) == (1, outcome)


def test_tar_labels_that_differ_are_said(tmp_path: Path) -> None:
    members = [("a.png", PNG[1]), ("a.cls", b"1"), ("a.json", b'{"label": 0}'), ("b.png", PNG[2]), ("b.cls", b"0"),
               ("b.json", b'{"label": 0.0}'), ("c.png", PNG[3]), ("c.cls", b"0"), ("c.json", b'{"label": "cat"}'),
               ("d.png", PNG[4]), ("d.cls", b"1"), ("d.json", b'{"label": [0, 1]}')]  # fmt: skip
    source: Any = open_source(write_tar(tmp_path / "a.tar", members))
    assert labels(source) == [1, 0, 0, 1]
    assert source.account.counts == {"labels in .json that differ from .cls": 1}
    assert source.account.examples["labels in .json that differ from .cls"] == "a.json"


def test_tar_folders_are_said_to_be_no_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_source(write_tar(tmp_path / "a.tar", [("x/a.png", PNG[1]), ("./x/b.png", PNG[2])]))
    assert "folders are no classes" not in caplog.text
    open_source(write_tar(tmp_path / "b.tar", [("cat/a.png", PNG[1]), ("dog/b.png", PNG[2])]))
    assert "b.tar lie in 2 folders, such as cat, but have no labels: in shards, folders are no classes" in caplog.text


def test_stream_parquet_files_without_rows_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_table(tmp_path / "a.parquet", label=[0, 1])
    table = parquet.read_table(tmp_path / "a.parquet")
    parquet.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    assert streamed(tmp_path) == [0, 1]
    assert "can't be read" not in caplog.text


def test_stream_reads_a_tar_that_cannot_seek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of networks only read on."""

    class OnlyRead:
        def __init__(self, path: str) -> None:
            self.file = Path(path).open("rb")  # noqa: SIM115

        def read(self, size: int = -1) -> bytes:
            return self.file.read(min(size, 1000) if size > 0 else size)

        def __enter__(self) -> OnlyRead:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    monkeypatch.setattr("mar.data.tar_stream.open_in_passing", OnlyRead)
    members = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", PNG[i]), ("cls", b"%d" % i))]
    assert streamed(write_tar(tmp_path / "a.tar", members)) == [0, 1, 2]


# ---- folders


@pytest.mark.parametrize(
    ("names", "twins"),
    [(("Cat/1.png", "cat/2.png"), "'Cat' and 'cat'"), (("caf\xe9/1.png", "cafe\u0301/2.png"), r"'cafe\u0301' and"),
     (("a cat/1.png", "a  cat/2.png"), "'a  cat' and 'a cat'")],
)  # fmt: skip
def test_folder_classes_that_look_alike_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], twins: str
) -> None:
    assert len(open_source(write(tmp_path, *names)).classes) == 2
    assert f"differ only in case, spaces or the form of accents: {twins}" in caplog.text


@pytest.mark.parametrize("twin", ["Train", "training"])
def test_folder_of_two_train_parts_is_refused(tmp_path: Path, twin: str) -> None:
    write(tmp_path, "train/cat/1.png", f"{twin}/dog/2.png", "val/cat/3.png")
    message = rf"^data: {tmp_path} has several folders for 'train': .*; put their pictures into one, or give --data "
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)
    assert len(open_source(tmp_path, "test")) == 1
    (tmp_path / twin / "dog" / "2.png").unlink()
    assert open_source(tmp_path).classes == ("cat",)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("images/train/1.png", "images/val/2.png", "labels/train/1.txt"), "2 folders of pictures (train, val)"),
        (("all/cat/1.png", "all/dog/2.png", "all/eel/3.png", "all/fox/4.png"), "4 folders of pictures (cat, dog, eel"),
        (("cat/a/1.png", "dog/b/2.png", "dog/c/3.png"), None),
        (("cat/1.png", "cat/2.png"), None),
    ],
)  # fmt: skip
def test_folder_of_one_class_with_folders_in_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], said: str | None
) -> None:
    open_source(write(tmp_path, *names))
    assert (said in caplog.text) if said else ("the one class" not in caplog.text)


def test_folder_class_of_kinds_that_are_not_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "cat/2.HEIC", "dog/1.heic", "dog/notes.md")
    with pytest.raises(ValueError, match=r"^data: dog of .* would be no class: .* such as dog/1\.heic; convert"):
        open_source(tmp_path)
    (tmp_path / "dog" / "1.heic").unlink()
    source: Any = open_source(tmp_path)
    assert source.account.counts == {
        "folders without pictures": 1, "pictures of kinds that are not read": 1, "other files": 1,
    }  # fmt: skip


def test_folder_with_labels_in_a_metadata_file_is_said(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "label": 1}\n')
    source: Any = open_source(tmp_path)
    assert source.account.counts == {"metadata files without captions, whose labels are not read": 1}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a cat"}\n')
    captioned: Any = open_source(tmp_path)
    assert captioned.account.counts == {}


def test_folder_of_shards_that_lie_deeper_says_how_to_name_them(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"image": [{"bytes": PNG[1], "path": None}]}), tmp_path / "x.parquet")
    (tmp_path / "label=0").mkdir()
    (tmp_path / "x.parquet").rename(tmp_path / "label=0" / "x.parquet")
    with pytest.raises(ValueError, match=r"^data: no pictures in .*shards that lie deeper have to be named, as '"):
        open_source(tmp_path)
    assert len(open_source(f"{tmp_path}/*/*.parquet")) == 1


# ---- tables


def write_table(path: Path, **columns: Any) -> Path:
    count = len(next(iter(columns.values())))
    images = [{"bytes": PNG[i], "path": None} for i in range(count)]
    parquet.write_table(pa.table({"image": images, **columns}), path)
    return path


@pytest.mark.parametrize(
    ("column", "classes", "numbers"),
    [
        (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b"), [1, 0, 1]),
        (pa.array(["b", "a", None], pa.large_string()), ("a", "b"), [1, 0, -1]),
        (pa.array(["b", "a", " "]), ("a", "b"), [1, 0, -1]),
        (pa.array(["", "a", None]), ("a",), [-1, 0, -1]),
        (pa.array([b"", b"a", None]), ("a",), [-1, 0, -1]),
        (pa.array([True, False, None]), ("0", "1"), [1, 0, -1]),
        (pa.array(np.array([1, 0, 1], np.float16)), ("0", "1"), [1, 0, 1]),
        (pa.array([1, 0, -1], pa.int8()), ("0", "1"), [1, 0, -1]),
    ],
)
def test_table_labels_of_odd_types_are_read(
    tmp_path: Path, column: Any, classes: tuple[str, ...], numbers: list[int]
) -> None:
    source: Any = open_source(write_table(tmp_path / "x.parquet", label=column))
    assert (source.classes, labels(source)) == (classes, numbers)


@pytest.mark.parametrize(
    "column",
    [pa.array([1, 2], pa.timestamp("us")), pa.array([1, 2], pa.date32()), pa.array([1, 2], pa.decimal128(3, 0)),
     pa.array([b"aa", b"bb"], pa.binary(2)), pa.array([{"id": 1}] * 2)],
)  # fmt: skip
def test_table_labels_of_other_types_are_one_line(tmp_path: Path, column: Any) -> None:
    path = write_table(tmp_path / "x.parquet", label=column)
    for name in (str(path), f"stream:{path}"):
        with pytest.raises(ValueError, match=r"^data: the column label of [^\n]* holds labels of the type [^\n]*$"):
            open_data(name, 3)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_stream_of_names_is_refused_when_it_is_opened(tmp_path: Path, kind: str) -> None:
    path = write_table(tmp_path / "x.parquet", label=pa.array(["a", "b"], getattr(pa, kind)()))
    with pytest.raises(ValueError, match=r"^data: labels of .* are names, which have no numbers in a stream"):
        open_data(f"stream:{path}", 3)


def test_table_columns_without_a_use_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_table(tmp_path / "x.parquet", category=["a", "b"], width=[8, 8])
    source: Any = open_source(path)
    assert source.account.line.endswith("2 pictures, no labels; left out: other columns: 2 (such as category)")
    open_data(f"stream:{path}", 3)
    assert "left out: other columns, the first of them category" in caplog.text


def test_saved_parts_are_counted(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"image": [{"bytes": PNG[i], "path": None} for i in range(3)]})
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "saved")
    source: Any = open_source(tmp_path / "saved")
    assert source.account.line.endswith("3 pictures, no labels; left out: pictures of other parts: 1 (test)")


# ---- pictures


def test_picture_that_is_none_has_a_short_reason(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"<html>404</html>")
    (tmp_path / "b.png").write_bytes(b"")
    for file, why in (
        (tmp_path / "a.png", "no picture of a known kind"), (io.BytesIO(b"x"), "no picture of a known kind"),
        (tmp_path / "b.png", "it is empty"), (io.BytesIO(), "it is empty"),
        (Path("a" * 3000), "."),
    ):  # fmt: skip
        with pytest.raises(UnreadableImage) as error:
            decode_image(file, "n")
        assert why in error.value.why
        assert len(error.value.why) <= 300


def test_pictures_of_many_pages_are_their_first(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (8, 8), color) for color in ("white", "black")]
    for name in ("a.gif", "b.webp", "c.tif", "d.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "e.jpg", "MPO", save_all=True, append_images=pages[1:])
    source = open_source(tmp_path)
    assert [source[i].image.convert("L").getextrema() for i in range(5)] == [(255, 255)] * 5
