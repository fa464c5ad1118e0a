"""Labels of shards and tables: none is lost, and none becomes another one, without a word."""

from __future__ import annotations

import math
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from shard_files import png_bytes, write_tar

from mar.data import accounts
from mar.data.images import UnreadableImage
from mar.data.labels import as_label, class_names, parse_label
from mar.data.sources import open_data, open_source
from mar.data.webdataset import TarSource

Members = list[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache of tables, and says all lines again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
    monkeypatch.setattr(accounts, "_logged", set())
    datasets.disable_progress_bars()


def labels(source: Any) -> list[int]:
    return [source[i].label for i in range(len(source))]


def open_tar(tmp_path: Path, members: Members, **options: Any) -> TarSource:
    source = open_source(write_tar(tmp_path / "a.tar", members, **options))
    assert isinstance(source, TarSource)
    return source


PNG = [png_bytes(i) for i in range(4)]


@pytest.mark.parametrize(
    "members",
    [
        [("a1.v1.0.png", PNG[0]), ("a1.v1.0.cls", b"0"), ("a2.v1.0.png", PNG[1]), ("a2.v1.0.cls", b"1")],
        [("a.v1.0.png", PNG[0]), ("a.v1.0.cls", b"0"), ("a.v2.0.png", PNG[1]), ("a.v2.0.cls", b"1")],
        [("f.001.png", PNG[0]), ("f.001.json", b'{"label": 0}'), ("f.002.png", PNG[1]), ("f.002.json", b'{"label":1}')],
        [("x.seg/a.png", PNG[0]), ("x.seg/a.cls", b"0"), ("x.seg/b.png", PNG[1]), ("x.seg/b.cls", b"1")],
        [("a.png", PNG[0]), ("b.png", PNG[1]), ("a.cls", b"0"), ("b.cls", b"1")],
        [("b.cls", b"1"), ("a.cls", b"0"), ("a.png", PNG[0]), ("b.png", PNG[1])],
        [("a.png", PNG[0]), ("a.CLS", b"0"), ("b.png", PNG[1]), ("b.Cls", b"1")],
        [("a.png", PNG[0]), ("a.cls", b"0.0"), ("b.png", PNG[1]), ("b.cls", b"1.00\n")],
        [("a.png", PNG[0]), ("a.json", b'{"label": 0.0}'), ("b.png", PNG[1]), ("b.json", b'{"label": 1.0}')],
        [("a.png", PNG[0]), ("a.cls", b"\xef\xbb\xbf0"), ("b.png", PNG[1]), ("b.cls", "1".encode("utf-16"))],
        [("a.png", PNG[0]), ("a.json", b'\xef\xbb\xbf{"label": 0}'), ("b.png", PNG[1]),
         ("b.json", '{"label": 1}'.encode("utf-16"))],
        [("a.png", PNG[0]), ("a.cls", b"0\0\n"), ("b.png", PNG[1]), ("b.cls", b"1e0")],
    ],
)  # fmt: skip
def test_tar_labels_of_any_spelling_are_numbers(tmp_path: Path, members: Members) -> None:
    source = open_tar(tmp_path, members)
    assert (source.classes, labels(source), source.account.counts) == (("0", "1"), [0, 1], {})


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("a.cls", b"caf\xe9"), r"a\.tar/a\.cls is not in UTF-8 .*at byte 3"),
        (("a.cls", b"0.5"), r"a\.tar/a\.cls has the label 0\.5 \(float\), expected a whole number or a name"),
        (("a.cls", b"1000000000"), "has the label 1000000000, but only 1 different ones"),
        (("a.cls", b"9" * 300), r"the label 9999999999\.\.\. of 300 digits"),
        (("a.json", b'{"label": [0, 1]}'), r"a\.tar/a\.json has the label \[0, 1\] \(list\)"),
        (("a.json", b'{"label": {"id": 1}}'), r"has the label {'id': 1} \(dict\)"),
        (("a.json", b'{"label": 1e300}'), "the label 10000000000... of 301 digits"),
        (("a.json", b'{"label": Infinity}'), "the label inf"),
    ],
)
def test_tar_label_of_no_class_stops_with_one_line(tmp_path: Path, member: tuple[str, bytes], message: str) -> None:
    message = message.replace("10000000000...", r"1000000000\.\.\.")
    with pytest.raises(ValueError, match=rf"^data: [^\n]*{message}[^\n]*$"):
        open_tar(tmp_path, [("a.png", PNG[0]), member])


