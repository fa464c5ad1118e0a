"""l-DeTok's tokenizer: the authors' tensors give the authors' moments, latents and pictures."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mar import zoo
from mar.checkpoint.files import CheckpointError
from mar.checkpoint.official_vit import load_vit, read_statistics, vit_from_state, vit_state
from mar.tokenizer import build, vit
from mar.tokenizer.base import unscaled_moments
from mar.tokenizer.vit import ViTConfig, ViTTokenizer, rope_angles
from tests.parity.support import GOLDEN, drawn_state, golden, meta, relative

BOUND = 1e-5
BB: dict[str, Any] = json.loads((GOLDEN / "family_keys.json").read_text("utf-8"))["models"]["detok_tokenizer_BB"]


def with_statistics(tokenizer: ViTTokenizer, name: str) -> ViTTokenizer:
    mean, std = (golden("detok_vit")[f"{name}/stats_{kind}"][: tokenizer.channels] for kind in ("mean", "std"))
    tokenizer.set_statistics(mean, std)
    return tokenizer


@pytest.fixture(scope="module")
def tiny() -> ViTTokenizer:
    header = meta("detok_vit")["tiny"]
    heads = header["sizes"]["heads"], header["decoder_sizes"]["heads"]
    return with_statistics(vit_from_state(drawn_state(header["keys"]), heads), "tiny")


@pytest.fixture(scope="module")
def full() -> ViTTokenizer:
    return with_statistics(vit_from_state(drawn_state(BB["tensors"])), "BB")


def raw_moments(tokenizer: ViTTokenizer, images: Tensor) -> Tensor:
    """Moments as the authors lay them out: (n, tokens, 2C), before the clamp of the log-variance."""
    return tokenizer.encoder(images)


def test_vit_rope_matches_the_reference() -> None:
    angles = rope_angles(4, 32)
    ours = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    assert relative(ours, golden("detok_vit")["tiny/rope_cos_sin"]) <= BOUND


def test_vit_tiny_encoding_matches_the_reference(tiny: ViTTokenizer) -> None:
    expected = golden("detok_vit")
    assert relative(raw_moments(tiny, expected["tiny/image"]), expected["tiny/moments"]) <= BOUND
    posterior = tiny.encode(expected["tiny/image"])
    assert relative(posterior.mean, expected["tiny/tokens"]) <= BOUND
    logvar = expected["tiny/moments"].transpose(1, 2)[:, 16:].unflatten(2, (4, 4))
    std = torch.exp(0.5 * logvar) / tiny.std.view(-1, 1, 1)
    assert relative(posterior.std, std) <= BOUND


def test_vit_tiny_decoding_matches_the_reference(tiny: ViTTokenizer) -> None:
    expected = golden("detok_vit")
    image = tiny.decode(expected["tiny/latents"])
    assert relative(image, expected["tiny/decoded"].clamp(-1, 1)) <= BOUND
    assert relative(image[:1] / 2 + 0.5, expected["tiny/picture_first"]) <= BOUND
    raw = tiny.denormalize(expected["tiny/latents"]).flatten(2).transpose(1, 2)
    assert relative(tiny.decoder(raw), expected["tiny/decoded"]) <= BOUND
    mean = expected["tiny/moments"][..., :16]
    assert relative(tiny.decoder(mean), expected["tiny/decoded_of_mean"]) <= BOUND
    rebuilt = tiny.decode(tiny.encode(expected["tiny/image"]).mean)
    assert relative(rebuilt[:1] / 2 + 0.5, expected["tiny/reconstruction_first"]) <= BOUND


def test_vit_full_size_encoding_matches_the_reference(full: ViTTokenizer) -> None:
    expected = golden("detok_vit")
    image = expected["BB/image_16"].repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert relative(raw_moments(full, image), expected["BB/moments"]) <= BOUND


@pytest.mark.parametrize("name", ["decoded", "decoded_of_mean"])
def test_vit_full_size_decoding_matches_the_reference(full: ViTTokenizer, name: str) -> None:
    expected = golden("detok_vit")
    raw = full.denormalize(expected["BB/latents"]).flatten(2).transpose(1, 2)
    image = full.decoder(raw if name == "decoded" else expected["BB/moments"][..., :16])
    assert relative(image[:, :, 100:132, 60:92], expected[f"BB/{name}_slice"]) <= BOUND
    assert relative(image.norm(dim=-1), expected[f"BB/{name}_row_norms"]) <= BOUND


@pytest.mark.parametrize("case", ["guided", "plain"])
def test_vit_of_the_sampling_case_decodes_its_latents(case: str) -> None:
    header, expected = meta("detok_mar_tiny")["tokenizer"], golden("detok_mar_tiny")
    heads = header["encoder_size"]["heads"], header["decoder_size"]["heads"]
    tokenizer = vit_from_state(drawn_state(header["keys"]), heads)
    tokenizer.set_statistics(expected["tokenizer/stats_mean"][:4], expected["tokenizer/stats_std"][:4])
    latents = expected[f"{case}/latents"]
    assert relative(tokenizer.decode(latents), expected[f"{case}/decoded"].clamp(-1, 1)) <= BOUND
    assert relative(tokenizer.decode(latents[:1]) / 2 + 0.5, expected[f"{case}/picture_first"]) <= BOUND


def test_vit_all_257_tensors_convert_both_ways(full: ViTTokenizer) -> None:
    official = drawn_state(BB["tensors"])
    assert full.vit == ViTConfig()
    assert len(official) == 257
    assert sum(t.numel() for t in official.values()) == BB["parameters"] == 171_712_628
    back = vit_state(full)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in official)


def test_vit_from_config_and_state_is_equal(tiny: ViTTokenizer) -> None:
    again = build(json.loads(json.dumps(tiny.config())))
    again.load_state_dict(tiny.state_dict())
    latents = golden("detok_vit")["tiny/latents"]
    assert torch.equal(again.decode(latents), tiny.decode(latents))
    assert again.to(torch.bfloat16).state_dict()["decoder.conv_out.weight"].dtype is torch.float32


def test_vit_slices_of_a_batch_are_equal_to_it(tiny: ViTTokenizer) -> None:
    images = golden("detok_vit")["tiny/image"]
    whole = unscaled_moments(tiny, images)
    parts = [unscaled_moments(tiny, part).mean for part in images.split(1)]
    assert relative(torch.cat(parts), whole.mean) <= BOUND


def test_vit_encodes_and_decodes_a_slice_at_a_time(tiny: ViTTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    images = golden("detok_vit")["tiny/image"].repeat(3, 1, 1, 1)[:5]
    whole = tiny.encode(images)
    pictures = tiny.decode(whole.mean)
    monkeypatch.setattr(vit, "VIT_SLICE", 2)
    seen: list[tuple[str, int]] = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, __, name=name: seen.append((name, len(inputs[0]))))
        for name, module in (("encoder", tiny.encoder), ("decoder", tiny.decoder))
    ]
    sliced = tiny.encode(images)
    assert relative(sliced.mean, whole.mean) <= BOUND
    assert relative(sliced.std, whole.std) <= BOUND
    assert relative(tiny.decode(whole.mean), pictures) <= BOUND
    for hook in hooks:
        hook.remove()
    assert seen == [(name, count) for name in ("encoder", "decoder") for count in (2, 2, 1)]


def test_vit_no_images_are_no_latents(tiny: ViTTokenizer) -> None:
    assert tiny.encode(torch.zeros(0, 3, 64, 64)).mean.shape == (0, 16, 4, 4)
    assert tiny.decode(torch.zeros(0, 16, 4, 4)).shape == (0, 3, 64, 64)


def test_vit_other_sizes_are_refused(tiny: ViTTokenizer) -> None:
    with pytest.raises(ValueError, match="got 32x64 pixels, expected 64x64"):
        tiny.encode(torch.zeros(1, 3, 32, 64))
    with pytest.raises(ValueError, match="this tokenizer knows one size, 64 pixels"):
        tiny.decode(torch.zeros(1, 16, 2, 4))


# ---- files


def test_read_statistics_of_gpu_tensors_come_to_the_cpu() -> None:
    mean, std = read_statistics(GOLDEN / "detok_stats.pkl")
    expected = load_file(GOLDEN / "detok_vit.safetensors")
    channels = len(expected["stats_file/mean"])
    assert mean.device.type == "cpu"
    assert torch.equal(mean[:channels], expected["stats_file/mean"])
    assert torch.equal(std[:channels], expected["stats_file/std"])


def published_file(path: Path) -> dict[str, Tensor]:
    """A tokenizer's file as its training leaves it; returns the EMA."""
    torch.manual_seed(5)
    # width 512, so that the heads are known
    config = {"image_size": 32, "patch_size": 16, "channels": 4}
    size = {"width": 512, "depth": 1, "heads": 8}
    tokenizer = ViTTokenizer(ViTConfig.from_dict({**config, "encoder": size, "decoder": size}))
    ema = vit_state(tokenizer)
    extra = {"loss_module.discriminator.0.weight": torch.zeros(2)}
    raw = {name: tensor + 1 for name, tensor in ema.items()}
    torch.save({"model": {**raw, **extra}, "model_ema": {**ema, **extra}, "epoch": 3, "loss_scaler": {}}, path)
    return ema


