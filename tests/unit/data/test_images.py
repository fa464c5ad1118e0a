from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from orientations import ORIENTATIONS, exif_of, file_bytes, steps, stored
from PIL import Image

from mar.data.images import Transform, adm_center_crop, convert_channels, decode_image, to_tensor, upright

BOX, BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode=None)


def test_adm_crop_of_a_landscape_step_by_step() -> None:
    image = noise(1000, 700)
    # 700 >= 2 * 256 once; then 350 -> 256, 500 * 256 / 350 -> 366, of which (366 - 256) // 2 = 55 go on the left.
    expected = image.resize((500, 350), BOX).resize((366, 256), BICUBIC).crop((55, 0, 311, 256))
    assert np.array_equal(adm_center_crop(image, 256), expected)


def test_adm_crop_of_a_portrait_that_is_halved_twice() -> None:
    image = noise(131, 277)
    expected = image.resize((65, 138), BOX).resize((32, 69), BOX).resize((32, 69), BICUBIC).crop((0, 18, 32, 50))
    # 69 rows are left with 18 above the middle 32 and 19 below.
    assert np.array_equal(adm_center_crop(image, 32), expected)


def test_adm_crop_enlarges_what_is_too_small() -> None:
    image = noise(20, 30)
    assert np.array_equal(adm_center_crop(image, 40), image.resize((40, 60), BICUBIC).crop((0, 10, 40, 50)))


def test_adm_crop_to_a_rectangle() -> None:
    image = noise(400, 300)
    # Halved once, since 300 >= 2 * 64 and 400 >= 2 * 128, but not twice; then 200 x 150 covers 128 x 64 as 128 x 96.
    expected = image.resize((200, 150), BOX).resize((128, 96), BICUBIC).crop((0, 16, 128, 80))
    assert np.array_equal(adm_center_crop(image, (64, 128)), expected)
    for size in (48, 96):
        assert np.array_equal(adm_center_crop(image, (size, size)), adm_center_crop(image, size))


def test_adm_crop_right_size_is_unchanged() -> None:
    image = noise(28, 28, "L")
    assert np.array_equal(adm_center_crop(image, 28), image)


def test_to_tensor_values_are_in_minus_one_to_one() -> None:
    image = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    assert to_tensor(image, 1).tolist() == [[[-1.0, 1.0]]]
    assert to_tensor(image, 3).tolist() == [[[-1.0, 1.0]]] * 3


def test_to_tensor_gray_is_weighted_and_channels_keep_order() -> None:
    image = Image.new("RGB", (1, 1), (255, 0, 0))
    assert to_tensor(image, 3).flatten().tolist() == [1.0, -1.0, -1.0]
    assert to_tensor(image, 1).item() == pytest.approx(2 * 0.299 - 1, abs=0.005)


def pixel(image: Image.Image, channels: int = 3) -> tuple[int, ...] | int:
    return convert_channels(image, channels).getpixel((0, 0))


def test_to_tensor_transparency_becomes_white() -> None:
    assert pixel(Image.new("RGBA", (1, 1), (255, 0, 0, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (1, 1), (0, 0, 0, 51))) == (204, 204, 204)
    assert pixel(Image.new("LA", (1, 1), (0, 0))) == (255, 255, 255)
    assert pixel(Image.new("LA", (1, 1), (0, 0)), channels=1) == 255
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert pixel(palette) == (10, 20, 30)
    palette.info["transparency"] = 0
    assert pixel(palette) == (255, 255, 255)


def test_to_tensor_other_color_modes_are_converted() -> None:
    assert pixel(Image.new("CMYK", (1, 1), (0, 255, 255, 0))) == (255, 0, 0)
    assert pixel(Image.new("1", (1, 1), 1), channels=1) == 255
    assert pixel(Image.new("YCbCr", (1, 1), (255, 128, 128))) == (255, 255, 255)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_to_tensor_16_bit_values_are_scaled(dtype: type) -> None:
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=dtype))
    assert image.mode in ("I;16", "I")
    assert np.asarray(convert_channels(image, 1)).tolist() == [[0, 128, 255]]


def test_transform_cuts_to_a_size() -> None:
    image = noise(40, 40)
    assert Transform(16)(image).shape == (3, 16, 16)
    assert Transform((8, 16), channels=1)(image).shape == (1, 8, 16)


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 1 pixel"):
        Transform((0, 4))
    with pytest.raises(ValueError, match="channels: got 2"):
        convert_channels(noise(4, 4), 2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_upright_any_orientation_and_format_gives_the_original(orientation: int, kind: str) -> None:
    image = decode_image(BytesIO(file_bytes(steps(), orientation, kind)), "lying")
    if kind != "TIFF":  # Pillow turns these itself
        assert image.size == ((48, 32) if orientation < 5 else (32, 48))
    result = np.asarray(upright(image).convert("L"), dtype=int)
    assert result.shape == (32, 48)
    assert np.abs(result - np.asarray(steps())).max() <= (2 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_upright_keeps_mode_and_turns_once(mode: str, orientation: int) -> None:
    image = stored(steps(), orientation).convert("L").convert("I" if mode == "I;16" else mode).convert(mode)
    image.info |= {"exif": exif_of(orientation).tobytes(), "mar": "kept"}
    result = upright(image)
    assert (result.mode, result.size, result.info["mar"]) == (mode, (48, 32), "kept")
    assert np.array_equal(upright(result), result)
    assert (result is image) == (orientation == 1)


def test_upright_orientation_in_xmp_alone_is_followed() -> None:
    image = stored(steps(), 6)
    image.info["xmp"] = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert np.array_equal(upright(image), steps())
    assert np.array_equal(upright(upright(image)), steps())


def damaged(kind: str) -> bytes:
    whole = exif_of(6).tobytes()
    return {
        "empty": b"",
        "no TIFF": whole.replace(b"MM\0*", b"MM\xff*"),
        "cut short": whole[:11],
        "header alone": whole[:6] + b"II*\0",
        "far away": whole[:10] + b"\xff\xff\xff\xf0" + whole[14:],
        "orientation 9": exif_of(9).tobytes(),
        "orientation 0": exif_of(0).tobytes(),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "no TIFF", "cut short", "header alone", "far away", "orientation 9", "orientation 0"]
)
def test_upright_damaged_exif_leaves_the_picture(kind: str) -> None:
    image = steps()
    image.info["exif"] = damaged(kind)
    assert upright(image) is image


def test_upright_damage_in_other_tags_does_not_matter() -> None:
    """`ImageOps.exif_transpose` fails here, as it writes all tags again."""
    exif = exif_of(6)
    exif[0x011A] = 2.0
    whole = exif.tobytes()
    rational = whole.index(b"\x01\x1a\0\x05")
    image = stored(steps(), 6)
    image.info["exif"] = whole[: rational + 2] + b"\0\x0c" + whole[rational + 4 :]  # of another type than it is
    assert np.array_equal(upright(image), steps())


def test_transform_turns_upright_only_if_told() -> None:
    image = decode_image(BytesIO(file_bytes(steps(), 6)), "lying")
    plain = Transform((32, 48), 1)(steps())
    assert torch.equal(Transform((32, 48), 1, upright=True)(image), plain)
    assert torch.equal(Transform((48, 32), 1)(image), plain[0].rot90().unsqueeze(0))
    assert np.array_equal(image, stored(steps(), 6))
