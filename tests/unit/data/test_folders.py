"""Folders of every kind: what is taken, what is left out and counted, and what stops."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from shard_files import png_bytes, write_tar

from mar.data import accounts
from mar.data.folder import FolderSource
from mar.data.images import source_digest
from mar.data.paths import is_system_name
from mar.data.sources import open_source


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test says all lines again."""
    monkeypatch.setattr(accounts, "_logged", set())


def put(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(1) if path.suffix == ".png" else b"x")
    return folder


def opened(folder: Path, split: str = "train") -> FolderSource:
    source = open_source(folder, split)
    assert isinstance(source, FolderSource)
    return source


@pytest.mark.parametrize(
    "system", ["@eaDir", ".thumbnails", "#recycle", "$RECYCLE.BIN", "__MACOSX", "System Volume Information", "@Recycle"]
)
@pytest.mark.parametrize("below", ["", "cat/"])
def test_folder_of_a_system_is_left_out(tmp_path: Path, system: str, below: str) -> None:
    put(tmp_path, f"{below}a.png", f"{below}{system}/a.png/thumb.png", f"{below}{system}/b.png")
    source = opened(tmp_path)
    assert source.classes == (("cat",) if below else ())
    assert source.image_names() == [f"{below}a.png"]
    assert source.account.line.endswith(f"left out: hidden or system folders: 1 ({below}{system})")


@pytest.mark.parametrize(
    ("folders", "part", "test"),
    [
        (["train", "val", "annotations"], "train", "val"),
        (["Train", "Val"], "Train", "Val"),
        (["TRAINING", "Test"], "TRAINING", "Test"),
        (["train", "Validation", "extra+"], "train", "Validation"),
        (["training", "val", "labels", "docs"], "training", "val"),
    ],
)
def test_folders_of_parts_are_no_classes(tmp_path: Path, folders: list[str], part: str, test: str) -> None:
    for name in folders:
        if name in (part, test):
            put(tmp_path, f"{name}/cat/a.png", f"{name}/dog/b.png")
        else:
            put(tmp_path, f"{name}/c.png" if name.endswith("+") else f"{name}/notes.csv")
    source = opened(tmp_path)
    assert (source.classes, source.folder) == (("cat", "dog"), tmp_path / part)
    assert source.account.counts["pictures of other parts"] == 2
    rest = {"pictures in folders beside the parts": 1} if "extra+" in folders else {"other files": len(folders) - 2}
    expected = {name: count for name, count in rest.items() if count}
    assert source.account.counts == {"pictures of other parts": 2, **expected}
    assert opened(tmp_path, "test").folder == tmp_path / test


def test_folder_called_train_among_classes_is_a_class(tmp_path: Path) -> None:
    put(tmp_path, "train/a.png", "car/b.png", "plane/c.png")
    assert opened(tmp_path).classes == ("car", "plane", "train")


# ---- links and special files


def test_folder_links_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "real", "1.png", "more/2.png")
    data = put(tmp_path / "data", "cat/0.png", "dog/sub/4.png", "dog/3.png")
    (data / "cat" / "part1").symlink_to(tmp_path / "real")
    (data / "dog" / "alias").symlink_to("sub")  # read already, under its own name
    (data / "dog" / "up").symlink_to("..")
    (data / "all").symlink_to(".")
    source = opened(data)
    assert source.classes == ("cat", "dog")
    assert source.image_names() == [
        "cat/0.png", "cat/part1/1.png", "cat/part1/more/2.png", "dog/3.png", "dog/sub/4.png",
    ]  # fmt: skip
    assert source.account.counts == {"links to folders that are read already": 3, "folders without pictures": 1}


def test_class_folder_that_is_a_link_is_a_class(tmp_path: Path) -> None:
    put(tmp_path / "real" / "cats", "1.png")
    put(tmp_path / "data", "dog/0.png")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "real" / "cats")
    (tmp_path / "data" / "hound").symlink_to("dog")
    assert opened(tmp_path / "data").image_names() == ["cat/1.png", "dog/0.png", "hound/0.png"]


def test_class_that_is_a_link_to_another_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "outside" / "cats", "1.png")
    put(tmp_path / "dog", "0.png")
    for link, target in (("cat", "outside/cats"), ("hound", "dog"), ("kitten", "cat"), ("none", "nowhere")):
        (tmp_path / link).symlink_to(target)
    put(tmp_path / "outside", "other/2.png")
    opened(tmp_path)
    said = [record.getMessage() for record in caplog.records if "is a link" in record.getMessage()]
    assert [line.partition(": the same")[0].partition(": ")[2] for line in said] == [
        f"the class hound of {tmp_path} is a link to the class dog",
        f"the class kitten of {tmp_path} is a link to the class cat",
    ]


