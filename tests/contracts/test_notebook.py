"""The notebook runs from top to bottom, and draws the pictures of the library."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image
from tiny import FAST, tiny_model

import mar
from mar.assets import imagenet_classes
from mar.pipeline import Pipeline
from mar.tokenizer import PixelTokenizer

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks/mar.ipynb"
TEXT = NOTEBOOK.read_text(encoding="utf-8")
SHOW_PICTURES = {"draw", "reveal", "settings-grid", "presets", "edit", "trained"}
SHOW_TEXT = {"load", "train", "evaluate"}

EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
for cell in notebook.cells:
    if cell.cell_type == "code":
        cell.outputs, cell.execution_count = [], None
notebook.cells.append(nbformat.v4.new_code_cell(sys.stdin.read(), id="hashes"))
client = NotebookClient(notebook, timeout=300, kernel_name="python3", coalesce_streams=True)
try:
    client.execute()
finally:
    nbformat.write(notebook, sys.argv[2])
"""
"""Runs a notebook and one more cell, in a process of its own: Jupyter's warnings are not ours."""

HASHES = """
from hashlib import sha256

for name, images in {"draw": sum(drawn, []), "reveal": revealed, "edit": edited}.items():
    print(name, *(sha256(image.tobytes()).hexdigest() for image in images))
"""


def parse(text: str) -> Any:
    return nbformat.reads(text, as_version=4)


@cache
def committed() -> dict[str, Any]:
    """Read the code cells as they were committed, by name."""
    return {cell.id: cell for cell in parse(TEXT).cells if cell.cell_type == "code"}