@pytest.mark.parametrize(
    ("more", "reason", "example"),
    [
        ([("x.cls", b"1")], "members without a picture", "x.cls"),
        ([("README.md", b"words")], "members without a picture", "README.md"),
        ([("b.jpg", PNG[1])], "further pictures of a sample", "b.jpg"),
        ([("b.cls", b"0"), ("b.cls", b"1")], "further labels or captions of a sample", "b.cls"),
        ([("b.npy", b"1")], "members of other kinds", "b.npy"),
        ([("._b.png", b"1")], "hidden or system files", "._b.png"),
        ([("__MACOSX/b.png", b"1"), ("x/@eaDir/c.png", b"1")], "hidden or system files", "__MACOSX/b.png"),
        ([("b.json", b"{")], "labels or captions that can't be read", "b.json is no JSON"),
        ([("b.json", b"[" * 100_000)], "labels or captions that can't be read", "b.json is no JSON"),
        ([("c.png", PNG[2]), ("c.cls", b"1"), ("b.png", PNG[3]), ("c.png", PNG[1]), ("d.png", PNG[1]),
          ("c.txt", b"which?")], "members that may belong to several pictures", "c.txt"),
    ],
)  # fmt: skip
def test_tar_member_of_no_use_is_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, more: Members, reason: str, example: str
) -> None:
    source = open_tar(tmp_path, [("a.png", PNG[0]), ("a.cls", b"0"), ("b.png", PNG[1]), *more])
    assert reason in source.account.counts
    assert source.account.examples[reason].startswith(example)
    assert caplog.text.count(source.account.line) == 1
    open_source(tmp_path / "a.tar")
    assert caplog.text.count(source.account.line) == 1, "said once"


def test_tar_links_are_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", PNG[0])])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("b.png", tarfile.SYMTYPE), ("c.png", tarfile.LNKTYPE), ("d.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
    source = open_source(path)
    assert isinstance(source, TarSource)
    assert source.account.line.endswith("1 picture, no labels; left out: links and special files: 3 (such as b.png)")


def test_tar_accounts_for_missing_labels_and_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", PNG[0]), ("a.cls", b"0"), ("b.png", PNG[1]), ("c.png", PNG[1])])
    write_tar(tmp_path / "1.tar", [])
    source = open_source(tmp_path)
    assert isinstance(source, TarSource)
    assert source.account.line == (
        f"data: {tmp_path}: 3 pictures, 1 of them with labels of 1 class; left out: shards without pictures: 1 (1.tar)"
    )


# ---- tables


