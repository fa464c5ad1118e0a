"""Checks the rules of prose: python tools/check_prose.py [--rule NAME] [--statistics] [PATH ...]

Prints `path:line: rule: message` for every finding, then a count per rule, and exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from prose_text import Comment, Passage, count_words, find_comments, paragraphs, prose_of, sentences, string_of

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src/mar", "tests", "benchmarks", "tools", "examples")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "notebooks/*.ipynb")

RULES = {
    "summary": "a docstring of src starts with a short clause; a function's with a verb",
    "sentence-length": "a sentence has at most 30 words, in Markdown 35",
    "relative-clauses": "a sentence has one which/that/what/where/whose/whom; a short one may have two",
    "spelling": "identifiers are spelled the American way",
    "private-words": "the field's word, not one this project used before",
    "test-names": "a test is called test_<unit>_<condition>_<result>",
    "args-block": "a public function of more than three arguments has an Args or a Returns block",
    "forward-comments": "a forward of more than ten lines has a comment on each section",
}

SUMMARY_WORDS = 12
SENTENCE_WORDS, MARKDOWN_SENTENCE_WORDS = 30, 35
SHORT_SENTENCE_WORDS = 20
MAX_ARGUMENTS = 3
FORWARD_LINES = 10

WORDS = tomllib.loads(Path(__file__).with_name("prose_words.toml").read_text())
FORBIDDEN_FIRST_WORDS = frozenset(WORDS["forbidden_first_words"].split())
IMPERATIVES = frozenset(WORDS["imperatives"].split())
NOT_VERBS = frozenset(WORDS["not_verbs"].split())
IZE = rf"({'|'.join(WORDS['verbs_in_ize'].split())})is(?=e|ing|ation|er|able)"
BRITISH = {re.compile(key, re.IGNORECASE): american for key, american in {IZE: r"\1iz", **WORDS["british"]}.items()}
PRIVATE_WORDS = WORDS["private_words"]
# Outside src, and in prose without backticks, the others may be ordinary words.
DISTINCT_WORDS = {word for word in PRIVATE_WORDS if re.search(r"\w_\w|^_|[a-z][A-Z]", word)}
PRIVATE_IN_PROSE = re.compile(rf"`({'|'.join(PRIVATE_WORDS)})`|(?<!\w)({'|'.join(DISTINCT_WORDS)})(?!\w)")

CLAUSE = re.compile(
    r"(?P<comma>, |\band |\bor )?(?<!\bso )\b(?P<word>which|that|what|whose|where|whom)\b", re.IGNORECASE
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


class Finding(NamedTuple):
    line: int
    rule: str
    message: str


def relative_words(sentence: str) -> list[str]:
    """Returns the words that begin a clause; "what A, what B and what C" has one of them."""
    words: list[str] = []
    for match in CLAUSE.finditer(sentence):
        word, is_list = match["word"].lower(), match["comma"] is not None
        if not (is_list and word in words):
            words.append(word)
    return words


def check_sentences(paragraph: Passage, limit: int) -> Iterator[Finding]:
    for line, text in sentences(paragraph):
        words, clauses = count_words(text), relative_words(" ".join(text.split()))
        opening = " ".join(text.split()[:6])
        if words > limit:
            yield Finding(line, "sentence-length", f'{words} words, expected at most {limit}: "{opening} ..."')
        if len(clauses) > 2 or (len(clauses) == 2 and words > SHORT_SENTENCE_WORDS):
            yield Finding(line, "relative-clauses", f'{", ".join(clauses)} in one sentence: "{opening} ..."')


def identifiers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields every name that the file defines, with its lines."""
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


