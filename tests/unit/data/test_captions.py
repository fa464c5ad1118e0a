"""Captions of every kind of source: what is taken, what is left out, and what is said of bad ones."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from shard_files import image_numbers, png_bytes, write_tar

from mar.config import ConfigError, TrainConfig
from mar.data.cache_writer import describe_cache, finish_cache, prepare_cache, update_captions, write_shards
from mar.data.captions import CaptionError, captions_of, pick_caption
from mar.data.folder import FolderSource
from mar.data.images import Transform
from mar.data.latent_cache import CAPTIONS, LatentSource, write_captions
from mar.data.loader import batches
from mar.data.sources import open_data, open_source
from mar.data.splits import open_test_split, subset, train_val_split
from mar.data.stream import StreamSource
from mar.tokenizer import PixelTokenizer
from mar.training.run import with_captions

CROP = Transform(8, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
    datasets.disable_progress_bars()


def paint(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(number))
    return folder


def jsonl(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row(name: str, text: Any, column: str = "text") -> dict[str, Any]:
    return {"file_name": name, column: text}


# ---- folders


def test_folder_metadata_jsonl_is_read(tmp_path: Path) -> None:
    paint(tmp_path, "a.png", "b.PNG", "c.png")
    jsonl(tmp_path / "metadata.jsonl", row("b.PNG", "  two\n cats "), row("a.png", "one"), row("c.png", ["x", "y"]))
    source = open_source(tmp_path)
    assert captions_of(source) == (("one",), ("two cats",), ("x", "y"))
    assert [source[i].captions for i in range(3)] == [("one",), ("two cats",), ("x", "y")]


def test_folder_several_rows_are_several_captions(tmp_path: Path) -> None:
    paint(tmp_path, "a.png")
    jsonl(tmp_path / "metadata.jsonl", row("a.png", "one"), row("a.png", "two"))
    assert captions_of(open_source(tmp_path)) == (("one", "two"),)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_folder_metadata_csv_of_windows_is_read(tmp_path: Path, delimiter: str) -> None:
    paint(tmp_path, "cat/a.png", "dog/b.png")
    lines = ["file_name,caption", 'cat\\a.png,"a cat; sitting, ""so""\r\non two lines"', "./dog/b.png,7"]
    text = "\r\n".join(line.replace(",", delimiter, 1) for line in lines) + "\r\n"
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = open_source(tmp_path)
    assert source.classes == ("cat", "dog")
    assert captions_of(source) == (('a cat; sitting, "so" on two lines',), ("7",))


def test_folder_metadata_of_class_folders_goes_before_that_above(tmp_path: Path) -> None:
    paint(tmp_path, "cat/a.png", "cat/b.png", "dog/c.png")
    jsonl(tmp_path / "metadata.jsonl", row("cat/a.png", "far"), row("dog/c.png", "a dog"))
    jsonl(tmp_path / "cat" / "metadata.jsonl", row("a.png", "near"), row("b.png", "b"))
    assert captions_of(open_source(tmp_path)) == (("near",), ("b",), ("a dog",))


def test_folder_splits_have_captions_of_their_own_or_above(tmp_path: Path) -> None:
    paint(tmp_path, "train/a.png", "val/b.png")
    jsonl(tmp_path / "metadata.jsonl", row("train/a.png", "above"), row("val/b.png", "b"))
    assert captions_of(open_source(tmp_path)) == (("above",),)
    assert captions_of(open_test_split(tmp_path)) == (("b",),)
    jsonl(tmp_path / "train" / "metadata.jsonl", row("a.png", "own"))
    assert captions_of(open_source(tmp_path)) == (("own",),)


def test_folder_named_column_is_read(tmp_path: Path) -> None:
    paint(tmp_path, "a.png")
    jsonl(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "t", "alt": "words"})
    assert captions_of(open_source(tmp_path, caption_column="alt")) == (("words",),)
    with pytest.raises(CaptionError, match=r"no column 'no'; it has file_name, text, alt$"):
        open_source(tmp_path, caption_column="no")
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(CaptionError, match=r"no metadata\.jsonl or metadata\.csv names the pictures of"):
        open_source(tmp_path, caption_column="alt")


def test_folder_text_files_are_read(tmp_path: Path) -> None:
    paint(tmp_path, "x/a.PNG", "x/b.v1.png", "x/c.png", "x/d.png")
    (tmp_path / "x" / "a.TXT").write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n  sitting  \r\n")
    (tmp_path / "x" / "b.v1.txt").write_text("b")
    (tmp_path / "x" / "c.txt").write_text(" \n\t\n")
    (tmp_path / "x" / "notes.txt").write_bytes(b"\xff not a caption")
    source = open_source(tmp_path)
    assert captions_of(source) == (("a cat", "sitting"), ("b",), (), ())


def test_folder_text_files_are_not_looked_for_beside_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path, "a.png", "b.png")
    (tmp_path / "b.txt").write_text("beside")
    jsonl(tmp_path / "metadata.jsonl", row("a.png", "one"))
    monkeypatch.setattr("mar.data.captions._read_text_files", lambda *_: pytest.fail("texts are looked for"))
    assert captions_of(open_source(tmp_path)) == (("one",), ())


def test_folder_boxes_in_text_files_are_no_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paint(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.25 0.1\n")
    source = open_source(tmp_path)
    assert captions_of(source) == ()
    assert "hold no words: not taken as captions" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"text": "x"}', r"line 1 of .*metadata\.jsonl has no file_name; expected the path"),
        ("metadata.jsonl", b'\n{"file_name": 5, "text": "x"}', "line 2 of .* has no file_name"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"', "line 1 of .* is no JSON"),
        ("metadata.jsonl", b'["a.png", "x"]', r"is \[\"a.png\", \"x\"\], expected an object"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": 5}', "got 5 in line 1 of .*, expected text or a list"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "\xff"}', "is not in UTF-8 .* save it in that encoding"),
        ("metadata.jsonl", b'{"file_name": "z.png", "text": "x"}', r"is there, such as z\.png; .*a\.png"),
        ("metadata.csv", b"image,text\na.png,x\n", "line 2 of .* has no file_name"),
        ("metadata.csv", b'file_name,text\na.png,"' + b"x" * 200_000, "is no CSV"),
        ("a.txt", b"\xff\xfex", r"a\.txt is not in UTF-8"),
    ],
)  # fmt: skip
def test_folder_bad_captions_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    paint(tmp_path, "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CaptionError, match=message) as error:
        open_source(tmp_path)
    assert "\n" not in str(error.value)


def test_folder_missing_pictures_and_captions_are_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paint(tmp_path, "a.png", "b.png", "c.png", "d.png")
    jsonl(tmp_path / "metadata.jsonl", row("a.png", "x"), row("b.png", " \t"), row("c.png", None), row("z.png", "z"))
    for _ in range(2):
        assert captions_of(open_source(tmp_path)) == (("x",), (), (), ())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert re.search(r"^1 of the 4 captions of .* not there, such as z\.png$", lines[0])
    assert re.search(r"^3 of the 4 pictures of .* have no caption$", lines[1])


@pytest.mark.parametrize("name", ["metadata.jsonl", "a.txt"])
def test_folder_of_empty_captions_has_none(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    paint(tmp_path, "a.png")
    (tmp_path / name).write_text(" \n" if name == "a.txt" else '{"file_name": "a.png", "text": " "}')
    source = open_source(tmp_path)
    assert captions_of(source) == ()
    assert "all captions of" in caplog.text


def test_folder_metadata_without_captions_is_ignored(tmp_path: Path) -> None:
    paint(tmp_path, "a.png")
    jsonl(tmp_path / "metadata.jsonl", {"file_name": "elsewhere.png", "width": 3})
    source = FolderSource(tmp_path)
    assert captions_of(source) == ()


def test_folder_line_ends_in_json_and_half_characters_are_read(tmp_path: Path) -> None:
    paint(tmp_path, "a.png", "b.png")
    lines = '{"file_name": "a.png", "text": "one\u2028two\x85three"}\n{"file_name": "b.png", "text": "\\ud800x"}\n'
    (tmp_path / "metadata.jsonl").write_text(lines, encoding="utf-8")
    assert captions_of(open_source(tmp_path)) == (("one two three",), ("?x",))


def test_folder_bad_test_split_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    paint(tmp_path, "train/a.png", "val/b.png")
    (tmp_path / "val" / "metadata.jsonl").write_text("{")
    assert captions_of(open_source(tmp_path)) == ()
    with pytest.raises(CaptionError, match="is no JSON"):
        open_test_split(tmp_path)


def test_source_bundled_has_no_caption_column() -> None:
    assert captions_of(open_source("fashion")) == ()
    with pytest.raises(CaptionError, match="fashion has no column 'x'"):
        open_source("fashion", caption_column="x")


# ---- tables


def table(captions: list[Any], column: str = "text", kind: Any = None, **others: list[Any]) -> datasets.Dataset:
    columns = {
        "image": [{"bytes": png_bytes(i), "path": None} for i in range(len(captions))],
        column: captions,
        **others,
    }
    types = {"image": datasets.Image(), column: kind or datasets.Value("string")}
    types |= {name: datasets.Value("string") for name in others}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_parquet_captions_are_read(tmp_path: Path, column: str, caplog: pytest.LogCaptureFixture) -> None:
    table(["a  cat", None, " "], column).to_parquet(tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert captions_of(source) == (("a cat",), (), ())
    assert [source[i].captions for i in range(3)] == [("a cat",), (), ()]
    assert "2 of the 3 pictures of" in caplog.text


def test_parquet_lists_of_captions_are_read(tmp_path: Path) -> None:
    kind = datasets.Features({"x": [datasets.Value("string")]})["x"]
    table([["a", "b"], [], [None, "c"]], "caption", kind).to_parquet(tmp_path / "x.parquet")
    assert captions_of(open_source(tmp_path / "x.parquet")) == (("a", "b"), (), ("c",))


def test_parquet_named_column_is_read(tmp_path: Path) -> None:
    table(["t"], alt=["words"]).to_parquet(tmp_path / "x.parquet")
    assert captions_of(open_source(tmp_path / "x.parquet", caption_column="alt")) == (("words",),)
    assert captions_of(open_data(tmp_path / "x.parquet", caption_column="alt")) == (("words",),)
    with pytest.raises(CaptionError, match=r"x\.parquet has no column 'no'; it has image, text, alt$"):
        open_source(tmp_path / "x.parquet", caption_column="no")


def test_parquet_numbers_are_no_captions(tmp_path: Path) -> None:
    table([5, 6], "text", datasets.Value("int64"), prompt=["p", "q"]).to_parquet(tmp_path / "x.parquet")
    assert captions_of(open_source(tmp_path / "x.parquet")) == (("p",), ("q",))
    with pytest.raises(CaptionError, match=r"got the column 'text' of .*, expected one of text or of lists of texts"):
        open_source(tmp_path / "x.parquet", caption_column="text")
    table([5, 6], "text", datasets.Value("int64")).to_parquet(tmp_path / "y.parquet")
    source = open_source(tmp_path / "y.parquet")
    assert captions_of(source) == ()


def test_saved_dataset_and_hub_captions_are_read(tmp_path: Path) -> None:
    datasets.DatasetDict(train=table(["t"]), test=table(["u"])).save_to_disk(tmp_path / "saved")
    assert captions_of(open_source(tmp_path / "saved")) == (("t",),)
    assert captions_of(open_source(tmp_path / "saved", "test")) == (("u",),)
    paint(tmp_path / "hub", "train/a.png", "train/b.png")
    jsonl(tmp_path / "hub" / "train" / "metadata.jsonl", row("a.png", "one", "alt"), row("b.png", "two", "alt"))
    for spec in (f"hub:{tmp_path / 'hub'}", str(tmp_path / "hub")):
        assert captions_of(open_source(spec, caption_column="alt")) == (("one",), ("two",))


# ---- shards and streams


def test_webdataset_captions_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        ("a.png", png_bytes(0)), ("a.txt", b"one\r\ntwo"), ("a.json", b'{"caption": "left out"}'),
        ("b.png", png_bytes(1)), ("b.json", b'{"prompt": "p", "caption": "three", "label": 1}'),
        ("c.png", png_bytes(2)), ("c.json", b'{"text": 5}'),
        ("d.png", png_bytes(3)), ("d.txt", b"\xff"),
        ("e.png", png_bytes(4)), ("e.json", b"{"),
        ("f.png", png_bytes(5)),
    ]  # fmt: skip
    source = open_source(write_tar(tmp_path / "a.tar", members))
    assert captions_of(source) == (("one", "two"), ("three",), (), (), (), ())
    assert [source[i].captions for i in range(2)] == [("one", "two"), ("three",)]
    assert (source.classes, source[1].label) == (("0", "1"), 1)
    assert re.search(r"labels or captions that can't be read: 3 \(such as got 5 in c\.json", caplog.text)
    assert "4 of the 6 pictures of" in caplog.text
    assert captions_of(open_source(tmp_path / "a.tar", caption_column="prompt")) == ((), ("p",), (), (), (), ())
    assert captions_of(open_source(tmp_path / "a.tar", caption_column="txt"))[:2] == (("one", "two"), ())
    with pytest.raises(CaptionError, match=r"no picture of .* has a caption at 'no' in its \.json"):
        open_source(tmp_path / "a.tar", caption_column="no")


def test_webdataset_without_captions_has_none(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", [("a.png", png_bytes(0)), ("a.json", b'{"width": 8}')]))
    assert (captions_of(source), source[0].captions) == ((), ())


def stream_captions(source: StreamSource) -> list[tuple[str, ...]]:
    return [source.example(sample).captions for sample in source.shards.samples(0)]


def test_stream_captions_come_in_passing(tmp_path: Path) -> None:
    table(["a", None], alt=["x", "y"]).to_parquet(tmp_path / "x.parquet")
    source = open_data(f"stream:{tmp_path / 'x.parquet'}")
    assert isinstance(source, StreamSource)
    assert stream_captions(source) == [("a",), ()]
    named = open_data(f"stream:{tmp_path / 'x.parquet'}", caption_column="alt")
    assert isinstance(named, StreamSource)
    assert stream_captions(named) == [("x",), ("y",)]
    with pytest.raises(CaptionError, match="has no column 'no'; it has image, text, alt"):
        open_data(f"stream:{tmp_path / 'x.parquet'}", caption_column="no")


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_stream_captions_of_shards_are_those_of_the_source(tmp_path: Path, kind: str) -> None:
    texts = {"txt": b"one\ntwo", "json": b'{"caption": "one"}'}
    members = [(f"{i}.{end}", data) for i in range(3) for end, data in (("png", png_bytes(i)), (kind, texts[kind]))]
    write_tar(tmp_path / "a.tar", members)
    source = open_data(f"stream:{tmp_path / 'a.tar'}")
    assert isinstance(source, StreamSource)
    assert stream_captions(source) == list(captions_of(open_source(tmp_path / "a.tar")))


def test_stream_words_are_not_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", png_bytes(0)), ("a.txt", b"one")])
    with pytest.raises(ConfigError, match="is read in passing, so that its words can't be counted"):
        with_captions(TrainConfig(data=f"stream:{tmp_path / 'a.tar'}", text="words"))


# ---- batches, parts, caches

SETS = {
    "folder": lambda folder: str(captioned_folder(folder)),
    "stream": lambda folder: f"stream:{captioned_shards(folder)}",
    "tar": lambda folder: str(captioned_shards(folder)),
}


def captions_at(index: int) -> tuple[str, ...]:
    """Image 3 of four has none, image 2 three."""
    return tuple(f"{index} {letter}" for letter in "xyz"[: {2: 3, 3: 0}.get(index % 4, 1)])


def captioned_folder(folder: Path, count: int = 12) -> Path:
    paint(folder, *(f"{i:02}.png" for i in range(count)))
    jsonl(folder / "metadata.jsonl", *(row(f"{i:02}.png", list(captions_at(i))) for i in range(count)))
    return folder


def captioned_shards(folder: Path, count: int = 12) -> Path:
    for shard in range(2):
        members = [(f"{i:02}.{end}", data) for i in range(shard, count, 2)
                   for end, data in (("png", png_bytes(i)), ("txt", "\n".join(captions_at(i)).encode()))]  # fmt: skip
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.mark.parametrize("kind", SETS)
def test_batches_draw_captions_by_seed_and_position(tmp_path: Path, kind: str) -> None:
    spec = SETS[kind](tmp_path)

    def drawn(seed: int = 0, workers: int = 0, start: int = 0, count: int = 12) -> list[tuple[int, int, str]]:
        stream = batches(open_data(spec), CROP, batch=4, seed=seed, workers=workers, start=start, flip=False)
        return [
            item
            for batch in islice(stream, count)
            for item in zip(image_numbers(batch), batch.positions.tolist(), batch.captions, strict=True)
        ]

    first = drawn()
    for index, position, caption in first:
        assert caption == pick_caption(captions_at(index), 0, position)
        assert (caption == "") == (index % 4 == 3)
    assert {caption[-1] for index, _, caption in first if index % 4 == 2} == {"x", "y", "z"}
    assert drawn(workers=2) == first
    assert drawn(start=20, count=7) == first[20:]
    assert [caption for *_, caption in drawn(seed=1)] != [caption for *_, caption in first]


def test_captions_of_parts_stay_with_their_images(tmp_path: Path) -> None:
    source = open_source(captioned_folder(tmp_path))
    train, val = train_val_split(source, 4)
    for part in (train, val, subset(source, 5)):
        numbers = [int(Path(part[i].name).stem) for i in range(len(part))]
        assert captions_of(part) == tuple(captions_at(number) for number in numbers)
        assert [part[i].captions for i in range(len(part))] == list(captions_of(part))
    assert len(train) + len(val) == 12


def make_cache(data: Path, out: Path, **settings: Any) -> LatentSource:
    source, tokenizer = open_source(data), PixelTokenizer(1, 0.0, 1.0)
    manifest = describe_cache(
        source, tokenizer, data=str(data), tokenizer_name="pixels", size=(8, 8), shard=5, **settings
    )
    shards = prepare_cache(out, manifest)
    assert shards is not None
    write_shards(out, manifest, source, tokenizer, shards, device=torch.device("cpu"))
    finish_cache(out, manifest, captions_of(source))
    return LatentSource(out)


def test_cache_captions_stay_with_their_images(tmp_path: Path) -> None:
    data = captioned_folder(tmp_path / "data")
    (data / "02.png").write_bytes(b"no picture")
    latents = make_cache(data, tmp_path / "cache", flip=True)
    assert captions_of(latents) == tuple(captions_at(i) for i in range(12))
    assert latents.read(1, flip=True)[0].shape == (1, 1, 8, 8)
    part = latents.subset(torch.arange(1, 12, 3).numpy())
    assert captions_of(part) == tuple(captions_at(i) for i in (1, 4, 7, 10))
    assert captions_of(part.subset(torch.tensor([1, 3]).numpy())) == (captions_at(4), captions_at(10))
    values = {i: round(float(latents.read(i, flip=False)[0].mean() + 1) * 127.5 / 5) for i in range(12) if i != 2}
    assert values == {i: i for i in range(12) if i != 2}
    by_position = [
        (int(position), caption)
        for batch in islice(batches(latents, CROP, batch=4, seed=3), 6)
        for position, caption in zip(batch.positions.tolist(), batch.captions, strict=True)
    ]
    of_images = [
        (int(position), caption)
        for batch in islice(batches(open_source(data), CROP, batch=4, seed=3), 6)
        for position, caption in zip(batch.positions.tolist(), batch.captions, strict=True)
    ]
    assert by_position == of_images


def test_cache_finished_gets_changed_captions(tmp_path: Path) -> None:
    data = captioned_folder(tmp_path / "data")
    latents = make_cache(data, tmp_path / "cache")
    manifest, now = latents.manifest, captions_of(latents)
    assert update_captions(tmp_path / "cache", manifest, now) is False
    assert update_captions(tmp_path / "cache", manifest, [("new",), *now[1:]]) is True
    assert captions_of(LatentSource(tmp_path / "cache"))[:2] == (("new",), captions_at(1))
    (tmp_path / "cache" / CAPTIONS).write_text("{")
    assert update_captions(tmp_path / "cache", manifest, now) is True
    assert captions_of(LatentSource(tmp_path / "cache")) == now
    assert update_captions(tmp_path / "cache", manifest, ()) is True
    assert not (tmp_path / "cache" / CAPTIONS).exists()


def test_cache_command_again_writes_changed_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mar.cli.cache import cache as run

    data, out = paint(tmp_path / "data", *(f"{i:02}.png" for i in range(4))), tmp_path / "cache"
    command = [str(data), "--tokenizer", "pixels", "--image-size", "8", "--out", str(out), "--device", "cpu"]

    def told(*more: str) -> str:
        assert run([*command, *more]) == 0
        return capsys.readouterr().out

    told()
    assert captions_of(LatentSource(out)) == ()
    assert "nothing to do" in told()
    jsonl(data / "metadata.jsonl", *({"file_name": f"{i:02}.png", "text": "t", "alt": f"{i}"} for i in range(4)))
    assert "its captions have changed and are written anew" in told()
    assert captions_of(LatentSource(out)) == (("t",),) * 4
    told("--caption-column", "alt")
    assert captions_of(LatentSource(out)) == (("0",), ("1",), ("2",), ("3",))
    assert "nothing to do" in told("--caption-column", "alt")


def test_cache_with_captions_of_another_count_is_damaged(tmp_path: Path) -> None:
    latents = make_cache(captioned_folder(tmp_path / "data"), tmp_path / "cache")
    write_captions(latents.folder, captions_of(latents)[:-1])
    with pytest.raises(ConfigError, match="has captions of 11 pictures, expected 12"):
        LatentSource(latents.folder)


# ---- the option


def test_folder_plan_keeps_the_caption_column(tmp_path: Path) -> None:
    from mar.cli.train_folder import plan_folder

    data = paint(tmp_path / "data", *(f"{i:02}.png" for i in range(20)))
    jsonl(data / "metadata.jsonl", *({"file_name": f"{i:02}.png", "text": "t", "alt": f"a b{i}"} for i in range(20)))
    base = ["--data", str(data), "--out", str(tmp_path / "run"), "--tokenizer", "own", "--image-size", "8"]
    plan, options = plan_folder([*base, "--caption-column", "alt"])
    assert (options.config.caption_column, options.config.model.words) == ("alt", 21)
    assert plan.cache is not None
    assert plan.cache.caption_column == "alt"
    with pytest.raises(CaptionError, match="has no column 'no'"):
        plan_folder([*base, "--caption-column", "no"])


def test_run_words_are_those_of_the_named_column(tmp_path: Path) -> None:
    paint(tmp_path, "a.png", "b.png")
    rows = [{"file_name": name, "text": "t", "alt": "one two"} for name in ("a.png", "b.png")]
    jsonl(tmp_path / "metadata.jsonl", *rows)
    config = TrainConfig(data=str(tmp_path), text="words", caption_column="alt")
    assert with_captions(config).model.words == 2
