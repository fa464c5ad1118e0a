"""A run's state: comes back bitwise, is whole or not there, and is never trusted."""

from __future__ import annotations

import hashlib
import logging
import pickle
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from mar.checkpoint import checksums, files, run_state
from mar.checkpoint.checksums import CHECKSUMS
from mar.checkpoint.files import CheckpointError
from mar.checkpoint.run_state import RunState


def example(seed: int = 0) -> dict[str, Any]:
    """A state with all that may be in one."""
    g = torch.Generator().manual_seed(seed)
    return {
        "model": {"a.weight": torch.randn(5, 3, generator=g), "a.bias": torch.randn(3, generator=g).bfloat16()},
        "odd": {
            "transposed": torch.randn(4, 6, generator=g).T,
            "slice": torch.randn(10, generator=g)[3:7],
            "scalar": torch.tensor(float("nan")),
            "empty": torch.empty(0, 4),
            "flags": torch.tensor([True, False]),
            "counts": torch.randint(2**62, (7,), generator=g),
        },
        "generator": g.get_state(),
        "groups": [{"betas": (0.9, 0.95), "lr": 1e-4 / 3, "fused": None}],
        "numbered": {0: {"step": torch.tensor(3.0)}, 1: "one"},
        "images": 10**15 + seed,
        "name": "Łódź",
        "loss": float("inf"),
    }


def blank() -> dict[str, Any]:
    """The same without its values."""

    def cleared(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.zeros_like(value)
        if isinstance(value, dict):
            return {key: cleared(item) for key, item in value.items()}
        return [cleared(item) for item in value] if isinstance(value, list) else None

    return cleared(example())


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """A nested state by paths, tensors as their bytes, so that NaN equals NaN and -0 is not 0."""
    if isinstance(value, Tensor):
        return {path: (value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).tolist())}
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{path}/{key!r}").items()}
    if isinstance(value, list | tuple):
        kind = type(value).__name__
        return {k: v for i, item in enumerate(value) for k, v in leaves(item, f"{path}/{kind}{i}").items()}
    return {path: value}


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_run_state_round_trip_is_bitwise(tmp_path: Path) -> None:
    RunState(tmp_path).save(128_000, example())
    state = blank()
    assert RunState(tmp_path).load(state)
    assert leaves(state) == leaves(example())
    assert names(tmp_path) == ["latest", "state-000000128000"]


def test_run_state_load_is_in_place(tmp_path: Path) -> None:
    RunState(tmp_path).save(1, example())
    state = blank()
    weight = state["model"]["a.weight"]
    RunState(tmp_path).load(state)
    assert state["model"]["a.weight"].data_ptr() == weight.data_ptr()
    assert torch.equal(weight, example()["model"]["a.weight"])