def statistics_file(path: Path, channels: int, key: str = "detok-BB-gamm3.0-m0.7") -> None:
    one = torch.ones(2 * channels)
    values = {"single": (one[:1], one[:1]), "channel": (0.5 * one, 2 * one)}
    path.write_bytes(pickle.dumps({key: values, "other": values}))


def test_load_vit_file_of_training_takes_the_ema_and_the_statistics_beside_it(tmp_path: Path) -> None:
    ema = published_file(tmp_path / "detok.pth")
    assert not load_vit(tmp_path / "detok.pth").has_stats
    statistics_file(tmp_path / "stats.pkl", 4)
    tokenizer = zoo.load_tokenizer(str(tmp_path / "detok.pth"))
    assert isinstance(tokenizer, ViTTokenizer)
    assert all(torch.equal(t, ema[name]) for name, t in vit_state(tokenizer).items())
    assert (tokenizer.mean.tolist(), tokenizer.std.tolist()) == ([0.5] * 4, [2.0] * 4)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran-the-code"),))


@pytest.mark.parametrize("inside", [False, True])
def test_read_statistics_with_code_in_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "stats.pkl"
    if inside:  # in the bytes of a storage, which torch itself would unpickle
        code = pickle.dumps(_Code(), protocol=2)

        class Storage:
            def __reduce__(self) -> tuple[Any, ...]:
                return (torch.storage._load_from_bytes, (code,))

        path.write_bytes(pickle.dumps({"k": Storage()}))
    else:
        path.write_bytes(pickle.dumps({"k": _Code()}))
    with pytest.raises(CheckpointError, match="refused") as caught:
        read_statistics(path)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("ran-the-code").exists()


def test_load_vit_statistics_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    published_file(tmp_path / "detok.pth")
    statistics_file(tmp_path / "stats.pkl", 16)
    with pytest.raises(CheckpointError, match=r"got statistics of 32 values, expected 8, twice the channels"):
        load_vit(tmp_path / "detok.pth")
    statistics_file(tmp_path / "stats.pkl", 4, key="another")
    with pytest.raises(CheckpointError, match=r"got statistics of another, other, expected those of detok-BB"):
        load_vit(tmp_path / "detok.pth")


def test_load_vit_half_a_checkpoint_is_refused(tmp_path: Path) -> None:
    ema = published_file(tmp_path / "detok.pth")
    half = {name: tensor for name, tensor in ema.items() if name.startswith("encoder.")}
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=r"is not a whole l-DeTok tokenizer: it has no decoder\."):
        load_vit(tmp_path / "half.pth")
    torch.save({name: t for name, t in ema.items() if not name.endswith("w3.bias")}, tmp_path / "gap.pth")
    with pytest.raises(CheckpointError, match="Missing key"):
        load_vit(tmp_path / "gap.pth")
