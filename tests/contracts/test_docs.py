"""The documents keep to the code: links, names, commands, snippets and quoted messages are all real."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import griffe
import pytest
import yaml
from PIL import Image

import mar
from mar import cli, config, presets, published
from mar.assets import FASHION_CLASSES, imagenet_classes
from mar.autoconfig import sizes
from mar.checkpoint.download import OFFICIAL
from mar.cli.train_folder import OwnTokenizer
from mar.config.tokenizer import TokenizerTrainConfig
from mar.data.conditions import WordReader
from mar.data.labels import resolve_labels
from mar.model.mar import MAR
from mar.pipeline import Pipeline
from mar.tokenizer import PixelTokenizer
from mar.zoo import BUNDLED

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs/training.md").read_text(encoding="utf-8")
MODELS = (ROOT / "docs/models.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
MIGRATING = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
PAPER = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
SAMPLING = (ROOT / "docs/sampling.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
TROUBLE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def anchor(heading: str) -> str:
    """A heading's address within its page, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def commands(text: str) -> list[str]:
    """Every `mar ...` line of a document, torchrun's too: in blocks, and between backticks where a verb follows."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`]+)`", FENCE.sub("", text))
    lines = [re.sub(r"^.*torchrun .*-m mar ", "mar ", " ".join(line.split())) for line in lines]
    verbs = "|".join(cli.VERBS)
    return [line for line in lines if re.match(rf"mar ({verbs})\b", line)]


def load_tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def complete(line: str) -> bool:
    """Whether a command is given with all that it needs, rather than only named."""
    words = shlex.split(line, comments=True)
    if words[-1] == "..." or words[1:] == ["train", "folder"]:  # which needs its data
        return False
    return len(words) > 2 or words[1:] in (["demo"], ["info"], ["models"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for _, target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name} links to {target}"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in [anchor(heading) for heading in headings], f"{document.name} links to {target}"


def defined(body: Sequence[ast.stmt], name: str) -> ast.stmt:
    """The statement that gives a module or a class its `name`. KeyError where none does."""
    for statement in body:
        named = statement.target if isinstance(statement, ast.AnnAssign) else statement
        targets = statement.targets if isinstance(statement, ast.Assign) else [named]
        if any(name in (getattr(target, "name", None), getattr(target, "id", None)) for target in targets):
            return statement
    raise KeyError(name)


def test_the_paper_leads_to_code_that_is_there() -> None:
    """Read, not imported: what needs diffusers takes seconds to import."""
    links = [(text.strip("`"), target) for text, target in LINK.findall(PAPER) if text.count(".") > 1]
    assert len(links) > 40
    for dotted, target in links:
        path = (ROOT / "docs" / target).resolve()
        module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        assert dotted.startswith(f"{module}."), f"{dotted} is linked to {target}"
        body: Sequence[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
        for name in dotted.removeprefix(f"{module}.").split("."):
            body = getattr(defined(body, name), "body", [])


def test_the_papers_models_have_the_sizes_it_is_said() -> None:
    from mar.checkpoint.store import model_shapes

    counts = [sum(shape.numel() for shape in model_shapes(c).values()) / 1e6 for c in published.MODELS.values()]
    assert ", ".join(f"{count:.1f}" for count in counts[:2]) + f" and {counts[2]:.1f} M" in PAPER
    fashion, cifar10 = (
        sum(shape.numel() for shape in model_shapes(config.model).values()) / 1e6
        for config in (presets.FASHION, presets.CIFAR10)
    )
    assert f"{fashion:.1f} million parameters" in MODELS
    assert f"| {fashion:.1f} M, pixels, v |" in TRAINING
    assert f"| {cifar10:.1f} M, [principal components](#principal-components), x0 |" in TRAINING


DRY = """
import importlib, json, pkgutil, shlex, sys, types
from mar import cli
from mar.autoconfig import plan
from mar.cli import options

class Parsed(Exception):
    pass

def parse(kind, verb, arguments, default=None, partly=False):
    found = options.parse(kind, verb, arguments, default, partly=partly)
    if partly:
        return found
    raise Parsed(found)

