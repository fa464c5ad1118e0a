"""Pictures as data URLs: there and back, and what is refused."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from mar.app import pictures
from mar.app.pictures import facts_of, png_url, preview_url, read_picture


def url_of(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    buffer = BytesIO()
    image.save(buffer, format=format, **options)
    return f"data:image/x;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def gradient() -> Image.Image:
    return Image.frombytes("RGB", (6, 4), bytes(range(72)))


def test_read_picture_of_png_url_is_the_picture_with_its_facts() -> None:
    image = read_picture(png_url(gradient(), {"seed": 3, "label": None}))
    assert image.tobytes() == gradient().tobytes()
    assert facts_of(image) == {"seed": 3, "label": None}


def test_read_picture_takes_base64_alone() -> None:
    assert read_picture(png_url(gradient()).split(",")[1]).tobytes() == gradient().tobytes()


def test_read_picture_turns_it_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to the right to see it upright
    image = read_picture(url_of(gradient(), exif=exif))
    assert image.size == (4, 6)
    assert image.tobytes() == gradient().transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("facts", ["[1]", "{", "1" * 5000, '{"a":' * 2000])
def test_facts_of_other_texts_are_none(facts: str) -> None:
    image = gradient()
    image.info["mar"] = facts
    assert facts_of(image) is None


@pytest.mark.parametrize(("side", "kind"), [(28, "png"), (200, "webp")])
def test_preview_url_of_small_pictures_is_lossless(side: int, kind: str) -> None:
    url = preview_url(Image.new("RGB", (side, side), (9, 90, 200)))
    assert url.startswith(f"data:image/{kind};base64,")
    assert read_picture(url).size == (side, side)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "got NoneType"),
        ({"path": "/etc/passwd"}, "got dict"),
        ("/etc/passwd", "expected a picture as a data URL"),
        ("http://127.0.0.1/a.png", "expected a picture as a data URL"),
        ("data:image/png,%89PNG", "not base64"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(), "can't read"),
        ("", "can't read"),
        ("data:image/png;base64,????", "not base64"),
        (url_of(gradient())[:-48], "can't read"),
    ],
)
def test_read_picture_of_anything_else_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_picture(data)


def test_read_picture_too_large_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    large = url_of(gradient(), "BMP")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 23)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="got 6x4, expected at most 23 pixels"):
        read_picture(large)
    with pytest.raises(ValueError, match="more than 10 MiB"):
        read_picture("A" * (15 * 2**20))
