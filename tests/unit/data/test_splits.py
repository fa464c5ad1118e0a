"""What is held out is never learned from, is of all classes, and is the same of pictures and of a cache of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from shard_files import png_bytes, write_tar, write_tar_shards
from tiny import write_images

from mar.config import ConfigError
from mar.data.cache_writer import describe_cache, finish_cache, prepare_cache, write_shards
from mar.data.folder import FolderSource
from mar.data.latent_cache import LatentSource
from mar.data.paths import NoSplit, find_split_files
from mar.data.sources import open_source
from mar.data.splits import (
    HELD_OUT,
    hold_out,
    load_held_out,
    open_test_split,
    open_train_val,
    save_held_out,
    stratified_indices,
    train_val_split,
)
from mar.evaluation.image_sets import has_test_split
from mar.tokenizer import PixelTokenizer


def cached(folder: Path, data: Path, split: str = "train") -> Path:
    """The pictures' latents, four a shard."""
    tokenizer, source = PixelTokenizer(1, 0.0, 1.0), open_source(data, split)
    about = describe_cache(source, tokenizer, data=str(data), tokenizer_name="pixels", size=(8, 8), shard=4)
    shards = prepare_cache(folder, about)
    assert shards
    write_shards(folder, about, source, tokenizer, shards, device=torch.device("cpu"))
    finish_cache(folder, about)
    return folder


def names(source: object) -> list[str]:
    return [source[i].name for i in range(len(source))]  # type: ignore[index, arg-type]