real, results = sys.stdout, {}
sys.stdout = sys.stderr
for info in pkgutil.iter_modules(cli.__path__, "mar.cli."):
    if info.name not in ("mar.cli.options", "mar.cli.__main__"):
        importlib.import_module(info.name).parse = parse
plan.zoo.load_tokenizer = lambda name: types.SimpleNamespace(
    stride=16, channels=16, config=dict, lossless=False, learns_basis=False, fixed_size=None
)
for line in json.load(sys.stdin):
    try:
        results[line] = {"code": cli.main(shlex.split(line, comments=True)[1:])}
    except Parsed as parsed:
        results[line] = {"options": repr(parsed.args[0])}
    except SystemExit as stopped:
        results[line] = {"code": stopped.code}
json.dump(results, real)
"""
"""Parses commands and does nothing; in a process of its own, as what tyro takes for a default is not of its type."""


@pytest.fixture(scope="module")
def understood(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Parse every complete command of the README and the pages, beside `pictures` and their `latents`.

    A command's result holds its options, or its exit code.
    """
    place = tmp_path_factory.mktemp("place")
    for number in range(20):
        path = place / "pictures" / f"kind{number % 5}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 256), (10 * number, 0, 0)).save(path)
    cache = ["cache", str(place / "pictures"), "--tokenizer", "pixels", "--image-size", "8"]
    assert cli.main([*cache, "--out", str(place / "latents")]) == 0
    every = [line for text in (README, MODELS, TRAINING, SAMPLING, EVALUATION, MIGRATING) for line in commands(text)]
    lines = {line: re.sub(r"\b(FOLDER|FILE)\b", "somewhere", line) for line in every if complete(line)}
    environment = {**os.environ, "PYTHONPATH": str(Path(mar.__file__).parents[1]), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", DRY],
        input=json.dumps(list(lines.values())),
        capture_output=True,
        text=True,
        env=environment,
        cwd=place,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) > 10
    return {line: {**results[run], "said": done.stderr} for line, run in lines.items()}


def test_every_command_is_understood(understood: dict[str, dict[str, Any]]) -> None:
    wrong = [line for line, result in understood.items() if result.get("code", 0) != 0]
    assert not wrong, next(iter(understood.values()))["said"]
    assert all("options" in result or "--help" in line for line, result in understood.items())


def test_statistics_are_compared_with_by_the_features_they_were_made_with() -> None:
    def option(words: list[str], name: str) -> str | None:
        return words[words.index(name) + 1] if name in words else None

    for text in (README, SAMPLING + EVALUATION):
        lines = [shlex.split(line, comments=True) for line in commands(text)]
        made = {option(words, "--out"): words for words in lines if words[1] == "stats"}
        judged = [words for words in lines if words[1] == "evaluate" and option(words, "--reference") in made]
        assert judged
        for words in judged:
            by = made[option(words, "--reference")]
            assert [option(words, n) for n in ("--features", "--weights")] == [
                option(by, n) for n in ("--features", "--weights")
            ]


def test_models_and_labels_of_the_commands_are_there() -> None:
    every = [line for text in (README, MODELS, SAMPLING, TRAINING) for line in commands(text)]
    samples = [shlex.split(line, comments=True) for line in every if line.startswith("mar sample ")]
    samples = [words for words in samples if len(words) > 2]
    assert len(samples) > 4
    for words in samples:
        model = words[2]
        if "/" in model:
            continue
        assert model in (*BUNDLED, *published.PUBLISHED)
        after = words[words.index("--labels") + 1 :] if "--labels" in words else []
        labels = [None if word == "none" else word for word in itertools.takewhile(lambda w: w[0] != "-", after)]
        names = FASHION_CLASSES if model == "fashion" else imagenet_classes()
        assert len(resolve_labels(labels, names, len(names))) == len(labels)
    inits = re.findall(r"--init (\S+)", "\n".join([*commands(README), *commands(TRAINING)]))
    assert inits
    assert set(inits) <= set(published.MODELS)


def test_the_readme_has_at_most_900_words() -> None:
    assert len(README.split()) <= 900


@pytest.fixture(scope="module")
def model_tables() -> Any:
    return load_tool("model_tables")


