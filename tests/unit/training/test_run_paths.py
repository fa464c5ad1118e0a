"""A run whose data is spelled differently, or was moved, is the same run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from mar.config import ConfigError
from mar.training.run import check_same_run, save_config


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