@pytest.mark.parametrize(("length", "count"), [(100, 10), (17, 5), (5, 5), (3, 9), (1, 1), (0, 4)])
def test_split_takes_one_of_each_stretch(length: int, count: int) -> None:
    chosen = stratified_indices(length, count)
    count = min(length, count)
    assert len(chosen) == count
    assert all(k * length // count <= i < (k + 1) * length // count for k, i in enumerate(chosen))
    assert np.array_equal(chosen, stratified_indices(length, count))


def test_split_covers_interleaved_classes() -> None:
    turns = np.bincount(stratified_indices(2000, 200) % 10, minlength=10)
    assert turns.min() >= 10
    assert np.bincount(stratified_indices(2000, 200) // 200).tolist() == [20] * 10


def test_split_parts_are_disjoint_and_complete(tmp_path: Path) -> None:
    learned, kept = train_val_split(FolderSource(write_images(tmp_path)), 4)
    assert (len(learned), len(kept)) == (15, 5)
    assert sorted(names(learned) + names(kept)) == sorted(names(FolderSource(tmp_path)))
    assert {kept[i].label for i in range(5)} == {0, 1}
    assert [len(part) for part in train_val_split(FolderSource(write_images(tmp_path / "two", 2)), 20)] == [1, 1]
    with pytest.raises(ValueError, match="got 1 picture, but one to learn from and one to judge by"):
        train_val_split(FolderSource(write_images(tmp_path / "one", 1)), 20)


def test_split_of_a_cache_matches_the_images(tmp_path: Path) -> None:
    data = write_images(tmp_path / "pictures")
    whole = open_source(data)
    parts = train_val_split(whole, 4), train_val_split(LatentSource(cached(tmp_path / "cache", data)), 4)
    for of_pictures, of_latents in zip(*parts, strict=True):
        assert len(of_pictures) == len(of_latents)
        for i in range(len(of_pictures)):
            pixels = torch.from_numpy(np.array(of_pictures[i].image)) / 127.5 - 1
            moments, label = of_latents.read(i, False)
            torch.testing.assert_close(moments[0, 0], pixels, atol=1e-3, rtol=0)
            assert label == of_pictures[i].label
        read = torch.stack([of_latents.read(i, False)[0][0] for i in range(len(of_latents))])
        assert torch.equal(torch.cat([moments.mean for moments in of_latents.in_order()]), read)
        assert torch.equal(torch.cat([moments.mean for moments in of_latents.in_order(3)]), read[:3])


def test_split_is_kept_when_a_folder_grows(tmp_path: Path) -> None:
    data, run = write_images(tmp_path / "pictures", 20), tmp_path / "run"
    learned, kept = map(names, parts := train_val_split(FolderSource(data), 4))
    assert load_held_out(run) is None
    save_held_out(run, parts[0])
    assert [*map(names, train_val_split(FolderSource(data), 4, load_held_out(run)))] == [learned, kept]
    write_images(data, 40)
    for name in ("across/0.png", "down/1.png"):  # in between
        Path(kept[0]).with_suffix(".bak").write_bytes(Path(kept[0]).read_bytes())
        Path(kept[0]).with_suffix(".bak").rename(data / name)
    grown = train_val_split(FolderSource(data), 4, load_held_out(run))
    assert names(grown[1]) == kept
    assert set(learned) < set(names(grown[0]))
    assert len(grown[0]) == 15 + 20 + 2
    aside = Path(kept[0]).rename(tmp_path / "aside.png")
    less = train_val_split(FolderSource(data), 4, load_held_out(run))
    assert names(less[1]) == kept[1:]
    save_held_out(run, less[0])  # which forgets nothing
    aside.rename(kept[0])
    assert names(train_val_split(FolderSource(data), 4, load_held_out(run))[1]) == kept


def test_split_is_kept_for_shards_tables_and_caches(tmp_path: Path) -> None:
    tars, tar_run = write_tar_shards(tmp_path / "tars"), tmp_path / "run of tars"
    learned, kept = hold_out(tars)
    save_held_out(tar_run, learned)
    write_tar(tars / "a.tar", [("first.png", png_bytes(1)), ("first.cls", b"0")])
    more = hold_out(tars, load_held_out(tar_run))
    assert (names(more[1]), len(more[0])) == (names(kept), len(learned) + 1)
    data, run = write_images(tmp_path / "pictures", 20), tmp_path / "run"
    cache = LatentSource(cached(tmp_path / "cache", data))
    first, others = train_val_split(cache, 4)
    save_held_out(run, first)
    note = load_held_out(run)
    assert np.array_equal(train_val_split(cache, 4, note)[1].indices, others.indices)
    with pytest.raises(ConfigError, match="held-out pictures can't be told"):
        train_val_split(LatentSource(cached(tmp_path / "larger", write_images(data, 24))), 4, note)
    with pytest.raises(ConfigError, match="held-out pictures can't be told"):
        train_val_split(FolderSource(data), 4, load_held_out(tar_run))
    (run / HELD_OUT).write_text("[]")
    with pytest.raises(ConfigError, match=r"held-out\.json can't be read"):
        load_held_out(run)


def test_validation_set_of_a_run_is_chosen(tmp_path: Path) -> None:
    flat, parted = write_images(tmp_path / "flat", 6), tmp_path / "parted"
    for name, count in (("train", 8), ("val", 4)):
        write_images(parted / name, count)

    def sizes(data: Path, every: int = 0, others: Path | None = None) -> tuple[int, int]:
        learned, kept = open_train_val(str(data), every=every, validate_on=None if others is None else str(others))
        return len(learned), 0 if kept is None else len(kept)

    assert sizes(flat) == (6, 0)
    assert sizes(parted) == (8, 4)
    assert sizes(flat, every=3) == (4, 2)
    assert sizes(parted, every=4) == (6, 2)  # asked for, though there is a test part
    assert sizes(flat, others=parted) == (6, 4)
    assert sizes(flat, every=3, others=parted / "train") == (4, 8)
    cache = cached(tmp_path / "cache", parted)
    assert sizes(cache) == (8, 4)  # of the pictures that were cached
    assert sizes(cache, every=4) == (6, 2)
    assert all(isinstance(part, LatentSource) for part in open_train_val(str(cache), every=4))
    of_test = cached(tmp_path / "cached test", parted, "test")
    assert sizes(of_test) == (4, 0)  # not what it learns from
    assert sizes(of_test, others=parted) == (4, 4)  # unless it is asked for
    parted.rename(tmp_path / "elsewhere")
    assert sizes(cache) == (8, 0)


def test_split_of_shards_is_by_one_word(tmp_path: Path) -> None:
    """As for folders and splits of the Hub: test before validation, and the outermost folder first."""
    names = ["train-0.tar", "validation-0.tar", "test-0.tar", "test-1.tar", "training/val-7.tar"]

    def found(split: str, among: list[str]) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_split_files(tmp_path, among, ".tar", split)]

    assert found("test", names) == ["test-0.tar", "test-1.tar"]
    assert found("test", names[:2]) == ["validation-0.tar"]
    assert found("train", names) == ["train-0.tar", "training/val-7.tar"]
    with pytest.raises(NoSplit, match=r"no .tar file in .* has 'test' in its name"):
        found("test", names[:1])
    with pytest.raises(ValueError, match=r"train_val\.tar names two splits \(train, val\)"):
        found("train", ["x_train_val.tar"])


def test_split_that_is_damaged_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "train-0.tar", [(f"{number}.png", png_bytes(number)) for number in range(4)])
    assert open_test_split(tmp_path / "data") is None
    (tmp_path / "data" / "test-0.tar").write_bytes(b"half of a download" * 100)
    for opened in (lambda: open_test_split(tmp_path / "data"), lambda: has_test_split(str(tmp_path / "data"))):
        with pytest.raises(ValueError, match=r"test-0\.tar"):
            opened()
