"""WebDataset shards: their contents, their faults, and each image once an epoch."""

from __future__ import annotations

import json
import logging
import os
import pickle
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from shard_files import image_numbers, png_bytes, write_tar, write_tar_shards
from tiny import open_tiny_run, tiny_train_config

from mar.config import ConfigError
from mar.data import loader
from mar.data.folder import FolderSource
from mar.data.images import Source, Transform, UnreadableImage, source_digest
from mar.data.loader import batches
from mar.data.paths import expand_braces
from mar.data.sources import open_source
from mar.data.webdataset import TarSource
from mar.sampling.plan import Plan
from mar.sampling.sinks import Job, Shards, prepare

TO_TENSOR = Transform(8, 1)


def values(source: Source) -> list[int]:
    return [int(np.asarray(source[i].image)[0, 0]) // 5 for i in range(len(source))]


def labels(source: Source) -> list[int]:
    return [source[i].label for i in range(len(source))]


def test_webdataset_folder_gives_images_and_labels(tmp_path: Path) -> None:
    source = open_source(write_tar_shards(tmp_path))
    assert isinstance(source, TarSource)
    assert source.classes == ("0", "1", "2")
    assert source.flips
    assert values(source) == list(range(24))
    assert labels(source) == [i % 3 for i in range(24)]
    assert source[7].name == str(tmp_path / "shard-001.tar" / "00007.png")


def test_webdataset_members_are_grouped_by_key(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            ("x/a.json", json.dumps({"label": "dog", "caption": "a dog"}).encode()),
            ("x/a.v1.png", png_bytes(1)),
            ("x/b.seg.png", png_bytes(2)),
            ("x/b.jpg", png_bytes(3)),  # a second picture of the same name
            ("x/b.cls", b" cat10\n"),
            ("x/b.json", b'{"label": "dog"}'),  # .cls counts more
            ("c.txt", b"no picture"),
            ("._d.png", b"of another system"),
            ("d.png", png_bytes(4)),
            ("e.PNG", png_bytes(5)),
            ("e.json", b"not json"),
            ("f.png", png_bytes(6)),
            ("f.cls", b"cat2"),
        ],
        tarfile.PAX_FORMAT,
    )
    source = open_source(tmp_path / "a.tar")
    assert source.classes == ("cat2", "cat10", "dog")
    assert values(source) == [1, 2, 4, 5, 6]
    assert labels(source) == [2, 1, -1, -1, 0]


def test_webdataset_boolean_labels_are_read(tmp_path: Path) -> None:
    said = [True, False, True]
    members = [(f"{k}.{kind}", data) for k, label in enumerate(said) for kind, data in (
        ("png", png_bytes(k)), ("json", json.dumps({"label": label}).encode()),
    )]  # fmt: skip
    source = open_source(write_tar(tmp_path / "a.tar", members))
    assert (source.classes, labels(source)) == (("0", "1"), [1, 0, 1])


def test_webdataset_long_names_and_negative_labels(tmp_path: Path) -> None:
    long = "a/" + "b" * 150
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        write_tar(
            tmp_path / "a.tar", [(f"{long}.png", png_bytes(9)), (f"{long}.cls", b"-1"), ("c.png", png_bytes(8))], form
        )
        source = open_source(tmp_path / "a.tar")
        assert (values(source), labels(source), source.classes) == ([9, 8], [-1, -1], ())
        assert source[0].name.endswith("b.png")


def test_webdataset_of_mar_generate_is_read(tmp_path: Path) -> None:
    plan = Plan((0, 1, 2, -1, 0), seed=3)
    sink = Shards(Job(tmp_path / "out", plan, 2, (1, 8, 8), ("ant", "bee", "cat"), {}, {}))
    for unit in prepare(sink) or []:
        grays = 5 * (unit.first + np.arange(len(unit.labels), dtype=np.uint8))
        sink.write(unit, np.tile(grays[:, None, None, None], (1, 1, 8, 8)))
    sink.finish(0, 1)
    sink.tidy()
    source = open_source(tmp_path / "out")
    assert values(source) == [0, 1, 2, 3, 4]
    assert labels(source) == [0, 1, 2, -1, 0]


