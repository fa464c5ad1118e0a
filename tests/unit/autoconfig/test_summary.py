"""What a look at some pictures tells of them all, and that a run remembers it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from orientations import exif_of
from PIL import Image
from tiny import caption_images
from tiny import write_images as bars

from mar.autoconfig.sizes import DatasetSummary
from mar.autoconfig.summary import SUMMARY_FILE, common_aspect, load_summary, save_summary, summarize_dataset
from mar.cli import main
from mar.config import ConfigError
from mar.data.images import Example
from mar.data.sources import FashionSource, open_source
from mar.tokenizer import PixelTokenizer
from mar.tokenizer.base import measure_latents


def fill(folder: Path, *images: Image.Image, copies: int = 8) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate([*images] * copies):
        image.save(folder / f"{number}.png")
    return folder


def look_at(folder: Path) -> DatasetSummary:
    return summarize_dataset(open_source(folder), str(folder))


def test_summary_of_odd_sizes_and_color_modes(tmp_path: Path) -> None:
    folder = fill(
        tmp_path / "odd", Image.new("RGB", (40, 90), "red"), Image.new("L", (50, 60)), Image.new("RGBA", (300, 70)),
        Image.new("1", (44, 44)),
    )  # fmt: skip
    seen = look_at(folder)
    assert (seen.count, seen.side, seen.image_channels, seen.classes) == (32, 47, 3, ())


def test_summary_gray_images_in_any_mode_are_gray(tmp_path: Path) -> None:
    gray = Image.effect_noise((40, 40), 60)
    assert look_at(fill(tmp_path / "grey", gray, gray.convert("RGB"), gray.convert("I;16"))).image_channels == 1
    tinted = Image.merge("RGB", (gray, gray, gray.point(lambda value: min(value + 1, 255))))
    assert look_at(fill(tmp_path / "tinted", gray, tinted)).image_channels == 3


def test_summary_reads_part_of_large_images(tmp_path: Path) -> None:
    image = np.zeros((600, 800, 3), np.uint8)
    image[::2, :, 0] = 255
    seen = look_at(fill(tmp_path / "large", Image.fromarray(image), copies=16))
    assert (seen.side, seen.image_channels) == (600, 3)


def test_summary_keeps_no_large_images() -> None:
    """Of 64 photographs of 12 megapixels, which take 2.3 GB."""

    class Photographs:
        classes, flips = (), False

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> Example:
            return Example(Image.new("RGB", (4000, 3000), (index, 1, 2)), -1, str(index))

    tracemalloc.start()
    summarize_dataset(Photographs(), "photographs")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6


def test_summary_max_abs_z_matches_measured_statistics() -> None:
    source = FashionSource()
    seen = summarize_dataset(source, "fashion")
    assert (seen.count, seen.side, seen.image_channels, len(seen.classes)) == (10_000, 28, 1, 10)
    images = torch.from_numpy(source.images[:2000]).unsqueeze(1) / 127.5 - 1
    found = measure_latents(PixelTokenizer(1), [images])
    assert seen.max_abs_z == pytest.approx((1 + abs(found.mean[0])) / found.std[0], rel=0.2)


def test_summary_max_abs_z_of_one_color_is_finite(tmp_path: Path) -> None:
    assert look_at(fill(tmp_path / "flat", Image.new("L", (9, 9), 128), copies=16)).max_abs_z < 200


def test_summary_leaves_out_unreadable_images(tmp_path: Path) -> None:
    folder = fill(tmp_path / "some", Image.new("L", (9, 9)), copies=20)
    for number in range(10):
        (folder / f"{number}.png").write_bytes(b"none")
    assert look_at(folder).side == 9
    for path in folder.iterdir():
        path.write_bytes(b"none")
    with pytest.raises(ValueError, match=r"none of 20 pictures of .*some that were looked at can be read"):
        look_at(folder)


def test_summary_of_two_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two has 2 pictures: expected at least 16"):
        look_at(fill(tmp_path / "two", Image.new("L", (9, 9)), copies=2))


def test_saved_summary_is_loaded_again(tmp_path: Path) -> None:
    data, run = bars(tmp_path / "data", 20), tmp_path / "run"
    seen, changed = load_summary(run, open_source(data), "data")
    assert changed is None
    assert not run.exists()
    save_summary(run, seen)
    (run / "run.json").touch()
    assert load_summary(run, open_source(data), "data") == (seen, None)
    Image.new("RGB", (64, 64), "red").save(data / "down" / "more.png")
    again, changed = load_summary(run, open_source(data), "data")
    assert again == seen
    assert changed == "data has 21 pictures now, 20 when the run began"
    save_summary(run, summarize_dataset(open_source(data), "data"))
    assert load_summary(run, open_source(data), "data")[0] == seen
    (data / "new").mkdir()
    Image.new("L", (8, 8)).save(data / "new" / "1.png")
    with pytest.raises(ConfigError, match="the classes across, down, new now, but the classes across, down when"):
        load_summary(run, open_source(data), "data")


def test_summary_of_a_run_that_never_began_is_made_anew(tmp_path: Path) -> None:
    """Other pictures may have been meant, and nothing was learned yet."""
    run = tmp_path / "run"
    save_summary(run, summarize_dataset(open_source(bars(tmp_path / "gray", 20)), "gray"))
    source = open_source(fill(tmp_path / "color", Image.new("RGB", (40, 40), "red"), copies=16))
    seen, changed = load_summary(run, source, "color")
    assert (seen.image_channels, seen.side, changed) == (3, 40, None)
    save_summary(run, seen)
    (run / "run.json").touch()
    assert load_summary(run, source, "color") == (seen, None)


def test_summary_counts_words_until_the_model_begins(tmp_path: Path) -> None:
    """Those of the cache that the model will read, if there is one."""
    data, run = caption_images(bars(tmp_path / "data", 20)), tmp_path / "run"
    seen = summarize_dataset(open_source(data), "data")
    save_summary(run, seen)
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "run.json").touch()
    lines = (data / "metadata.jsonl").read_text().splitlines()
    more = json.loads(lines[0]) | {"text": "something entirely else"}
    changed = "\n".join([json.dumps(more), *lines[1:]])

    (data / "metadata.jsonl").write_text(changed)
    again, _ = load_summary(run, open_source(data), "data")
    assert again == summarize_dataset(open_source(data), "data")
    assert again.words > seen.words
    save_summary(run, again)

    cached = ["cache", str(data), "--tokenizer", "pixels", "--image-size", "8", "--out", str(run / "latents")]
    assert main(cached) == 0
    (data / "metadata.jsonl").write_text("\n".join(lines))
    assert load_summary(run, open_source(data), "data")[0] == again
    (run / "latents" / "index.json").unlink()
    assert load_summary(run, open_source(data), "data")[0] == seen
    (run / "run.json").touch()
    assert load_summary(run, open_source(data), "data")[0] == again


WHOLE = {"count": 20, "side": 8, "image_channels": 1, "classes": ["across", "down"], "max_abs_z": 2.5}


@pytest.mark.parametrize(
    "changes", [{"side": 0}, {"image_channels": 2}, {"max_abs_z": -1}, {"aspect": 0}, {"other": 1}]
)
def test_damaged_summary_file_is_refused(changes: dict[str, int], tmp_path: Path) -> None:
    source = open_source(bars(tmp_path / "data", 20))
    file = tmp_path / "run" / SUMMARY_FILE
    file.parent.mkdir()
    file.with_name("run.json").touch()
    file.write_text(json.dumps(WHOLE))
    assert load_summary(file.parent, source, "data") == (DatasetSummary(20, 8, 1, ("across", "down")), None)
    file.write_text(json.dumps({**WHOLE, **changes}))
    with pytest.raises(ConfigError, match=r"pictures\.json can't be understood \(.*\); take another --out"):
        load_summary(file.parent, source, "data")


@pytest.mark.parametrize(
    ("aspects", "common"),
    [
        ([1.0] * 10, 1.0),
        ([1.5] * 10, 1.5),
        ([0.5] * 10, 0.5),
        ([1.5] * 6 + [0.667] * 4, 1.5),
        ([1.5] * 5 + [0.667] * 5, 1.0),  # as many landscapes as portraits
        ([1.36, 1.4, 1.5, 1.6, 1.64], 1.5),  # all within 10%
        ([1.3, 1.3, 1.5, 1.7, 1.7], 1.0),
        ([1.14] * 10, 1.0),  # nearly squares
        ([0.88] * 10, 1.0),
        ([1.16] * 10, 1.16),
        ([0.86] * 10, 0.86),
        ([7.0] * 10, 3.0),
        ([0.1] * 10, 1 / 3),
    ],
)
def test_common_aspect_is_that_of_most_images(aspects: list[float], common: float) -> None:
    assert common_aspect(np.array(aspects)) == common


def test_summary_of_lying_portraits_is_of_portraits(tmp_path: Path) -> None:
    """As a phone stores them: the sensor's landscape, and an EXIF orientation."""
    (tmp_path / "phone").mkdir()
    for number in range(20):
        image = Image.new("RGB", (80, 60), (9 * number, 70, 120))
        image.save(tmp_path / "phone" / f"{number}.jpg", exif=exif_of(8 if number % 2 else 6))
    source = open_source(tmp_path / "phone")
    assert summarize_dataset(source, "phone").aspect == 4 / 3
    assert summarize_dataset(source, "phone", turn_upright=False).aspect == 0.75
    assert summarize_dataset(source, "phone").side == 60


def test_saved_summary_without_aspect_is_square(tmp_path: Path) -> None:
    folder = fill(tmp_path / "data", Image.new("L", (30, 40)), copies=16)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    (tmp_path / "run" / SUMMARY_FILE).write_text(json.dumps({**WHOLE, "count": 16, "classes": []}))
    assert load_summary(tmp_path / "run", open_source(folder), "data")[0].aspect == 1
    seen, _ = load_summary(tmp_path / "new", open_source(folder), "data")
    assert seen.aspect == 4 / 3
    save_summary(tmp_path / "new", seen)
    assert load_summary(tmp_path / "new", open_source(folder), "data")[0] == seen