def check_identifiers(path: str, tree: ast.Module) -> Iterator[Finding]:
    """Yields British spellings and private words, each name once a file."""
    first_lines = {Path(path).stem: 1}
    for name, line in identifiers(tree):
        first_lines[name] = min(line, first_lines.get(name, line))
    for name, line in first_lines.items():
        american = name
        for pattern, replacement in BRITISH.items():
            american = pattern.sub(replacement, american)
        if american != name and name not in WORDS["allowed_spellings"]:
            yield Finding(line, "spelling", f"{name}: say {american}")
        if name in (PRIVATE_WORDS if path.startswith("src/") else DISTINCT_WORDS):
            yield Finding(line, "private-words", f"{name}: say {PRIVATE_WORDS[name]}")


def check_private_words(prose: Sequence[Passage]) -> Iterator[Finding]:
    for line, text in prose:
        for match in PRIVATE_IN_PROSE.finditer(text):
            word = match[1] or match[2]
            inside = text[: match.start()].count("\n")
            yield Finding(line + inside, "private-words", f"{word}: say {PRIVATE_WORDS[word]}")


def definitions(parent: ast.AST, public: bool = True) -> Iterator[tuple[Definition, bool]]:
    """Yields every class and function, and if it can be reached by public names alone."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Definition):
            shown = public and (not node.name.startswith("_") or node.name.endswith("__"))
            yield node, shown
            yield from definitions(node, shown and isinstance(node, ast.ClassDef))
        elif isinstance(node, ast.stmt):
            yield from definitions(node, public)


def is_called(node: ast.AST) -> bool:
    """Tells functions and methods from classes, properties and overloads."""
    decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", [])]
    return isinstance(node, Function) and not any(re.search(r"property|setter|overload", each) for each in decorators)


def check_summary(node: ast.Module | Definition, public: bool) -> Iterator[Finding]:
    docstring = ast.get_docstring(node)
    fields = [] if isinstance(node, Function) else node.body[1:]
    docstrings = [Passage(field.lineno, text) for field in fields if (text := string_of(field))]
    if docstring:
        docstrings.append(Passage(node.body[0].lineno, docstring))
        first_sentence = next((text for each in paragraphs(docstring, 1) for _, text in sentences(each)), "")
        summary = re.split(r"[:;](?=\s)|\s\(", first_sentence, maxsplit=1)[0]  # what follows explains it
        if public and (words := count_words(summary)) > SUMMARY_WORDS:
            yield Finding(node.body[0].lineno, "summary", f"{words} words, expected at most {SUMMARY_WORDS}")
    for line, text in docstrings:
        first, second = [word.strip(",.:;") for word in (text + " ?").split()[:2]]
        if first.lower() in FORBIDDEN_FIRST_WORDS:
            yield Finding(line, "summary", f"begins with {first}: name the thing, or what is done")
        elif text is docstring and public and is_called(node) and (second == "of" or not is_verb(first)):
            yield Finding(line, "summary", f"{node.name} begins with {first}: begin with a verb")


def is_verb(word: str) -> bool:
    """Guesses: an imperative from the list, or a word in -s that is no plural."""
    third_person = word.isalpha() and word[0].isupper() and word.endswith("s")
    return word.lower() in IMPERATIVES or (third_person and word.lower() not in NOT_VERBS)


def check_arguments(node: Function, docstring: str) -> Iterator[Finding]:
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls", "ctx")]
    if len(names) <= MAX_ARGUMENTS:
        return
    block = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    if block is None:
        if not re.search(r"^(Returns|Yields):", docstring, re.MULTILINE):
            yield Finding(node.lineno, "args-block", f"{node.name} has {len(names)} arguments and no Args block")
        return
    described = set(re.findall(r"\w+", " ".join(re.findall(r"^ +([\w*, `]+)(?: \(.*\))?:", block[1], re.MULTILINE))))
    if missing := [name for name in names if name not in described]:
        yield Finding(node.lineno, "args-block", f"Args of {node.name} leaves out {', '.join(missing)}")


def check_forward(node: Function, comments: Sequence[Comment], lines: Sequence[str]) -> Iterator[Finding]:
    body = node.body[1:] if ast.get_docstring(node) else node.body
    if not body:
        return
    inside = [comment for comment in comments if body[0].lineno - 1 <= comment.line <= node.end_lineno]
    code = [line for line in lines[body[0].lineno - 1 : node.end_lineno] if line.strip() and line.strip()[0] != "#"]
    if len(code) > FORWARD_LINES and len(inside) < 2:
        yield Finding(node.lineno, "forward-comments", f"{len(code)} lines, {len(inside)} comments, expected two")


def check_definitions(tree: ast.Module, comments: Sequence[Comment], lines: Sequence[str]) -> Iterator[Finding]:
    yield from check_summary(tree, True)
    for node, public in definitions(tree):
        docstring = ast.get_docstring(node) or ""
        yield from check_summary(node, public)
        if public and is_called(node) and (node.name == "__call__" or not node.name.startswith("__")):
            yield from check_arguments(node, docstring)
        for method in filter(is_called, node.body if isinstance(node, ast.ClassDef) else ()):
            if method.name == "forward":
                yield from check_forward(method, comments, lines)
            elif method.name == "__init__" and public:  # described by the class, or by itself
                yield from check_arguments(method, docstring + "\n" + (ast.get_docstring(method) or ""))


def check_tests(tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if isinstance(node, Function) and node.name.startswith("test_"):
            words = node.name.split("_")[1:]
            if len(words) < 3 or words[0] in ("it", "they", "what", "that"):
                yield Finding(node.lineno, "test-names", f"{node.name}: expected test_<unit>_<condition>_<result>")


def check_file(path: str, source: str) -> list[Finding]:
    """Checks the text of a file; its path, from the repository's root, says which rules are for it."""
    if path.endswith(".md"):
        return [each for text in paragraphs(source, 1) for each in check_sentences(text, MARKDOWN_SENTENCE_WORDS)]
    if path.endswith(".ipynb"):  # a line of a finding is that of its cell's text
        texts = ["".join(cell["source"]) for cell in json.loads(source)["cells"] if cell["cell_type"] == "markdown"]
        return [each for text in texts for each in check_file("text.md", text)]
    tree, comments = ast.parse(source), find_comments(source)
    prose = list(prose_of(tree, comments))
    findings = [each for text in prose for each in check_sentences(text, SENTENCE_WORDS)]
    findings += check_identifiers(path, tree)
    if path.startswith("src/"):
        findings += check_private_words(prose)
        findings += check_definitions(tree, comments, source.splitlines())
    elif path.startswith("tests/"):
        findings += check_tests(tree)
    return sorted(findings)


