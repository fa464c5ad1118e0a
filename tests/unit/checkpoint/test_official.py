"""The authors' files are read with nothing run, imported whole, and written back as they were."""

from __future__ import annotations

import argparse
import logging
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mar.checkpoint.files import CheckpointError
from mar.checkpoint.official import (
    convert_optimizer,
    from_official,
    infer_config,
    is_flat_official,
    read_mar,
    read_torch,
    to_official,
    write_mar,
)
from mar.checkpoint.official_kl16 import read_kl16
from mar.config import HeadConfig, ModelConfig, TrunkConfig
from mar.model.mar import MAR

TINY = ModelConfig(
    channels=3,
    grid=(8, 8),
    patch_size=2,
    encoder=TrunkConfig(8, 1, 2),
    decoder=TrunkConfig(8, 2, 2),
    head=HeadConfig(12, 2, batch_mul=3),
    buffer_size=5,
    classes=7,
    attention_dropout=0.0,
)
ARGS = argparse.Namespace(
    model="mar_tiny", img_size=64, vae_stride=8, patch_size=2, diffusion_batch_mul=3, attn_dropout=0.0, lr=None
)


def state(seed: int) -> dict[str, Tensor]:
    """A model's tensors under the official names, in the reference's order."""
    torch.manual_seed(seed)
    return to_official(MAR(TINY).state_dict())


RAW, EMA = state(1), state(2)


def write(path: Path, **holder: Any) -> Path:
    torch.save(holder, path)
    return path


def same(ours: Mapping[str, Tensor] | None, theirs: Mapping[str, Tensor]) -> bool:
    expected = from_official(theirs)
    return ours is not None and set(ours) == set(expected) and all(torch.equal(ours[n], expected[n]) for n in expected)


class Malice:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


def test_official_ema_is_the_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "c.pth", model=RAW, model_ema=EMA, args=ARGS)
    with caplog.at_level(logging.INFO):
        read = read_mar(path, num_heads=2)
    assert read.weights == "ema"
    assert "took the ema weights" in caplog.text
    assert read.notes == {"source": "c.pth", "weights": "ema"}
    assert same(read.state, EMA)
    assert same(read.ema, EMA)
    assert same(read.raw, RAW)
    assert read.model_config == TINY
    assert read.args is not None
    assert read.args["img_size"] == 64
    assert (read.optimizer, read.epoch) == (None, None)

    raw = read_mar(path, "raw", num_heads=2)
    assert raw.weights == "raw"
    assert same(raw.state, RAW)


@pytest.mark.parametrize("ema", [{}, {"model_ema": None}])
def test_official_without_ema_is_refused_unless_raw(tmp_path: Path, ema: dict[str, None]) -> None:
    path = write(tmp_path / "c.pth", model=RAW, args=ARGS, **ema)
    with pytest.raises(CheckpointError, match=r"has no EMA weights \(`model_ema`\).*ask for .* convert --weights raw`"):
        read_mar(path, num_heads=2)
    assert same(read_mar(path, "raw", num_heads=2).state, RAW)


def test_official_bare_state_dict_is_raw(tmp_path: Path) -> None:
    path = write(tmp_path / "c.pth", **RAW)
    assert same(read_mar(path, "raw", num_heads=2, patch_size=2).state, RAW)
    with pytest.raises(CheckpointError, match="has no EMA weights"):
        read_mar(path, "ema", num_heads=2, patch_size=2)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_flat_file_is_of_unknown_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str) -> None:
    path = tmp_path / f"mar-base{suffix}"
    save_file(RAW, path) if suffix == ".safetensors" else write(path, **RAW)
    assert is_flat_official(path) == (suffix == ".safetensors")
    read = read_mar(path, num_heads=2, patch_size=2)
    assert (read.weights, read.raw, read.ema, read.family) == ("unknown", None, None, "mar")
    assert same(read.state, RAW)
    assert "one set of weights, of unknown kind; those of jadechoghari/mar are the raw ones" in caplog.text


