"""Pictures come once each, as they were, whatever the batch and the share; what can't be read is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import extractors
import numpy as np
import pytest
import tiny
import torch
from orientations import ORIENTATIONS, file_bytes, steps
from PIL import Image

from mar.data.sources import open_source
from mar.evaluation import image_sets
from mar.evaluation.evaluate import collect
from mar.evaluation.image_sets import (
    GeneratedImages,
    ImageBatch,
    ImageSet,
    NpzImages,
    SourceImages,
    digest,
    has_test_split,
    is_image_set,
    is_statistics,
    open_images,
    rank_share,
)
from mar.sampling.plan import Plan
from mar.training import run


def walk(pictures: ImageSet, batch: int, first: int = 0, end: int | None = None) -> ImageBatch:
    """All batches of a share, below each other."""
    parts = list(pictures.batches(batch, first, len(pictures) if end is None else end))
    assert all(len(part.images) <= batch for part in parts)
    return ImageBatch(*(torch.cat([getattr(p, name) for p in parts]) for name in ("images", "indices", "labels")))


def same(a: ImageBatch, b: ImageBatch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "indices", "labels"))


def pixels(count: int = 11, channels: int = 3, size: tuple[int, int] = (5, 4)) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, *size, channels), dtype=np.uint8)


def write(path: Path, compressed: bool = False, **arrays: Any) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_image_set_shares_are_even_and_complete(count: int, world: int) -> None:
    shares = [rank_share(count, rank, world) for rank in range(world)]
    assert [i for first, end in shares for i in range(first, end)] == list(range(count))
    sizes = [end - first for first, end in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_npz_in_any_batches_and_shares(compressed: bool, channels: int, batch: int, tmp_path: Path) -> None:
    values, labels = pixels(channels=channels), np.arange(11) % 3
    found = NpzImages(write(tmp_path / "a.npz", compressed, arr_0=values, arr_1=labels))
    whole = walk(found, batch)
    assert np.array_equal(whole.images.permute(0, 2, 3, 1).numpy(), values)
    assert whole.labels.tolist() == labels.tolist()
    assert whole.indices.tolist() == list(range(11))
    part = walk(found, batch, 5, 9)
    assert np.array_equal(part.images.permute(0, 2, 3, 1).numpy(), values[5:9])
    assert part.labels.tolist() == labels[5:9].tolist()
    assert part.indices.tolist() == [5, 6, 7, 8]
    assert list(found.batches(batch, 4, 4)) == []


def test_npz_without_labels_and_with_a_limit(tmp_path: Path) -> None:
    found = NpzImages(write(tmp_path / "a.npz", arr_0=pixels()), limit=6)
    assert len(found) == 6
    assert walk(found, 4).labels.tolist() == [-1] * 6
    assert len(NpzImages(tmp_path / "a.npz", limit=50)) == 11


@pytest.mark.parametrize("compressed", [False, True])
def test_image_set_limit_covers_all_classes(compressed: bool, tmp_path: Path) -> None:
    """Of a set that comes class by class, as many of each; the same pictures in any batches and shares."""
    classes = np.arange(12) // 4
    values = np.arange(12, dtype=np.uint8)[:, None, None, None].repeat(4, 1)
    by_class = tmp_path / "p"
    for number, label in enumerate(classes):
        (by_class / f"c{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(values[number, :, :, 0].repeat(4, 1)).save(by_class / f"c{label}" / f"{number}.png")
    found: list[ImageSet] = [
        NpzImages(write(tmp_path / "a.npz", compressed, arr_0=values, arr_1=classes), limit=6),
        SourceImages(open_source(by_class), "p", limit=6),
    ]
    for pictures in found:
        whole = walk(pictures, 6)
        numbers = whole.images[:, 0, 0, 0].tolist()
        assert whole.labels.tolist() == [0, 0, 1, 1, 2, 2] == classes[numbers].tolist()
        assert whole.indices.tolist() == list(range(6))
        part = walk(pictures, 2, 1, 5)
        assert part.images[:, 0, 0, 0].tolist() == numbers[1:5]
        assert part.indices.tolist() == [1, 2, 3, 4]


def test_image_set_digests_tell_sets_apart(tmp_path: Path) -> None:
    def held(values: np.ndarray) -> str:
        return digest(NpzImages(write(tmp_path / "a.npz", arr_0=values)))

    assert held(pixels()) == held(pixels()) != held(255 - pixels())
    one, same_, other = (
        digest(SourceImages(open_source(folder(tmp_path / name, Image.new("L", (8, 6), value))), "p"))
        for name, value in (("one", 1), ("same", 1), ("other", 2))
    )
    assert one == same_ != other


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": pixels().astype(np.float32)}, ["float32", "expected uint8"]),
        ({"arr_0": pixels().astype(np.int16)}, ["int16", "expected uint8"]),
        ({"arr_0": pixels()[..., 0]}, ["(11, 5, 4)", "(count, height, width, 1 or 3)"]),
        ({"arr_0": pixels(channels=4)}, ["(11, 5, 4, 4)", "1 or 3"]),
        ({"arr_0": pixels(count=0)}, ["(0, 5, 4, 3)"]),
        ({"images": pixels()}, ["images.npy", "no arr_0"]),
        ({}, ["nothing", "no arr_0"]),
        ({"arr_0": np.asfortranarray(pixels())}, ["Fortran"]),
        ({"arr_0": np.array([Payload()], dtype=object)}, ["object", "expected uint8"]),
        ({"arr_0": pixels(), "arr_1": np.arange(4)}, ["arr_1", "(4,)", "(11,) whole numbers"]),
        ({"arr_0": pixels(), "arr_1": np.ones(11)}, ["arr_1", "float64", "whole numbers"]),
        ({"arr_0": pixels(), "arr_1": np.array([Payload()] * 11, dtype=object)}, ["class numbers", "allow_pickle"]),
    ],
)
def test_npz_without_images_is_refused(
    arrays: dict[str, np.ndarray], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=r"a\.npz") as refused:
        NpzImages(path)
    said = str(refused.value)
    assert all(word in said for word in words), said
    assert "\n" not in said
    assert capsys.readouterr().out == ""  # nothing was unpickled


def cut(data: bytearray) -> bytearray:
    return data[: len(data) // 2]


def spoil(data: bytearray) -> bytearray:
    data[len(data) // 2 - 40 : len(data) // 2 + 40] = bytes(80)
    return data


def spoil_the_directory(data: bytearray) -> bytearray:
    at = data.index(b"PK\x01\x02")
    data[at : at + 4] = b"XXXX"
    return data


# Newer Pythons pass over what is not compressed without a look at it, so that only compressed shares begin late.
@pytest.mark.parametrize(("compressed", "first"), [(False, 0), (True, 0), (True, 60)])
@pytest.mark.parametrize("damage", [cut, spoil, spoil_the_directory])
def test_npz_damaged_is_refused(
    compressed: bool, damage: Callable[[bytearray], bytearray], first: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.npz", compressed, arr_0=pixels(70))
    path.write_bytes(damage(bytearray(path.read_bytes())))
    with pytest.raises(ValueError, match=r"a\.npz: .*can't be read .*; make it again") as refused:
        list(NpzImages(path).batches(8, first, 70))
    assert "\n" not in str(refused.value)


def test_npz_with_missing_images_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", arr_0=pixels(11))
    path.write_bytes(path.read_bytes().replace(b"(11, 5, 4, 3)", b"(99, 5, 4, 3)"))
    with pytest.raises(ValueError, match=r"ends before its last picture|CRC"):
        walk(NpzImages(path), 50)


def folder(path: Path, *pictures: Image.Image) -> Path:
    path.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(path / f"{i}.png")
    return path


def test_folder_in_any_batches_and_shares(tmp_path: Path) -> None:
    source = open_source(tiny.write_images(tmp_path / "pictures", 9))
    found = SourceImages(source, "bars")
    whole = walk(found, 4)
    assert whole.images.shape == (9, 1, 8, 8)
    for i in range(9):
        assert np.array_equal(whole.images[i, 0].numpy(), np.asarray(source[i].image))
        assert whole.labels[i] == source[i].label
    assert found.classes == ("across", "down")
    assert same(walk(found, 1), whole)
    part = walk(found, 2, 3, 8)
    assert torch.equal(part.images, whole.images[3:8])
    assert part.indices.tolist() == [3, 4, 5, 6, 7]
    assert len(SourceImages(source, "bars", limit=4)) == 4


def test_folder_of_mixed_modes_is_independent_of_batches(tmp_path: Path) -> None:
    gray = Image.fromarray(pixels(1)[0, ..., 0])
    color = Image.fromarray(pixels(1)[0])
    found = SourceImages(open_source(folder(tmp_path / "p", gray, color, gray)), "p")
    together = walk(found, 3).images
    alone = [part.images[0] for part in found.batches(1, 0, 3)]
    assert [tuple(one.shape) for one in alone] == [(1, 5, 4), (3, 5, 4), (1, 5, 4)]
    for i, one in enumerate(alone):
        assert torch.equal(one.expand(3, 5, 4), together[i])


def test_folder_of_several_sizes_is_refused(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path / "p", Image.new("L", (8, 6)), Image.new("L", (9, 6))))
    with pytest.raises(ValueError, match=r"1\.png is 6x9, expected 6x8 as before it; .*--image-size"):
        walk(SourceImages(source, "p"), 4)
    assert walk(SourceImages(source, "p", size=(4, 4)), 4).images.shape == (2, 1, 4, 4)


@pytest.mark.parametrize("batch", [1, 3])
def test_folder_unreadable_image_is_left_out_and_named(tmp_path: Path, batch: int) -> None:
    where = folder(tmp_path / "p", *(Image.new("L", (8, 8), i) for i in range(3)))
    (where / "1.png").write_bytes(b"no picture")
    parts = list(SourceImages(open_source(where), "p").batches(batch, 0, 3))
    assert [index for part in parts for index in part.indices.tolist()] == [0, 2]
    assert [int(image.max()) for part in parts for image in part.images] == [0, 2]
    assert [error.name for part in parts for error in part.unreadable] == [str(where / "1.png")]
    digests = {digest(SourceImages(open_source(where), "p"))}
    (where / "1.png").unlink()
    digests.add(digest(SourceImages(open_source(where), "p")))
    assert len(digests) == 2


def test_generated_set_follows_seed_and_number() -> None:
    model = tiny.tiny_pipeline()
    drawn = GeneratedImages(model, Plan.total(7, [0, 1, 2, -1], seed=3), name="tiny", allow_broken=True)
    whole = walk(drawn, 7)
    assert whole.images.shape == (7, 1, 4, 4)
    assert whole.labels.tolist() == [0, 1, 2, -1, 0, 1, 2]
    assert drawn.classes == ("ant", "bee", "cat")
    parts = [walk(drawn, 2, 0, 3), walk(drawn, 2, 3, 7)]
    assert torch.cat([p.indices for p in parts]).tolist() == list(range(7))
    assert (torch.cat([p.images for p in parts]).int() - whole.images.int()).abs().max() <= 1
    assert list(drawn.batches(2, 5, 5)) == []
    again = model.sample([1], [3 * 2**32 + 5], output="tensor", allow_broken=True)
    assert isinstance(again, torch.Tensor)
    assert (whole.images[5].int() - ((again[0] + 1) * 127.5).round().clamp(0, 255).int()).abs().max() <= 1
    assert not torch.equal(whole.images[0], whole.images[4])  # the same class, another number


def test_generated_set_settings_and_progress() -> None:
    told: list[float] = []
    plan = Plan.total(4, [0])
    plain = walk(GeneratedImages(tiny.tiny_pipeline(), plan, name="a", allow_broken=True), 2)
    drawn = GeneratedImages(
        tiny.tiny_pipeline(), plan, name="b", allow_broken=True, advance=told.append, guidance_scale=3.0, steps=2
    )
    assert not torch.equal(walk(drawn, 2).images, plain.images)
    assert told == [1.0, 2.0, 3.0, 4.0]


# --- by name


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    return str(tiny.write_images(tmp_path / "pictures", 9))


@pytest.fixture
def statistics(pictures: str, tmp_path: Path) -> str:
    """Of the pictures, without their features."""
    collect(open_images(pictures), extractors.tiny()).statistics.save(tmp_path / "statistics.npz")
    return str(tmp_path / "statistics.npz")


def test_npz_statistics_and_images_are_told_apart(statistics: str, tmp_path: Path) -> None:
    assert is_statistics(statistics)
    assert is_statistics(str(write(tmp_path / "adm.npz", mu=np.zeros(6), sigma=np.eye(6))))
    assert not is_statistics(str(write(tmp_path / "a.npz", arr_0=pixels(9, size=(8, 8)))))
    assert not is_statistics(str(tmp_path / "nothing.npz"))
    (tmp_path / "text.npz").write_text("no zip")
    assert not is_statistics(str(tmp_path / "text.npz"))
    damaged = Path(statistics).read_bytes().replace(b"PK\x01\x02", b"XXXX")
    (tmp_path / "damaged.npz").write_bytes(damaged)
    assert not is_statistics(str(tmp_path / "damaged.npz"))


def test_models_and_images_are_told_apart(pictures: str, tmp_path: Path) -> None:
    assert is_image_set(pictures)
    assert is_image_set("anything.npz")
    assert is_image_set("anything.parquet")
    for model in ("fashion", "mar-base", "a/model.safetensors", "owner/name", str(tmp_path / "not-there")):
        assert not is_image_set(model)
    (tmp_path / "run").mkdir()
    tiny.tiny_pipeline().save(tmp_path / "run" / "model.safetensors")
    assert not is_image_set(str(tmp_path / "run"))


def test_bundled_model_name_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fashion", "mar-base"):
        tiny.write_images(Path(name), 4)
    assert not is_image_set("fashion")
    assert is_image_set("./fashion")
    assert is_image_set("mar-base")  # as to `zoo.load`, for which what is there comes before an official model


def test_samples_of_a_run_are_refused(tmp_path: Path) -> None:
    assert image_sets.RUN_FILE == run.RUN_FILE
    tiny.write_images(tmp_path / "young" / "samples", 4)
    (tmp_path / "young" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"young is the folder of a run, .* saved its model\.safetensors"):
        open_images(str(tmp_path / "young"))


def test_npz_size_is_known(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.npz", arr_0=pixels(9, size=(8, 8))))
    assert len(open_images(path, size=(8, 8), limit=5)) == 5
    with pytest.raises(ValueError, match=r"a\.npz: got images of 8x8 pixels, expected 4x4"):
        open_images(path, size=(4, 4))
    with pytest.raises(ValueError, match=r"there is no file .*b\.npz"):
        open_images(str(tmp_path / "b.npz"))


def test_image_set_of_a_source_has_splits_and_sizes(pictures: str, tmp_path: Path) -> None:
    found = open_images(pictures, size=(4, 4), split="test", limit=5)
    (part,) = found.batches(64, 0, 5)
    assert part.images.shape == (5, 1, 4, 4)
    assert found.name == f"{pictures} (test)"
    assert [len(open_images("fashion", split=split)) for split in ("train", "test")] == [10_000, 2_000]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no pictures in .*empty"):
        open_images(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="does not exist"):
        open_images(str(tmp_path / "nowhere"))


def test_image_set_test_split_is_used(tmp_path: Path) -> None:
    flat, parted = tiny.write_images(tmp_path / "flat", 6), tmp_path / "parted"
    tiny.write_images(parted / "train", 8)
    assert has_test_split("fashion")
    assert has_test_split(str(flat))  # the whole folder serves for both
    assert not has_test_split(str(parted))


def test_source_images_are_turned_upright_if_told(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for orientation in ORIENTATIONS:
        (tmp_path / "p" / f"{orientation}.png").write_bytes(file_bytes(steps(), orientation))
    found = walk(open_images(str(tmp_path / "p"), upright=True), 3).images
    assert torch.equal(found, torch.from_numpy(np.array(steps())).expand(8, 1, -1, -1))
    with pytest.raises(ValueError, match="is 48x32, expected 32x48 as before it"):
        walk(open_images(str(tmp_path / "p")), 3)