def mime_types(cell: Any) -> set[str]:
    return {kind for output in cell.outputs for kind in output.get("data", {})}


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def hashes(images: list[Image.Image]) -> list[str]:
    return [sha256(image.tobytes()).hexdigest() for image in images]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the notebook, with a short training, without network and in an empty home; returns its code cells."""
    place = tmp_path_factory.mktemp("notebook")
    environment = os.environ | {
        "PYTHONPATH": str(Path(mar.__file__).parents[1]),
        "MAR_NOTEBOOK_IMAGES": "320",
        "MAR_HOME": str(place / "home"),
        "IPYTHONDIR": str(place / "ipython"),
        "JUPYTER_CONFIG_DIR": str(place / "jupyter"),
        "TMPDIR": str(place),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        # Whoever asks a proxy that is not there gets no answer.
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
    out = place / "executed.ipynb"
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(out)],
        input=HASHES,
        capture_output=True,
        text=True,
        env=environment,
        cwd=place,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {cell.id: cell for cell in parse(out.read_text(encoding="utf-8")).cells if cell.cell_type == "code"}


def test_notebook_run_from_top_to_bottom_shows_everything(executed: dict[str, Any]) -> None:
    assert executed.keys() - {"hashes"} == committed().keys()
    outputs = [output for cell in executed.values() for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    for name, cell in executed.items():
        assert cell.execution_count is not None, name
    assert {name for name, cell in executed.items() if mime_types(cell) & {"image/png", "image/gif"}} == SHOW_PICTURES
    assert "320/320 images" in printed(executed["train"])
    distances = re.findall(r"^(.+?) +(\d+)$", printed(executed["evaluate"]), re.MULTILINE)
    assert [name for name, _ in distances] == ["real pictures", "the bundled model", "our model"]
    assert int(distances[1][1]) < int(distances[2][1]), "a model of five steps is worse than the bundled one"


def test_notebook_images_equal_those_of_sample(executed: dict[str, Any]) -> None:
    model = mar.load("fashion")
    labels = ["T-shirt/top", "trouser", "dress", "sneaker", "bag"]
    original = model.sample(["pullover"], seeds=[1], preset="balanced")[0]
    mask = Image.new("L", original.size)
    mask.paste(255, (0, 12, 28, 28))
    others = ["pullover", "T-shirt/top", "dress", "coat"]
    expected = {
        "draw": [
            image for seed in range(3) for image in model.sample([*labels, None], seeds=[seed] * 6, preset="balanced")
        ],
        "reveal": model.sample(labels, seeds=range(5), preset="balanced", steps=20),
        "edit": model.sample(others, seeds=range(4), known=[original] * 4, mask=[mask] * 4, preset="balanced"),
    }
    rows = [line.split() for line in printed(executed["hashes"]).splitlines()]
    assert {name: found for name, *found in rows} == {name: hashes(images) for name, images in expected.items()}


def test_notebook_committed_has_outputs_and_is_small() -> None:
    nbformat.validate(parse(TEXT))
    assert len(TEXT) < 1_500_000
    for name in SHOW_PICTURES:
        assert mime_types(committed()[name]) & {"image/png", "image/gif"}, name
    for name in SHOW_TEXT:
        assert printed(committed()[name]), name
    assert "16,000/16,000 images" in printed(committed()["train"]), "outputs are those of the full training"
    counts = [cell.execution_count for cell in committed().values()]
    assert counts == list(range(1, len(counts) + 1)), "outputs are those of one run from top to bottom"


def test_notebook_committed_tells_nothing_of_a_machine() -> None:
    notebook = parse(TEXT)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert not [cell.id for cell in notebook.cells if cell.metadata]
    readable = "\n".join(cell.source + (printed(cell) if cell.cell_type == "code" else "") for cell in notebook.cells)
    for cell in committed().values():
        for output in cell.outputs:
            assert output.get("name") != "stderr"
            readable += output.get("data", {}).get("text/plain", "")
    assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|usr|work|Users|var|opt|mnt)/|[A-Z]:\\", readable)


def test_notebook_links_lead_somewhere() -> None:
    text = "\n".join(cell.source for cell in parse(TEXT).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((\.\.[^)#]+)\)", text)
    assert len(links) > 3
    assert not [link for link in links if not (NOTEBOOK.parent / link).exists()]


def test_notebook_with_mar_base_draws_by_changing_one_line(monkeypatch: pytest.MonkeyPatch, untyped: None) -> None:
    """An untrained model of ImageNet's classes and colors stands in for the authors'."""
    model = tiny_model(channels=3, grid=(16, 16), classes=1000)
    stand_in = Pipeline(
        model, PixelTokenizer(3, 0.0, 1.0), classes=imagenet_classes(), sampling=replace(FAST, x0_bound=1.0)
    )
    monkeypatch.setattr("mar.load", lambda name: {"mar-base": stand_in}[name])
    monkeypatch.setattr("mar.devices.choose_device", lambda: "cpu")
    sources = {name: cell.source for name, cell in committed().items()}
    assert sources["settings"].count('MODEL = "fashion"') == 1
    sources["settings"] = sources["settings"].replace('MODEL = "fashion"', 'MODEL = "mar-base"')
    names: dict[str, Any] = {}
    for name in ("settings", "load", "helpers", "draw", "reveal", "settings-grid", "presets", "edit"):
        exec(compile(sources[name], name, "exec"), names)
    rows = [*names["drawn"], names["revealed"], *names["grid"], names["edited"]]
    assert {(image.mode, image.size) for row in rows for image in row} == {("RGB", (16, 16))}
    assert names["LABELS"][0] == "golden retriever"


def test_run_notebook_clean_keeps_one_format_of_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(NOTEBOOK.parents[1] / "tools")
    notebook = parse(TEXT)
    notebook.metadata["language_info"]["version"] = "3.11"
    notebook.cells[-1].metadata["collapsed"] = True
    next(cell for cell in notebook.cells if cell.id == "draw").outputs[0].data["image/jpeg"] = "AAAA"
    importlib.import_module("run_notebook").clean(notebook)
    assert nbformat.writes(notebook) + "\n" == TEXT
