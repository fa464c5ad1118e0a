"""Outputs: what readers find in them, what is still missing, and files that are not theirs."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mar.assets import imagenet_classes
from mar.checkpoint.files import CheckpointError
from mar.config import ConfigError
from mar.sampling.plan import Plan, WorkUnit
from mar.sampling.progress import progress_text
from mar.sampling.sinks import SINKS, Job, Npz, PngFolder, Shards, Sink, prepare, shards
from mar.sampling.sinks.base import png, pngs
from mar.sampling.sinks.folder import class_folders

CLASSES = ("ant", "bee", "cat")
FORMATS = {"png": "out", "npz": "out.npz", "webdataset": "out"}


def job(out: Path, channels: int = 3, **changes: Any) -> Job:
    settings = {"guidance_scale": 1.0, **changes}
    plan = Plan((0, 1, 2, -1, 0, 1, 2), seed=3)
    return Job(out, plan, 3, (channels, 2, 4), CLASSES, settings, {"guidance_scale": 1.0})


def pictures(unit: WorkUnit, channels: int = 3) -> np.ndarray:
    """Every value says which picture it is of, and where."""
    values = np.arange(channels * 8, dtype=np.uint8).reshape(channels, 2, 4)
    return np.stack([values + 30 * (unit.first + i) for i in range(len(unit.labels))]).astype(np.uint8)


def fill(sink: Sink, channels: int = 3) -> None:
    for unit in prepare(sink) or []:
        sink.write(unit, pictures(unit, channels))
    for rank in (1, 0):
        sink.finish(rank, 2)
    sink.tidy()


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs_from_threads_are_those_of_one(channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mar.sampling.sinks.base.os.cpu_count", lambda: 5)
    drawn = np.random.default_rng(0).integers(256, size=(7, channels, 2, 4), dtype=np.uint8)
    [unit] = Plan((0, 1, 2, -1, 0, 1, 2), seed=3).units(7)
    own = [{"guidance_scale": 1.0, "label": None if ask < 0 else ask} for ask in unit.labels]
    alone = [
        png(image, {**facts, "seed": 3 * 2**32 + i}) for i, (image, facts) in enumerate(zip(drawn, own, strict=True))
    ]
    assert pngs(job(tmp_path, channels), unit, drawn) == alone


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_sink_writes_class_folders(channels: int, tmp_path: Path) -> None:
    fill(PngFolder(job(tmp_path / "out", channels)), channels)
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    folders = ["ant", "bee", "cat", "none", "ant", "bee", "cat"]
    assert names == {f"{folder}/{i:06}.png" for i, folder in enumerate(folders)}
    with Image.open(tmp_path / "out/none/000003.png") as image:
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        values = np.asarray(image).reshape(2, 4, channels).transpose(2, 0, 1)
        assert np.array_equal(values, pictures(WorkUnit(0, 3, (-1,), (0,)), channels)[0])
        assert json.loads(image.text["mar"]) == {"guidance_scale": 1.0, "label": None, "seed": 3 * 2**32 + 3}


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_sink_writes_adms_format(channels: int, tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    fill(Npz(job(path, channels)), channels)
    expected = pictures(WorkUnit(0, 0, (0,) * 7, (0,) * 7), channels).transpose(0, 2, 3, 1)
    with np.load(path) as file:
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], np.broadcast_to(expected, (7, 2, 4, 3)))
        assert file["arr_1"].tolist() == [0, 1, 2, -1, 0, 1, 2]
    with zipfile.ZipFile(path) as archive:  # it reads the member as a stream, header first
        assert archive.testzip() is None
        with archive.open("arr_0.npy") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            assert (shape, fortran, dtype) == ((7, 2, 4, 3), False, np.uint8)
            assert len(member.read()) == 7 * 24
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npz", "out.npz.json"]


def test_webdataset_sink_writes_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 6)
    fill(Shards(job(tmp_path / "out")))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000000.tar", "000001.tar", "generate.json"]
    found = {}
    for name in ("000000.tar", "000001.tar"):
        assert (tmp_path / "out" / name).stat().st_size % tarfile.RECORDSIZE == 0
        with tarfile.open(tmp_path / "out" / name) as tar:
            found[name] = [member.name for member in tar]
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name == "000006.png":
                    values = np.asarray(Image.open(file)).transpose(2, 0, 1)
                    assert np.array_equal(values, pictures(WorkUnit(0, 6, (2,), (0,)))[0])
                if member.name == "000003.cls":
                    assert file.read() == b"-1"
    assert found["000000.tar"] == [f"{i:06}.{kind}" for i in range(6) for kind in ("png", "cls")]
    assert found["000001.tar"] == ["000006.png", "000006.cls"]


@pytest.mark.parametrize("kind", FORMATS)
def test_sink_existing_units_are_skipped(kind: str, tmp_path: Path) -> None:
    sink = SINKS[kind](job(tmp_path / FORMATS[kind]))
    units = prepare(sink)
    assert units is not None
    assert [unit.number for unit in units] == [0, 1, 2]
    sink.write(units[1], pictures(units[1]))
    assert [unit.number for unit in prepare(sink) or []] == [0, 2]
    for unit in (units[0], units[2]):
        sink.write(unit, pictures(unit))
    if kind != "png":
        assert prepare(sink) == []  # all drawn, but still in parts
    sink.finish(0, 1)
    assert prepare(sink) is None
    sink.tidy()
    assert prepare(sink) is None


def test_sink_partial_unit_is_drawn_again(tmp_path: Path) -> None:
    sink = PngFolder(job(tmp_path / "out"))
    units = prepare(sink)
    assert units is not None
    sink.write(units[0], pictures(units[0]))
    (tmp_path / "out/bee/000001.png").unlink()
    assert [unit.number for unit in prepare(sink) or []] == [0, 1, 2]


@pytest.mark.parametrize("kind", FORMATS)
def test_sink_foreign_files_are_refused(kind: str, tmp_path: Path) -> None:
    out = tmp_path / FORMATS[kind]
    sink = SINKS[kind](job(out))
    sink.folder.mkdir()
    (sink.folder / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis.txt is there, but not from a run"):
        prepare(sink)
    assert not sink.manifest.exists()
    (sink.folder / "thesis.txt").rename(tmp_path / "thesis.txt")
    assert prepare(sink)
    (tmp_path / "thesis.txt").rename(sink.folder / "thesis.txt")
    with pytest.raises(ConfigError, match=r"holds thesis.txt, which this run did not write"):
        prepare(sink)


def test_npz_sink_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.npz").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"out.npz is there, but not from a run"):
        prepare(Npz(job(tmp_path / "out.npz")))
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


@pytest.mark.parametrize("kind", FORMATS)
def test_sink_other_settings_are_refused(kind: str, tmp_path: Path) -> None:
    sink = SINKS[kind](job(tmp_path / FORMATS[kind]))
    units = prepare(sink)
    assert units
    sink.write(units[0], pictures(units[0]))
    with pytest.raises(ConfigError, match=r"begun with guidance_scale 1.0, not 2.0, steps None, not 4; give the same"):
        prepare(SINKS[kind](job(tmp_path / FORMATS[kind], guidance_scale=2.0, steps=4)))
    sink = SINKS[kind](job(tmp_path / FORMATS[kind], mar="another version"))
    assert prepare(sink)
    sink.manifest.write_text('{"guidance": ')
    with pytest.raises(ConfigError, match="damaged"):
        prepare(sink)


@pytest.mark.parametrize("kind", FORMATS)
def test_sink_without_images_accepts_other_settings(kind: str, tmp_path: Path) -> None:
    assert prepare(SINKS[kind](job(tmp_path / FORMATS[kind])))
    sink = SINKS[kind](job(tmp_path / FORMATS[kind], guidance_scale=2.0))
    units = prepare(sink)
    assert units
    assert json.loads(sink.manifest.read_text())["guidance_scale"] == 2.0
    sink.manifest.write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match=r"begun with guidance_scale None, not 2\.0"):
        prepare(sink)
    assert sink.manifest.read_text() == '{"mine": 1}'


def test_sink_leftovers_are_removed_hidden_files_kept(tmp_path: Path) -> None:
    sink = PngFolder(job(tmp_path / "out"))
    (tmp_path / "out/ant").mkdir(parents=True)
    for name in (".generate.json.abcd_123", "ant/.000000.png.xyz12345", ".hidden", "ant/.000001.png.xyz12345"):
        (tmp_path / "out" / name).write_text("half")
    assert prepare(sink)
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {"generate.json", ".hidden", "ant/.000001.png.xyz12345"}  # picture 1 is no ant


def test_sink_damaged_part_is_named(tmp_path: Path) -> None:
    sink = Npz(job(tmp_path / "out.npz"))
    for unit in prepare(sink) or []:
        sink.write(unit, pictures(unit))
    part = tmp_path / "out.npz.parts/000003.npy"
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"000003.npy is damaged; delete it"):
        sink.finish(0, 1)
    with part.open("wb") as file:
        np.save(file, np.zeros((3, 2, 4, 1), dtype=np.uint8))
    with pytest.raises(ConfigError, match=r"000003.npy has no uint8 \(3, 2, 4, 3\)"):
        sink.finish(0, 1)
    part.unlink()
    assert [unit.number for unit in prepare(sink) or []] == [1]
    assert not (tmp_path / "out.npz").exists()


def test_sink_too_little_disk_fails_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mar.checkpoint.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 300})())
    with pytest.raises(CheckpointError, match="336 bytes are needed, but only 300 bytes are free"):
        prepare(Npz(job(tmp_path / "out.npz")))
    assert not list(tmp_path.iterdir())


def test_sink_other_image_modes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 channels"):
        job(tmp_path, channels=2)


def test_folder_sink_class_folders_are_distinct() -> None:
    assert class_folders(("a b/c", "None", "../..", "x", "X")) == {
        0: "a-b-c", 1: "None-1", 2: "2", 3: "x-3", 4: "X-4", -1: "none",
    }  # fmt: skip
    assert class_folders(("a/b", "a b", "a-b-0")) == {0: "a-b-0-0", 1: "a-b-1", 2: "a-b-0-2", -1: "none"}
    folders = class_folders(imagenet_classes())
    assert len({name.casefold() for name in folders.values()}) == 1001
    assert folders[207] == "golden-retriever"


def test_progress_shows_rate_and_time_left() -> None:
    assert progress_text(1000, 1000, 1000, 0.0) == "1,000 of 1,000 pictures"
    assert progress_text(640, 50_000, 600, 10.0) == "640 of 50,000 pictures, 4.0 a second, 3:25:40 left"
    assert progress_text(602.0, 610, 600, 5.0) == "602 of 610 pictures, 2.5 s a picture, 0:00:20 left"
