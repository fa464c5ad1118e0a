"""Wrapped names are read as the clean ones; foreign files are described, and what is ambiguous is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_config, tiny_pipeline
from torch import Tensor

from mar import zoo
from mar.checkpoint import store
from mar.checkpoint.contents import READABLE, foreign, kind_of, unwrap, unwrap_name
from mar.checkpoint.files import CheckpointError
from mar.checkpoint.official import read_mar, to_official
from mar.checkpoint.official_kl16 import read_kl16
from mar.checkpoint.official_vit import PATCH_EMBED, read_vit
from mar.checkpoint.tokenizers import load_tokenizer, save_tokenizer
from mar.config import HeadConfig, ModelConfig, TrunkConfig
from mar.model.mar import MAR
from mar.pipeline import Pipeline
from mar.tokenizer import PixelTokenizer

WRAPPERS: dict[str, Callable[[str], str]] = {
    "ddp": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled in ddp": lambda name: f"module._orig_mod.{name}",
    "ddp in compiled": lambda name: f"_orig_mod.module.{name}",
    "twice": lambda name: f"module.module._orig_mod.{name}",
    "inside": lambda name: name.replace(".", "._orig_mod.", 1),
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}".replace(".0.", ".0._checkpoint_wrapped_module."),
    "shared beginning": lambda name: f"net.{name}",
}
HEAD = HeadConfig(width=16, depth=1)
CONFIG = ModelConfig(
    channels=3,
    grid=(4, 4),
    encoder=TrunkConfig(16, 1, 2),
    decoder=TrunkConfig(16, 1, 2),
    head=HEAD,
    buffer_size=3,
    classes=4,
)


def official(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: tensor.detach().clone() for name, tensor in to_official(MAR(CONFIG).state_dict()).items()}


RAW, EMA = official(1), official(2)
KL16 = {
    f"{name}.weight": torch.randn(2, 2)
    for name in ("encoder.conv_in", "decoder.conv_in", "quant_conv", "encoder.down.0.block.0.norm1", "loss.logvar")
}
VIT = {name: torch.randn(2, 2) for name in (PATCH_EMBED, "encoder.transformer.0.w", "decoder.decoder_embed.weight")}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def save(path: Path, holder: Any) -> Path:
    torch.save(holder, path)
    return path


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_read_mar_wrapped_names_are_the_clean_ones(wrap: Callable[[str], str], tmp_path: Path) -> None:
    raw, ema = ({wrap(name): tensor for name, tensor in state.items()} for state in (RAW, EMA))
    clean = read_mar(save(tmp_path / "clean.pth", {"model": RAW, "model_ema": EMA}), num_heads=2)
    for holder in ({"model": raw, "model_ema": ema}, {"model": RAW, "model_ema": ema}):
        read = read_mar(save(tmp_path / "c.pth", holder), num_heads=2)
        assert read.weights == "ema"
        assert equal(read.state, clean.state)
        assert read.raw is not None
        assert clean.raw is not None
        assert equal(read.raw, clean.raw)
        assert read.model_config == clean.model_config


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_read_mar_bare_state_dicts_are_of_unknown_kind(wrap: Callable[[str], str], tmp_path: Path) -> None:
    clean = read_mar(save(tmp_path / "clean.pth", {"model": RAW, "model_ema": EMA}), num_heads=2).state
    bare = {wrap(name): tensor for name, tensor in EMA.items()}
    save_file(bare, tmp_path / "flat.safetensors")
    (tmp_path / "misnamed.pth").write_bytes((tmp_path / "flat.safetensors").read_bytes())
    save(tmp_path / "bare.bin", bare)
    save(tmp_path / "nested.pth", {"state_dict": bare, "epoch": 3})
    for name in ("flat.safetensors", "misnamed.pth", "bare.bin", "nested.pth"):
        read = read_mar(tmp_path / name, num_heads=2)
        assert read.weights == "unknown", name
        assert equal(read.state, clean), name


def test_read_mar_ambiguous_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"c\.pth: it holds .* under 'net' and 'net_ema'; keep one of them"):
        read_mar(save(tmp_path / "c.pth", {"net": RAW, "net_ema": EMA}), num_heads=2)
    both = {**RAW, "module.mask_token": RAW["mask_token"]}
    with pytest.raises(CheckpointError, match=r"mask_token and module\.mask_token are both the tensor mask_token"):
        read_mar(save(tmp_path / "c.pth", {"model_ema": both}), num_heads=2)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_read_tokenizers_wrapped_names_are_the_clean_ones(wrap: Callable[[str], str], tmp_path: Path) -> None:
    for clean, read in ((KL16, read_kl16), (VIT, read_vit)):
        expected = read(save(tmp_path / "clean.pth", {"model": clean}))
        wrapped = {wrap(name): tensor for name, tensor in clean.items()}
        save_file(wrapped, tmp_path / "flat.safetensors")
        for path in (
            save(tmp_path / "a.pth", {"model": wrapped}),
            save(tmp_path / "b.pth", wrapped),
            save(tmp_path / "c.pth", {"state_dict": wrapped}),
            tmp_path / "flat.safetensors",
        ):
            assert equal(read(path), expected), path.name
    assert equal(read_vit(save(tmp_path / "d.pth", {"model": KL16, "model_ema": VIT})), read_vit(tmp_path / "b.pth"))


def test_load_own_tokenizer_wrapped_names_are_the_clean_ones(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tokenizer = PixelTokenizer(1, 0.25, 0.5)
    save_tokenizer(tokenizer, tmp_path)
    weights = tmp_path / "tokenizer.safetensors"
    save_file({f"module._orig_mod.{name}": t for name, t in load_file(weights).items()}, weights)
    assert equal(load_tokenizer(tmp_path).state_dict(), tokenizer.state_dict())


def test_pipeline_of_a_compiled_model_is_saved_clean(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.save(tmp_path / "clean.safetensors")
    header, tensors = store.load(tmp_path / "clean.safetensors")
    wrapped = {name.replace("model.", "model._orig_mod.module.", 1): t for name, t in tensors.items()}
    store.save(tmp_path / "wrapped.safetensors", header, wrapped)
    assert (tmp_path / "wrapped.safetensors").read_bytes() == (tmp_path / "clean.safetensors").read_bytes()
    assert Pipeline.open(tmp_path / "wrapped.safetensors").model.config == tiny_config(channels=1)


def test_unwrap_removes_wrappers_alone() -> None:
    assert unwrap_name("module.blocks.0._orig_mod.module.weight") == "blocks.0.weight"
    assert unwrap_name("module") == "module"
    assert unwrap_name("submodule.module_list.weight") == "submodule.module_list.weight"
    assert unwrap({"module.a": 1, "b": 2}) == {"a": 1, "b": 2}


FOREIGN: dict[str, tuple[list[str], str | None]] = {
    "unet": (["input_blocks.0.0.weight", "middle_block.0.weight", "output_blocks.0.0.weight"], "the UNet of a latent"),
    "sdxl": (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"], "a whole"),
    "diffusers_unet": (
        ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "mid_block.attentions.0.norm.weight",
         "up_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"],
        "a UNet of diffusers",
    ),
    "lora": (["lora_unet_down_blocks_0.lora_up.weight", "lora_unet_down_blocks_0.lora_down.weight"], "a LoRA"),
    "peft": (["base_model.model.layers.0.q_proj.lora_A.weight"], "a LoRA"),
    "clip": (["text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"], "a text encoder"),
    "llama": (
        ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"],
        "a language model as Llama",
    ),
    "vae": (
        ["encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight", "quant_conv.weight",
         "decoder.up_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"],
        "an autoencoder of diffusers: give its folder",
    ),
    "dit": (["x_embedder.proj.weight", "t_embedder.mlp.0.weight", "blocks.0.adaLN_modulation.1.weight"], "a DiT"),
    "flux": (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "a FLUX transformer"),
    "unknown": (["layer1.weight", "layer2.weight", "layer3.weight", "layer4.weight"], None),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_one_line_wherever_they_are_given(name: str, tmp_path: Path) -> None:
    names, kind = FOREIGN[name]
    tensors = {each: torch.zeros(2, 2) for each in names}
    for path in (tmp_path / "f.safetensors", tmp_path / "f.pth", tmp_path / "f.bin"):
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
        said = set()
        for use in (zoo.load, zoo.load_tokenizer, zoo.describe, zoo.import_official):
            with pytest.raises(CheckpointError) as refused:
                use(path if use in (zoo.describe, zoo.import_official) else str(path))
            said.add(str(refused.value))
        [line] = said
        assert line.startswith(f"{path} holds {len(names)} tensor")
        assert line.endswith(READABLE)
        assert ("): " + kind in line) if kind else ("): " not in line)


def test_foreign_dicts_are_described(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    described = {
        "holds the state of an optimizer, and no weights": optimizer,
        "holds no tensors; ": {},
        "holds no tensors, but epoch, note; ": {"epoch": 3, "note": "x"},
        "holds 1 tensor under `net`, and epoch (layer.weight); ": {"net": {"layer.weight": torch.zeros(1)}, "epoch": 3},
    }
    for words, holder in described.items():
        path = save(tmp_path / "f.pth", holder)
        for use in (zoo.load, zoo.load_tokenizer):
            with pytest.raises(CheckpointError) as refused:
                use(str(path))
            assert str(refused.value).startswith(f"{path} {words}"), refused.value
    (tmp_path / "empty.pth").touch()
    (tmp_path / "empty.safetensors").touch()
    for path in (tmp_path / "empty.pth", tmp_path / "empty.safetensors"):
        for use in (zoo.load, zoo.load_tokenizer):
            with pytest.raises(CheckpointError, match="is empty: the copy or download of it failed; get it again"):
                use(str(path))


def test_kinds_are_named_only_where_they_are_certain() -> None:
    assert kind_of(["encoder.conv_in.weight"]) is None
    assert kind_of(["module.encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffloss.net.x"]) == "a MAR"
    long = foreign(Path("f"), {"x" * 300: torch.zeros(1)})
    assert len(str(long)) < 300


def test_describe_reads_official_checkpoints(tmp_path: Path) -> None:
    wide = ModelConfig(
        channels=3, grid=(4, 4), encoder=TrunkConfig(448, 1, 8), decoder=TrunkConfig(448, 1, 8), head=HEAD, classes=4
    )
    tensors = to_official(MAR(wide).state_dict())
    header = zoo.describe(save(tmp_path / "c.pth", {"model": tensors, "model_ema": tensors}))
    assert (header.model.encoder, header.weights) == (wide.encoder, "ema")
    header = zoo.describe(save(tmp_path / "c.pth", {"model": tensors}))
    assert header.weights == "raw"
