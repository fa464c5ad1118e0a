"""Runs a notebook from top to bottom, and keeps its outputs: python tools/run_notebook.py [NOTEBOOK]

The file stays the same where nothing has changed: no times, no version of Python, one format for each picture.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "mar.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_SECONDS = 900


def execute(notebook: nbformat.NotebookNode, folder: Path, env: Mapping[str, str]) -> None:
    """Runs all cells in `folder`, in a kernel with the environment `env`. CellExecutionError for a cell that fails."""
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.execute(env=dict(env))
    clean(notebook)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drops what differs from machine to machine, and the second format that Pillow gives of a picture."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path, nargs="?", default=NOTEBOOK)
    path = parser.parse_args(arguments).notebook
    notebook = nbformat.read(path, as_version=4)
    execute(notebook, path.parent, os.environ)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