@pytest.mark.parametrize("document", ["README.md", "docs/models.md"])
def test_tables_of_models_are_those_of_the_records(model_tables: Any, document: str) -> None:
    """`python tools/model_tables.py` rewrites them."""
    text = (ROOT / document).read_text(encoding="utf-8")
    assert model_tables.filled(document, text) == text
    assert model_tables.filled(document, text.replace("4.23", "4.24", 1)) == text


def test_tables_of_models_without_markers_are_refused(model_tables: Any) -> None:
    with pytest.raises(ValueError, match=r"README\.md has not one table between '<!-- table:readme -->'"):
        model_tables.filled("README.md", "# Models")


def test_the_readme_shows_every_verb() -> None:
    shown = {shlex.split(line, comments=True)[1] for line in commands(README)}
    assert shown == set(cli.VERBS)


@pytest.mark.parametrize(
    "text",
    [README, TRAINING, TROUBLE, SAMPLING, EVALUATION, MIGRATING],
    ids=["README", "training", "troubleshooting", "sampling", "evaluation", "migrating"],
)
def test_flags_are_ours_or_the_references(text: str) -> None:
    """Flags of ours have no underscores; what the left column of the table names is the reference's."""
    ours = set(flags(config.TrainConfig)) | set(flags(TokenizerTrainConfig))
    ours |= {f"--{part}" for part in ("out", "init", "help", "device", "resume-official", "sampling")}
    ours |= {
        f"--{part}"
        for part in ("nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf", "local-addr")
    }  # torchrun's
    ours |= {"--vae", *flags(OwnTokenizer, "vae.")}
    for module in (*(module for module, _ in cli.VERBS.values()), "mar.cli.train_folder"):
        for name, kind in vars(importlib.import_module(module)).items():
            if name.endswith("Options") and dataclasses.is_dataclass(kind):
                ours |= set(flags(kind))
    slurm = text.replace("--signal ", "")  # of sbatch
    body = "\n".join(line.split("|", 2)[-1] if line.startswith("|") else line for line in slurm.splitlines())
    named = set(re.findall(r"(?<![\w-])--[a-z0-9][\w.-]*\w", body))
    assert len(named) > 10
    assert not named - ours


def flags(kind: Any, prefix: str = "") -> Iterator[str]:
    """The flags that tyro makes of a dataclass."""
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        name = f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(default):
            yield from flags(type(default), f"{name}.")
        else:
            yield f"--{name}"
            if isinstance(default, bool):
                yield f"--{prefix}no-{field.name.replace('_', '-')}"


def test_recipes_and_models_named_are_there() -> None:
    for text in (README, MODELS, PAPER, TRAINING, TROUBLE, MIGRATING):
        names = set(re.findall(r"\b(?:mar|imagenet)-(?:base|large|huge)\b", text))
        assert names <= {*published.MODELS, *presets.RECIPES}
    assert {*published.TOKENIZERS, *published.PUBLISHED} == set(OFFICIAL)
    recipes = re.findall(r"^\| `([\w-]+)` \|", TRAINING.split("## A folder")[0], re.MULTILINE)
    assert set(recipes) == set(presets.RECIPE_NAMES)


def test_docs_training_sizes_are_those_of_autoconfig() -> None:
    smallest, small, medium, large = sizes.MODEL_SIZES
    table = TRAINING.split("### What is chosen")[1].split("### An example")[0]
    for size in (smallest, small, medium):
        encoder, decoder = size.trunks
        trunk = f"{encoder.depth} + {decoder.depth} blocks {encoder.width} wide"
        assert (f"than {size.max_count:,}: {trunk}" if size.max_count else f"little time: {trunk}") in table
    assert large.trunks == (replace(presets.RECIPES["imagenet-base"].model.encoder, rotary=True),) * 2
    narrow, wide = zip(*(size.head[:2] for size in sizes.MODEL_SIZES), strict=True)
    assert f"{', '.join(map(str, narrow[:-1]))} or {narrow[-1]} wide for tokens of up to 16 values; " in table
    assert f"; {wide[0]}, {wide[1]} or {wide[-1]} for wider ones" in table
    for count, side in sizes.MAX_SIDE_BY_COUNT[:-1]:
        assert f"{side} for fewer than {count:,}" in table


