"""A file of weights: a bitwise round trip, and one clear line for every file that is not one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mar.checkpoint import checksums, files, store
from mar.checkpoint.files import CheckpointError
from mar.checkpoint.store import Header
from mar.config import HeadConfig, ModelConfig, SamplingConfig, TrunkConfig
from mar.model.mar import MAR

TINY = ModelConfig(
    channels=2,
    grid=(4, 6),
    encoder=TrunkConfig(8, 1, 2),
    decoder=TrunkConfig(12, 1, 3),
    head=HeadConfig(8, 1),
    buffer_size=3,
    classes=3,
)
HEADER = Header(
    TINY,
    SamplingConfig(steps=8, guidance_scale=1.5, x0_bound=3.0),
    {"kind": "pixels", "image_channels": 1},
    ("t-shirt", "Łódź", "größe"),
    "raw",
    {"images_seen": 128_000, "recipe": "fashion"},
)


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = {f"model.{name}": tensor for name, tensor in MAR(TINY).state_dict().items()}
    return {**model, "tokenizer.mean": torch.tensor([0.25]), "tokenizer.std": torch.tensor([float("nan")])}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "model.safetensors"
    store.save(path, HEADER, tensors())
    return path


def bits(stored: dict[str, Tensor]) -> dict[str, Any]:
    return {n: (t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).tolist()) for n, t in stored.items()}


def test_header_of_any_length_is_read(tmp_path: Path) -> None:
    """The length comes first in the file, and its bytes may look like the beginning of another kind of file's."""
    begins = set()
    for more in range(0, 256, 8):
        path = tmp_path / f"{more}.safetensors"
        store.save(path, replace(HEADER, notes={"recipe": "x" * more}), tensors())
        assert store.read_header(path).notes == {"recipe": "x" * more}
        begins.add(path.read_bytes()[0])
    assert 0x80 in begins  # as a pickle


def test_store_round_trip_is_bitwise(saved: Path) -> None:
    header, loaded = store.load(saved)
    assert header == HEADER
    assert bits(loaded) == bits(tensors())
    assert store.read_header(saved) == HEADER


def test_store_half_precision_and_transposed_tensors_round_trip(tmp_path: Path) -> None:
    stored = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    stored["model.token_embed.weight"] = stored["model.token_embed.weight"].T.contiguous().T
    store.save(tmp_path / "m", HEADER, stored)
    assert bits(store.load(tmp_path / "m")[1]) == bits(stored)


def test_store_same_weights_give_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    for number in range(8):
        store.save(tmp_path / str(number), HEADER, tensors())
        assert (tmp_path / str(number)).read_bytes() == saved.read_bytes()


def test_store_file_is_plain_safetensors(saved: Path) -> None:
    assert set(load_file(saved)) == set(tensors())
    assert saved.stat().st_mode & stat.S_IROTH  # not only by its owner


def test_store_save_leaves_only_the_file(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == ["model.safetensors"]


def with_header(saved: Path, path: Path, change: dict[str, Any] | None) -> Path:
    """A copy whose header has other values; None leaves the header out."""
    metadata = None
    if change is not None:
        with store.safe_open(saved, framework="pt") as file:
            metadata = {"mar": json.dumps({**json.loads(file.metadata()["mar"]), **change})}
    save_file(load_file(saved), path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"holds \d+ tensors .*: a model of mar whose header is lost"),
        (
            {"format": "mar/2"},
            "made by a newer mar: .* format mar/2, this is mar .* reads mar/1; upgrade mar",
        ),
        ({"format": "other/1"}, "of format 'other/1', which this mar does not know"),
        ({"format": 3}, "its header can't be understood"),
        ({"model": {"channels": 0}}, "channels is 0, but it must be at least 1"),
        ({"model": {"flavour": "sweet"}}, "ModelConfig has no field flavour"),
        ({"model": "large"}, "its header can't be understood"),
        ({"sampling": None}, "its header can't be understood"),
        ({"weights": "average"}, "weights: got 'average', expected ema, raw or unknown"),
        ({"surprise": 1}, "its header can't be understood"),
    ],
)
def test_store_other_headers_are_refused(
    saved: Path, tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        store.load(with_header(saved, tmp_path / "other", change))


def test_store_header_mismatch_names_the_tensor(saved: Path, tmp_path: Path) -> None:
    wider = store.to_dict(replace(TINY, classes=4))
    path = with_header(saved, tmp_path / "other", {"model": wider})
    with pytest.raises(
        CheckpointError, match=r"not those of its config: model.class_embed.weight is \(3, 8\), expected \(4, 8\)"
    ):
        store.load(path)


def test_store_save_of_mismatched_tensors_is_refused(tmp_path: Path) -> None:
    fewer = tensors()
    del fewer["model.mask_token"]
    with pytest.raises(CheckpointError, match="mask_token is missing"):
        store.save(tmp_path / "m", HEADER, fewer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: the copy or download of it failed"),
        (b"<!DOCTYPE html><html>log in</html>", "is a web page, not weights"),
        (b"\n <html>", "is a web page, not weights"),
        (b"PK\x03\x04 and so on", "is a PyTorch file, not safetensors; `mar convert` reads it"),
        (b"\x80\x02}q\x00.", "is a PyTorch file"),
        (b"short", "is not a safetensors file"),
        (b"\xff" * 100, "is not a safetensors file"),
        ((20).to_bytes(8, "little") + b"{" + b"x" * 30, "is not a safetensors file: its header can't be read"),
    ],
)
def test_store_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        store.load(path)


