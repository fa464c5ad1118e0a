"""Prompts on the page: which words a model knows, and what it does not read of a prompt."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mar.pipeline import Pipeline

MAX_EXAMPLES = 6
"""Examples of a model that the page shows."""
MAX_NOTE = 300
"""Longest line about a prompt, in characters."""
_READERS = logging.getLogger("mar.data")
"""Logger by which readers of captions say what they leave out or cut."""


def describe_prompts(pipeline: Pipeline) -> dict[str, Any]:
    """Return what the page needs of a model that draws from words.

    `words` are those that it knows, the most frequent first; none for a text encoder, which reads all.
    """
    return {"kind": "prompt", "words": _known_words(pipeline), "examples": _examples(pipeline)}


def sample_prompt(pipeline: Pipeline) -> str:
    """Return a prompt that the model can draw."""
    return [*_examples(pipeline), *_known_words(pipeline), "a picture"][0]


def check_prompts(pipeline: Pipeline, prompts: Sequence[str | None]) -> dict[str, Any]:
    """Tell the unknown and cut words of prompts.

    Returns `notes`, a line for each prompt that has some, and `draws`: whether all prompts can be drawn. A line of the
    only prompt does not repeat it.
    """
    texts = list(dict.fromkeys(prompt or "" for prompt in prompts))
    notes: list[str] = []
    draws = True
    for text in filter(str.strip, texts):
        try:
            if pipeline.captions is None:
                pipeline.reader.read(None, [text])  # says what to give instead
            elif (note := pipeline.captions.check(text)) is not None:
                notes.append(note)
        except ValueError as error:
            notes.append(str(error))
            draws = False
    head = f"prompt {texts[0]!r}: " if len(texts) == 1 else ""
    lines = [note.removeprefix(head) for note in dict.fromkeys(notes)]
    return {"notes": [line if len(line) <= MAX_NOTE else f"{line[:MAX_NOTE]}..." for line in lines], "draws": draws}


@contextmanager
def unlogged_prompts() -> Iterator[None]:
    """Keep warnings of this thread's caption readers out of the log: they repeat prompts."""
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread

    _READERS.addFilter(passes)
    try:
        yield
    finally:
        _READERS.removeFilter(passes)


def _known_words(pipeline: Pipeline) -> list[str]:
    from mar.data.conditions import WordReader

    return list(pipeline.captions.words) if isinstance(pipeline.captions, WordReader) else []


def _examples(pipeline: Pipeline) -> list[str]:
    """Return the examples that the model's file has, without those that are no prompts."""
    given = pipeline.notes.get("examples")
    return [each for each in given if isinstance(each, str) and each][:MAX_EXAMPLES] if isinstance(given, list) else []
