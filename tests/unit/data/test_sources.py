from __future__ import annotations

import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from orientations import ORIENTATIONS, file_bytes, steps
from PIL import Image, features
from shard_files import write_tar

from mar.data.folder import FolderSource
from mar.data.images import Transform, UnreadableImage
from mar.data.loader import in_order
from mar.data.sources import FashionSource, open_data, open_source


def paint(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)
    return path


def names(source: FolderSource) -> list[str]:
    return [Path(source[i].name).relative_to(source.folder).as_posix() for i in range(len(source))]


def test_class_folders_give_labels(tmp_path: Path) -> None:
    for name in ("class10/a.png", "class2/img10.png", "class2/img2.PNG", "class2/deep/er/x.jpeg", ".hidden/h.png"):
        paint(tmp_path / name)
    paint(tmp_path / "class2" / ".thumb.png")
    (tmp_path / "class2" / "notes.txt").write_text("not a picture")
    source = FolderSource(tmp_path)
    assert source.classes == ("class2", "class10")
    assert names(source) == ["class2/img2.PNG", "class2/img10.png", "class2/deep/er/x.jpeg", "class10/a.png"]
    assert [source[i].label for i in range(4)] == [0, 0, 0, 1]


def test_flat_folder_has_no_classes(tmp_path: Path) -> None:
    for i in (10, 9, 1):
        paint(tmp_path / f"{i}.png", i)
    source = open_source(tmp_path)
    assert source.classes == ()
    assert [(source[i].label, source[i].image.getpixel((0, 0))) for i in range(3)] == [(-1, 1), (-1, 9), (-1, 10)]


def test_folder_ignored_files_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paint(tmp_path / "cat" / "a.png")
    paint(tmp_path / "stray.png")
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.WARNING, "mar.data"):
        assert FolderSource(tmp_path).classes == ("cat",)
    assert "pictures beside the class folders: 1 (stray.png)" in caplog.text
    assert "folders without pictures: 1 (empty)" in caplog.text


def test_split_folders_are_not_classes(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "cat" / "a.png", 1)
    paint(tmp_path / "val" / "cat" / "b.png", 2)
    assert open_source(tmp_path).classes == ("cat",)
    assert open_source(tmp_path, "test")[0].image.getpixel((0, 0)) == 2
    paint(tmp_path / "dog" / "c.png")
    assert open_source(tmp_path).classes == ("cat",), "train and test parts: the rest is beside them"
    (tmp_path / "val" / "cat" / "b.png").unlink()
    assert open_source(tmp_path).classes == ("dog", "train"), "a train is a thing, too"


def test_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(ValueError, match=f"no pictures in {tmp_path}: looked for .*.jpg"):
        open_source(tmp_path)


def test_source_of_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; expected fashion, a folder"):
        open_source(tmp_path / "nothing")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither a folder nor a \.parquet or \.tar file"):
        open_source(tmp_path / "a.zip")
    with pytest.raises(ValueError, match="split: got 'valid'"):
        open_source("fashion", "valid")
    paint(tmp_path / "train" / "cat" / "a.png")
    (tmp_path / "a.zip").unlink()
    with pytest.raises(ValueError, match="no folder for 'test'"):
        open_source(tmp_path, "test")


def test_source_bundled_by_name_is_opened() -> None:
    source = open_source("fashion", "test")
    assert isinstance(source, FashionSource)
    assert source[3].name == "fashion/test/3"
    assert source.classes[source[1].label] == "Trouser"


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated png", "truncated jpeg", "gone"])
def test_damaged_files_are_unreadable_images(tmp_path: Path, damage: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = tmp_path / ("x.jpeg" if "jpeg" in damage else "x.png")
    Image.fromarray(pixels).save(path)
    source = FolderSource(tmp_path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "garbage": b"\x89PNG\r\n\x1a\n" + b"?" * 99}.get(damage, whole[: len(whole) // 2]))
    if damage == "gone":
        path.unlink()
    with pytest.raises(UnreadableImage, match="can't read the picture") as error:
        source[0]
    assert error.value.name == str(path)
    assert error.value.why


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_damaged_avif_is_an_unreadable_image(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (9, 80, 200)).save(tmp_path / "x.avif")
    whole = (tmp_path / "x.avif").read_bytes()
    (tmp_path / "x.avif").write_bytes(whole[:-24] + b"\xff" * 24)
    with pytest.raises(UnreadableImage, match=r"can't read the picture .*x\.avif: .*[Dd]ecod"):
        FolderSource(tmp_path)[0]


@pytest.mark.parametrize("kind", ["folder", "tar", "stream", "parquet"])
def test_source_of_any_kind_gives_pictures_upright(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{orientation}.png": file_bytes(steps(), orientation) for orientation in ORIENTATIONS}
    if kind == "folder":
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
    elif kind == "parquet":
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
        datasets.disable_progress_bars()
        rows = [{"bytes": data, "path": None} for data in files.values()]
        types = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": rows}, features=types).to_parquet(tmp_path / "x.parquet")
    else:
        write_tar(tmp_path / "x.tar", files.items())
    where = {"tar": str(tmp_path / "x.tar"), "stream": f"stream:{tmp_path / 'x.tar'}"}
    source = open_data(where.get(kind, str(tmp_path / "x.parquet" if kind == "parquet" else tmp_path)))
    [images] = in_order(source, Transform((32, 48), 1, upright=True), limit=8)
    assert torch.equal(images, Transform((32, 48), 1)(steps()).expand(8, -1, -1, -1))
    [lying] = in_order(source, Transform((32, 48), 1), limit=8)
    assert not torch.equal(lying, images)
