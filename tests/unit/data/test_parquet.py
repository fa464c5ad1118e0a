from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from mar.data.images import UnreadableImage
from mar.data.sources import open_source


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
    datasets.disable_progress_bars()


def png(value: int) -> dict[str, Any]:
    file = BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def table(labels: list[Any] | None, kind: Any = None, start: int = 0) -> datasets.Dataset:
    count = 3 if labels is None else len(labels)
    columns: dict[str, Any] = {"image": [png(start + i) for i in range(count)]}
    features: dict[str, Any] = {"image": datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, kind
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_parquet_with_class_names(tmp_path: Path) -> None:
    kind = datasets.ClassLabel(names=["cat", "dog"])
    table([1, 0, 1], kind).to_parquet(tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert source.classes == ("cat", "dog")
    assert [source[i].label for i in range(len(source))] == [1, 0, 1]
    assert [source[i].image.getpixel((0, 0)) for i in range(3)] == [0, 1, 2]
    assert source[2].name == f"{tmp_path / 'x.parquet'}#2"
    assert source.flips


def test_parquet_labels_are_numbers_or_names(tmp_path: Path) -> None:
    table([2, None, 0], datasets.Value("int64")).to_parquet(tmp_path / "numbers.parquet")
    numbers = open_source(tmp_path / "numbers.parquet")
    assert numbers.classes == ("0", "1", "2")
    assert [numbers[i].label for i in range(3)] == [2, -1, 0]
    table([True, None, False], datasets.Value("bool")).to_parquet(tmp_path / "yes.parquet")
    yes = open_source(tmp_path / "yes.parquet")
    assert (yes.classes, [yes[i].label for i in range(3)]) == (("0", "1"), [1, -1, 0])
    table(["b10", "b2", "b10"], datasets.Value("string")).to_parquet(tmp_path / "names.parquet")
    named = open_source(tmp_path / "names.parquet")
    assert named.classes == ("b2", "b10")
    assert [named[i].label for i in range(3)] == [1, 0, 1]


def test_parquet_without_datasets_schema_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"img": [png(7)], "other": [1]}), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert source.classes == ()
    assert source[0].image.getpixel((0, 0)) == 7
    assert source[0].label == -1


def test_parquet_folder_has_splits(tmp_path: Path) -> None:
    for i, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]):
        table(None, start=10 * i).to_parquet(tmp_path / "data" / f"{name}.parquet")
    train, test = open_source(tmp_path), open_source(tmp_path, "test")
    assert [train[i].image.getpixel((0, 0)) for i in range(len(train))] == [0, 1, 2, 10, 11, 12]
    assert [test[i].image.getpixel((0, 0)) for i in range(len(test))] == [20, 21, 22]


def test_parquet_files_without_split_are_for_training(tmp_path: Path) -> None:
    table(None).to_parquet(tmp_path / "constraints.parquet")
    assert len(open_source(tmp_path)) == 3
    with pytest.raises(ValueError, match="'test' in its name; there is constraints"):
        open_source(tmp_path, "test")


def test_dataset_saved_to_disk_is_read(tmp_path: Path) -> None:
    table(None).save_to_disk(tmp_path / "one")
    assert open_source(tmp_path / "one")[1].image.getpixel((0, 0)) == 1
    datasets.DatasetDict(train=table(None), validation=table(None, start=5)).save_to_disk(tmp_path / "two")
    assert open_source(tmp_path / "two", "test")[0].image.getpixel((0, 0)) == 5


def test_parquet_broken_cell_is_an_unreadable_image(tmp_path: Path) -> None:
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no picture", "path": None}, None, png(3)]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    broken.to_parquet(tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    for index in (0, 1):
        with pytest.raises(UnreadableImage, match=f"x.parquet#{index}"):
            source[index]
    assert source[2].image.getpixel((0, 0)) == 3


def test_parquet_unsuitable_tables_are_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(ValueError, match=r"no column of pictures .* it has text"):
        open_source(tmp_path / "text.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.parquet can't be read as Parquet"):
        open_source(tmp_path / "junk.parquet")
