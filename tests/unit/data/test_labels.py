from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mar.assets import FASHION_CLASSES, imagenet, imagenet_classes
from mar.data.labels import resolve_labels

NAMES = imagenet_classes()


def one(label: int | str | None) -> int:
    return resolve_labels([label], NAMES, 1000)[0]


def test_label_by_number_name_or_wordnet_id() -> None:
    numbers = list(range(1000))
    assert resolve_labels(numbers, NAMES, 1000) == numbers
    assert resolve_labels([str(n) for n in numbers], NAMES, 1000) == numbers
    assert resolve_labels(NAMES, NAMES, 1000) == numbers
    assert resolve_labels([name.upper() for name in NAMES], NAMES, 1000) == numbers
    assert resolve_labels([entry.wnid for entry in imagenet()], NAMES, 1000) == numbers


@pytest.mark.parametrize(
    ("label", "number"),
    [("golden", 207), ("  Golden   Retriever ", 207), ("tank suit", 639), ("tabby cat", 281), ("kite", 21), (None, -1)],
)
def test_label_by_part_or_synonym(label: str | None, number: int) -> None:
    assert one(label) == number


@pytest.mark.parametrize(
    ("label", "candidates"),
    [
        ("crane", ["134", "517"]),
        ("Cardigan", ["264", "474"]),
        ("maillot", ["638", "639"]),
        ("retriever", ["205", "209"]),
    ],
)
def test_label_ambiguous_lists_the_numbers(label: str, candidates: list[str]) -> None:
    with pytest.raises(ValueError, match="may be any of") as error:
        one(label)
    assert all(number in str(error.value) for number in candidates)


def test_label_unknown_suggests_close_names() -> None:
    with pytest.raises(ValueError, match=r"'goldfsh' is not a class; close to it: 1 \(goldfish\)"):
        one("goldfsh")
    with pytest.raises(ValueError, match=r"'xyzzy' is not a class; the 10 classes are T-shirt/top, Trouser"):
        resolve_labels(["xyzzy"], FASHION_CLASSES, 10)
    with pytest.raises(ValueError, match="not a class"):
        one("  ")


@pytest.mark.parametrize("label", [1000, "1000", -1, "-1"])
def test_label_out_of_range_names_the_range(label: int | str) -> None:
    with pytest.raises(ValueError, match="out of range: this model has classes 0 to 999"):
        one(label)


@pytest.mark.parametrize("label", [1.7, np.float32(2), torch.tensor(3.0), b"ant", [1]])
@pytest.mark.usefixtures("untyped")
def test_label_of_another_type_is_refused(label: Any) -> None:
    with pytest.raises(ValueError, match=r"^label .*: expected a whole number, a name, or None"):
        one(label)


@pytest.mark.parametrize("labels", ["12", 12])
@pytest.mark.usefixtures("untyped")
def test_labels_single_label_is_no_list(labels: Any) -> None:
    with pytest.raises(ValueError, match=f"^labels: got {labels!r}, expected a list of them"):
        resolve_labels(labels, NAMES, 1000)


@pytest.mark.usefixtures("untyped")
def test_label_of_an_array_is_a_number() -> None:
    labels: Any = [np.int64(3), torch.tensor(4)]
    assert resolve_labels(labels, NAMES, 1000) == [3, 4]


def test_label_numeric_class_name_wins() -> None:
    assert resolve_labels(["7", 7], ["7", *"abcdefg"], 8) == [0, 7]


def test_class_folders_of_wordnet_ids_have_names() -> None:
    assert resolve_labels(["golden retriever", "n01440764"], ["n01440764", "n02099601"], 2) == [1, 0]


def test_labels_of_a_model_without_names_or_classes() -> None:
    assert resolve_labels([3, None], (), 10) == [3, -1]
    with pytest.raises(ValueError, match="no class names; give a number"):
        resolve_labels(["cat"], (), 10)
    with pytest.raises(ValueError, match="no classes"):
        resolve_labels([0], (), 0)