def test_official_family_is_told_by_tensors_and_entries(tmp_path: Path) -> None:
    plain = {"model": RAW, "model_ema": EMA, "args": ARGS}
    assert read_mar(write(tmp_path / "a.pth", **plain), num_heads=2).family == "mar"
    assert read_mar(tmp_path / "a.pth", num_heads=2, family="detok").family == "detok"
    detok = write(tmp_path / "b.pth", **plain, loss_scaler={}, last_elapsed_time=3.5, epoch=799)
    assert read_mar(detok, num_heads=2).family == "detok"
    emigm = write(tmp_path / "c.pth", model_ema=tied_state(0), args=ARGS)
    assert read_mar(emigm, num_heads=2).family == "emigm"
    with pytest.raises(CheckpointError, match=r"family: got mar, but the file has eMIGM's one vector as mask token"):
        read_mar(emigm, num_heads=2, family="mar")
    with pytest.raises(CheckpointError, match="family: got emigm, but the file has MAR's tensors"):
        read_mar(detok, num_heads=2, family="emigm")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_official_half_precision_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    halves = {name: nn.Parameter(tensor.to(dtype)) for name, tensor in EMA.items()}
    read = read_mar(write(tmp_path / "c.pth", model=RAW, model_ema=halves, args=ARGS), num_heads=2)
    assert same(read.state, {name: tensor.detach().float() for name, tensor in halves.items()})
    assert {(tensor.dtype, tensor.requires_grad) for tensor in read.state.values()} == {(torch.float32, False)}


@pytest.mark.parametrize(
    ("width", "model", "heads"), [(768, None, 12), (1024, None, 16), (1280, None, 16), (96, "mar_base", 12)]
)
def test_official_heads_follow_from_name_or_width(width: int, model: str | None, heads: int) -> None:
    config = ModelConfig(encoder=TrunkConfig(width, 1, heads), decoder=TrunkConfig(width, 1, heads))
    with torch.device("meta"):
        tensors = to_official(MAR(config).state_dict())
    assert infer_config(tensors, {"model": model}) == config


def test_official_unknown_heads_are_required(tmp_path: Path) -> None:
    path = write(tmp_path / "c.pth", model=RAW, model_ema=EMA)
    with pytest.raises(CheckpointError, match=r"c\.pth: the number of attention heads .* width 8, .* give it"):
        read_mar(path)
    with pytest.raises(CheckpointError, match="width 8 is not a multiple of num_heads 3"):
        read_mar(path, num_heads=3)
    with pytest.raises(CheckpointError, match="no square of patches of 5x5"):
        read_mar(path, num_heads=2, patch_size=5)