def find_files(limits: Sequence[Path]) -> Iterator[Path]:
    """Yields the files that are checked, only those under `limits` if there are any."""
    python = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    documents = (path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern)))
    for path in (*python, *documents):
        if not limits or any(path.is_relative_to(limit.resolve()) for limit in limits):
            yield path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="files and folders to check (default: all)")
    parser.add_argument("--rule", choices=RULES, action="append", help="check this rule only; may be repeated")
    parser.add_argument("--statistics", action="store_true", help="print counts per file instead of findings")
    options = parser.parse_args(arguments)
    rules = options.rule or list(RULES)
    files = {path.relative_to(ROOT).as_posix(): path.read_text() for path in find_files(options.paths)}
    findings = {name: [each for each in check_file(name, text) if each.rule in rules] for name, text in files.items()}
    per_file = {name: Counter(each.rule for each in findings[name]) for name in files if findings[name]}
    counts = sum(per_file.values(), Counter[str]())
    if options.statistics:
        for name, count in sorted(per_file.items(), key=lambda item: -item[1].total()):
            print(f"{count.total():5} {name}: " + ", ".join(f"{rule} {number}" for rule, number in count.most_common()))
    else:
        for name in files:
            for each in findings[name]:
                print(f"{name}:{each.line}: {each.rule}: {each.message}")
    print("\n".join(f"{counts[rule]:5} {rule}: {RULES[rule]}" for rule in rules))
    return int(bool(counts))


if __name__ == "__main__":
    sys.exit(main())
