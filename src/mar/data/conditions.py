"""Readers of conditions: what data or a user says -> the tensor that `MAR` takes (`mar.model.conditions`)."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from mar import distributed
from mar.data.captions import nearest_words, split_words
from mar.data.labels import resolve_labels
from mar.model.conditions import NO_CONDITION, has_condition

logger = logging.getLogger("mar.data")

WORDS = "words"
"""Reader of captions whose words are learned with the model."""
TEXT = "text"
"""Kind of readers that have a frozen text encoder (`mar.data.text_encoder`)."""
Label = SupportsIndex | str | None
"""Class name, class number, or None for no class."""
Prompt = str | None
"""A picture in words; None or "" for no condition."""
CHECKED_AT_ONCE = 256
"""Captions that are embedded at a time to see which of them are read."""
MAX_NOTES = 5
"""Prompts of one request of which each is told what is not read of it; more are counted."""


MAX_CHECKED = 10_000
"""Prompts that a reader remembers to have checked; a server gets them without end."""


class ConditionReader(ABC):
    """Turns labels or captions into conditions."""

    @abstractmethod
    def read(self, labels: Iterable[Label] | None, prompts: Iterable[Prompt] | None) -> Shaped[Tensor, "n ..."]:
        """Return the conditions of what a user typed.

        ValueError for anything that the model can't draw.
        """

    def validate(self, labels: Iterable[Label] | None, prompts: Iterable[Prompt] | None) -> None:
        """Check what a user typed, as `read` does."""
        self.read(labels, prompts)

    @abstractmethod
    def of_data(self, labels: Int[Tensor, " n"], captions: Sequence[str]) -> Shaped[Tensor, "n ..."]:
        """Return the conditions of a batch.

        Args:
            labels: class numbers; -1: none.
            captions: a caption each, "" for none; empty where the data has no captions.
        """

    def header(self) -> dict[str, Any]:
        """Return what a model's file keeps of it, JSON-able."""
        return {}


class ClassReader(ConditionReader):
    """Reads class numbers and names.

    Args:
        classes: names of the classes; may be empty.
        count: number of classes.
    """

    def __init__(self, classes: Sequence[str], count: int) -> None:
        self.classes, self.count = classes, count

    def read(self, labels: Iterable[Label] | None, prompts: Iterable[Prompt] | None) -> Int[Tensor, " n"]:
        """Return class numbers."""
        if prompts is not None:
            remedy = "give labels: class names or numbers" if self.count else "leave them out"
            raise ValueError(f"prompts: this model does not read words; {remedy}")
        return torch.tensor(
            resolve_labels([] if labels is None else labels, self.classes, self.count), dtype=torch.long
        )

    def of_data(self, labels: Int[Tensor, " n"], captions: Sequence[str]) -> Int[Tensor, " n"]:
        """Return the class numbers of a batch."""
        return labels