def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a model of the bundled one's shape and classes, tiny and untrained, in its place."""
    trunk = config.TrunkConfig(width=8, depth=1, num_heads=1)
    tiny = dataclasses.replace(
        presets.FASHION.model, encoder=trunk, decoder=trunk, head=config.HeadConfig(8, 1, prediction="v"), buffer_size=2
    )
    sampling = config.SamplingConfig(steps=2, diffusion_steps=2, x0_bound=1.0)

    def load(name: str) -> Pipeline:
        assert name in BUNDLED
        if name == "emoji":
            words = WordReader(["woman", "astronaut", "pizza"], 2)
            drawn = dataclasses.replace(tiny, classes=0, words=3)
            return Pipeline(MAR(drawn), PixelTokenizer(1, 0.0, 1.0), captions=words, sampling=sampling)
        return Pipeline(MAR(tiny), PixelTokenizer(1, 0.0, 1.0), classes=FASHION_CLASSES, sampling=sampling)

    monkeypatch.setattr(mar, "load", load, raising=False)
    monkeypatch.chdir(tmp_path)
    snippets = blocks(README, "python")
    assert snippets[0].count("\n") == 3, "the README starts with three lines of Python"
    assert (snippets[0].count("prompts="), 'mar.load("emoji")' in snippets[0]) == (1, True)
    of_readme: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), of_readme)
    assert len(of_readme["images"]) == 2
    names: dict[str, Any] = {}
    for snippet in blocks(SAMPLING, "python"):
        exec(compile(snippet, "sampling.md", "exec"), names)
    assert len(names["images"]) == 4
    assert len(list(tmp_path.glob("*-of-2.png"))) == 2
    kept, other = names["images"][0].crop((0, 0, 28, 16)), names["other"].crop((0, 0, 28, 16))
    assert kept.tobytes() == other.tobytes()


def test_python_of_the_training_page_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small model, whose metric is logged twice."""
    trunk = config.TrunkConfig(width=8, depth=1, num_heads=1)
    model = dataclasses.replace(
        presets.FASHION.model, encoder=trunk, decoder=trunk, head=config.HeadConfig(8, 1, prediction="v"), buffer_size=2
    )
    sampling = config.SamplingConfig(steps=2, diffusion_steps=2, x0_bound=1.0)
    short = dataclasses.replace(presets.FASHION, model=model, sampling=sampling, images=16, batch=8, decay=0, warmup=0)
    monkeypatch.setattr(presets, "recipe", {"fashion": short}.__getitem__)
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks((ROOT / "docs/training.md").read_text(encoding="utf-8"), "python")
    exec(compile(snippet.replace("5_000", "8"), "training.md", "exec"), {})
    lines = [json.loads(line) for line in (tmp_path / "runs/python/log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if "brightness" in line] == [8, 16]
    assert Pipeline.open(tmp_path / "runs/python/model.safetensors").model.config == model


def test_python_of_the_diffusers_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for snippet in blocks((ROOT / "docs/diffusers.md").read_text(encoding="utf-8"), "python"):
        exec(compile(snippet, "diffusers.md", "exec"), names)
    images = [image.tobytes() for image in names["images"]]
    assert [image.tobytes() for image in names["same"]] == images
    assert names["pipe"].num_timesteps == 20
    again = names["same_pipe"](["dress", 3, None], 12, 4, seeds=[0, 1, 2]).images
    assert [image.tobytes() for image in again] == images
    others = [image.crop((0, 0, 28, 16)).tobytes() for image in names["others"]]
    assert others == [names["images"][0].crop((0, 0, 28, 16)).tobytes()] * 4
    assert len({image.tobytes() for image in names["others"]}) == 4
    whole = names["pipe"]("sneaker", 12, seeds=[3]).images
    assert names["unfinished"][0].tobytes() != whole[0].tobytes()


def messages() -> Iterator[str]:
    """The fixed parts of every string in the code."""
    for path in (ROOT / "src/mar").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.strip()) >= 8:
                yield " ".join(node.value.split())


def test_quoted_messages_are_those_of_the_code() -> None:
    """What is left of a quotation, once the code's own words are taken out, is names and numbers."""
    fixed = sorted(set(messages()), key=len, reverse=True)
    quotations = re.findall(r"(?:^> .*\n)+", TROUBLE, re.MULTILINE)
    assert len(quotations) > 10
    for quotation in quotations:
        text = " ".join(line.removeprefix("> ") for line in quotation.splitlines())
        left = text
        for part in fixed:
            left = left.replace(part, "")
        assert len(left) < 0.4 * len(text), f"no message of the code says: {text} (unknown: {left})"


