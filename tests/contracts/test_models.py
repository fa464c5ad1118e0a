"""`mar models` lists every model, and what is on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mar.checkpoint.download import needed
from mar.cli import main
from mar.published import BUNDLED, PUBLISHED, TOKENIZERS


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAR_HOME", str(tmp_path))
    return tmp_path


def test_models_table_has_a_line_for_each(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for remote in needed("emigm-xs"):
        (home / remote.name).touch()
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.split("\n\n")[0].splitlines()[1:]}
    assert [*rows] == [*BUNDLED, *PUBLISHED, *TOKENIZERS]
    assert rows["mar-base"] == ["mar-base", "208", "M", "256", "2.31", "281.7", "256", "1.5", "GiB"]
    assert rows["emigm-xs"] == ["emigm-xs", "69", "M", "256", "4.23", "218.6", "16", "not", "known", "yes"]
    assert rows["fashion"] == ["fashion", "3.5", "M", "28", "bundled", "yes"]
    assert {name for name, row in rows.items() if row[-1] == "yes"} == {*BUNDLED, "emigm-xs", "kl16"}
    assert str(home) in out
    assert max(map(len, out.split("\n\n")[0].splitlines())) <= 80


def test_models_json_has_settings_files_and_licenses(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    records = {record["name"]: record for record in json.loads(capsys.readouterr().out)}
    assert [*records] == [*BUNDLED, *PUBLISHED, *TOKENIZERS]
    large = records["emigm-large-512"]
    assert (large["tokenizer"], large["pixels"], large["here"]) == ("dc-ae", 512, False)
    assert large["get"] == "mar download emigm-large-512"
    assert [figures["fid"] for figures in large["figures"]] == [2.19, 1.77]
    assert large["figures"][1]["sampling"]["guidance_time"] == [0.25, 0.5]
    [file] = records["kl16"]["files"]
    assert (file["bytes"], file["sha256"][:8]) == (265_900_046, "34ce001b")
    assert file["urls"][1].startswith("https://huggingface.co/jadechoghari/mar/resolve/773c9bd")
    assert all(record["license"] for record in records.values())
