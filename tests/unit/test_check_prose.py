"""The rules of `tools/check_prose.py`: an example that each of them finds, and one that it leaves alone."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
LONG = "word " * 40
NOTEBOOK = json.dumps({"cells": [{"cell_type": kind, "source": [LONG]} for kind in ("markdown", "code")]})


@pytest.fixture
def prose(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("check_prose")


def function(docstring: str, arguments: str = "", name: str = "f") -> str:
    return f'def {name}({arguments}):\n    """{docstring}"""\n'


FORWARD = "class Block:\n    def forward(self, x):\n" + "        x = x + 1\n" * 12
FOUR = "a, b, *, c, d"

FINDINGS = [
    ("src/mar/a.py", '"""Where things are."""', "summary"),
    ("src/mar/a.py", f'"""{"Long " * 13}."""', "summary"),
    ("src/mar/a.py", 'class A:\n    x: int\n    """How many there are."""', "summary"),
    ("src/mar/a.py", function("The mean of a tensor."), "summary"),
    ("src/mar/a.py", function("Whether it fits.", name="_private"), "summary"),
    ("src/mar/a.py", function("Statistics about a tensor."), "summary"),
    ("src/mar/a.py", function("Sum of a tensor."), "summary"),
    ("benchmarks/a.py", f'"""Title.\n\n{LONG}"""', "sentence-length"),
    ("tests/a.py", f"# {LONG}\nx = 1\n", "sentence-length"),
    ("src/mar/a.py", f'raise ValueError(f"{{x}} {LONG}")', "sentence-length"),
    ("README.md", LONG, "sentence-length"),
    ("docs/a.md", f"- {LONG}", "sentence-length"),
    ("notebooks/a.ipynb", NOTEBOOK, "sentence-length"),
    ("docs/a.md", f"{'word ' * 20} which is what it is.", "relative-clauses"),
    ("docs/a.md", "Of what is there, it counts what was said where it stands.", "relative-clauses"),
    ("docs/a.md", "That is what it does where it stands.", "relative-clauses"),
    ("src/mar/a.py", "def normalise(): ...", "spelling"),
    ("tests/a.py", "x.colours = 1", "spelling"),
    ("src/mar/neighbours.py", "", "spelling"),
    ("src/mar/a.py", "def f(initialiser): ...", "spelling"),
    ("src/mar/a.py", "def give_back_memory(): ...", "private-words"),
    ("tests/a.py", "def give_back_memory(): ...", "private-words"),
    ("src/mar/a.py", "turns = 1", "private-words"),
    ("src/mar/a.py", "# See `turns`.", "private-words"),
    ("src/mar/a.py", "# See give_back_memory.", "private-words"),
    ("tests/a.py", "def test_it_stays_as_before(): ...", "test-names"),
    ("tests/a.py", "def test_axes(): ...", "test-names"),
    ("src/mar/a.py", function("Adds.", FOUR), "args-block"),
    ("src/mar/a.py", function("Adds.\n\n    Args:\n        a: One.\n        b, c: Two.\n    ", FOUR), "args-block"),
    ("src/mar/a.py", f"def f({FOUR}): ...", "args-block"),
    ("src/mar/a.py", f"class A:\n    def __init__(self, {FOUR}): ...", "args-block"),
    ("src/mar/a.py", FORWARD, "forward-comments"),
]

CLEAN = [
    ("src/mar/a.py", '"""Noise schedules of diffusion."""'),
    ("src/mar/a.py", function("Returns this rank's loss.")),
    ("src/mar/a.py", function("Train a model.")),
    ("src/mar/a.py", function("The mean of a tensor.", name="_private")),
    ("src/mar/a.py", "@property\n" + function("The mean of a tensor.")),
    ("src/mar/a.py", f'class A:\n    x: int\n    """Seconds {"and more " * 10}."""'),
    ("benchmarks/a.py", '"""What is measured."""'),
    ("tests/a.py", f"# {'word ' * 20}\n\n# {'word ' * 20}\n"),
    ("src/mar/a.py", f"x = '{LONG}'"),
    ("docs/a.md", f"| {LONG} |\n\n```\n{LONG}\n```\n\n    {LONG}\n\n# {LONG}"),
    ("docs/a.md", f"See `{LONG}` or [this page](https://{LONG})."),
    ("docs/a.md", f"{'word ' * 20} e.g. {'word ' * 10}. {'word ' * 30}"),
    ("docs/a.md", "Counts what is there, and that is all."),
    ("docs/a.md", "It says what was got, what was expected, and what to do, so that it helps."),
    ("docs/a.md", f"Heusel et al. (arXiv 1706.08500) {'word ' * 20}. **Bold.** {'word ' * 20}"),
    ("docs/a.md", f"> {LONG}"),
    ("src/mar/a.py", "def promise(noise, raised, center): ..."),
    ("src/mar/a.py", "client.normalise(colour=1)"),
    ("src/mar/a.py", function("Turns images into tokens, and returns those found.")),
    ("benchmarks/a.py", "turns = 1  # See `turns`."),
    ("tests/a.py", "def test_cache_empty_is_built(): ..."),
    ("src/mar/a.py", function("Adds.", "a, b, c")),
    ("src/mar/a.py", function("Adds.\n\n    Returns:\n        The sum.\n    ", FOUR)),
    ("src/mar/a.py", function("Adds.\n\n    Args:\n        a: One.\n\n        b, c, d: Others.\n    ", FOUR)),
    ("src/mar/a.py", function("", FOUR, "_private").replace('""""""', "...")),
    ("src/mar/a.py", FORWARD + "        # Attention.\n        x = x\n        # MLP.\n        x = x\n"),
]


@pytest.mark.parametrize(("path", "source", "rule"), FINDINGS)
def test_check_file_bad_example_gives_one_finding(prose: ModuleType, path: str, source: str, rule: str) -> None:
    assert {finding.rule for finding in prose.check_file(path, source)} == {rule}


@pytest.mark.parametrize(("path", "source"), CLEAN)
def test_check_file_good_example_gives_none(prose: ModuleType, path: str, source: str) -> None:
    assert prose.check_file(path, source) == []


def test_check_file_every_rule_has_an_example(prose: ModuleType) -> None:
    assert {rule for _, _, rule in FINDINGS} == set(prose.RULES)


def test_check_file_sentence_reports_its_own_line(prose: ModuleType) -> None:
    source = f'"""Title.\n\nShort one.\nAnother `piece\nof code`. {LONG}\n"""\n\n# Short.\n# {LONG}\n'
    assert [finding.line for finding in prose.check_file("benchmarks/a.py", source)] == [5, 9]


def test_main_finding_exits_with_1(
    prose: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(f"{LONG}.")
    assert prose.main([]) == 1
    assert "README.md:1: sentence-length: 40 words" in capsys.readouterr().out
    assert prose.main(["--rule", "spelling"]) == 0
    assert prose.main([str(tmp_path / "docs")]) == 0