class CaptionReader(ConditionReader):
    """Base of readers of captions."""

    def read(self, labels: Iterable[Label] | None, prompts: Iterable[Prompt] | None) -> Shaped[Tensor, "n ..."]:
        """Return the conditions of prompts; labels may only be None, which is no condition.

        What is not read of a prompt is logged, once.
        """
        return self.embed(self._texts(labels, prompts))

    def validate(self, labels: Iterable[Label] | None, prompts: Iterable[Prompt] | None) -> None:
        """Check prompts as `read` does, without embedding them."""
        self._texts(labels, prompts)

    def _texts(self, labels: Iterable[Label] | None, prompts: Iterable[Prompt] | None) -> list[str]:
        """Return checked prompts, "" for none."""
        if labels is not None and prompts is None:
            given = list(labels)
            if wrong_labels := [label for label in given if label is not None]:
                raise ValueError(
                    f"labels: got {wrong_labels[0]!r}, but this model draws from words; give prompts (--prompt at the "
                    "shell)"
                )
            prompts = [None] * len(given)
        elif labels is not None:
            raise ValueError("got labels and prompts, expected prompts alone")
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise ValueError(f"prompts: got {prompts!r}, expected a list of them, as [{prompts!r}]")
        texts = list(prompts)
        if wrong := [text for text in texts if not isinstance(text, str | None)]:
            raise ValueError(f"prompts: got {wrong[0]!r}, expected text")
        self._log_notes([text for text in dict.fromkeys(texts) if text and text.strip()])
        return [text or "" for text in texts]

    def of_data(self, labels: Int[Tensor, " n"], captions: Sequence[str]) -> Shaped[Tensor, "n ..."]:
        """Return the conditions of a batch's captions."""
        return self.embed(captions or [""] * len(labels))

    def readable(self, captions: Sequence[str]) -> list[str]:
        """Return the captions of which something is read."""
        parts = [captions[first : first + CHECKED_AT_ONCE] for first in range(0, len(captions), CHECKED_AT_ONCE)]
        flags = [flag for part in parts for flag in has_condition(self.embed(part)).tolist()]
        return [caption for caption, flag in zip(captions, flags, strict=True) if flag]

    def check(self, prompt: str) -> str | None:
        """Describe unread parts of a prompt; None: all is read. ValueError if nothing is."""
        return None

    @cached_property
    def _checked(self) -> set[str]:
        """Prompts that have been checked."""
        return set()

    def _log_notes(self, prompts: Sequence[str]) -> None:
        new = [prompt for prompt in prompts if prompt not in self._checked]
        notes = [note for prompt in new if (note := self.check(prompt)) is not None]
        if len(self._checked) > MAX_CHECKED:
            self._checked.clear()
        self._checked.update(new)
        if distributed.rank() != 0:
            return
        for note in notes[:MAX_NOTES]:
            logger.warning("%s", note)
        if len(notes) > MAX_NOTES:
            logger.warning("%s more prompts are read in part", f"{len(notes) - MAX_NOTES:,}")

    def to(self, device: torch.device | str) -> None:
        """Compute on a device from now on."""

    @abstractmethod
    def embed(self, captions: Sequence[str]) -> Shaped[Tensor, "n ..."]:
        """Return the conditions of captions; NO_CONDITION for ""."""


class WordReader(CaptionReader):
    """Reads captions by the numbers of their words.

    Args:
        words: that it knows; the others are left out.
        length: the most words of a caption; the rest is cut.
    """

    def __init__(self, words: Sequence[str], length: int) -> None:
        self.words, self.length = tuple(words), length
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def embed(self, captions: Sequence[str]) -> Int[Tensor, "n w"]:
        """Return the numbers of the known words of each caption."""
        rows = torch.full((len(captions), self.length), NO_CONDITION)
        for row, caption in zip(rows, captions, strict=True):
            numbers = [self.numbers[word] for word in self._known(caption)][: self.length]
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        return rows

    def check(self, prompt: str) -> str | None:
        """Describe unknown and cut words. ValueError if none is known."""
        known = self._known(prompt)
        unknown = [word for word in split_words(prompt) if word not in self.numbers and not self._bound(word)]
        unknown = [word for word in unknown if not any(word in each.split("-") for each in known)]
        notes = []
        if unknown or not known:
            hints = [f"{word} ({', '.join(near)}?)" if (near := nearest_words(word, self.words)) else word
                     for word in dict.fromkeys(unknown)]  # fmt: skip
            said = f"unknown words: {', '.join(hints)}" if hints else "it has no words"
            if not known:
                raise ValueError(
                    f"prompt {prompt!r}: {said}; expected some of the {len(self.words):,} words that this model knows"
                )
            notes.append(f"{said}; left out")
        if len(known) > self.length:
            notes.append(f"cut after {self.length} words, before {known[self.length]!r}")
        return f"prompt {prompt!r}: {'; '.join(notes)}" if notes else None

    def header(self) -> dict[str, Any]:
        """Return the words."""
        return {"kind": WORDS, "words": list(self.words)}

    def _known(self, caption: str) -> list[str]:
        """Return the known words; "medium dark" is read as "medium-dark" where that is one, and the other way."""
        words, known = split_words(caption), list[str]()
        i = 0
        while i < len(words):
            pair = "-".join(words[i : i + 2])
            if i + 1 < len(words) and pair in self.numbers:
                known.append(pair)
                i += 2
                continue
            known += [words[i]] if words[i] in self.numbers else self._bound(words[i])
            i += 1
        return known

    def _bound(self, word: str) -> list[str]:
        """Return the known parts of an unknown word with hyphens."""
        return [part for part in word.split("-") if part in self.numbers] if "-" in word else []


def reader_from_header(condition: dict[str, Any], length: int) -> CaptionReader | None:
    """Return the reader that a model's file describes; None for a model without captions."""
    if condition.get("kind") == WORDS:
        return WordReader(condition["words"], length)
    if condition.get("kind") == TEXT:
        from mar.data.text_encoder import TextReader

        return TextReader.from_header(condition)
    return None
