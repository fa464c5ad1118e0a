"""Pictures of odd shapes and values: none becomes something else without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shard_files import png_bytes

from mar.data.images import MAX_COVERING_PIXELS, Transform, UnreadableImage, adm_center_crop, decode_image
from mar.data.splits import hold_out


def saved(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


def test_image_of_floats_in_unit_range_is_scaled(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    unit = Transform(8, 1)(decode_image(saved(tmp_path / "a.tif", values), "a"))
    wide = Transform(8, 1)(decode_image(saved(tmp_path / "b.tif", np.rint(values * 255)), "b"))
    assert unit.min() == -1
    assert unit.max() == 1
    assert np.array_equal(unit.numpy(), wide.numpy())


@pytest.mark.parametrize(
    "values", [[-1.0, 1.0], [0.0, 256.0], [0.0, float("nan")], [0.0, float("inf")], [0, 70_000], [-1, 3]]
)
def test_image_of_values_beyond_gray_is_unreadable(tmp_path: Path, values: list[float]) -> None:
    kind = np.int32 if isinstance(values[0], int) else np.float32
    path = saved(tmp_path / "a.tif", np.array([values], dtype=kind))
    with pytest.raises(UnreadableImage, match=r"got values from .* expected 0 to"):
        decode_image(path, "a.tif")


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 30_000), (2, 60_000)])
def test_thin_image_is_cropped_before_it_is_enlarged(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    resize, resized = Image.Image.resize, list[int]()

    def recorded(image: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        resized.append(size[0] * size[1])
        return resize(image, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    column = np.linspace(0, 255, max(size), dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(column[:, None] if size[1] > size[0] else column, size[::-1]).copy())
    crop = np.asarray(adm_center_crop(image, 512))
    assert crop.shape == (512, 512)
    assert np.abs(crop.astype(int) - 127).max() <= 2, "the middle"
    assert resized
    assert max(resized) <= MAX_COVERING_PIXELS, "never the whole picture"


def test_thin_image_crop_is_near_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 3, 3), dtype=np.uint8)
    whole = np.asarray(adm_center_crop(Image.fromarray(noise), 32)).astype(int)
    assert MAX_COVERING_PIXELS > 32 * 427
    monkeypatch.setattr("mar.data.images.MAX_COVERING_PIXELS", 1)
    part = np.asarray(adm_center_crop(Image.fromarray(noise), 32)).astype(int)
    assert np.abs(whole - part).mean() < 8


def test_held_out_pictures_that_cannot_be_read_stop(tmp_path: Path) -> None:
    for i in range(16):
        (tmp_path / f"{i:02}.png").write_bytes(png_bytes(i))
    train, val = hold_out(tmp_path)
    assert (len(train), len(val)) == (15, 1)
    Path(val[0].name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"^data: none of 1 held-out pictures of [^\n]*\.png \([^\n]*replace them"):
        hold_out(tmp_path)