def test_official_other_model_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "c.pth", model_ema={"encoder.conv_in.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"holds 1 tensor under `model_ema` \(encoder\.conv_in\.weight\); mar"):
        read_mar(path)
    extra = {**EMA, "encoder_blocks.0.attn.rope": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"1 tensors are not those of a MAR: encoder_blocks\.0\.attn\.rope"):
        read_mar(write(path, model_ema=extra), num_heads=2)
    missing = {name: tensor for name, tensor in EMA.items() if name != "mask_token"}
    with pytest.raises(CheckpointError, match="mask_token is missing"):
        read_mar(write(path, model_ema=missing), num_heads=2)


@pytest.mark.parametrize("reader", [read_mar, read_kl16])
class TestRefusals:
    """What both readers refuse, in one line that starts with the file."""

    def refuse(self, reader: Any, path: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            reader(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)

    def test_official_pickled_code_is_refused(self, reader: Any, tmp_path: Path) -> None:
        path = write(tmp_path / "c.pth", model=RAW, model_ema=EMA, args=Malice(tmp_path / "trap"))
        self.refuse(reader, path, r"is refused: its pickle wants to run ([\w.]+\.)?exec, ")
        assert not (tmp_path / "trap").exists()

    def test_official_code_in_a_namespace_is_refused(self, reader: Any, tmp_path: Path) -> None:
        args = argparse.Namespace(path=Malice(tmp_path / "trap"))
        self.refuse(reader, write(tmp_path / "c.pth", model=RAW, model_ema=EMA, args=args), "wants to run .*exec")
        assert not (tmp_path / "trap").exists()

    def test_official_harmless_classes_are_refused(self, reader: Any, tmp_path: Path) -> None:
        args = argparse.Namespace(output=pathlib.PurePosixPath("out"))
        self.refuse(reader, write(tmp_path / "c.pth", model=RAW, args=args), r"wants to run pathlib\.PurePosixPath")

    def test_official_whole_modules_are_refused(self, reader: Any, tmp_path: Path) -> None:
        self.refuse(reader, write(tmp_path / "c.pth", model=nn.Linear(2, 2)), r"torch\.nn\.modules\.linear\.Linear")

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
    def test_official_truncated_files_are_refused(self, reader: Any, tmp_path: Path, share: float) -> None:
        path = write(tmp_path / "c.pth", model=RAW, model_ema=EMA)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        self.refuse(reader, path, "is truncated or damaged" if share else "is empty")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"<!DOCTYPE html>", "is a web page, not weights: the download of it failed"),
            (pickle.dumps({"model": 1}), "is a bare pickle"),
            (b"\x10\0\0\0\0\0\0\0{}", r"is not a file of torch\.save"),
            (b"PK\x05\x06" + bytes(18), r"is an empty zip, and not a file of torch\.save"),
        ],
    )
    def test_official_other_formats_are_refused(
        self, reader: Any, tmp_path: Path, content: bytes, message: str
    ) -> None:
        (tmp_path / "c.pth").write_bytes(content)
        self.refuse(reader, tmp_path / "c.pth", message)

    def test_official_missing_file_is_refused(self, reader: Any, tmp_path: Path) -> None:
        self.refuse(reader, tmp_path / "none.pth", "there is no such file")

    def test_official_list_is_refused(self, reader: Any, tmp_path: Path) -> None:
        torch.save([1, 2], tmp_path / "c.pth")
        self.refuse(reader, tmp_path / "c.pth", "holds a list, not a dict")

    def test_official_other_tensors_are_refused(self, reader: Any, tmp_path: Path) -> None:
        self.refuse(reader, write(tmp_path / "c.pth", model={"w": torch.ones(1)}, model_ema={"w": torch.ones(1)}), "w")


def test_official_kl16_drops_training_tensors(tmp_path: Path) -> None:
    kl16 = {name: torch.randn(2, 2).half() for name in ("encoder.conv_in.weight", "decoder.conv_in.weight")}
    kl16["quant_conv.weight"] = torch.randn(3)
    others = {"loss.logvar": torch.ones(1), "discriminator.main.0.weight": torch.ones(1), "counter": 3}
    read = read_kl16(write(tmp_path / "kl16.ckpt", model={**kl16, **others}, epoch=3))
    assert {name: tensor.dtype for name, tensor in read.items()} == dict.fromkeys(kl16, torch.float32)
    assert all(torch.equal(read[name], tensor.float()) for name, tensor in kl16.items())
    with pytest.raises(CheckpointError, match=r"holds \d+ tensors under `model` \(fake_latent, .*: a MAR;"):
        read_kl16(write(tmp_path / "c.pth", model=RAW))


def reference_optimizer(parameters: Mapping[str, Tensor]) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    """AdamW as the reference groups it."""
    named = {name: nn.Parameter(tensor.clone()) for name, tensor in parameters.items()}
    undecayed = {n for n, p in named.items() if p.ndim == 1 or n.endswith(".bias") or "diffloss" in n}
    groups = [
        {"params": [p for n, p in named.items() if n in undecayed], "weight_decay": 0.0},
        {"params": [p for n, p in named.items() if n not in undecayed], "weight_decay": 0.02},
    ]
    return named, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def test_official_training_state_is_continued(tmp_path: Path) -> None:
    named, optimizer = reference_optimizer(RAW)
    for _ in range(2):
        for name, parameter in named.items():
            generator = torch.Generator().manual_seed(len(name))
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    path = write(
        tmp_path / "c.pth", model=RAW, model_ema=EMA, optimizer=optimizer.state_dict(), epoch=12, scaler={}, args=ARGS
    )
    read = read_mar(path, num_heads=2)
    assert read.epoch == 12
    assert read.optimizer is not None
    assert set(read.optimizer) == set(read.state)
    for key in ("exp_avg", "exp_avg_sq"):
        expected = from_official({name: optimizer.state[parameter][key] for name, parameter in named.items()})
        for name, tensor in expected.items():
            assert torch.equal(read.optimizer[name][key], tensor), name
            assert read.optimizer[name][key].shape == read.state[name].shape
    assert {float(entry["step"]) for entry in read.optimizer.values()} == {2.0}


