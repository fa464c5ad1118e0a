"""Pictures as cameras store them: lying in the file, with an EXIF orientation for the way up."""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATIONS = range(1, 9)


def steps(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A gray picture of 3 x 2 flat parts, that no turn or flip leaves as it is. JPEG keeps it to a level or two."""
    values = np.array([[0, 40, 80], [120, 160, 255]], dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.NEAREST)


def stored(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as it lies in a file of this orientation: the table of the EXIF standard, by rows and columns."""
    a = np.asarray(image)
    lying = {
        1: a,
        2: a[:, ::-1],
        3: a[::-1, ::-1],
        4: a[::-1],
        5: a.swapaxes(0, 1),
        6: np.rot90(a),
        7: a[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(a, -1),
    }
    return Image.fromarray(np.ascontiguousarray(lying[orientation]))


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def file_bytes(image: Image.Image, orientation: int, kind: str = "PNG") -> bytes:
    """A file of the picture in this orientation."""
    file = BytesIO()
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    stored(image, orientation).save(file, kind, exif=exif_of(orientation), **options)
    return file.getvalue()


def lay_down(folder: Path) -> Path:
    """Stores every PNG of a folder in another orientation: each looks as before, once it is upright."""
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        with Image.open(path) as image:
            image.load()
        path.write_bytes(file_bytes(image, 2 + number % 7))
    return folder


def forget_upright(path: Path) -> None:
    """Takes the field out of a JSON file of a run or cache, as versions that did not have it wrote the file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    del values.get("content", values)["upright"]
    values.pop("checksum", None)
    if "content" in values:
        values["sha256"] = hashlib.sha256(json.dumps(values["content"], sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(values), encoding="utf-8")