def test_store_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        store.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="there is no such file"):
        store.load(tmp_path)


@hypothesis.given(share=st.floats(0, 1, exclude_max=True))
def test_store_truncated_file_is_refused_at_any_length(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    path = saved.parent.parent / "truncated.safetensors"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"is truncated|is empty|is not a safetensors file"):
        store.load(path)


@hypothesis.given(content=st.binary(max_size=200))
def test_store_garbage_is_refused_in_one_line(saved: Path, content: bytes) -> None:
    path = saved.parent.parent / "garbage.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"garbage\.safetensors"):
        store.load(path)


def test_store_full_disk_keeps_the_old_file(saved: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "model.safetensors"
    shutil.copy(saved, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"can't write .*model.safetensors \(.* KiB needed\)"):
            store.save(path, replace(HEADER, weights="ema"), tensors())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_checks_free_space_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 100, 100))
    with pytest.raises(CheckpointError, match=r"KiB are needed, but only 100 bytes are free"):
        store.save(tmp_path / "m", HEADER, tensors())
    assert list(tmp_path.iterdir()) == []


def test_store_save_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save(tmp_path / "m", HEADER, tensors())
    assert list(tmp_path.iterdir()) == []


def test_store_save_to_an_invalid_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"can't write .*: (Not a directory|File exists)"):
        store.save(tmp_path / "file" / "model.safetensors", HEADER, tensors())


