"""Data sets as the Hub keeps them, and streams of files: the Hub is a folder here, the web a memory."""

from __future__ import annotations

import io
import pickle
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import fsspec
import pytest
from PIL import Image
from shard_files import image_numbers, png_bytes, write_tar, write_tar_shards

from mar.data import hub
from mar.data.images import Transform, UnreadableImage
from mar.data.loader import batches, in_order
from mar.data.paths import hub_name
from mar.data.sources import open_data, open_source
from mar.data.stream import StreamSource

NAMES = datasets.ClassLabel(names=["cat", "dog"])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
    datasets.disable_progress_bars()


def parquet(path: Path, first: int, count: int = 3, kind: Any = NAMES, labels: list[Any] | None = None) -> None:
    columns = {
        "image": [{"bytes": png_bytes(i), "path": None} for i in range(first, first + count)],
        "label": labels or [i % 2 for i in range(first, first + count)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A data set of Parquet files as `push_to_hub` lays them out."""
    folder = tmp_path / "repository [1]"  # brackets, since `datasets` takes names for patterns
    for number, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]):
        parquet(folder / "data" / f"{name}.parquet", 3 * number)
    return folder


def opened(spec: str, classes: int = 0) -> StreamSource:
    source = open_data(spec, classes)
    assert isinstance(source, StreamSource)
    return source


def shown(source: StreamSource, shard: int) -> list[tuple[str, int, int]]:
    examples = [source.example(row) for row in source.shards.samples(shard)]
    return [(e.name, e.image.getpixel((0, 0)) // 5, e.label) for e in examples]


def test_hub_names_are_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_name("someone/pictures") == hub_name("hub:someone/pictures") == ("someone/pictures", None)
    assert hub_name("hub:old-name@small") == ("old-name", "small")
    assert hub_name("someone/pictures@v1.0") == ("someone/pictures", "v1.0")
    assert [hub_name(name) for name in ("pictures", "/a/b", "a/b/c", "../b/c", "a/{b}", "a/b.tar")] == [None] * 6
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "pictures").mkdir(parents=True)
    assert hub_name("someone/pictures") is None
    with pytest.raises(ValueError, match="names no data set"):
        hub_name("hub:@small")


def test_hub_dataset_is_a_table(repository: Path, tmp_path: Path) -> None:
    place = repository.rename(tmp_path / "repository")
    source = open_source(f"hub:{place}")
    assert source.classes == ("cat", "dog")
    assert [(source[i].image.getpixel((0, 0)) // 5, source[i].label) for i in range(len(source))] == [
        (i, i % 2) for i in range(6)
    ]
    assert len(open_source(f"hub:{place}", "test")) == 3
    with pytest.raises(ValueError, match=r"can't be opened on the Hub, and is no path here: .*nosuch"):
        open_source(f"hub:{place}@nosuch")


def test_hub_configuration_and_split_are_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": png_bytes(1), "path": None}]}, features=datasets.Features({"image": datasets.Image()})
    )
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *names: ["valid", "train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((names, split)) or table)
    assert open_source("someone/pictures@large")[0].name == "someone/pictures@large#0"
    open_source("someone/pictures", "test")
    assert asked == [(("someone/pictures", "large"), "train"), (("someone/pictures", None), "valid")]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *names: ["train"])
    with pytest.raises(ValueError, match="someone/pictures has no split 'test'; it has train"):
        open_source("someone/pictures", "test")


@pytest.mark.parametrize("spec", ["someone/pictures", "stream:someone/pictures", "stream:hub:someone/pictures"])
def test_hub_without_a_network_fails_in_one_line(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="pictures can't be opened on the Hub, and is no path here: ") as caught:
        open_data(spec)
    assert "\n" not in str(caught.value)


def test_hub_http_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("aiohttp")
    monkeypatch.setattr(library, "ClientError", type("ClientError", (Exception,), {}), raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", library)

    def fail(*arguments: Any) -> None:
        raise library.ClientError("gone\nand more")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(ValueError, match=r"^data: a/b can't be opened on the Hub, and is no path here: gone$"):
        open_source("a/b")


def test_stream_of_parquet_files_is_read(repository: Path) -> None:
    for spec in (f"stream:{repository}", f"stream:hub:{repository}"):
        if "hub" in spec:
            spec = f"stream:hub:{repository.rename(repository.with_name('repository'))}"
        source = opened(spec)
        assert source.classes == ("cat", "dog")
        assert source.flips
        files = [f"train-0000{i}-of-00002.parquet" for i in range(2)]
        assert source.shards.names == tuple(files)
        again = pickle.loads(pickle.dumps(source))
        assert shown(again, 1) == [(f"{files[1]}#{i}", 3 + i, (3 + i) % 2) for i in range(3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_of_tar_files_is_like_other_streams(tmp_path: Path, workers: int) -> None:
    for spec in (f"stream:{write_tar_shards(tmp_path / 'a')}", f"stream:{tmp_path}/a/shard-{{000..003}}.tar"):
        source = opened(spec, classes=3)
        assert source.classes == ("0", "1", "2")
        stream = batches(source, Transform(8, 1), batch=4, seed=0, workers=workers)
        found = list(islice(stream, 6))
        assert sorted(number for batch in found for number in image_numbers(batch)) == list(range(24))
        assert all(batch.labels.tolist() == [number % 3 for number in image_numbers(batch)] for batch in found)


def test_stream_of_urls_is_read(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in write_tar_shards(tmp_path).glob("*.tar"):
        memory.pipe(f"/web/{path.name}", path.read_bytes())
    for spec in ("stream:memory://web/shard-{000..003}.tar", "stream:memory://web/*.tar"):
        source = opened(spec, 3)
        assert source.shards.names == tuple(f"shard-00{i}.tar" for i in range(4))
        assert [number for _, number, _ in shown(source, 2)] == list(range(12, 18))
    with pytest.raises(ValueError, match=r"can't be opened: .*shard-004\.tar"):
        open_data("stream:memory://web/shard-{000..004}.tar")


def test_stream_images_beside_their_table_are_fetched(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.png").write_bytes(png_bytes(len(name) + (name == "dog")))
    source = opened(f"stream:hub:{tmp_path}")
    assert source.classes == ("cat", "dog")
    assert [(number, label) for _, number, label in shown(source, 0)] == [(3, 0), (4, 1)]
    row = next(source.shards.samples(0))
    (tmp_path / "train" / "cat" / "1.png").unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        source.example(row)


def test_stream_truncated_shard_is_skipped_and_named(tmp_path: Path) -> None:
    source = opened(f"stream:{write_tar_shards(tmp_path)}", 3)
    path = tmp_path / "shard-001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: 512 * 13])  # three pictures of four blocks each, and a header
    rows = source.shards.samples(1)
    assert [row.name for row in islice(rows, 3)] == [f"shard-001.tar/{i:05}.png" for i in range(6, 9)]
    with pytest.raises(UnreadableImage, match=r"shard-001\.tar from its picture 3 on \(unexpected end of data\)"):
        next(rows)
    seen, skipped = shown_while_training(source)
    assert seen == set(range(24)) - {9, 10, 11}
    path.unlink()
    seen, skipped = shown_while_training(source)
    assert seen == set(range(24)) - set(range(6, 12))
    assert {name.partition(" (")[0] for name in skipped} == {"shard-001.tar from its picture 0 on"}
    assert len(list(in_order(source, Transform(8, 1), batch=18))) == 1
    for other in tmp_path.glob("*.tar"):
        other.unlink()
    with pytest.raises(ValueError, match=r"no pictures in 5 shards .*, the last of them shard-00\d\.tar from"):
        shown_while_training(source)


def shown_while_training(source: StreamSource) -> tuple[set[int], set[str]]:
    """Of two epochs of 24 pictures: which came, and what was skipped."""
    source.cursors = {}
    found = list(islice(batches(source, Transform(8, 1), batch=4, seed=0), 12))
    names = {name for batch in found for name in batch.skipped}
    return {number for batch in found for number in image_numbers(batch)}, names


def test_stream_labels_are_read(tmp_path: Path) -> None:
    parquet(tmp_path / "numbers.parquet", 0, 3, datasets.Value("int64"), [4, -1, None])
    spec = f"stream:{tmp_path / 'numbers.parquet'}"
    assert [row.label for row in opened(spec, 5).shards.samples(0)] == [4, -1, -1]
    unconditional = opened(spec)
    assert unconditional.classes == ()
    assert [row.label for row in unconditional.shards.samples(0)] == [-1, -1, -1]
    few = opened(spec, 3)
    with pytest.raises(ValueError, match=r"numbers\.parquet#0 has the label 4, but there are 3 classes"):
        few.example(next(few.shards.samples(0)))
    parquet(tmp_path / "names.parquet", 0, 1, datasets.Value("string"), ["dog"])
    assert opened(f"stream:{tmp_path / 'names.parquet'}").classes == ()
    write_tar(tmp_path / "none.tar", [("a.png", png_bytes(1))])
    assert opened(f"stream:{tmp_path / 'none.tar'}", 4).classes == ()  # which the run compares with the model's
    with pytest.raises(ValueError, match=r"labels of .* are names, which have no numbers in a stream"):
        open_data(f"stream:{tmp_path / 'names.parquet'}", 2)


def test_stream_labels_in_json_are_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{i}.{e}", d) for i in range(2) for e, d in _pair(i)])
    assert [row.label for row in opened(f"stream:{tmp_path / 'a.tar'}", 9).shards.samples(0)] == [7, 8]
    (tmp_path / "repository").mkdir()
    (tmp_path / "a.tar").rename(tmp_path / "repository" / "a.tar")
    table = open_source(f"hub:{tmp_path / 'repository'}")
    assert [table[i].label for i in range(2)] == [7, 8]
    assert len(table.classes) == 9


def _pair(number: int) -> list[tuple[str, bytes]]:
    return [("png", png_bytes(number)), ("json", b'{"label": %d, "width": 8}' % (7 + number))]


def test_stream_of_other_sources_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    for spec, words in {
        f"stream:{tmp_path}": r"has no \.tar or \.parquet files; a stream is of these",
        f"stream:{tmp_path / 'nowhere'}": "does not exist; a stream is of these",
        f"stream:{tmp_path / 'a.png'}": r"stands for \.png files",
        "stream:": "has no",
    }.items():
        with pytest.raises(ValueError, match=words):
            open_data(spec)
    with pytest.raises(ValueError, match="is a stream, from which only `mar train` reads; leave stream: out"):
        open_source("stream:someone/pictures")


def test_stream_of_a_table_without_columns_is_refused() -> None:
    unknown = datasets.IterableDataset.from_generator(lambda: iter([{"image": 1}]))
    with pytest.raises(ValueError, match="does not tell its columns"):
        hub.DatasetShards(unknown, "x", [], 0)
