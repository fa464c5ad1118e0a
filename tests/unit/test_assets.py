from __future__ import annotations

import time

import pytest
import torch

from mar.assets import FASHION_CLASSES, asset, imagenet, imagenet_classes
from mar.data.sources import FashionSource


def test_bundled_images_are_balanced_and_small() -> None:
    began = time.perf_counter()
    train, test = FashionSource("train"), FashionSource("test")
    assert time.perf_counter() - began < 0.5
    assert (len(train), len(test)) == (10_000, 2_000)
    for source in (train, test):
        labels = torch.as_tensor(source.labels)
        assert labels.bincount().tolist() == [len(source) // 10] * 10
        # Any stretch of ten has every class: a prefix is as balanced as the whole.
        assert sorted(source[i].label for i in range(50, 60)) == list(range(10))
    assert sum(asset(f"fashion-mnist/{split}.png").stat().st_size for split in ("train", "test")) < 5_000_000
    assert "Zalando SE" in asset("fashion-mnist/LICENSE").read_text()


def test_bundled_images_match_their_sheet() -> None:
    # Trousers are dark in the two upper corners and light along both legs; a slip of one pixel row would mix pictures.
    source = FashionSource("test")
    pixels = torch.as_tensor(source.images).float()
    labels = torch.as_tensor(source.labels)
    trousers = pixels[labels == FASHION_CLASSES.index("Trouser")].mean(0)
    assert trousers[:, :4].mean() < 10 < 100 < trousers[4:24, 11:17].mean()
    # The first ten are the first of each class of the data set's test file: the ankle boot is its very first picture.
    assert source[9].image.size == (28, 28)
    assert int(pixels[9].sum()) == 33_456


def test_imagenet_classes_are_1000_distinct_names() -> None:
    names = imagenet_classes()
    assert len(names) == len({name.casefold() for name in names}) == 1000
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
    wnids = [entry.wnid for entry in imagenet()]
    assert wnids == sorted(wnids)
    assert "Tinca tinca" in imagenet()[0].synonyms


def test_missing_asset_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="bundled nothing"):
        asset("nothing")
