"""Conditions: classes as they always were, captions word by word, and none of either."""

from __future__ import annotations

import pytest
import torch
from tiny import noise, tiny_config, tiny_model

from mar.config import ConfigError
from mar.model.conditions import (
    NO_CONDITION,
    TextCondition,
    WordsCondition,
    build_conditioner,
    drop_condition,
    has_condition,
)
from mar.model.mar import MAR

NOTHING = torch.empty(1, 0, dtype=torch.long)
WORDS = {"classes": 0, "words": 6, "buffer_size": 4}
TEXT = {"classes": 0, "text_width": 3, "buffer_size": 4}


def words(*numbers: int, length: int = 4) -> torch.Tensor:
    """One caption of words, padded."""
    return torch.tensor([[*numbers, *[NO_CONDITION] * (length - len(numbers))]])


def text(tokens: int, length: int, seed: int = 0) -> torch.Tensor:
    """One caption of encoded tokens, padded with values that must not matter."""
    features = torch.cat([noise(1, 4, 3, seed=seed)[:, :tokens], noise(1, length - tokens, 3, seed=seed + 9)], dim=1)
    there = torch.cat([torch.ones(1, tokens, 1), torch.full((1, length - tokens, 1), -1.0)], dim=1)
    return torch.cat([features, there], dim=-1)


# ---- every kind


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (torch.tensor([0, -1, 2]), [True, False, True]),
        (torch.tensor([[3, -1], [-1, -1], [0, 1]]), [True, False, True]),
        (torch.full((2, 4, 3), -1.0), [False, False]),
        (torch.empty(0, 4, dtype=torch.long), []),
    ],
)
def test_has_condition_of_each_kind_finds_rows_with_one(condition: torch.Tensor, expected: list[bool]) -> None:
    assert has_condition(condition).tolist() == expected


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 2)])
def test_drop_condition_takes_whole_rows_only(shape: tuple[int, ...]) -> None:
    condition = torch.arange(1, 1 + torch.Size(shape).numel()).view(shape)
    dropped = drop_condition(condition, torch.tensor([False, True, False]))
    assert has_condition(dropped).tolist() == [True, False, True]
    assert torch.equal(dropped[[0, 2]], condition[[0, 2]])


@pytest.mark.parametrize(
    ("kind", "null"),
    [({}, torch.tensor([-1])), (WORDS, words()), (TEXT, torch.full((1, 4, 4), -1.0))],
    ids=["class", "words", "text"],
)
def test_null_condition_equals_the_unconditional_model_bitwise(kind: dict[str, int], null: torch.Tensor) -> None:
    model = tiny_model(**kind)
    unconditional = MAR(tiny_config(**{**kind, "classes": 0, "words": 0, "text_width": 0})).eval()
    own = model._conditioner + "."
    shared = {name: value for name, value in model.state_dict().items() if not name.startswith(own)}
    unconditional.load_state_dict(shared)
    tokens = noise(1, 16, 2)
    assert torch.equal(model(tokens, null, NOTHING), unconditional(tokens, torch.tensor([-1]), NOTHING))


def test_build_conditioner_of_two_kinds_is_refused() -> None:
    assert build_conditioner(tiny_config(classes=0)) == ("class_embed", None)
    with pytest.raises(ConfigError, match="one kind of condition, but classes and words"):
        tiny_config(words=5)


# ---- classes


def test_class_condition_is_its_embedding_in_every_buffer_token() -> None:
    """What the model did before conditions had a room of their own."""
    model, labels = tiny_model(), torch.tensor([2, NO_CONDITION, 0])
    weight = model.state_dict()["class_embed.weight"]
    expected = torch.stack([weight[2], model.null_class[0], weight[0]])[:, None] + model.encoder_position[:2]
    assert torch.equal(model.embed_condition(labels) + model.encoder_position[:2], expected)


# ---- words


def test_words_condition_pads_with_a_learned_token() -> None:
    conditioner = tiny_model(**WORDS).conditioner
    assert isinstance(conditioner, WordsCondition)
    buffer = conditioner(words(3, 0))
    table = conditioner.words.weight
    assert torch.equal(buffer[0], torch.stack([table[3], table[0], conditioner.padding, conditioner.padding]))
    assert torch.equal(conditioner(words(3, 0, length=2)), buffer)  # as many as there are words


def test_words_condition_follows_the_order_of_words() -> None:
    model, tokens = tiny_model(**WORDS), noise(1, 16, 2)
    one, other = (model(tokens, words(*order), NOTHING) for order in ((1, 2), (2, 1)))
    assert (one - other).abs().max() > 1e-3


def test_words_condition_longer_than_the_buffer_is_refused() -> None:
    conditioner = tiny_model(**WORDS).conditioner
    assert conditioner is not None
    with pytest.raises(ValueError, match="captions: got 5 tokens, expected at most 4"):
        conditioner(words(0, 1, 2, 3, 4))


# ---- encoded text


@pytest.mark.parametrize("length", [2, 3, 4])
def test_text_condition_does_not_depend_on_padding(length: int) -> None:
    conditioner = tiny_model(**TEXT).conditioner
    assert isinstance(conditioner, TextCondition)
    expected = conditioner(text(2, 4))
    torch.testing.assert_close(conditioner(text(2, length)), expected)
    assert torch.equal(expected[:, 2:], conditioner.padding.expand(1, 2, -1))
    assert not torch.equal(conditioner(text(2, 4, seed=1))[:, :2], expected[:, :2])