def test_file_of_8_bits_is_a_quarter_and_rounds_each_row(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 128, generator=generator) * torch.logspace(-6, 3, 64).unsqueeze(1)
    matrix[5] = 0
    stored = store.to_8_bits("x", matrix)
    assert {name: tensor.dtype for name, tensor in stored.items()} == {"x": torch.int8, "x:scale": torch.float32}
    back = store.from_8_bits(stored["x"], stored["x:scale"])
    assert ((back - matrix).abs() <= matrix.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all()
    assert store.to_8_bits("bias", matrix[0]).keys() == {"bias"}


HUGE = 10**9
MODEL = store.to_dict(TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": MODEL | {"encoder": MODEL["encoder"] | {"depth": HUGE}}}, "model.encoder.depth is 1000000000, but"),
        ({"model": MODEL | {"head": MODEL["head"] | {"depth": HUGE}}}, "model.head.depth is 1000000000, but the file"),
        ({"model": MODEL | {"head": MODEL["head"] | {"diffusion_steps": HUGE}}}, "diffusion_steps is 1e.09, too large"),
        ({"model": MODEL | {"classes": HUGE}}, r"model.classes is 1e\+09, too large for a file"),
        ({"model": MODEL | {"classes": 3.0}}, "ModelConfig.classes: got 3.0, expected a whole number"),
        ({"model": MODEL | {"classes": True}}, "ModelConfig.classes: got True, expected a whole number"),
        ({"model": MODEL | {"grid": [4]}}, r"ModelConfig.grid: got \[4\]"),
        ({"model": MODEL | {"grid": [HUGE, HUGE]}}, "model.grid is 1e"),
        ({"model": MODEL | {"encoder": [1]}}, r"ModelConfig.encoder: got \[1\]"),
        ({"sampling": {"temperature": 1e30}}, "temperature is 1e.30, outside"),
        ({"sampling": {"guidance_scale": float("nan")}}, "guidance_scale: got nan"),
        ({"sampling": {"steps": "8"}}, "steps: got '8', expected a whole number"),
        ({"classes": "abc"}, "Header.classes: got 'abc'"),
        ({"classes": ["a", "b"]}, "it names 2 classes, but the model has 3"),
        ({"classes": [1, 2, 3]}, "Header.classes: got"),
        ({"notes": [1]}, "Header.notes: got"),
        ({"condition": {"kind": "words", "words": ["a"]}}, "its captions have no list of 0 words"),
        ({"tokenizer": None}, "Header.tokenizer: got None"),
        ({"tokenizer": {"kind": ["pixels"]}}, "its tokenizer can't be built"),
        ({"tokenizer": {"kind": "pixels", "image_channels": "1"}}, "its tokenizer can't be built"),
        ({"tokenizer": {"kind": "residual", "depth": HUGE}}, "tokenizer.depth is 1000000000, but the file has"),
        ({"tokenizer": {"kind": "residual", "width": HUGE * 8}}, "tokenizer.width is 8e.09, too large"),
        ({"tokenizer": {"kind": "kl", "config": {"block_out_channels": [HUGE]}}}, "block_out_channels is 1e.09"),
        ({"tokenizer": {"kind": "pca"}}, "the tensors are not those of its config: tokenizer.mean is .*, expected"),
        ({"notes": {"images": 7}}, "is damaged: its header is not as it was written"),
        ({"sha256": 3}, "its header can't be understood"),
    ],
)
def test_store_header_out_of_bounds_is_refused_at_once(
    saved: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = with_header(saved, tmp_path / "other", change)
    for read in (store.load, store.read_header):
        with pytest.raises(CheckpointError, match=message) as said:
            read(path)
        assert "\n" not in str(said.value)


def test_store_deep_json_is_refused(saved: Path, tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    save_file(load_file(saved), tmp_path / "metadata", metadata={"mar": deep})
    header = b'{"a":' + deep.encode() + b"}"
    (tmp_path / "table").write_bytes(len(header).to_bytes(8, "little") + header)
    for name in ("metadata", "table"):
        with pytest.raises(CheckpointError, match="header can't be"):
            store.load(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.int8])
def test_store_whole_numbers_are_no_weights(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    with store.safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    stored = load_file(saved)
    stored["model.mask_token"] = stored["model.mask_token"].to(dtype)
    save_file(stored, tmp_path / "m", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"model\.mask_token is stored as"):
        store.read_header(tmp_path / "m")


@pytest.mark.parametrize("name", ["model.mask_token", "tokenizer.mean"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_store_values_not_finite_are_named(name: str, value: float) -> None:
    stored = tensors() | {"tokenizer.std": torch.ones(1)}
    store.check_values(Path("m"), stored)
    stored[name] = stored[name].clone()
    stored[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f"m: {name} have values that are not finite"):
        store.check_values(Path("m"), stored)
    with pytest.raises(CheckpointError, match=r"tokenizer\.std has values that are not positive"):
        store.check_values(Path("m"), {"tokenizer.std": torch.zeros(1)})


def test_store_flipped_bit_is_refused_or_means_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = saved.read_bytes(), tmp_path / "m"
    expected = bits(tensors())
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(len(whole), (120,), generator=generator).tolist():
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            header, loaded = store.load(path)
        except CheckpointError:
            refused += 1
        else:
            assert (header, bits(loaded)) == (HEADER, expected), place
    assert refused > 110
    store.save(tmp_path / "finite", HEADER, tensors() | {"tokenizer.std": torch.ones(1)})
    assert store.verify(tmp_path / "finite")
    monkeypatch.setenv("MAR_CHECKSUMS", "off")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert bits(store.load(path)[1]) != expected


def test_store_damage_names_the_tensors(saved: Path, tmp_path: Path) -> None:
    stored = load_file(saved)
    for name in ("model.mask_token", "tokenizer.mean"):
        stored[name].view(torch.uint8)[0] ^= 1
    with store.safe_open(saved, framework="pt") as file:
        save_file(stored, tmp_path / "m", metadata=file.metadata())
    with pytest.raises(CheckpointError, match=r"m is damaged in model\.mask_token, tokenizer\.mean: not as it was"):
        store.load(tmp_path / "m")


@pytest.mark.parametrize("has_checksum", [False, True])
def test_store_file_of_an_earlier_version_opens(saved: Path, tmp_path: Path, has_checksum: bool) -> None:
    """The first had no checksums, the next one sha256 of all tensors, which is compared as ever."""
    with store.safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["mar"])
    del header["checksums"]
    stored, path = load_file(saved), tmp_path / "m"
    if has_checksum:
        header["sha256"] = {"tensors": checksums.tensors_digest(stored)}
        header["sha256"]["header"] = checksums.json_digest(header)
    save_file(stored, path, metadata={"mar": json.dumps(header)})
    assert store.load(path)[0] == HEADER
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    if has_checksum:
        with pytest.raises(CheckpointError, match="is damaged in its tensors"):
            store.load(path)
    else:
        store.load(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_store_finite_values_are_told_by_their_bits(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    for value in (0.0, -0.0, limits.max, limits.min, limits.smallest_normal, -limits.smallest_normal / 2):
        store.check_values(Path("m"), {"w": torch.tensor([1.0, value, -1.0], dtype=dtype)})
    nan = torch.tensor(float("nan"), dtype=dtype)
    for value in (float("inf"), float("-inf"), nan, -nan, torch.copysign(nan, torch.tensor(-1.0, dtype=dtype))):
        with pytest.raises(CheckpointError, match="m: w have values that are not finite"):
            store.check_values(Path("m"), {"w": torch.tensor([1.0, value, -1.0], dtype=dtype)})


def test_write_where_folders_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems refuse it; the file is there all the same. A file that can't be flushed is an error."""
    fsync, wrong = os.fsync, errno.EINVAL

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) or wrong != errno.EINVAL:
            raise OSError(wrong, "refused")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_text(tmp_path / "a.txt", "there")
    assert (tmp_path / "a.txt").read_text() == "there"
    wrong = errno.EIO
    with pytest.raises(CheckpointError):
        files.write_text(tmp_path / "b.txt", "there")