def test_official_parameters_without_gradient_have_no_moments() -> None:
    named, optimizer = reference_optimizer(RAW)
    named["mask_token"].grad = torch.ones_like(named["mask_token"])
    optimizer.step()
    assert set(convert_optimizer(optimizer.state_dict(), RAW)) == {"mask_token"}


def test_official_other_optimizer_is_refused(tmp_path: Path) -> None:
    named, optimizer = reference_optimizer(RAW)
    stored = optimizer.state_dict()
    stored["state"] = {0: {"step": 1, "exp_avg": torch.ones(77), "exp_avg_sq": torch.ones(77)}}
    with pytest.raises(CheckpointError, match=r"its optimizer has \(77,\) where z_proj\.bias is \(8,\)"):
        read_mar(write(tmp_path / "c.pth", model=RAW, model_ema=EMA, optimizer=stored), num_heads=2, patch_size=2)
    sgd = torch.optim.SGD(list(named.values())[:3])
    with pytest.raises(ValueError, match="its optimizer is not the reference's AdamW"):
        convert_optimizer(sgd.state_dict(), RAW)


def test_official_export_round_trip_is_exact(tmp_path: Path) -> None:
    read = read_mar(write(tmp_path / "c.pth", model=RAW, model_ema=EMA, args=ARGS), num_heads=2)
    assert read.raw is not None
    write_mar(tmp_path / "back.pth", read.model_config, read.raw, read.state)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == ["model", "model_ema"]
    for key, expected in (("model", RAW), ("model_ema", EMA)):
        assert list(back[key]) == list(expected)
        assert all(torch.equal(back[key][name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ModelConfig(classes=0), "unconditional models"),
        (ModelConfig(grid=(8, 16)), "rectangular grids"),
        (ModelConfig(head=HeadConfig(prediction="v")), "prediction of v"),
        (ModelConfig(head=HeadConfig(path="linear")), "a linear path to noise"),
        (ModelConfig(head=HeadConfig(diffusion_steps=500)), "schedule of 500 steps"),
    ],
)
def test_official_export_of_unsupported_settings_is_refused(tmp_path: Path, config: ModelConfig, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"the reference has no {reason}"):
        write_mar(tmp_path / "c.pth", config, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_official_export_of_another_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_ema does not fit its config: class_embed.weight is missing; "):
        write_mar(tmp_path / "c.pth", TINY, from_official(RAW), {})
    assert list(tmp_path.iterdir()) == []


def test_official_export_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"can't write .*c\.pth \(.* needed\)"):
            write_mar(tmp_path / "c.pth", TINY, from_official(RAW), from_official(EMA))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# ---- eMIGM: null class and mask token are one tensor, stored twice


def tied_state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return to_official(MAR(TIED).state_dict(), tied=True)


TIED = replace(TINY, tie_null=True, mask_schedule="exp")