def test_run_state_optimizer_continues(tmp_path: Path) -> None:
    def made() -> tuple[nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(1)
        model = nn.Linear(4, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: nn.Linear, optimizer: torch.optim.AdamW) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()

    model, optimizer = made()
    step(model, optimizer)
    RunState(tmp_path).save(1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    step(model, optimizer)

    resumed, other = made()
    step(resumed, other)  # so that it has a state to load into
    step(resumed, other)
    state = {"model": resumed.state_dict(), "optimizer": other.state_dict()}
    RunState(tmp_path).load(state)
    resumed.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    step(resumed, other)
    assert torch.equal(resumed.weight, model.weight)


def test_run_state_load_without_state_does_nothing(tmp_path: Path) -> None:
    state = blank()
    assert not RunState(tmp_path / "never").load(state)
    assert leaves(state) == leaves(blank())


def test_run_state_keeps_the_newest(tmp_path: Path) -> None:
    run = RunState(tmp_path)
    for images in (90, 100, 1000, 2000):
        run.save(images, example(images), keep=2)
    assert names(tmp_path) == ["latest", "state-000000001000", "state-000000002000"]
    with pytest.raises(ValueError, match="keep: got 0"):
        run.save(3000, example(), keep=0)


def test_run_state_saved_again_replaces_the_first(tmp_path: Path) -> None:
    run = RunState(tmp_path)
    run.save(5, example(1), keep=1)
    run.save(5, example(2), keep=1)
    state = blank()
    run.load(state)
    assert state["images"] == example(2)["images"]
    assert names(tmp_path) == ["latest", "state-000000000005"]


def test_run_state_full_disk_keeps_the_old_state(tmp_path: Path) -> None:
    run = RunState(tmp_path)
    run.save(5, example())
    before = (names(tmp_path), (tmp_path / "latest").read_text())
    with full_disk(30_000), pytest.raises(CheckpointError, match=r"can't write .*state-000000000006 \(.* needed\)"):
        run.save(6, {**example(1), "large": torch.zeros(50_000)})
    assert (names(tmp_path), (tmp_path / "latest").read_text()) == before
    state = blank()
    assert run.load(state)
    assert leaves(state) == leaves(example())


def test_save_checks_free_space_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"are needed, but only 1000 bytes are free"):
        RunState(tmp_path).save(6, example())
    assert names(tmp_path) == []


@pytest.mark.parametrize("where", ["in the shards", "before the rename"])
def test_run_state_interrupted_keeps_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    run = RunState(tmp_path)
    run.save(5, example())

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "in the shards":
            patch.setattr(FileSystemWriter, "finish", interrupted)
        else:
            patch.setattr(run_state, "_move", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.save(6, example(1))
    assert names(tmp_path) == ["latest", "state-000000000005"]
    assert run.latest() == tmp_path / "state-000000000005"


def test_run_state_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".saving-state-000000000004").mkdir()
    (tmp_path / ".saving-state-000000000004" / "__0_0.distcp").write_bytes(b"half")
    run = RunState(tmp_path)
    assert run.latest() is None
    run.save(5, example())
    assert names(tmp_path) == ["latest", "state-000000000005"]


@pytest.mark.parametrize("pointer", [None, b"", b"\xff\xfe", b"state-000000000099\n", b"../../etc/passwd"])
def test_run_state_damaged_pointer_falls_back_to_the_newest(
    tmp_path: Path, pointer: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunState(tmp_path)
    run.save(5, example(5))
    run.save(6, example(6))
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_bytes(pointer)
    state = blank()
    with caplog.at_level(logging.WARNING):
        assert run.load(state)
    assert state["images"] == example(6)["images"]
    assert "names no state" in caplog.text


def test_run_state_pointer_to_an_older_state_is_followed(tmp_path: Path) -> None:
    run = RunState(tmp_path)
    run.save(5, example(5))
    run.save(6, example(6))
    (tmp_path / "latest").write_text("state-000000000005")
    assert run.latest() == tmp_path / "state-000000000005"


@pytest.mark.parametrize("victim", [".metadata", "state.json", "__0_0.distcp"])
def test_run_state_truncated_falls_back_to_an_older_one(
    tmp_path: Path, victim: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunState(tmp_path)
    run.save(5, example(5))
    broken = run.save(6, example(6)) / victim
    broken.write_bytes(broken.read_bytes()[:-50])
    state = blank()
    with caplog.at_level(logging.WARNING):
        assert run.load(state)
    assert leaves(state) == leaves(example(5))
    assert "looking for an older state" in caplog.text


def test_run_state_without_a_complete_one_is_an_error(tmp_path: Path) -> None:
    run = RunState(tmp_path)
    (run.save(5, example()) / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no state in .* is whole"):
        run.load(blank())


def test_run_state_shard_of_zeros_is_reported(tmp_path: Path) -> None:
    run = RunState(tmp_path)
    shard = run.save(5, {"x": torch.arange(1000.0)}) / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(CheckpointError, match=r"no state .* is whole \(.*__0_0.distcp is damaged: its bytes are not"):
        run.load({"x": torch.zeros(1000)})


def test_run_state_with_checksums_of_an_earlier_version_is_compared(tmp_path: Path) -> None:
    """They were one sha256 a file."""
    run = RunState(tmp_path)
    saved = run.save(5, {"x": torch.arange(1000.0)})
    names = ("__0_0.distcp", ".metadata", "state.json", "config.json")
    digests = {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in names}
    checksums.write_folder(saved, digests)
    state = {"x": torch.zeros(1000)}
    assert run.load(state)
    assert torch.equal(state["x"], torch.arange(1000.0))
    data = bytearray((saved / names[0]).read_bytes())
    data[2000] ^= 1
    (saved / names[0]).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is damaged: its bytes are not"):
        run.load(state)


@pytest.mark.parametrize("place", [0, 2500, 4999, 5000, 9999, 10_000, 10_006])
def test_checksums_of_pieces_cover_every_byte(tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_PIECE", 5000)
    monkeypatch.setattr(checksums, "_PART", 1024)
    data = bytearray(torch.arange(10_007).to(torch.uint8).numpy().tobytes())
    path = tmp_path / "shard"
    path.write_bytes(data)
    checksums.write_folder(tmp_path, checksums.file_digests([path]))
    assert checksums.check_folder(tmp_path)
    pieces = [zlib.crc32(data[first : first + 5000]) for first in (0, 5000, 10_000)]
    assert checksums.file_digests([path])["shard"] == f"crc32:10007:{''.join(f'{crc:08x}' for crc in pieces)}"
    data[place] ^= 16
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="shard is damaged"):
        checksums.check_folder(tmp_path)


def test_run_state_damage_is_said_in_one_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line names the damaged file, whichever check meets it."""
    run = RunState(tmp_path)
    run.save(1, example(1))
    saved = [run.save(number, example(number), keep=4) for number in (2, 3, 4)]
    (saved[0] / "__0_0.distcp").write_bytes(b"cut")
    (saved[1] / ".metadata").write_bytes(b"no pickle")
    for state in saved[1:]:
        (state / "checksums.json").unlink()  # as an earlier version left it
    shard = saved[2] / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    state = blank()
    with caplog.at_level(logging.WARNING):
        assert run.load(state)
    assert leaves(state) == leaves(example(1))
    lines = [record.getMessage() for record in caplog.records if "looking for" in record.getMessage()]
    assert [line.split(" ")[0].rstrip(":") for line in lines] == [
        str(saved[2]), f"{saved[1] / '.metadata'}", f"{saved[0] / '__0_0.distcp'}"
    ]  # fmt: skip
    assert all(line.endswith("; looking for an older state") and line.count("damaged") <= 1 for line in lines)


def test_run_state_of_another_config_names_the_settings(tmp_path: Path) -> None:
    small = {"model": {"width": 3, "depth": 2}, "batch": 64}
    RunState(tmp_path, small).save(5, {"model": {"w": torch.ones(3)}, "step": 7})
    state = {"model": {"w": torch.zeros(4), "b": torch.zeros(1)}, "step": 0}
    large = {"model": {"width": 4, "depth": 2}, "batch": 64}
    with pytest.raises(CheckpointError, match=r"another model .*: model\.width 3 -> 4; model/b was not saved"):
        RunState(tmp_path, large).load(state)
    assert state["step"] == 0
    assert state["model"]["w"].tolist() == [0, 0, 0, 0]


def test_run_state_changed_dtype_is_refused(tmp_path: Path) -> None:
    RunState(tmp_path).save(5, {"w": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"w was saved as \(3,\) torch.float32, now \(3,\) torch.bfloat16"):
        RunState(tmp_path).load({"w": torch.ones(3, dtype=torch.bfloat16)})


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", 1j, {("a",): 1}])
def test_run_state_values_outside_json_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="state: x "):
        RunState(tmp_path).save(5, {"x": value})
    assert names(tmp_path) == []


class Malice:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_run_state_pickled_metadata_runs_no_code(tmp_path: Path) -> None:
    run = RunState(tmp_path)
    trap = tmp_path / "trap"
    saved = run.save(5, example())
    (saved / ".metadata").write_bytes(pickle.dumps(Malice(trap)))
    with pytest.raises(CheckpointError, match="no state"):
        run.load(blank())
    with pytest.raises(CheckpointError, match=r"refused: it asks for pathlib\.Path\.touch"):
        run_state.read_dcp_metadata(saved)
    assert not trap.exists()


def test_run_state_pickled_shards_are_not_read(tmp_path: Path) -> None:
    with run_state._ignore_single_process_warning():
        state_dict_saver.save({"x": Malice(tmp_path / "trap")}, checkpoint_id=tmp_path / "state")
    with pytest.raises(CheckpointError, match="refused: x is not a tensor"):
        run_state.read_dcp_metadata(tmp_path / "state")


def two_states(folder: Path, *, checksums: bool) -> Path:
    """A folder of two states, the newer of which is returned; without checksums, as earlier versions wrote them."""
    run = RunState(folder)
    older, newer = run.save(1, example(1)), run.save(2, example(2))
    if not checksums:
        for state in (older, newer):
            (state / CHECKSUMS).unlink()
    return newer


def falls_back(folder: Path) -> bool:
    """Whether the older state is loaded, to the last bit."""
    state = blank()
    assert RunState(folder).load(state)
    return leaves(state) == leaves(example(1))


def test_run_state_flipped_bit_anywhere_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    newer = two_states(tmp_path, checksums=True)
    for path in sorted(newer.iterdir()):
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 8 * len(whole) // 13):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            caplog.clear()
            assert falls_back(tmp_path), f"{path.name}, bit {bit}"
            assert "looking for an older state" in caplog.text
        path.write_bytes(whole)
    state = blank()
    assert RunState(tmp_path).load(state)
    assert leaves(state) == leaves(example(2))


def test_run_state_checksums_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = two_states(tmp_path, checksums=True)
    text = (newer / "state.json").read_text("utf-8")
    (newer / "state.json").write_text(text.replace("1000000000000002", "7"), "utf-8")
    assert falls_back(tmp_path)
    monkeypatch.setenv("MAR_CHECKSUMS", "off")
    state = blank()
    assert RunState(tmp_path).load(state)
    assert state["images"] == 7


MEMO = b"\x80\x04N" + b"r\xff\xff\xff\x7f" + b"."
"""A pickle of None, which would be object 2^31 of a table."""
DEEP = b"\x80\x04" + b"(" * 100_000 + b"."


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", MEMO, DEEP, b"\x80\x04\x96" + b"\xff" * 7 + b"\x00."])
def test_run_state_broken_metadata_without_checksums_falls_back(tmp_path: Path, content: bytes) -> None:
    newer = two_states(tmp_path, checksums=False)
    (newer / ".metadata").write_bytes(content)
    assert falls_back(tmp_path)


@pytest.mark.parametrize("error", [MemoryError, RecursionError, AttributeError("no size"), SystemError, OverflowError])
def test_run_state_any_error_of_its_metadata_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | type[Exception]
) -> None:
    newer = two_states(tmp_path, checksums=False)
    check = run_state._check_metadata
    calls: list[Any] = []

    def failing(metadata: Any) -> None:
        calls.append(metadata)
        if len(calls) == 1:
            raise error
        check(metadata)

    monkeypatch.setattr(run_state, "_check_metadata", failing)
    assert falls_back(tmp_path), newer


def test_run_state_tensor_without_chunks_falls_back(tmp_path: Path) -> None:
    newer = two_states(tmp_path, checksums=False)
    metadata = pickle.loads((newer / ".metadata").read_bytes())
    metadata.state_dict_metadata["model/a.weight"].chunks = []
    (newer / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "model/a.weight of shape (5, 3) is there in part: 0 values" in str(run_state.damage(newer))
    assert falls_back(tmp_path)


def test_run_state_metadata_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    newer = two_states(tmp_path, checksums=False)
    metadata = pickle.loads((newer / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../state-000000000001/__0_0.distcp"
    (newer / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "expected one of its folder" in str(run_state.damage(newer))
    assert falls_back(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", "[" * 100_000, '{"model": {"a.weight": {"$tensor": 3}}}', '{"$pairs": 1}']
)
def test_run_state_broken_json_falls_back(tmp_path: Path, text: str) -> None:
    newer = two_states(tmp_path, checksums=False)
    (newer / "state.json").write_text(text, "utf-8")
    assert falls_back(tmp_path)