def write_table(path: Path, given: list[Any], kind: Any = None, start: int = 0) -> Path:
    columns = {"image": [{"bytes": PNG[start + i], "path": None} for i in range(len(given))], "label": given}
    table = datasets.Dataset.from_dict(columns)
    types = datasets.Features({"image": datasets.Image(), "label": kind or table.features["label"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    table.cast(types).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("given", "classes", "numbers"),
    [
        ([1.0, 0.0, 1.0], ("0", "1"), [1, 0, 1]),
        ([1.0, math.nan, None], ("0", "1"), [1, -1, -1]),
        ([None, None, None], (), [-1, -1, -1]),
        ([b"cat", b"ant", None], ("ant", "cat"), [1, 0, -1]),
        ([True, False, None], ("0", "1"), [1, 0, -1]),
        (["cat", "ant", None], ("ant", "cat"), [1, 0, -1]),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_table_labels_of_any_type_are_read(
    tmp_path: Path, given: list[Any], classes: tuple[str, ...], numbers: list[int], saved: bool
) -> None:
    path = write_table(tmp_path / "x.parquet", given)
    if saved:
        datasets.load_dataset("parquet", data_files=str(path), split="train").save_to_disk(tmp_path / "saved")
        path = tmp_path / "saved"
    source: Any = open_source(path)
    assert (source.classes, labels(source)) == (classes, numbers)
    assert source.account.without_label == numbers.count(-1)
    assert b"".join(source.listing())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([10**9, 10**9 + 1], "has the label 1000000001, but only 2 different ones"),
        ([0.5, 1.0], r"the column label of .* has the label 0\.5 \(float\)"),
        ([math.inf, 1.0], r"the column label of .* has the label inf"),
        ([[0], [1]], r"the column label of .* holds labels of the type List\(Value\('int64'\)\)"),
        ([{"a": 1}, {"a": 2}], "the column label of .* holds labels of the type"),
        ([b"caf\xe9", b"b"], "the column label of .* is not in UTF-8"),
    ],
)
def test_table_label_of_no_class_stops_with_one_line(tmp_path: Path, given: list[Any], message: str) -> None:
    path = write_table(tmp_path / "x.parquet", given)
    with pytest.raises(ValueError, match=rf"^data: [^\n]*{message}[^\n]*$"):
        open_source(path)


def test_table_of_lists_of_pictures_is_refused(tmp_path: Path) -> None:
    cells = [[{"bytes": PNG[0], "path": None}]]
    types = datasets.Features({"image": datasets.Sequence(datasets.Image())})
    datasets.Dataset.from_dict({"image": cells}, features=types).to_parquet(tmp_path / "x.parquet")
    datasets.Dataset.from_dict({"image": [1]}).to_parquet(tmp_path / "y.parquet")
    for name in ("x", "y"):
        with pytest.raises(ValueError, match=r"^data: the column image of [^\n]*, expected a picture a row$"):
            open_source(tmp_path / f"{name}.parquet")


def test_table_files_without_rows_are_left_out(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", [0, 1])
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "b.parquet")
    source: Any = open_source(tmp_path)
    assert (len(source), source.account.counts) == (2, {"files without rows": 1})
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ValueError, match="holds no pictures: it has no rows"):
        open_source(tmp_path)


def test_table_files_of_other_columns_are_one_line(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", [0, 1])
    write_table(tmp_path / "b.parquet", [[0], [1]])
    with pytest.raises(ValueError, match=r"^[^\n]*the columns of a\.parquet and b\.parquet differ[^\n]*$"):
        open_source(tmp_path)


def test_table_empty_cells_are_counted(tmp_path: Path) -> None:
    cells = [{"bytes": PNG[0], "path": None}, None, {"bytes": None, "path": None}]
    parquet.write_table(pa.table({"image": cells}), tmp_path / "x.parquet")
    source: Any = open_source(tmp_path / "x.parquet")
    assert source.account.line.endswith("x.parquet: 3 pictures, no labels; left out: empty cells: 2 (such as row 1)")


# ---- streams


@pytest.mark.parametrize(
    ("label", "number"),
    [("1.0", 1), ("null", -1), ("true", 1), ("-1", -1), ("7", None), ('"cat"', None), ("0.5", None)],
)
def test_stream_labels_are_those_of_the_shard(tmp_path: Path, label: str, number: int | None) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", PNG[0]), ("a.json", f'{{"label": {label}}}'.encode())])
    if label == '"cat"':  # told by the type of the column
        with pytest.raises(ValueError, match="are names, which have no numbers in a stream"):
            open_data(f"stream:{path}", 3)
        return
    if label == "0.5":
        with pytest.raises(ValueError, match=r"^data: a\.tar/a\.json has the label 0\.5 \(float\), expected a whole"):
            open_data(f"stream:{path}", 3)
        return
    source: Any = open_data(f"stream:{path}", 3)
    samples = list(source.preview())
    if number is not None:
        assert [source.example(sample).label for sample in samples] == [number]
    else:
        with pytest.raises(ValueError, match="has the label 7, but there are 3 classes"):
            source.example(samples[0])


@pytest.mark.parametrize(
    ("kind", "label", "outcome"),
    [
        *(("cls", label, 1) for label in (b"1.0", b"1", b"\xef\xbb\xbf1", b"1\0")),
        *(("cls", label, -1) for label in (b"-1", b"", b"\0")),
        *(("json", label, 1) for label in (b"1", b"1.0", b"true")),
        *(("json", label, -1) for label in (b"-1", b"null", b'""', b"NaN")),
        ("txt", b"words", -1),
        ("cls", b"0.5", r"has the label 0\.5 \(float\), expected a whole number or a name; correct it$"),
        ("json", b"0.5", r"has the label 0\.5 \(float\), expected a whole number or a name; correct it$"),
        ("json", b"[1]", r"has the label \[1\] \(list\), expected a whole number or a name; correct it$"),
        ("cls", b"caf\xe9", r"is not in UTF-8 \(.*\); save its label in that encoding$"),
        ("cls", b"cat", "has the label 'cat', a name, which has no number in a stream; leave stream: out$"),
        ("json", b'"1"', "has the label '1', a name, which has no number in a stream; leave stream: out$"),
        ("cls", b"7", "has the label 7, but there are 3 classes$"),
    ],
)
def test_stream_late_label_is_one_line_with_its_member(
    tmp_path: Path, kind: str, label: bytes, outcome: int | str
) -> None:
    """The first pictures are looked at when a stream is opened, later ones when they come."""
    members = [(f"{i}.{kind}", data) for i in range(40) for kind, data in (("png", PNG[0]), ("cls", b"0"))]
    content = b'{"label": %b}' % label if kind == "json" else label
    path = write_tar(tmp_path / "a.tar", [*members, ("late.png", PNG[1]), (f"late.{kind}", content)])
    source: Any = open_data(f"stream:{path}", 3)
    assert source.classes == ("0", "1", "2")
    *_, last = source.preview()
    assert last.name == "a.tar/late.png"
    if isinstance(outcome, int):
        assert source.example(last).label == outcome
    else:
        with pytest.raises(ValueError, match=rf"^(data: )?a\.tar/late\.({kind}|png) {outcome}"):
            source.example(last)


def test_stream_labels_apart_from_pictures_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("b.cls", b"1"), ("a.cls", b"0"), ("a.png", PNG[0]), ("b.png", PNG[1])])
    unsorted = write_tar(tmp_path / "b.tar", [(f"{i}.cls", b"1") for i in range(40)] + [("1.png", PNG[0])])
    open_data(f"stream:{path}")  # labels are not used
    for file, member in ((path, "a.tar/b.cls"), (unsorted, "b.tar/0.cls")):
        with pytest.raises(ValueError, match=rf"^data: {member} lies apart from its picture, and a stream is read"):
            open_data(f"stream:{file}", 3)


