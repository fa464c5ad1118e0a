"""Pictures as they travel: data URLs, with the settings of drawn ones inside their PNG."""

from __future__ import annotations

import base64
import binascii
import json
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 10 * 2**20
"""Largest file that is accepted."""
MAX_PIXELS = 40_000_000
"""Most pixels of a picture that is accepted."""
MAX_ASPECT = 50
"""Longest side of a picture that is accepted, in shorter sides: it is scaled by the shorter one."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are accepted, as Pillow calls them; a file is told by its contents."""
LOSSLESS_SIDE = 96
"""Previews up to this side are PNGs; larger ones are compressed with loss."""


def read_picture(data: Any, name: str = "picture") -> Image.Image:
    """Decode a picture from a data URL, or from base64 alone.

    It is turned upright, as its EXIF orientation says. Raises ValueError for anything else than a picture, and for one
    that is too large.

    Args:
        data: what was sent.
        name: for messages.
    """
    from PIL import UnidentifiedImageError

    from mar.data.images import UnreadableImage, decode_image, upright

    if not isinstance(data, str):
        raise ValueError(f"{name}: got {type(data).__name__}, expected a picture as a data URL")
    head, comma, body = data.partition(",") if data.startswith("data:") else ("", ",", data)
    if not comma or (head and not head.endswith(";base64")):
        raise ValueError(f"{name}: got a data URL that is not base64, expected data:image/png;base64,...")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"{name}: got more than {MAX_BYTES // 2**20} MiB; make it smaller")
    try:
        content = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name}: got text that is not base64, expected a picture as a data URL") from None
    try:
        image = decode_image(BytesIO(content), name, FORMATS, MAX_PIXELS)
    except UnreadableImage as error:
        unknown = isinstance(error.__cause__, UnidentifiedImageError)
        why = f"got another kind of file, expected {', '.join(FORMATS)}" if unknown else error.why
        raise ValueError(f"{name}: can't read it: {why}") from error
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{name}: got {image.width}x{image.height}, expected sides of at most {MAX_ASPECT}:1")
    return upright(image)


def facts_of(image: Image.Image) -> dict[str, Any] | None:
    """Return the settings that mar wrote into a PNG; None: no settings."""
    try:
        facts = json.loads(image.info.get("mar", ""))
        json.dumps(facts, ensure_ascii=False).encode()  # half a surrogate pair can't be sent back
    except (TypeError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def png_url(image: Image.Image, facts: dict[str, Any] | None = None) -> str:
    """Encode a picture as a PNG data URL, with its settings inside."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if facts is not None:
        info.add_text("mar", json.dumps(facts))
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return _data_url("image/png", buffer)


def preview_url(image: Image.Image) -> str:
    """Encode a picture of the reveal as a data URL, quickly."""
    buffer = BytesIO()
    if max(image.size) <= LOSSLESS_SIDE:
        image.save(buffer, format="PNG", compress_level=1)
        return _data_url("image/png", buffer)
    image.save(buffer, format="WEBP", quality=80, method=0)
    return _data_url("image/webp", buffer)


def _data_url(kind: str, buffer: BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