def test_tied_file_takes_the_mask_token_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ema = tied_state(1)
    ema["fake_latent"] = torch.full_like(ema["fake_latent"], 0.1)
    others = {"epoch": 7, "scaler": {"scale": 65536.0, "growth_tracker": 3}}
    path = write(tmp_path / "eMIGM.pth", model=tied_state(0), model_ema=ema, args=ARGS, optimizer=None, **others)
    read = read_mar(path, num_heads=2)
    assert read.model_config == TIED
    assert "stored with two values; took mask_token's" in caplog.text
    assert torch.equal(read.state["mask_token"], ema["mask_token"][0])
    assert "null_class" not in read.state
    MAR(read.model_config).load_state_dict(read.state)

    # and back, in the layout it came from
    assert read.raw is not None
    write_mar(tmp_path / "back.pth", read.model_config, read.raw, read.state)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    expected = {**ema, "fake_latent": ema["mask_token"]}
    assert list(back["model_ema"]) == list(ema)
    assert all(torch.equal(back["model_ema"][name], expected[name]) for name in expected)
    assert all(torch.equal(back["model"][name], tensor) for name, tensor in tied_state(0).items())


def test_tied_file_with_ema_alone_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read = read_mar(write(tmp_path / "c.pth", model_ema=tied_state(1), args=ARGS), num_heads=2)
    assert "two values" not in caplog.text
    assert read.raw is None


def test_tied_optimizer_has_the_shared_vector_once(tmp_path: Path) -> None:
    state = tied_state(0)
    named = {n: nn.Parameter(t) for n, t in state.items() if n != "mask_token"}
    still = [p for n, p in named.items() if p.ndim == 1 or n.endswith(".bias") or "diffloss" in n]
    decayed = [p for p in named.values() if not any(p is other for other in still)]
    optimizer = torch.optim.AdamW([{"params": still, "weight_decay": 0.0}, {"params": decayed}])
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    path = write(tmp_path / "c.pth", model=state, model_ema=state, args=ARGS, optimizer=optimizer.state_dict())
    moments = read_mar(path, num_heads=2).optimizer
    assert moments is not None
    assert moments.keys() == dict(MAR(TIED).named_parameters()).keys()
    expected = optimizer.state[named["fake_latent"]]["exp_avg"][0]
    assert torch.equal(moments["mask_token"]["exp_avg"], expected)


def flat(path: Path) -> dict[str, bytes]:
    """The tensors of a file of torch.save, as bytes."""
    return {name: tensor.numpy().tobytes() for name, tensor in read_torch(path).items()}


def test_official_flipped_bit_is_refused_or_means_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pth"
    torch.save({name: torch.randn(40, 5) for name in "abc"}, path)
    whole, expected = path.read_bytes(), flat(path)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(8 * len(whole), (200,), generator=generator).tolist():
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            read = flat(path)
        except CheckpointError:
            refused += 1
        else:
            assert read == expected, place
    assert refused > 120
    data = bytearray(whole)
    data[whole.index(expected["b"]) + 3] ^= 64
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"m\.pth is damaged \(Bad CRC-32 for file 'm/data/1'\); copy"):
        read_torch(path)
    monkeypatch.setenv("MAR_CHECKSUMS", "off")
    assert flat(path) != expected


def rewritten(path: Path, change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The same zip with other records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change.get(name.split("/", 1)[1], content))
    return path


def test_official_short_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save({"a": torch.zeros(10_000), "b": torch.ones(3).bfloat16()}, path)
    with pytest.raises(CheckpointError, match="its record 0 is 4 bytes long, but a tensor of 40,000 bytes is in it"):
        read_torch(rewritten(path, {"data/0": b"1234"}))
    torch.save({"a": torch.zeros(10_000)}, path)
    with pytest.raises(CheckpointError, match="its records are compressed"):
        read_torch(rewritten(path, {}, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xe4\x0bT\x02\x85R.", "wants to run builtins.bytearray"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "it numbers 2,147,483,647 objects in"),
        (b"\x80\x02}", "damaged"),
        (b"(" * 100_000 + b".", "damaged"),
        (b"", "damaged"),
    ],
)
def test_official_pickle_that_takes_all_memory_is_refused(tmp_path: Path, pickled: bytes, message: str) -> None:
    path = tmp_path / "m.pth"
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=message) as said:
        read_torch(rewritten(path, {"data.pkl": pickled}))
    assert "\n" not in str(said.value)
