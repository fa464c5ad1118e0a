"""A run whose data is spelled differently, or was moved, is the same run; one of other pictures is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from shard_files import write_tar_shards

from mar.config import ConfigError
from mar.config.tokenizer import TokenizerTrainConfig
from mar.data import folder
from mar.data.folder import FolderSource
from mar.data.images import quick_digest
from mar.training.run import check_same_run, save_config
from mar.training.tokenizer import TokenizerRun, open_tokenizer_run
from mar.training.trainer import Run


@pytest.mark.parametrize("spelled", ["pictures/", "./pictures", "ABSOLUTE", "../here/pictures", "linked", "moved"])
def test_run_of_the_same_data_in_other_words_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    tiny.write_images(here / "pictures")
    config = replace(tiny.tiny_train_config(here / "pictures"), data="pictures")
    save_config(config, tmp_path / "run")
    (here / "linked").symlink_to("pictures")
    if spelled == "moved":
        (here / "pictures").rename("moved")
    now = str(here / "pictures") if spelled == "ABSOLUTE" else spelled
    assert check_same_run(replace(config, data=now), tmp_path / "run")
    tiny.write_images(here / "pictures")
    tiny.write_images(here / "others")
    for other in ("others", "missing", "fashion", "stream:pictures"):
        with pytest.raises(ConfigError, match="holds another run"):
            check_same_run(replace(config, data=other), tmp_path / "run")


# ---- the pictures


def shades(folder: Path, first: int = 0, count: int = 20) -> Path:
    """Pictures in two classes, as `tiny.write_images`, of other shades and sizes for each `first`."""
    for i in range(count):
        path = folder / ("across" if i % 2 else "down") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.arange(64, dtype=np.uint8).reshape(8, 8) * (first + i)) % 251).save(path)
    return folder


def begun(tmp_path: Path, data: str, **settings: Any) -> None:
    """Train and save a run of some pictures."""
    open_saved(tmp_path, data, **settings).save()


def open_saved(tmp_path: Path, data: str, **settings: Any) -> Run:
    return tiny.open_tiny_run(replace(tiny.tiny_train_config(Path(data)), data=data, **settings), tmp_path / "run")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("hold_out", [0, 5])
def test_run_of_moved_images_goes_on(place: Path, hold_out: int) -> None:
    shades(place / "old")
    begun(place, "old", hold_out=hold_out)
    (place / "old").rename("new")
    run = open_saved(place, "new/", hold_out=hold_out)
    assert (run.moved_from, run.data_note) == ("old", None)
    run.save()
    assert open_saved(place, str(place / "new"), hold_out=hold_out).moved_from is None


@pytest.mark.parametrize("change", ["other sizes", "other names", "more", "fewer"])
def test_run_of_other_images_in_another_place_is_refused_until_they_are_linked(place: Path, change: str) -> None:
    begun(place, str(shades(place / "old")))
    before = sorted(place.glob("run/*"))
    (place / "old").rename("gone")
    new = shades(place / "new", 100 if change == "other sizes" else 0, {"more": 22, "fewer": 18}.get(change, 20))
    if change == "other names":
        (new / "down" / "2.png").rename(new / "down" / "two.png")
    counts = f"20 pictures to learn from then, {len(list(new.rglob('*.png')))} now"
    with pytest.raises(
        ConfigError, match=rf"^{place}/old of this run is gone, .* are others \({counts}\); .* link these to"
    ):
        open_saved(place, "new")
    assert sorted(place.glob("run/*")) == before
    (place / "old").symlink_to("new")
    run = open_saved(place, "new")
    assert run.moved_from is None
    assert run.data_note is not None
    same_count = "as many pictures as when the run was saved, but other names or sizes"
    assert (same_count if change.startswith("other") else "but 20 when the run was saved") in run.data_note


def test_run_of_other_images_in_the_same_place_says_so_once(place: Path) -> None:
    begun(place, str(shades(place / "old")))
    shades(place / "old", 100)
    run = open_saved(place, str(place / "old"))
    assert run.data_note is not None
    assert run.data_note.startswith("warning: the data has as many pictures")
    run.save()
    assert open_saved(place, str(place / "old")).data_note is None


def test_run_without_a_noted_digest_goes_on_by_its_classes(place: Path) -> None:
    begun(place, str(shades(place / "old")))
    (path,) = place.glob("run/state-*/state.json")
    (path.parent / "checksums.json").unlink()
    state = json.loads(path.read_text())
    assert state["data"].pop("digest")
    path.write_text(json.dumps(state))
    (place / "old").rename("gone")
    shades(place / "new", 100)
    assert open_saved(place, "new").data_note is None


def test_run_of_a_moved_stream_is_one_of_the_same_shards(place: Path) -> None:
    settings: Any = {"model": replace(tiny.tiny_train_config(place).model, classes=0)}
    write_tar_shards(place / "old", (6, 6))
    begun(place, "stream:old", **settings)
    (place / "old").rename("new")
    assert "0 pictures are repeated" in str(open_saved(place, "stream:new", **settings).data_note)
    (place / "new").rename("gone")
    write_tar_shards(place / "other", (6, 6, 6))
    with pytest.raises(ConfigError, match=r"^stream:new of this run is gone, and the shards here are others"):
        open_saved(place, "stream:other", **settings)


def test_tokenizer_run_of_other_images_in_another_place_is_refused(place: Path) -> None:
    config = TokenizerTrainConfig(str(shades(place / "old", 0, 42)), image_size=8, images=8, batch=4, perceptual=0)

    def opened(data: str) -> TokenizerRun:
        return open_tokenizer_run(
            replace(config, data=data), place / "run", device=torch.device("cpu"), load_network=lambda: None
        )

    opened(config.data).save()
    (place / "old").rename("new")
    run = opened("new")
    assert (run.moved_from, run.data_note) == (config.data, None)
    (place / "new").rename("gone")
    with pytest.raises(ConfigError, match="new of this run is gone, and the pictures here are others"):
        opened(str(shades(place / "other", 100, 42)))
    (place / "other").rename("new")
    assert "other names or sizes" in str(opened("new").data_note)


def test_folder_digest_asks_few_files_for_their_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "SIZED_IMAGES", 5)
    sizes = [path.stat().st_size for path in sorted(shades(tmp_path / "a").rglob("*.png"))]
    source = FolderSource(tmp_path / "a")
    before = quick_digest(source)
    *_, listed = [b"".join(source.quick_listing())]
    assert len(sizes) == 20
    assert listed.count(b" ") == 5
    assert quick_digest(FolderSource(tmp_path / "a")) == before
    (tmp_path / "a" / "down" / "18.png").write_bytes(b"1")  # the last one
    assert quick_digest(FolderSource(tmp_path / "a")) != before