def test_stream_members_of_no_use_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [("a.png", PNG[0]), ("a.cls", b"0"), ("lone.txt", b"words"), ("b.png", PNG[1]), ("b.cls", b"1"),
               ("b.npy", b""), ("lone2.txt", b"words"), ("b.jpg", PNG[2]), ("c.png", PNG[2]),
               ("c.CLS", b"2.0")]  # fmt: skip
    source: Any = open_data(f"stream:{write_tar(tmp_path / 'a.tar', members)}", 3)
    for _ in range(2):
        assert [source.example(sample).label for sample in source.preview()] == [0, 1, -1, 2]
    said = [message.partition("left out: ")[2] for message in caplog.messages if "left out" in message]
    assert said == [
        "members without a picture, the first of them a.tar/lone.txt",
        "members of other kinds, the first of them b.npy",
    ]


@pytest.mark.parametrize("place", ["header", "cut header", "no end"])
def test_stream_damaged_header_is_no_end(tmp_path: Path, place: str) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", PNG[i]) for i in range(3)])
    data = bytearray(path.read_bytes())
    source: Any = open_data(f"stream:{path}")
    third = 4 * 512  # of two blocks each
    path.write_bytes(data[: third + 2 * 512] if place == "no end" else data[: third + 100] if place == "cut header"
                     else data[:third] + b"\1" * 512 + data[third + 512 :])  # fmt: skip
    samples = source.shards.samples(0)
    if place == "no end":
        assert len(list(samples)) == 3
        return
    assert [next(samples).name] == ["a.tar/0.png"]
    with pytest.raises(UnreadableImage, match=r"a\.tar from its picture 1 on \(no header at byte 2,048\)"):
        list(samples)


def test_stream_labels_follow_pictures_with_dots(tmp_path: Path) -> None:
    members = [(f"a{i}.v1.0.{kind}", data) for i in range(3) for kind, data in (("png", PNG[i]), ("cls", b"%d" % i))]
    source: Any = open_data(f"stream:{write_tar(tmp_path / 'a.tar', members)}", 3)
    assert [source.example(sample).label for sample in source.preview()] == [0, 1, 2]


# ---- the rule


def test_label_rule_is_one_for_all() -> None:
    assert [as_label(value, "x") for value in (None, math.nan, 2.0, True, b"\xef\xbb\xbfcat", "cat", b"", -1)] == [
        None, None, 2, 1, "cat", "cat", None, -1,
    ]  # fmt: skip
    assert [parse_label(data, "x") for data in (b"7", b" 7.0\n", b"07", b"1_000", b"", b"v1.5")] == [
        7, 7, 7, "1_000", None, "v1.5",
    ]  # fmt: skip
    assert len(class_names(range(0, 300_000, 2))) == 299_999
    assert class_names([1, "1", "x"]) == ("1", "x")