@pytest.mark.parametrize("flat", [True, False])
def test_folder_special_files_are_not_opened(tmp_path: Path, flat: bool) -> None:
    folder = tmp_path if flat else tmp_path / "cat"
    put(folder, "a.png", ".b.png")
    os.mkfifo(folder / "c.png")
    (folder / "d.png").symlink_to("nowhere.png")
    (folder / "e.png").symlink_to("e.png")
    (folder / "f.png").symlink_to("a.png")
    (folder / "g.png").symlink_to("c.png")
    source = opened(tmp_path)
    assert [name.rpartition("/")[2] for name in source.image_names()] == ["a.png", "f.png"]
    assert source.account.counts == {"pipes, sockets and devices": 2, "broken links": 2, "hidden files": 1}


# ---- what can't be read stops


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Make a folder fail to be listed: root may list folders whatever their permissions."""
    scandir = os.scandir

    def install(folder: Path, number: int) -> None:
        def scan(path: Any) -> Any:
            if Path(path) == folder:
                raise OSError(number, os.strerror(number), str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", scan)

    return install


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("where", ["cat", "cat/deep", "val", ""])
def test_folder_that_cannot_be_listed_stops(
    tmp_path: Path, refuse: Callable[[Path, int], None], number: int, where: str
) -> None:
    put(tmp_path, "cat/a.png", "cat/deep/b.png", "dog/c.png", "val/d.png")
    refuse(tmp_path / where, number)
    with pytest.raises(
        ValueError, match=rf"^data: [^\n]* can't be read \({os.strerror(number)}\): without it, classes"
    ):
        open_source(tmp_path)


# ---- shards in folders


def test_folder_of_shards_accounts_for_the_rest(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", png_bytes(1))])
    write_tar(tmp_path / "b.TAR", [("b.png", png_bytes(2))])
    put(tmp_path, "c.tar.gz", "d.tgz", "preview.png", "notes.md", ".e.tar", ".cache/f.tar", "g.zip")
    source: Any = open_source(tmp_path)
    assert (len(source), source.account.counts) == (2, {
        "packed archives, to be unpacked first": 3, "pictures beside the shards": 1, "other files": 1,
        "hidden files": 1, "hidden or system folders": 1,
    })  # fmt: skip


def test_folder_of_packed_archives_says_so(tmp_path: Path) -> None:
    put(tmp_path, "c.tar.gz", "d.tgz")
    with pytest.raises(ValueError, match=r"no pictures in .*packed archives, to be unpacked first: 2 \(such as c"):
        open_source(tmp_path)


def test_folder_shards_of_a_linked_folder_are_found(tmp_path: Path) -> None:
    write_tar(tmp_path / "real" / "train-0.tar", [("a.png", png_bytes(1))])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "real")
    assert len(open_source(tmp_path / "data")) == 1


# ---- any tree

NAMES = st.sampled_from(
    [
        "a.png",
        "b.PNG",
        "c10.png",
        "c9.png",
        ".h.png",
        "t.md",
        "x",
        "cat",
        "dog",
        "train",
        "Train",
        "Val",
        "p.heic",
        "metadata.jsonl",
        "@eaDir",
        ".git",
        "é.png",
    ]
)
KINDS = st.sampled_from(["picture", "picture", "picture", "empty", "link", "loop", "dangling", "fifo", "unreadable"])
TREES = st.dictionaries(st.lists(NAMES, min_size=1, max_size=4).map("/".join), KINDS, min_size=1, max_size=14)


def plant(root: Path, tree: dict[str, str]) -> None:
    """Make the files of a tree; those whose place is taken by something else are left out."""
    for name, kind in tree.items():
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "fifo":
                os.mkfifo(path)
            elif kind in ("link", "loop", "dangling"):
                path.symlink_to({"link": root.parent / "elsewhere", "loop": root, "dangling": "nowhere"}[kind])
            else:
                with open(path, "xb") as file:
                    file.write(b"" if kind == "empty" else png_bytes(2))
                path.chmod(0o000 if kind == "unreadable" else 0o600)
        except OSError:
            continue


def count_all(root: Path) -> int:
    """Count what an account has an entry for: all but folders, and hidden or system folders as one each."""
    count, linked = 0, False
    for parent, folders, files in os.walk(root):
        links = [name for name in folders if (Path(parent) / name).is_symlink() and not is_system_name(name)]
        linked = linked or bool(links)
        system = [name for name in folders if is_system_name(name)]
        folders[:] = [name for name in folders if name not in system + links]
        count += len(files) + len(system)
    return -1 if linked else count  # linked folders may be read several times: once for each class


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES, seed=st.randoms(use_true_random=False))
def test_folder_of_any_tree_accounts_for_all_in_any_order(tmp_path: Path, tree: dict[str, str], seed: Any) -> None:
    shutil.rmtree(tmp_path)
    put(tmp_path / "elsewhere", "p.png", "q/r.png", "s.txt")
    root = tmp_path / "data"
    root.mkdir()
    plant(root, tree)
    first = outcome(root)
    with shuffled(seed):
        assert outcome(root) == first
    if isinstance(first, str):
        reasons = ("no pictures in", "has no folder for 'train'", "has several folders for", "would be no class",
                   "metadata.jsonl")  # fmt: skip
        assert any(reason in first for reason in reasons), first
        assert "\n" not in first
        return
    _, pictures, left_out, _ = first
    total = count_all(root)
    if total >= 0:
        left_out = {name: count for name, count in left_out.items() if name != "folders without pictures"}
        assert pictures + sum(left_out.values()) == total


def outcome(root: Path) -> Any:
    try:
        source = opened(root)
    except ValueError as error:
        return str(error)
    return source.classes, len(source), dict(source.account.counts), source_digest(source)


class shuffled:  # noqa: N801  (a context)
    """Lists folders in a random order."""

    def __init__(self, seed: Any) -> None:
        self.seed, self.scandir, self.listdir = seed, os.scandir, os.listdir

    def __enter__(self) -> None:
        class Listing(list[Any]):
            def __enter__(self) -> Listing:
                return self

            def __exit__(self, *_: object) -> None: ...

        def scan(path: Any = ".") -> Iterator[Any]:
            with self.scandir(path) as entries:
                found = list(entries)
            self.seed.shuffle(found)
            return Listing(found)  # type: ignore[return-value]

        os.scandir = scan  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        os.scandir = self.scandir


# ---- any shard

MEMBERS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d/a", "d/b", "./e", "f10", "f9"]),
    st.tuples(
        st.booleans(),
        st.dictionaries(
            st.sampled_from(["cls", "json", "txt", "npy", "CLS"]), st.sampled_from([b"0", b"1", b"2.0", b""])
        ),
    ),
    min_size=1,
    max_size=6,
)


def shard_members(tree: dict[str, tuple[bool, dict[str, bytes]]]) -> list[tuple[str, bytes]]:
    """Members of a shard: of each key a picture, if it has one, and others."""
    members = []
    for number, (key, (has_picture, others)) in enumerate(tree.items()):
        members += [(f"{key}.png", png_bytes(number + 1))] if has_picture else []
        for kind, value in others.items():
            label = value or b"null"
            members.append((f"{key}.{kind}", b'{"label": %b}' % label if kind == "json" else value))
    return members


def shard_outcome(path: Path) -> Any:
    """Classes, names with labels and pixels, and the account of a tar file; or its error."""
    try:
        source: Any = open_source(path)
    except ValueError as error:
        return str(error)
    examples = [source[i] for i in range(len(source))]
    pictures = {example.name: (example.label, example.image.getextrema()) for example in examples}
    assert len(pictures) == len(source)
    return source.classes, pictures, dict(source.account.counts)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=MEMBERS, seed=st.randoms(use_true_random=False))
def test_tar_of_any_members_accounts_for_all_in_any_order(
    tmp_path: Path, tree: dict[str, tuple[bool, dict[str, bytes]]], seed: Any
) -> None:
    if any({"cls", "CLS"} <= others.keys() for _, others in tree.values()):
        return  # two labels of a picture: the last one counts
    members = shard_members(tree)
    first = shard_outcome(write_tar(tmp_path / "a.tar", members))
    seed.shuffle(members)
    assert shard_outcome(write_tar(tmp_path / "a.tar", members)) == first
    if isinstance(first, str):
        assert first.startswith("data: no pictures in") or " but only " in first
        assert "\n" not in first
        return
    _, pictures, left_out = first
    used = [name for name, _ in members if name.rpartition(".")[2] != "npy"]
    assert sum(left_out.values()) == len(members) - len(pictures) - sum(
        name.rpartition(".")[0] in {key for key, (has_picture, _) in tree.items() if has_picture}
        for name in used if not name.endswith(".png")
    )  # fmt: skip


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(st.sampled_from(["1", "2", "10", "train-0", "a/3", "é", "a/.h", "b/4"]), min_size=1),
       suffix=st.sampled_from([".tar", ".parquet"]), seed=st.randoms(use_true_random=False))  # fmt: skip
def test_shards_of_any_names_are_the_same_in_any_order(tmp_path: Path, names: set[str], suffix: str, seed: Any) -> None:
    shutil.rmtree(tmp_path)
    for number, name in enumerate(sorted(names)):
        path = tmp_path / "data" / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".tar":
            write_tar(path, [(f"{number}.png", png_bytes(number)), (f"{number}.cls", b"%d" % number)])
        else:
            rows = {"image": [{"bytes": png_bytes(number), "path": None}], "label": [number]}
            parquet.write_table(pa.table(rows), path)
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"

    def read() -> Any:
        try:
            source: Any = open_source(tmp_path / "data")
        except ValueError as error:
            return str(error)
        return [source[i].label for i in range(len(source))], dict(source.account.counts), source_digest(source)

    first = read()
    with shuffled(seed):
        assert read() == first
    if isinstance(first, str):  # all of them deeper, or hidden
        assert "no pictures in" in first
    elif "train-0" in names:  # the others name no part
        assert first[0] == [sorted(names).index("train-0")]
    else:
        assert len(first[0]) == len(names - {"a/.h"})
