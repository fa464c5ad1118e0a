"""DC-AE from its weights alone: diffusers' names and its authors', with and without a config beside."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import published_files
import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import save_file
from torch import Tensor

from mar import zoo
from mar.checkpoint.files import CheckpointError
from mar.checkpoint.official_dc import is_dc, load_dc
from mar.tokenizer import PixelTokenizer, dc
from mar.tokenizer.dc import DCTokenizer

AUTHORS = [
    (r"encoder\.conv_in\.conv\.", "encoder.project_in.main.conv.conv."),
    (r"encoder\.conv_out\.", "encoder.project_out.main.op_list.0.conv."),
    (r"encoder\.down_blocks\.(\d+)\.(\d+)\.", r"encoder.stages.\1.op_list.\2."),
    (r"decoder\.conv_in\.", "decoder.project_in.main.conv."),
    (r"decoder\.norm_out\.", "decoder.project_out.op_list.0."),
    (r"decoder\.conv_out\.conv\.", "decoder.project_out.op_list.2.main.conv.conv."),
    (r"decoder\.up_blocks\.(\d+)\.(\d+)\.", r"decoder.stages.\1.op_list.\2."),
    (r"\.attn\.to_out\.", ".context_module.main.proj.conv."),
    (r"\.attn\.norm_out\.", ".context_module.main.proj.norm."),
    (r"\.attn\.to_qkv\.", ".context_module.main.qkv.conv."),
    (r"\.conv_out\.conv_(inverted|depth|point)\.", r".local_module.main.\1_conv.conv."),
    (r"\.conv_out\.norm\.", ".local_module.main.point_conv.norm."),
    (r"(op_list\.\d+)\.conv\.", r"\1.main.conv.conv."),
    (r"(op_list\.\d+)\.conv(\d)\.", r"\1.main.conv\2.conv."),
    (r"(op_list\.\d+)\.norm\.", r"\1.main.conv2.norm."),
]
"""diffusers' names and the authors', in the order of the replacements."""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> AutoencoderDC:
    monkeypatch.setattr(dc, "DC_AE_CONFIG", published_files.DC_CONFIG)
    torch.manual_seed(0)
    return AutoencoderDC(**published_files.DC_CONFIG)


def authors_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors as the authors' code has them: q, k, v in one, matrices as 1x1 convolutions."""
    joined = dict(state)
    for name in state:
        if name.endswith(".to_q.weight"):
            parts = [joined.pop(name.replace("to_q", f"to_{part}")) for part in "qkv"]
            joined[name.replace("to_q", "to_qkv")] = torch.cat(parts)[:, :, None, None]
        if name.endswith(".to_out.weight"):
            joined[name] = state[name][:, :, None, None]
    renamed = {}
    for name, tensor in joined.items():
        for pattern, replacement in AUTHORS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("layout", ["diffusers", "authors"])
def test_dc_weights_alone_are_loaded_with_the_published_scale(
    tiny: AutoencoderDC, tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str
) -> None:
    state = {name: tensor.contiguous() for name, tensor in tiny.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file(state if layout == "diffusers" else authors_layout(state), path)
    with caplog.at_level(logging.WARNING):
        tokenizer = zoo.load_tokenizer(str(path))
    assert "is taken for dc-ae-f32c32-in-1.0, with the scale 0.3189; mix-1.0 has the same tensors" in caplog.text
    assert isinstance(tokenizer, DCTokenizer)
    assert tokenizer.std.tolist() == pytest.approx([1 / 0.3189])
    loaded = tokenizer.autoencoder.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_dc_weights_with_a_config_beside_follow_it(tiny: AutoencoderDC, tmp_path: Path) -> None:
    published_files.dc_files(tmp_path / "one", latent_channels=16, scaling_factor=0.5)
    path = tmp_path / "one/diffusion_pytorch_model.safetensors"
    tokenizer = load_dc(path)
    assert (tokenizer.channels, tokenizer.std.tolist()) == (16, [2.0])
    published_files.dc_files(tmp_path / "two", scaling_factor=1.0)
    path = tmp_path / "two/diffusion_pytorch_model.safetensors"
    assert not load_dc(path).has_stats
    assert load_dc(path, 0.25).std.tolist() == [4.0]  # a published one, whose scale is known


def test_dc_weights_that_do_not_fit_are_one_line(tiny: AutoencoderDC, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = {name: tensor.contiguous() for name, tensor in tiny.state_dict().items()}
    save_file(dict(list(state.items())[:-2]), path)
    with pytest.raises(CheckpointError, match=r"is not the DC-AE of its config: .*Missing") as caught:
        load_dc(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:-10])
    assert not is_dc(path)
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        load_dc(path)


def test_is_dc_other_files_are_none(tmp_path: Path) -> None:
    save_file({"encoder.conv_in.weight": torch.ones(1)}, tmp_path / "kl.safetensors")
    assert not is_dc(tmp_path / "kl.safetensors")
    assert not is_dc(tmp_path / "absent.safetensors")


def test_dc_repository_of_the_authors_layout_leads_to_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str) -> PixelTokenizer:
        asked.append(name)
        return PixelTokenizer(3, 0.0, 1.0)

    monkeypatch.setattr(zoo, "load_diffusers", load)
    zoo.load_tokenizer("mit-han-lab/dc-ae-f32c32-in-1.0")
    assert asked == ["mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"]
