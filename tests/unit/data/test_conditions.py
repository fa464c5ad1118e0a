"""Readers: labels and prompts that are understood, in part or not at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import WORDS

from mar.data.conditions import MAX_NOTES, ClassReader, WordReader, reader_from_header


def reader(length: int = 4) -> WordReader:
    return WordReader(WORDS, length)


def numbers(*prompts: str | None, length: int = 4) -> list[list[int]]:
    """The words of each prompt."""
    rows = reader(length).read(None, list(prompts)).tolist()
    return [[number for number in row if number >= 0] for row in rows]


def of(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


# ---- words


def test_word_reader_reads_words_in_their_order() -> None:
    assert numbers("a red cat", "Cat, RED!", "cat cat") == [of("a", "red", "cat"), of("cat", "red"), of("cat", "cat")]
    assert reader().read(None, ["a cat"]).tolist() == [[*of("a", "cat"), -1, -1]]


@pytest.mark.parametrize("text", ["medium-dark skin tone", "medium dark skin tone", "Medium-Dark, skin tone"])
def test_word_reader_joins_what_its_words_join(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert numbers(text) == [of("medium-dark", "skin", "tone")]
    assert not caplog.records


def test_word_reader_splits_words_it_does_not_know_joined(caplog: pytest.LogCaptureFixture) -> None:
    assert numbers("dog-cat", "dark-skin") == [of("dog", "cat"), of("dark", "skin")]
    assert not caplog.records


@pytest.mark.parametrize("empty", [None, "", " \t"])
def test_word_reader_empty_prompt_is_no_condition(empty: str | None) -> None:
    assert reader().read(None, [empty]).tolist() == [[-1] * 4]
    assert reader().read([None], None).tolist() == [[-1] * 4]


def test_word_reader_unknown_words_are_named_with_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    assert numbers("a rod cat zzz") == [of("a", "cat")]
    assert [record.getMessage() for record in caplog.records] == [
        "prompt 'a rod cat zzz': unknown words: rod (red?), zzz; left out"
    ]


def test_word_reader_long_prompt_is_cut_and_named(caplog: pytest.LogCaptureFixture) -> None:
    assert numbers("a red dog cat", length=3) == [of("a", "red", "dog")]
    assert [record.getMessage() for record in caplog.records] == [
        "prompt 'a red dog cat': cut after 3 words, before 'cat'"
    ]


def test_word_reader_says_one_line_a_prompt_and_only_once(caplog: pytest.LogCaptureFixture) -> None:
    held = reader(2)
    for _ in range(2):
        held.read(None, ["a red zzz dog", "a cat", "a red zzz dog"])
    assert len(caplog.records) == 1
    assert "unknown words: zzz; left out; cut after 2 words" in caplog.text


def test_word_reader_many_odd_prompts_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    reader().read(None, [f"a cat zz{i}" for i in range(MAX_NOTES + 3)])
    assert len(caplog.records) == MAX_NOTES + 1
    assert caplog.records[-1].getMessage() == "3 more prompts are read in part"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("cot", r"'cot': unknown words: cot \(cat\?\); expected some of the 10 words"),
        ("!?", r"'!\?': it has no words; expected some of the 10"),
    ],
)
def test_word_reader_prompt_without_known_words_is_refused(prompt: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        numbers("a cat", prompt)


@pytest.mark.parametrize(
    ("labels", "prompts", "words"),
    [
        (["cat"], None, "labels: got 'cat', but this model draws from words; give prompts"),
        ([0], None, "labels: got 0, but this model draws from words"),
        ([None], ["a cat"], "got labels and prompts, expected prompts alone"),
        (None, "a cat", r"prompts: got 'a cat', expected a list of them, as \['a cat'\]"),
        (None, 3, "prompts: got 3, expected a list"),
        (None, ["a cat", 3], "prompts: got 3, expected text"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_word_reader_anything_else_is_refused(labels: Any, prompts: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reader().read(labels, prompts)


def test_word_reader_of_data_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.tensor([0, 1, -1])
    with caplog.at_level(logging.DEBUG):
        assert reader().of_data(labels, ["a dog", "", "zzz"]).tolist() == [
            [*of("a", "dog"), -1, -1],
            [-1] * 4,
            [-1] * 4,
        ]
        assert reader().of_data(labels, ()).tolist() == [[-1] * 4] * 3
    assert not caplog.records


def test_word_reader_readable_leaves_out_unknown_captions() -> None:
    assert reader().readable(["a cat", "zzz", "", "dog zzz"]) == ["a cat", "dog zzz"]
    assert reader().readable([]) == []


def test_word_reader_comes_back_from_its_header() -> None:
    again = reader_from_header(reader().header(), 4)
    assert isinstance(again, WordReader)
    assert (again.words, again.length) == (WORDS, 4)
    assert reader_from_header({}, 4) is None


# ---- classes


def test_class_reader_reads_labels_and_refuses_prompts() -> None:
    classes = ClassReader(("ant", "bee"), 2)
    assert classes.read(["bee", 0, None], None).tolist() == [1, 0, -1]
    labels = torch.tensor([1, -1])
    assert classes.of_data(labels, ["an ant", ""]) is labels
    with pytest.raises(ValueError, match="prompts: this model does not read words; give labels"):
        classes.read(None, ["bee"])
    with pytest.raises(ValueError, match="prompts: this model does not read words; leave them out"):
        ClassReader((), 0).read(None, ["bee"])


def test_check_of_many_prompts_embeds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of an encoder would fill the memory; and captions are looked at in parts."""
    reader = WordReader(["bee", "ant"], 4)
    embed, sizes = reader.embed, []

    def counted(captions: Sequence[str]) -> torch.Tensor:
        sizes.append(len(captions))
        return embed(captions)

    monkeypatch.setattr(reader, "embed", counted)
    reader.validate(None, ["a bee"] * 1000)
    with pytest.raises(ValueError, match="labels: got 'dress', but this model draws from words"):
        reader.validate([None, "dress"], None)
    assert sizes == []
    assert reader.readable(["bee", "nothing"] * 300) == ["bee"] * 300
    assert sizes == [256, 256, 88]
