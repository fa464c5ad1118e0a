"""Makes the bundled subset of Fashion-MNIST: python tools/make_fashion_asset.py --data FOLDER

FOLDER has the four gzipped IDX files as they are distributed. The subset is the first 1,000 training images and the
first 200 test images of each class, in the order of the files. Image i is of class i % 10, on a sheet of 100 images per
row. A PNG of a sheet is smaller than an .npz, loads in a tenth of a second, and people can view it.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, COLUMNS, CLASSES = 28, 100, 10
ASSETS = Path(__file__).resolve().parents[1] / "src" / "mar" / "assets" / "fashion-mnist"


def read_idx(path: Path, header: int) -> np.ndarray:
    """Read the bytes of a gzipped IDX file after its header."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def make_sheet(data: Path, stem: str, per_class: int) -> Image.Image:
    images = read_idx(data / f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, SIDE, SIDE)
    labels = read_idx(data / f"{stem}-labels-idx1-ubyte.gz", 8)
    first = np.stack([np.flatnonzero(labels == c)[:per_class] for c in range(CLASSES)])
    subset = images[first.T.ravel()]
    sheet = subset.reshape(-1, COLUMNS, SIDE, SIDE).transpose(0, 2, 1, 3).reshape(-1, COLUMNS * SIDE)
    return Image.fromarray(np.ascontiguousarray(sheet))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four .gz files")
    data = parser.parse_args().data
    for stem, split, per_class in (("train", "train", 1000), ("t10k", "test", 200)):
        path = ASSETS / f"{split}.png"
        make_sheet(data, stem, per_class).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