def test_no_figure_is_left_open() -> None:
    for document in DOCUMENTS:
        assert re.findall(r"<!-- figure: ([\w-]+) -->", document.read_text(encoding="utf-8")) == [], document.name


def test_the_workflow_calls_targets_of_the_makefile() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {step["run"] for step in steps} == {"make lint", "make test"}
    assert {step["run"].removeprefix("make ") for step in steps} <= targets
    assert workflow["permissions"] == {"contents": "read"}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mar.__version__
    paper = citation["preferred-citation"]
    assert f"title={{{paper['title']}}}" in README
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert f"author={{{names}}}" in README
    assert f"## [{mar.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hooks() -> Any:
    return load_tool("mkdocs_hooks")


def test_names_without_a_docstring_are_found(hooks: Any) -> None:
    code = '''
        """A module."""
        FLAG = True
        _hidden = 1
        def bare(): ...
        class Base:
            """A base."""
            field: int = 0
            def kept(self):
                """Documented here."""
        class Child(Base):
            """A child."""
            def kept(self): ...
            def new(self): ...
    '''
    with griffe.temporary_visited_module(textwrap.dedent(code), module_name="some") as module:
        assert set(hooks.undocumented(module)) == {"some.FLAG", "some.bare", "some.Child.new"}


def test_links_into_the_code_lead_to_the_reference(hooks: Any) -> None:
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(ROOT / "docs/paper.md")))

    def built(link: str) -> str:
        return str(hooks.on_page_markdown(link, page=page))

    assert (
        built("[`mar.pipeline.Pipeline`](../src/mar/pipeline.py)") == "[`mar.pipeline.Pipeline`][mar.pipeline.Pipeline]"
    )
    assert built("[the pipeline](../src/mar/pipeline.py)") == "[the pipeline][mar.pipeline]"
    assert built("[`main.py`](../src/mar/__main__.py)") == "`main.py`"
    for unchanged in ("[x](../src/mar/missing.py)", "[x](training.md#recipes)", "![x](images/demo.png)"):
        assert built(unchanged) == unchanged


def test_the_layers_are_those_that_lint_checks() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        contract = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]
    shown = re.search(r"behind a bar:\n\n(.+?)\n\n", CONTRIBUTING, re.DOTALL)
    assert shown is not None
    assert [line.strip() for line in shown[1].splitlines()] == [re.sub(r"[()]", "", row) for row in contract["layers"]]


def test_every_decision_is_in_the_index() -> None:
    """Numbers run from 1, dates never fall, and titles are those of the records."""
    index = (ROOT / "docs/decisions/index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d{4}) \| (\d{4}-\d\d-\d\d) \| \[(.+)\]\(([\w.-]+)\) \|$", index, re.MULTILINE)
    records = sorted(path for path in (ROOT / "docs/decisions").glob("*.md") if path.name != "index.md")
    assert [file for *_, file in rows] == [path.name for path in records]
    assert [int(number) for number, *_ in rows] == list(range(1, len(records) + 1))
    assert [date for _, date, *_ in rows] == sorted(date for _, date, *_ in rows)
    for (number, date, title, _), path in zip(rows, records, strict=True):
        text = path.read_text(encoding="utf-8")
        assert path.name.startswith(f"{number}-")
        assert text.startswith(f"# {number}: {title}\n\n{date}\n\n**Context.** "), path.name
        assert len(text.split()) <= 160, f"{path.name} has {len(text.split())} words, expected at most 160"
