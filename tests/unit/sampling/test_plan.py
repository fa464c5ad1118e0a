"""Which pictures are drawn: balanced labels, seeds that follow from the number, units without gap or excess."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mar.config import ConfigError
from mar.sampling.plan import Plan, as_argument, read_labels, read_prompts


def test_plan_classes_take_turns() -> None:
    plan = Plan.per_class(3, [4, 7], seed=2)
    assert plan.labels == (4, 7, 4, 7, 4, 7)
    assert [seed for unit in plan.units(4) for seed in unit.seeds] == [2 * 2**32 + i for i in range(6)]


@pytest.mark.parametrize("count", [1, 3, 7, 10])
def test_plan_prefix_is_balanced_and_stable(count: int) -> None:
    plan, longer = Plan.total(count, range(3)), Plan.total(count + 5, range(3))
    assert len(plan) == count
    assert longer.labels[:count] == plan.labels
    counts = Counter({0: 0, 1: 0, 2: 0}) + Counter(plan.labels)
    assert max(counts.values()) - min(counts[label] for label in range(3)) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_plan_units_cover_it_once(size: int) -> None:
    plan = Plan(tuple(range(7)), seed=1)
    units = list(plan.units(size))
    assert [unit.number for unit in units] == list(range(len(units)))
    assert [label for unit in units for label in unit.labels] == list(range(7))
    assert all(unit.seeds[0] == 2**32 + unit.first == 2**32 + unit.labels[0] for unit in units)
    assert {len(unit.labels) for unit in units[:-1]} <= {size}


def test_plan_digest_follows_labels_and_order() -> None:
    prints = {Plan(labels).fingerprint() for labels in [(0,), (1,), (0, 1), (1, 0), (-1,), (0, 0)]}
    assert len(prints) == 6


def test_plan_invalid_arguments_are_refused() -> None:
    for wrong in (lambda: Plan(()), lambda: Plan((0,), -1), lambda: Plan((0,), 2**32), lambda: Plan.total(0, [0])):
        with pytest.raises(ConfigError, match=r"at least 1|expected 0 to"):
            wrong()
    with pytest.raises(ConfigError, match="got 0"):
        Plan.per_class(0, [1])
    with pytest.raises(ConfigError, match="batch: got 0"):
        list(Plan((0,)).units(0))


def test_plan_from_a_file_of_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeffcat\r\n 3 \n\nNone\ngrüne Mamba\n".encode())
    assert read_labels(path) == ["cat", "3", None, "grüne Mamba"]
    path.write_text("\n \n")
    with pytest.raises(ConfigError, match="has no labels"):
        read_labels(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no text"):
        read_labels(path)


def test_plan_of_classes_keeps_its_digest() -> None:
    """Outputs that earlier versions began go on."""
    assert Plan((0, 1, 2, -1)).fingerprint() == "3085ba666f63c7795d1caa2eaa9cc2de5204d7bf591f7040d58a42a00868ee6a"


def test_plan_of_prompts_takes_turns_and_has_no_labels() -> None:
    plan = Plan.total(5, ["a cat", "dog", ""], seed=1)
    assert plan.has_prompts
    assert plan.asks == ("a cat", "dog", "", "a cat", "dog")
    assert plan.labels == (-1,) * 5
    assert [unit.asks for unit in plan.units(3)] == [("a cat", "dog", ""), ("a cat", "dog")]
    prints = {Plan(asks).fingerprint() for asks in [("a b",), ("a", "b"), ("b", "a"), ("",), (-1,), ("0",), (0,)]}
    assert len(prints) == 7


def test_plan_argument_is_labels_or_prompts() -> None:
    assert as_argument((0, -1)) == {"labels": [0, None]}
    assert as_argument(("dog", "")) == {"prompts": ["dog", ""]}


def test_plan_from_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red cat\r\n \nNone\n  grüne Mamba, 3 \n".encode())
    assert read_prompts(path) == ["a red cat", None, "grüne Mamba, 3"]
    path.write_text("\n")
    with pytest.raises(ConfigError, match="has no prompts, expected one a line"):
        read_prompts(path)
