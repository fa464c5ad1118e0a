"""`mar verify`: what is whole, what is damaged, what has no checksums."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from saved_files import make_autoencoder, make_cache, make_tokenizer

from mar.autoconfig.summary import SUMMARY_FILE
from mar.autoconfig.timing import PLAN_FILE
from mar.checkpoint import checksums
from mar.checkpoint.checksums import CHECKSUMS
from mar.checkpoint.files import size_text
from mar.checkpoint.run_state import RunState
from mar.checkpoint.tokenizers import STATISTICS_FILE
from mar.cli import main
from mar.cli.verify import NOTES
from mar.config import TrainConfig
from mar.data.splits import HELD_OUT
from mar.data.text_encoder import EncoderInfo, write_table
from mar.evaluation.statistics import FeatureStats
from mar.training.early_stopping import HISTORY_FILE
from mar.training.log import TRACKERS_FILE
from mar.training.run import CAPTIONS_FILE, RUN_FILE, load_config, save_config
from mar.training.trainer import CALLBACKS_DONE_FILE


def flip(path: Path, place: int = -3) -> None:
    """Flip a bit."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder of two states and a model."""
    folder = tmp_path / "run"
    for images in (1, 2):
        RunState(folder).save(images, {"w": torch.arange(100.0), "images": images})
    tiny.tiny_pipeline().save(folder / "model.safetensors")
    return folder


def test_verify_of_a_whole_run_names_its_parts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(TrainConfig(), run)
    assert main(["verify", str(run)]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    parts = ("state-000000000001", "state-000000000002", "model.safetensors", "run.json")
    for part, files, line in zip(parts, (5, 5, 1, 1), lines, strict=True):
        of_part = line.removeprefix(f"{run / part} is as it was written ")
        assert re.fullmatch(rf"\({files} files?, [^,]+, \d+\.\d+ s\)", of_part), line
    size = sum(path.stat().st_size for part in parts for path in [run / part, *run.glob(f"{part}/*")] if path.is_file())
    assert total.startswith(f"compared 12 files, {size_text(size)}, ")
    assert total.endswith("s: nothing is damaged")


def test_verify_of_damage_names_the_files_and_fails(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((run / "state-000000000002").glob("*.distcp"))
    flip(shard, 1000)
    flip(run / "model.safetensors")
    assert main(["verify", str(run)]) == 2
    out, err = capsys.readouterr()
    whole, total = out.splitlines()
    assert whole.startswith(f"{run / 'state-000000000001'} is as it was written (5 files")
    assert total.endswith(": 2 damaged")
    first, second = err.splitlines()
    assert first == f"mar: {shard} is damaged: its bytes are not those that were written"
    assert second.startswith(f"mar: {run / 'model.safetensors'} is damaged")


def test_verify_without_checksums_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "state-000000000001" / CHECKSUMS).unlink()
    assert main(["verify", str(run)]) == 0
    assert f"{run / 'state-000000000001'} opens; it has no checksums" in capsys.readouterr().out


def test_verify_of_statistics_and_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.npz"
    FeatureStats(torch.zeros(3).double(), torch.eye(3).double(), 5).save(path)
    assert main(["verify", str(path)]) == 0
    flip(path, 300)
    assert main(["verify", str(path)]) == 2
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path / "empty")]) == 2
    assert main(["verify"]) == 2
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if not line.startswith("compared")] == [out.splitlines()[0]]
    assert out.startswith(f"{path} is as it was written (1 file")
    assert len(err.splitlines()) == 4


def test_verify_where_checksums_are_off_compares_all_the_same(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAR_CHECKSUMS", "off")
    save_config(TrainConfig(), run)
    note = run / "run.json"
    note.write_text(note.read_text().replace('"batch": ', '"batch": 1'))
    flip(run / "model.safetensors")
    flip(next((run / "state-000000000001").glob("*.distcp")), 1000)
    assert load_config(TrainConfig, run) is not None
    assert main(["verify", str(run)]) == 2
    assert "3 damaged" in capsys.readouterr().out
    assert not checksums.enabled()


def test_verify_goes_on_after_damage_and_missing_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = run / "state-000000000002"
    for name in ("state.json", "config.json"):
        flip(state / name, 0)
    flip(run / "model.safetensors")
    assert main(["verify", str(run / "nothing"), str(run / "model.safetensors"), str(run)]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].endswith(": 3 damaged, 1 not found")
    nothing, model, of_state, again = err.splitlines()
    assert nothing == f"mar: {run / 'nothing'}: there is no such file or folder"
    assert model == again
    assert of_state.startswith(f"mar: {state / 'config.json'} is damaged (state.json as well)")


@pytest.mark.parametrize("kind", ["kl", "residual", "cache", "captions"])
def test_verify_of_a_folder_names_each_damaged_file(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file of a folder, damaged alone, is named and nothing else is."""
    folder = tmp_path / "made"
    folder.mkdir()
    MADE[kind](folder)
    assert main(["verify", str(folder)]) == 0
    assert "no checksums" not in capsys.readouterr().out
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        flip(path, len(whole) // 2)
        assert main(["verify", str(folder)]) == 2, path
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        if path.name != CHECKSUMS and kind != "residual":  # whose config and weights have one checksum
            assert path.name in err
        path.write_bytes(whole)


def make_captions(folder: Path) -> None:
    info = EncoderInfo("some/encoder", None, "0" * 64, 4, 6)
    write_table(folder / info.table_file, info, {"a cat": torch.randn(3, 6), "a dog": torch.randn(2, 6)})


MADE: dict[str, Callable[[Path], None]] = {
    "kl": make_autoencoder, "residual": make_tokenizer, "cache": make_cache, "captions": make_captions
}  # fmt: skip


def test_verify_knows_every_note() -> None:
    assert NOTES == (
        RUN_FILE, PLAN_FILE, SUMMARY_FILE, HELD_OUT, CAPTIONS_FILE, HISTORY_FILE, STATISTICS_FILE, "sweep.json",
        TRACKERS_FILE, CALLBACKS_DONE_FILE,
    )  # fmt: skip
