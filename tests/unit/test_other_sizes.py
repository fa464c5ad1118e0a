"""Images of other sizes than the trained one: `at_size`, and `image_size` wherever images are drawn."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sampling_options import sampling_options
from tiny import FAST, TRUNK, tiny_model, tiny_pipeline, tiny_words_pipeline
from torch import Tensor

from mar.cli import main
from mar.config import ConfigError, TrunkConfig
from mar.diffusers_pipeline import MARPipeline
from mar.pipeline import Pipeline
from mar.sampling.generate import generate
from mar.tokenizer import PCATokenizer, PixelTokenizer, Tokenizer
from mar.tokenizer.dc import DCTokenizer
from mar.tokenizer.kl import from_config
from mar.tokenizer.residual import ResidualTokenizer
from mar.tokenizer.vit import ViTConfig, ViTTokenizer

TINY = tiny_pipeline()
PATCHED = tiny_pipeline(patch_size=2, grid=(8, 8))
BOUNDED = replace(FAST, x0_bound=2.0)
PATCHED.sampling = BOUNDED
ROTARY = tiny_pipeline(encoder=replace(TRUNK, rotary=True), decoder=replace(TRUNK, rotary=True))
SHARP: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


def draw(model: Pipeline, labels: list[Any], **options: Any) -> Tensor:
    return model.sample(labels, output="tensor", **options)


# ---- sizes


@pytest.mark.parametrize(("size", "shape"), [(8, (8, 8)), ((4, 8), (4, 8)), ([6, 2], (6, 2)), (np.int64(2), (2, 2))])
def test_sample_at_another_size_has_it(size: Any, shape: tuple[int, int]) -> None:
    images = draw(PATCHED, [0, None], image_size=size)
    assert images.shape == (2, 1, *shape)
    assert images.isfinite().all()
    [first, _] = PATCHED.sample([0, None], image_size=size)
    assert first.size == (shape[1], shape[0])


@pytest.mark.parametrize("model", [TINY, PATCHED, ROTARY])
def test_sample_at_the_trained_size_is_unchanged(model: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert torch.equal(draw(model, [0, 1], image_size=model.image_size), draw(model, [0, 1]))
    assert not caplog.records
    assert model.at_size(model.image_size) is model
    before = draw(model, [0, 1])
    draw(model, [0, 1], image_size=12)
    assert torch.equal(draw(model, [0, 1]), before)


def test_sample_at_another_size_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        draw(TINY, [0, 1, 2], batch=1, image_size=(8, 6))
    [record] = caplog.records
    assert record.getMessage() == (
        "images of 8 x 6 pixels by a model that was trained at 4 x 4: experimental, expect worse ones"
    )


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "got 0x0 pixels .* positive multiples of 2, the side of a token"),
        ((8, -2), "got 8x-2 pixels"),
        ((8, 7), "got 8x7 pixels .* positive multiples of 2"),
        (34, "got 34x34 pixels .* at most 32x32, 4 times the trained size"),
        ((8, 10**9), "at most 32x32"),
        ("8", "expected .height, width. in pixels, or one number"),
        (8.0, "got 8.0, expected"),
        ((8, 8, 8), "expected .height, width. in pixels"),
        ((8, None), "expected .height, width. in pixels"),
    ],
)
def test_at_size_impossible_size_is_one_line(size: Any, message: str) -> None:
    check = Pipeline._check_size  # without the check of types that tests add
    with pytest.raises(ValueError, match=message) as error:
        getattr(check, "__wrapped__", check)(PATCHED, size)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("image_size: got ")


def test_at_size_starts_from_the_trained_model() -> None:
    there = TINY.at_size(12).at_size((8, 6))
    assert torch.equal(draw(there, [1]), draw(TINY, [1], image_size=(8, 6)))
    assert TINY.at_size(12).at_size(4) is TINY


def test_at_size_is_for_drawing_alone(tmp_path: Path) -> None:
    other = TINY.at_size(8)
    with pytest.raises(ConfigError, match="another size can't be saved"):
        other.save(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="another size can't be moved or cast"):
        other.to("cpu")


# ---- drawing


@settings(max_examples=8, deadline=None)
@given(options=sampling_options(), rotary=st.booleans(), size=st.sampled_from([(8, 6), (2, 4), (6, 10)]))
def test_image_at_another_size_does_not_depend_on_the_batch(
    options: dict[str, Any], rotary: bool, size: tuple[int, int]
) -> None:
    model = (ROTARY if rotary else TINY).at_size(size)
    options = {"steps": 5, "diffusion_steps": 6, **options}
    whole = draw(model, [0, None, 2], seeds=[3, 4, 5], **options)
    alone = torch.cat([draw(model, [label], seeds=[seed], **options) for label, seed in ((0, 3), (None, 4), (2, 5))])
    assert torch.allclose(whole, alone, **SHARP)


def test_steps_of_another_size_follow_its_tokens() -> None:
    last = None
    for last in TINY.reveal([0], image_size=8, steps=64, diffusion_steps=1):
        assert last.known.shape == (1, 8, 8)
    assert last is not None
    assert last.steps == 64  # one a token; the trained size has 16
    assert sorted(last.revealed_at.flatten().tolist()) == list(range(1, 65))
    assert last.images[0].size == (8, 8)


def test_presets_of_another_size_follow_its_tokens() -> None:
    model = Pipeline(TINY.model, TINY.tokenizer, sampling=replace(FAST, steps=64, diffusion_steps=100))
    for size, steps in ((4, 7), (16, 28), ((4, 16), 14)):
        assert model.at_size(size).sampling_with("balanced").steps == steps


def test_known_and_mask_at_another_size_keep_the_rest() -> None:
    known = torch.linspace(-1, 1, 2 * 48).view(2, 1, 8, 6)
    mask = torch.zeros(2, 8, 6, dtype=torch.bool)
    mask[0, :, :3], mask[1, 2] = True, True
    images = draw(TINY, [0, 1], known=known, mask=mask, image_size=(8, 6))
    assert torch.allclose(images[~mask.unsqueeze(1)], known[~mask.unsqueeze(1)], atol=1e-6)
    assert not torch.allclose(images[mask.unsqueeze(1)], known[mask.unsqueeze(1)], atol=0.1)
    with pytest.raises(ValueError, match=r"known latents: got shape \(2, 1, 8, 6\), expected \(2, 1, 4, 4\)"):
        draw(TINY, [0, 1], known=known, mask=mask)


def test_painted_pixels_at_another_size_grow_by_a_token() -> None:
    known = [Image.new("L", (12, 16), 90)]
    mask = Image.new("L", (12, 16))
    mask.paste(255, (4, 4, 6, 8))
    [image] = PATCHED.sample([0], known=known, mask=[mask], image_size=(16, 12))
    changed = np.asarray(image) != 90
    assert changed[4:8, 4:6].any()
    assert not changed[np.asarray(mask) == 0].any()
    grown = next(iter(PATCHED.reveal([0], known=known, mask=[mask], image_size=(16, 12), grow=1)))
    assert int((grown.revealed_at > 0).sum()) == 4 * 3  # 2x1 painted tokens and their neighbors
    assert grown.revealed_at.shape == (1, 8, 6)


def test_stream_at_another_size_is_that_of_sample() -> None:
    images = torch.cat(list(TINY.stream([0, 1, 2], batch=2, image_size=(8, 4))))
    assert images.shape == (3, 1, 8, 4)
    expected = [torch.from_numpy(np.array(image)) for image in TINY.sample([0, 1, 2], batch=2, image_size=(8, 4))]
    assert torch.equal(images[:, 0], torch.stack(expected))


def test_threads_draw_sizes_of_one_model_side_by_side() -> None:
    sizes = [4, 8, (8, 4), (4, 12)]
    alone = [draw(ROTARY, [0, 1], image_size=size) for size in sizes]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda size: draw(ROTARY, [0, 1], image_size=size), sizes))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_words_at_another_size_draw_their_prompt() -> None:
    model = tiny_words_pipeline()
    images = model.sample(prompts=["red cat", "dog", None], seeds=[1, 1, 1], output="tensor", image_size=(8, 4))
    assert images.shape == (3, 1, 8, 4)
    assert not torch.equal(images[0], images[1])


def test_wide_model_at_another_size_pads_to_its_own_tokens() -> None:
    wide = TrunkConfig(width=512, depth=1, num_heads=2, mlp_ratio=0.1)
    model = Pipeline(tiny_model(encoder=wide, decoder=wide, channels=1), PixelTokenizer(1, mean=0.0, std=0.5))
    whole = draw(model, [0, 1], image_size=(12, 8), steps=5, diffusion_steps=4)
    alone = torch.cat([draw(model, [i], seeds=[i], image_size=(12, 8), steps=5, diffusion_steps=4) for i in (0, 1)])
    assert torch.allclose(whole, alone, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_rounded_weights_at_another_size_are_near_the_exact_ones(dtype: torch.dtype) -> None:
    exact = draw(tiny_pipeline(), [0, 1], image_size=8)
    rounded = draw(tiny_pipeline().to(dtype=dtype), [0, 1], image_size=8)
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).abs().mean()) < 0.1


# ---- tokenizers

KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8], "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 4,
}  # fmt: skip
DC = {
    "latent_channels": 2, "attention_head_dim": 4, "scaling_factor": 0.5,
    "encoder_block_types": ["ResBlock", "EfficientViTBlock"], "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8],
    "encoder_layers_per_block": [1, 1], "decoder_layers_per_block": [1, 1],
    "encoder_qkv_multiscales": [[], [5]], "decoder_qkv_multiscales": [[], [5]],
}  # fmt: skip


def _tokenizers() -> dict[str, Tokenizer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kl, dc = from_config(KL), DCTokenizer(AutoencoderDC(**DC))
        pca, residual = PCATokenizer(3, 2, 2), ResidualTokenizer(3, 2, 2, width=8, depth=1)
        pictures = torch.rand(8, 3, 8, 8) * 2 - 1
        pca.fit([pictures])
        residual.fit_linear([pictures])
    kl.set_statistics(0.0, 1.0)
    return {"kl": kl, "dc": dc, "pca": pca, "residual": residual}


@pytest.mark.parametrize("kind", ["kl", "dc", "pca", "residual"])
def test_tokenizer_encodes_and_decodes_another_size(kind: str) -> None:
    tokenizer = _tokenizers()[kind].requires_grad_(False)
    model = Pipeline(tiny_model(), tokenizer, sampling=BOUNDED)
    assert model.image_size == (8, 8)
    known = torch.linspace(-1, 1, 3 * 12 * 16).view(1, 3, 12, 16)
    mask = torch.zeros(1, 12, 16, dtype=torch.bool)
    mask[:, :4, :4] = True
    images = draw(model, [0], image_size=(12, 16), known=known, mask=mask)
    assert images.shape == (1, 3, 12, 16)
    assert torch.equal(images[:, :, 4:], known[:, :, 4:])
    with pytest.raises(ValueError, match="positive multiples of 2"):
        draw(model, [0], image_size=(12, 15))


def test_vit_tokenizer_has_one_size() -> None:
    size = {"width": 16, "depth": 1, "heads": 2}
    vit = {"image_size": 8, "patch_size": 2, "channels": 2, "encoder": size, "decoder": size}
    model = Pipeline(tiny_model(), ViTTokenizer(ViTConfig.from_dict(vit), 0.0, 1.0), sampling=FAST)
    with pytest.raises(ValueError, match="expected 8x8: this model's tokenizer knows no other size"):
        model.at_size((16, 8))
    assert model.at_size(8) is model


# ---- diffusers, command line


def test_diffusers_height_and_width_are_the_image_size() -> None:
    pipe = MARPipeline(TINY)
    pipe.set_progress_bar_config(disable=True)
    images = pipe([0, 1], seeds=[0, 1], height=8, width=6, output_type="pt").images
    assert torch.allclose(images * 2 - 1, draw(TINY, [0, 1], image_size=(8, 6)), atol=1e-6)
    assert pipe([0], seeds=[0], width=8, output_type="pt").images.shape == (1, 1, 4, 8)
    assert pipe([0], seeds=[0], height=4, output_type="pt").images.shape == (1, 1, 4, 4)
    with pytest.raises(ValueError, match="got 0x4 pixels"):
        pipe([0], height=0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    TINY.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("words", [["8x6"], ["8X6"], ["8", "6"]])
def test_cli_image_size_is_height_and_width(path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = path.parent / "out"
    assert main(["sample", str(path), "--image-size", *words, "--labels", "bee", "--out", str(out)]) == 0
    with Image.open(out / "bee-00000.png") as image:
        assert image.size == (6, 8)
        facts = json.loads(image.text["mar"])  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(image), np.asarray(TINY.sample(["bee"], image_size=(8, 6))[0]))
    assert facts["image_size"] == [8, 6]
    assert facts["weights"] == TINY.fingerprint()
    capsys.readouterr()


def test_cli_generate_at_another_size_goes_on(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = path.parent / "out.npz"
    command = ["generate", str(path), "--out", str(out), "--count", "3", "--device", "cpu"]
    assert main([*command, "--image-size", "8x6"]) == 0
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (3, 8, 6, 3)
    assert main([*command, "--image-size", "8x6"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(command) == 2  # other settings than those of the file


def help_of(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", ["sample", "generate"])
def test_cli_help_says_the_order_and_that_it_is_experimental(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(help_of(verb, capsys).replace("│", " ").split())
    assert "--image-size HEIGHTxWIDTH" in said
    assert "Experimental: height and width in pixels" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["big"], "got 'big', expected PIXELS or HEIGHTxWIDTH"),
        (["8x8x8"], "got '8x8x8', expected PIXELS or HEIGHTxWIDTH"),
        (["0"], "image-size: got 0x0 pixels"),
        (["100x4"], "expected at most 16x16, 4 times the trained size"),
    ],
)
def test_cli_bad_image_size_is_one_line(
    path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = path.parent / "out"
    assert main(["sample", str(path), "--image-size", *words, "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not out.exists()


def test_cli_evaluate_at_another_size_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(path), "--reference", "fashion", "--features", "efficientnet-lite0", "--image-size", "8"]
    assert main([*command, "--device", "cpu"]) == 2
    assert "but" in (said := capsys.readouterr().err)
    assert "draws 4x4" in said


# ---- the state of one batch


def test_generate_of_another_grid_reveals_every_token_once() -> None:
    model = ROTARY.model.with_grid((6, 10))
    steps = list(generate(model, [0, 1], [7, 8], replace(FAST, steps=6, order="halton")))
    assert steps[-1].latents.shape == (2, 1, 6, 10)
    assert bool(steps[-1].known.all())
    assert int((steps[-1].revealed_at == 0).sum()) == 0