def test_webdataset_splits_and_patterns_are_found(tmp_path: Path) -> None:
    for number, name in enumerate(["x-train-10", "x-train-9", "x-val-0"]):
        write_tar(tmp_path / f"{name}.tar", [("a.png", png_bytes(number))])
    write_tar(tmp_path / "parts" / "train" / "b.tar", [("a.png", png_bytes(7))])
    assert values(open_source(tmp_path)) == [7, 1, 0]  # 9 before 10
    assert values(open_source(tmp_path, "test")) == [2]
    assert values(open_source(tmp_path / "parts")) == [7]
    with pytest.raises(ValueError, match=r"no \.tar file in .* has 'test' in its name; there is b\.tar"):
        open_source(tmp_path / "parts", "test")
    assert values(open_source(f"{tmp_path}/x-{{train,val}}-*.tar")) == [1, 0, 2]
    assert values(open_source(f"{tmp_path}/x-train-{{9..10}}.tar")) == [1, 0]
    with pytest.raises(ValueError, match=r"there is no .*x-train-11\.tar, which .* asks for"):
        open_source(f"{tmp_path}/x-train-{{9..11}}.tar")
    with pytest.raises(ValueError, match="none are told to be for 'test'"):
        open_source(f"{tmp_path}/x-*.tar", "test")
    assert expand_braces("a-{008..011}.{tar,zip}")[:3] == ["a-008.tar", "a-008.zip", "a-009.tar"]
    (tmp_path / "x-train-9.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"stands for \.tar, \.zip files"):
        open_source(f"{tmp_path}/x-train-9.*")


def test_webdataset_images_beside_tar_files_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "backup.tar", [("a.png", png_bytes(1))])
    (tmp_path / "preview.png").write_bytes(png_bytes(2))
    assert isinstance(open_source(tmp_path), TarSource)
    assert "pictures beside the shards: 1 (preview.png)" in caplog.text
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.png").write_bytes(png_bytes(3))
    assert isinstance(open_source(tmp_path), FolderSource)
    assert "shards beside the pictures: 1 (backup.tar)" in caplog.text


def test_webdataset_unsuitable_tars_are_refused(tmp_path: Path) -> None:
    path = write_tar_shards(tmp_path) / "shard-002.tar"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[2048:2300] = b"x" * 252
    for wrong in (whole[:5000], whole[: 512 * 3], bytes(damaged), b"junk" * 1000, b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"shard-002\.tar is cut short or no plain tar .*; fetch it again"):
            open_source(tmp_path)
    write_tar(tmp_path / "none" / "a.tar", [("a.txt", b"x")])
    with pytest.raises(ValueError, match=r"no pictures in .*none \(1 tar files\): looked for"):
        open_source(tmp_path / "none")


def test_webdataset_digest_follows_the_images(tmp_path: Path) -> None:
    def digest(*members: tuple[str, bytes]) -> str:
        return source_digest(open_source(write_tar(tmp_path / "a.tar", members)))

    first = digest(("a.png", png_bytes(1)), ("a.cls", b"1"))
    assert digest(("a.png", png_bytes(1)), ("a.cls", b"1")) == first
    others = [digest(("a.png", png_bytes(1)), ("a.cls", b"0")), digest(("b.png", png_bytes(1)), ("b.cls", b"1"))]
    others.append(digest(("a.png", png_bytes(1) + b"."), ("a.cls", b"1")))
    assert len({first, *others}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_epoch_has_every_image_once_across_process_counts(tmp_path: Path, workers: int) -> None:
    source = pickle.loads(pickle.dumps(open_source(write_tar_shards(tmp_path))))

    def some(start: int, count: int, rank: int = 0, world: int = 1) -> list[int]:
        stream = batches(source, TO_TENSOR, batch=4, seed=1, start=start, rank=rank, world=world, workers=workers)
        return [number for batch in islice(stream, count) for number in image_numbers(batch)]

    whole = some(0, 12)
    assert sorted(whole[:24]) == sorted(whole[24:]) == list(range(24))
    assert whole[:24] != whole[24:]
    assert sorted(some(0, 3, 0, 2) + some(0, 3, 1, 2)) == sorted(whole[:12])
    assert some(12, 9) == whole[12:]


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_webdataset_vanished_image_is_skipped_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(loader, "MAX_CROPS_BYTES", 0)
    if kind == "tar":
        gone, expected = write_tar_shards(tmp_path, (5, 1)) / "shard-001.tar", "shard-001.tar/00005.png"
    else:
        for i in range(6):
            (tmp_path / f"{i}.png").write_bytes(png_bytes(i))
        gone, expected = tmp_path / "5.png", "5.png"
    stream = batches(open_source(tmp_path), TO_TENSOR, batch=6, seed=0)
    assert sorted(image_numbers(next(stream))) == list(range(6))
    gone.unlink()
    batch = next(stream)
    assert sorted(image_numbers(batch)) == [0, 0, 1, 2, 3, 4]
    assert batch.skipped == (str(tmp_path / expected),)
    with caplog.at_level(logging.WARNING):
        next(stream)
    assert caplog.text.count(expected) == 1


def test_webdataset_rewritten_tar_is_detected(tmp_path: Path) -> None:
    source = open_source(write_tar_shards(tmp_path))
    path = tmp_path / "shard-000.tar"
    os.utime(path, ns=(1, 1))
    with pytest.raises(UnreadableImage, match="is not the one that was opened"):
        source[0]
    assert source[6].label == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_label_beyond_the_classes_is_one_line(tmp_path: Path, workers: int) -> None:
    source = open_source(write_tar_shards(tmp_path))
    source.classes = ("0", "1")
    with pytest.raises(ValueError, match=r"^[^\n]*\.png has the label 2, but there are 2 classes$"):
        list(islice(batches(source, TO_TENSOR, batch=12, seed=0, workers=workers), 2))


def test_run_with_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the model has 2 classes, but .* has 3"):
        open_tiny_run(tiny_train_config(write_tar_shards(tmp_path / "data")), tmp_path / "run")
