"""Reads prose out of Markdown and Python: paragraphs, sentences, comments and error messages, each with its line."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from typing import NamedTuple

ERROR_CALL = re.compile(r"(Error|Exception|Warning|warn|warning|require)$")
DIRECTIVE = re.compile(r"^#\s*(type: ignore|noqa|pragma|fmt:|ruff:|mypy:|!|-\*-)[^#]*")
CODE, LINK = re.compile(r"(`+)[^`]+\1"), re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
SENTENCE = re.compile(
    r"""\S.*?(?: (?<!\be\.g | \bi\.e)(?<!\bvs | \bcf | \bal) [.!?] ["')\]*_]* (?=\s) | \Z)""", re.DOTALL | re.VERBOSE
)
SECTION = re.compile(r"(Args|Returns|Yields|Raises|Attributes|Example|Examples):$")
NO_PROSE = re.compile(rf"$|```|~~~|[|#<>]|{SECTION.pattern}")
LIST_ITEM = re.compile(r"^\s*([-*+]|\d{1,2}[.)])\s")


class Passage(NamedTuple):
    """A sentence or a paragraph, and the line of its file on which it begins."""

    line: int
    text: str


def paragraphs(text: str, line: int) -> Iterator[Passage]:
    """Yields the paragraphs and list items of a text; code, tables, headings and quotations are left out."""
    start, lines = line, list[str]()
    fenced = section = False
    for number, raw in enumerate(text.splitlines(), line):
        stripped, indent = raw.strip(), len(raw) - len(raw.lstrip())
        if stripped.startswith(("```", "~~~")):
            fenced = not fenced
        section = bool(SECTION.match(stripped)) or (section and (indent > 0 or not stripped))
        entry = bool(LIST_ITEM.match(raw)) or (section and indent == 4)
        code = fenced or (indent >= 4 and not lines and not entry and not section)
        skipped = code or bool(NO_PROSE.match(stripped))
        if lines and (skipped or entry):
            yield Passage(start, "\n".join(lines))
            lines = []
        if not skipped:
            start = start if lines else number
            lines.append(LIST_ITEM.sub("", raw).strip())
    if lines:
        yield Passage(start, "\n".join(lines))


def sentences(paragraph: Passage) -> Iterator[Passage]:
    """Yields the sentences of a paragraph; a piece of code counts as one word."""
    text = CODE.sub(lambda code: "code" + "\n" * code[0].count("\n"), LINK.sub(r"\1", paragraph.text))
    for match in SENTENCE.finditer(text):
        yield Passage(paragraph.line + text[: match.start()].count("\n"), match[0])


def count_words(text: str) -> int:
    """Counts words; letters of shapes and formulas are none."""
    return sum(word in ("a", "A", "I") or sum(map(str.isalpha, word)) > 1 for word in text.split())


class Comment(NamedTuple):
    line: int
    column: int
    text: str
    own_line: bool


def find_comments(source: str) -> list[Comment]:
    return [
        Comment(*token.start, DIRECTIVE.sub("", token.string).lstrip("#: "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]


def join_comments(comments: Sequence[Comment]) -> Iterator[Passage]:
    """Yields comments with those that continue on the next line as one passage."""
    block: list[Comment] = []
    for comment in comments:
        if block and not (comment.own_line and (comment.line - 1, comment.column) == block[-1][:2]):
            yield Passage(block[0].line, "\n".join(each.text for each in block))
            block = []
        block.append(comment)
    if block:
        yield Passage(block[0].line, "\n".join(each.text for each in block))


def error_texts(call: ast.Call) -> Iterator[Passage]:
    """Yields the messages among the arguments of an exception, a warning or `require`."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    for argument in call.args if ERROR_CALL.search(name) else ():
        parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
        texts = [part.value if isinstance(part, ast.Constant) else "value" for part in parts]
        if any(isinstance(part, ast.Constant) for part in parts) and all(isinstance(text, str) for text in texts):
            yield Passage(argument.lineno, "".join(texts))


def string_of(node: ast.AST) -> str | None:
    """Returns the text of a statement that is a string, as docstrings are."""
    value = node.value if isinstance(node, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def prose_of(tree: ast.Module, comments: Sequence[Comment]) -> Iterator[Passage]:
    """Yields the paragraphs of docstrings, comments and error messages."""
    for node in ast.walk(tree):
        if docstring := string_of(node):
            yield from paragraphs(inspect.cleandoc(docstring), node.lineno)
        elif isinstance(node, ast.Call):
            yield from error_texts(node)
    for comment in join_comments(comments):
        yield from paragraphs(*reversed(comment))
