"""The records of published models agree with the code, with each other, and with the authors' names."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mar.assets import asset
from mar.checkpoint.store import model_shapes
from mar.config import ModelConfig
from mar.nn import init_empty_weights
from mar.published import (
    BUNDLED,
    FAMILIES,
    PUBLISHED,
    TOKENIZERS,
    files_of,
    names_in_repository,
    same_tensors,
    tokenizer_of,
)
from mar.tokenizer import TOKENIZERS as KINDS
from mar.zoo import describe


def count(config: ModelConfig) -> int:
    return sum(shape.numel() for shape in model_shapes(config).values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_has_its_parameters_and_settings(name: str) -> None:
    model = PUBLISHED[name]
    assert count(model.config) == model.parameters
    assert model.config.channels == TOKENIZERS[model.tokenizer].channels
    assert model.pixels == (512 if name.endswith("-512") else 256)
    assert model.figures[0].fid < model.figures[1].fid or model.family == "emigm"
    for figures in model.figures:
        figures.sampling.check(model.config)
    assert model.summary().endswith(f"{model.figures[0].fid:.2f}")


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_model_is_as_its_record_says(name: str) -> None:
    header = describe(asset(f"{name}.safetensors"))
    assert count(header.model) == BUNDLED[name].parameters
    assert header.model.grid[0] * header.tokenizer.get("stride", 1) == BUNDLED[name].pixels


def test_published_tokenizers_have_their_parameters_channels_and_strides() -> None:
    from diffusers import AutoencoderDC

    from mar.tokenizer.dc import DC_AE_CONFIG, DCTokenizer
    from mar.tokenizer.kl import kl16
    from mar.tokenizer.vit import ViTConfig, ViTTokenizer

    with init_empty_weights():
        built = {
            "kl16": kl16(),
            "dc-ae": DCTokenizer(AutoencoderDC(**DC_AE_CONFIG)),
            "detok": ViTTokenizer(ViTConfig()),
        }
    assert built.keys() == TOKENIZERS.keys()
    for name, tokenizer in built.items():
        record = TOKENIZERS[name]
        assert isinstance(tokenizer, KINDS[record.kind].load())
        assert (tokenizer.channels, tokenizer.stride) == (record.channels, record.stride)
        own = [*tokenizer.parameters()]
        assert sum(p.numel() for p in own) == record.parameters
    assert TOKENIZERS["dc-ae"].scale == DC_AE_CONFIG["scaling_factor"]


def test_published_patterns_of_the_hub_tell_the_models_apart() -> None:
    names = [f"eMIGM_{size}_{pixels}_checkpoint.pth" for size in ("xsmall", "small", "base", "large", "huge")
             for pixels in (256, 512)]  # fmt: skip
    emigm = [file for name in PUBLISHED for file in files_of(name) if file.pattern]
    assert len(emigm) == 9
    for file in emigm:
        [own] = [name for name in names if re.fullmatch(file.pattern or "", name)]
        assert file.sources == (f"hf://GSAI-ML/eMIGM/{own}",)


def test_published_records_are_looked_up() -> None:
    assert names_in_repository("jjiaweiyang/l-DeTok") == ["detok-base", "detok-large", "detok"]
    assert names_in_repository("jadechoghari/mar") == ["mar-base", "kl16"]
    assert names_in_repository("mit-han-lab/dc-ae-f32c32-in-1.0") == ["dc-ae"]
    assert names_in_repository("own/er") == []
    small = PUBLISHED["emigm-xs-512"].config
    assert tokenizer_of(replace(small, classes=7), "emigm") == "dc-ae"
    assert tokenizer_of(replace(small, channels=16), "emigm") == "kl16"
    assert tokenizer_of(replace(small, channels=3), "detok") == "detok"
    assert (same_tensors("mar"), same_tensors("emigm")) == (["detok"], [])


def test_published_hashes_and_sizes_come_together() -> None:
    files = [file for name in (*PUBLISHED, *TOKENIZERS) for file in files_of(name)]
    assert {file.name for file in files if file.sha256} == {"mar-base.pth", "kl16.ckpt"}
    for file in files:
        assert (file.sha256 is None) == (file.size is None)
        assert file.sha256 is None or len(file.sha256) == 64
    assert set(FAMILIES) == {model.family for model in PUBLISHED.values()}
