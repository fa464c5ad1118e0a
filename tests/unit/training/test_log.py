"""Where a log goes: files, TensorBoard, and trackers that are not installed here, played by small fakes."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import open_tiny_run, tiny_train_config, write_images

from mar.config import ConfigError, TrainConfig
from mar.training.log import JsonLines, Log, RunLog, TensorBoard, Writer, open_log, open_writers, require_writers
from mar.training.trainer import Run

GRAY = Image.new("L", (4, 2), 200)


class FakeTracker(ModuleType):
    """The parts of wandb and trackio in use; records all calls."""

    class Error(Exception):
        """wandb's own."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.step = self.last = 0
        self.refusal: Exception | None = None

    def init(self, **settings: Any) -> FakeTracker:
        print(f"* {self.__name__} says this on stdout")
        if self.refusal is not None:
            raise self.refusal
        self.begun.append(settings)
        self.step = self.last + 1 if self.last else 0  # as wandb finds it where it goes on with a run
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))
        self.last = step

    def Image(self, picture: Image.Image) -> tuple[str, tuple[int, int]]:  # noqa: N802  as they call it
        return "picture", picture.size

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTracker:
    fake = FakeTracker(request.param)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return fake


def writing(folder: Path, *names: str, images: int = 0, callbacks_done: int | None = None) -> RunLog:
    writers = open_writers(names, folder, config={"lr": 0.1}, images=images, callbacks_done=callbacks_done)
    assert all(isinstance(writer, Writer) for writer in writers)
    return RunLog(folder, 100, images, writers)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_log_every_writer_gets_every_value(
    tmp_path: Path, tracker: FakeTracker, capsys: pytest.CaptureFixture[str]
) -> None:
    log = writing(tmp_path / "a run", "tensorboard", tracker.__name__)
    log.write(8, psnr=2.5, step=2, about="words")
    log.write_image(8, "samples", GRAY)
    log.close()
    assert lines(tmp_path / "a run") == [{"images": 8, "psnr": 2.5, "step": 2, "about": "words"}]
    step = "step" if tracker.__name__ == "wandb" else "steps"  # trackio's own word for images is step
    assert tracker.logged == [(8, {"psnr": 2.5, step: 2}), (8, {"samples": ("picture", (4, 2))})]
    assert tracker.finished == 1
    (begun,) = tracker.begun
    assert (begun["project"], begun["config"], begun["resume"]) == ("mar", {"lr": 0.1}, "allow")
    assert begun["name"].startswith("a run")
    if tracker.__name__ == "trackio":
        assert capsys.readouterr().out == ""  # mar's own results go there
    board = EventAccumulator(str(tmp_path / "a run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("psnr")] == [(8, 2.5)]
    (image,) = board.Images("samples")
    assert (image.step, image.width, image.height) == (8, 4, 2)


def test_log_damaged_tracker_id_is_one_line(tmp_path: Path, tracker: FakeTracker) -> None:
    writing(tmp_path, tracker.__name__).close()
    path = tmp_path / "trackers.json"
    path.write_text(path.read_text().replace('": "', '": "f', 1))
    with pytest.raises(ConfigError, match=r"trackers.json can't be read \(it is not as it was written"):
        writing(tmp_path, tracker.__name__)


def test_log_resumed_run_keeps_its_tracker_id(tmp_path: Path, tracker: FakeTracker) -> None:
    log = writing(tmp_path, tracker.__name__)
    for images in (10, 20, 30):
        log.write(images, step=images // 10, psnr=0.1 * images)
    log.close()
    log = writing(tmp_path, tracker.__name__, images=10)  # killed: 10 is the last state
    for images in (20, 30, 40):
        log.write(images, step=images // 10, psnr=0.1 * images)
        log.write_image(images, "samples", GRAY)
    log.close()
    called = [(begun.get("id"), begun["name"]) for begun in tracker.begun]
    assert called[0] == called[1]
    assert [line["images"] for line in lines(tmp_path)] == [10, 20, 30, 40]
    # 20 was told before; 30 is the last that was, and not all of it may have been
    again = [] if tracker.__name__ == "wandb" else [30]
    assert [step for step, values in tracker.logged if "psnr" in values] == [10, 20, 30, *again, 40]
    assert [step for step, values in tracker.logged if "samples" in values] == [*again, 40]
    other = writing(tmp_path / "other", tracker.__name__)
    other.close()
    assert (tracker.begun[-1].get("id"), tracker.begun[-1]["name"]) != called[0]


@pytest.mark.parametrize("tracker", ["wandb"], indirect=True)
def test_log_wandb_error_is_one_line(tmp_path: Path, tracker: FakeTracker) -> None:
    tracker.refusal = tracker.Error("No API key configured.\nMore of it.")
    with pytest.raises(ConfigError, match=r"^wandb: No API key configured; WANDB_MODE=offline needs no server$"):
        writing(tmp_path, "wandb")


@pytest.mark.parametrize("tracker", ["trackio"], indirect=True)
def test_log_trackio_error_is_one_line(tmp_path: Path, tracker: FakeTracker) -> None:
    tracker.refusal = ValueError("`server_url` must be a full URL")
    with pytest.raises(ConfigError, match=r"^trackio: `server_url` must be a full URL$"):
        writing(tmp_path, "trackio")


def test_log_project_name_is_passed_on(tmp_path: Path, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{tracker.__name__.upper()}_PROJECT", "mine")
    writing(tmp_path, tracker.__name__).close()
    assert tracker.begun[0]["project"] == "mine"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_log_missing_package_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = rf'^--log-to {name} needs the extra `{name}`: pip install "\.\[{name}\]" in the clone of mar$'
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    with pytest.raises(ConfigError, match=line):
        require_writers(["tensorboard", name])
    monkeypatch.setitem(sys.modules, name, ModuleType(name))  # a folder of that name
    with pytest.raises(ConfigError, match=line):
        require_writers([name])
    require_writers(["tensorboard"])
    require_writers([])


def test_log_brackets_in_names_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, 40, 0, [])
    log.note("drew runs/a[/b]/:dog:/[old]*.png")
    log.close()
    assert "drew runs/a[/b]/:dog:/[old]*.png\n" in capsys.readouterr().err


def test_log_lines_after_the_state_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLines(path)
    for images in (0, 10, 20):
        log.write(images, {"step": images // 10} if images else {"tokenizer_psnr": 30.0})
        log.write(images, {"val_loss": math.inf, "words": "ä"})
    path.write_text(path.read_text() + '{"images": 30, "st')
    whole = path.read_text().splitlines()
    assert JsonLines(path, 20).last_logged == 20
    assert path.read_text().splitlines() == whole[:-1]
    assert json.loads(whole[-2]) == {"images": 20, "val_loss": None, "words": "ä"}
    # looks at the run after 20 images are made again, so that their lines come again
    assert JsonLines(path, 20, callbacks_done=10).last_logged == 20
    assert path.read_text().splitlines() == whole[:5]
    assert JsonLines(path, 10, callbacks_done=0).last_logged == 20
    assert path.read_text().splitlines() == whole[:3]
    assert JsonLines(path).last_logged == 10  # the run begins anew
    assert path.read_text() == ""


def test_log_tensorboard_purges_after_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for later, first, counts in ((0, 0, (10, 20, 30)), (1, 20, (30, 40))):
        monkeypatch.setattr(time, "time", lambda then=now + later: then)  # files are in order by their names' seconds
        board = TensorBoard(tmp_path, first)
        for images in counts:
            board.write(images, {"loss": float(first + images), "words": "no number"})
        board.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert read.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(10, 10), (20, 20), (30, 50), (40, 60)]


def run_of(folder: Path, **changes: Any) -> Run:
    return open_tiny_run(tiny_train_config(write_images(folder / "pictures", 6), **changes), folder / "run")


def test_log_destination_follows_the_config(
    tmp_path: Path, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, log_to=(tracker.__name__,))
    log = open_log(run)
    log.write(4, psnr=1.0)
    log.close()
    assert tracker.logged == [(4, {"psnr": 1.0})]
    assert tracker.begun[0]["config"]["batch"] == run.config.batch
    assert not (run.folder / "tensorboard").exists()
    monkeypatch.setenv("RANK", "1")
    silent = open_log(run)
    assert type(silent) is Log
    silent.write(8, psnr=1.0)
    silent.write_image(8, "samples", GRAY)
    silent.close()
    assert len(tracker.begun) == len(tracker.logged) == len(lines(run.folder)) == 1


def test_log_unknown_destination_is_refused() -> None:
    config = TrainConfig()
    object.__setattr__(config, "log_to", ("tensorboard", "mlflow"))  # pytest checks the types of arguments first
    with pytest.raises(ConfigError, match="log_to has mlflow, but there are only tensorboard, wandb, trackio"):
        config.__post_init__()
