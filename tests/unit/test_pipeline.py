"""Pipeline: labels and seeds in, images out, and clear errors."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FAST, tiny_config, tiny_model, tiny_pipeline, tiny_words_pipeline
from torch import Tensor

from mar import backends
from mar.checkpoint.files import CheckpointError
from mar.config import ConfigError, HeadConfig
from mar.model.mar import MAR
from mar.pipeline import Pipeline, to_pil
from mar.sampling.generate import BrokenLatents
from mar.tokenizer import PixelTokenizer

TINY = tiny_pipeline()
LEFT = torch.zeros(2, 4, 4, dtype=torch.bool)
LEFT[:, :, :2] = True  # generate the left half


def pixels(images: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image) for image in images])


def gray(n: int, channels: int = 1) -> Tensor:
    return torch.linspace(-1, 1, n * channels * 16).view(n, channels, 4, 4)


def test_pipeline_sample_returns_images() -> None:
    images = TINY.sample(["bee", 2, None], seeds=[5, 6, 7])
    assert [(image.mode, image.size) for image in images] == [("L", (4, 4))] * 3
    tensor = TINY.sample(["BEE", "2", None], seeds=[5, 6, 7], output="tensor")
    assert (tensor.shape, tensor.dtype) == ((3, 1, 4, 4), torch.float32)
    assert -1 <= float(tensor.min()) < float(tensor.max()) <= 1
    assert np.array_equal(pixels(to_pil(tensor)), pixels(images))
    assert TINY.image_size == (4, 4)


def test_pipeline_default_seeds_count_from_0() -> None:
    assert np.array_equal(pixels(TINY.sample([0, 0])), pixels(TINY.sample([0, 0], seeds=[0, 1])))
    assert not np.array_equal(*pixels(TINY.sample([0, 0])))


@pytest.mark.parametrize(
    "seeds", [np.arange(3, 5), torch.arange(3, 5), [np.int64(3), np.int32(4)], (3, 4), range(3, 5)]
)
def test_pipeline_any_integer_is_a_seed(seeds: Any) -> None:
    drawn = TINY.sample(np.array([0, 1]), seeds, output="tensor")
    assert torch.equal(drawn, TINY.sample([0, 1], [3, 4], output="tensor"))


@pytest.mark.parametrize("seeds", [[0.0, 1.5], np.array([0.0, 1.0]), torch.zeros(2), "12", 7])
@pytest.mark.usefixtures("untyped")
def test_pipeline_invalid_seeds_are_refused(seeds: Any) -> None:
    with pytest.raises(ValueError, match=r"^seeds: got .*, expected whole numbers, one per picture"):
        TINY.sample([0, 1], seeds)


@pytest.mark.parametrize("preset", ["exact", "balanced", "fast"])
def test_pipeline_preset_is_reproducible_for_any_batch(preset: str) -> None:
    many = Pipeline(TINY.model, TINY.tokenizer, sampling=replace(FAST, steps=8, diffusion_steps=15))  # fewer by presets
    labels, seeds = [0, 1, 2, None], [7, 8, 9, 10]
    whole = many.sample(labels, seeds, output="tensor", preset=preset, guidance_scale=2.0)
    assert torch.equal(many.sample(labels, seeds, output="tensor", preset=preset, guidance_scale=2.0), whole)
    cut = many.sample(labels, seeds, output="tensor", preset=preset, guidance_scale=2.0, batch=1)
    assert float((cut - whole).abs().max()) < 1e-4
    plain = many.sample(labels, seeds, output="tensor", guidance_scale=2.0)
    assert torch.equal(plain, whole) == (preset == "exact")


def test_pipeline_options_override_the_preset() -> None:
    fast = TINY.sampling_with("fast")
    assert TINY.sampling_with("fast", solver="ddim") == replace(fast, solver="ddim")
    assert TINY.sampling_with() == TINY.sampling_with("exact") == TINY.sampling
    with pytest.raises(ConfigError, match="preset is 'slow', but it must be one of exact, balanced, fast"):
        TINY.sampling_with("slow")
    with pytest.raises(ConfigError, match="diffusion_steps is 2000"):
        TINY.sampling_with("fast", diffusion_steps=2000)


def test_pipeline_options_hold_for_one_call() -> None:
    before = TINY.sampling
    default = pixels(TINY.sample([0]))
    other = pixels(TINY.sample([0], steps=16, guidance_scale=3.0, temperature=0.5))
    assert not np.array_equal(default, other)
    assert TINY.sampling is before
    assert np.array_equal(pixels(TINY.sample([0])), default)


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_pipeline_batch_size_changes_no_image(batch: int, capsys: pytest.CaptureFixture[str]) -> None:
    labels, seeds = [0, 1, 2, None, 0], [3, 1, 4, 1, 5]
    whole = TINY.sample(labels, seeds, output="tensor")
    cut = TINY.sample(labels, seeds, output="tensor", batch=batch, progress=batch == 2)
    assert float((cut - whole).abs().max() / whole.std()) < 1e-4
    assert capsys.readouterr().out == ""  # the bar is on stderr


def test_pipeline_without_labels_draws_nothing() -> None:
    assert TINY.sample([]) == []
    assert TINY.sample([], output="tensor").shape == (0, 1, 4, 4)
    assert TINY.sample([], known=[], mask=LEFT[:0]) == []


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        ([0, 1], {"seeds": [1]}, "seeds: got 1 for 2 labels"),
        ([0], {"seeds": []}, "seeds: got 0 for 1 labels"),
        (["dog"], {}, "'dog' is not a class; the 3 classes are ant, bee, cat"),
        (["bees"], {}, r"close to it: 1 \(bee\)"),
        ([3], {}, "label 3 is out of range: this model has classes 0 to 2"),
        ([-1], {}, "label -1 is out of range"),
        ([0], {"batch": 0}, "batch: got 0, expected at least 1"),
        ([0], {"steps": 0}, "steps is 0"),
        ([0], {"diffusion_steps": 1001}, "diffusion_steps is 1001, but the model's schedule has 1000"),
        ([0], {"known": gray(1)}, "only one of them"),
        ([0, 1], {"known": to_pil(gray(3)), "mask": LEFT, "batch": 1}, "known: got 3 for 2 labels"),
        ([0, 1], {"known": to_pil(gray(2)), "mask": LEFT[:1], "batch": 1}, "mask: got 1 for 2 labels"),
        ([0, 1], {"known": gray(2, 3), "mask": LEFT}, "got 3 channels, expected 1 for this tokenizer"),
        ([0, 1], {"known": gray(2)[..., :3], "mask": LEFT}, r"shape \(2, 1, 4, 3\), expected \(2, 1, 4, 4\)"),
    ],
)
def test_pipeline_invalid_requests_are_refused(labels: list[Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TINY.sample(labels, **options)


def test_pipeline_labels_without_classes_are_refused() -> None:
    unconditional = tiny_pipeline(classes=0)
    assert len(unconditional.sample([None, None])) == 2
    with pytest.raises(ValueError, match="has no classes; leave the labels out"):
        unconditional.sample([0])
    with pytest.raises(ConfigError, match="guidance"):
        unconditional.sample([None], guidance_scale=2.0)


def test_pipeline_mismatched_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="got one with 1 latent channels, expected 2"):
        Pipeline(tiny_model(), PixelTokenizer(1, 0.0, 1.0))


def test_pipeline_inpainting_keeps_known_pixels() -> None:
    known = to_pil(gray(2))
    drawn = pixels(TINY.sample([0, 1], known=known, mask=LEFT))
    assert np.array_equal(drawn[:, :, 2:], pixels(known)[:, :, 2:])
    assert not np.array_equal(drawn[:, :, :2], pixels(known)[:, :, :2])
    as_tensor = TINY.sample([0, 1], known=gray(2), mask=LEFT, output="tensor")
    torch.testing.assert_close(as_tensor[..., 2:], gray(2)[..., 2:], rtol=0, atol=1e-6)
    alone = TINY.sample([1], [1], known=gray(2)[1:], mask=LEFT[1:], output="tensor")
    torch.testing.assert_close(as_tensor[1:], alone, rtol=0, atol=1e-4)
    cut = TINY.sample([0, 1], known=gray(2), mask=LEFT, output="tensor", batch=1)
    torch.testing.assert_close(cut, as_tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("known", [gray(5), to_pil(gray(5))])
def test_pipeline_known_images_are_encoded_in_batches(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, sizes = tiny_pipeline(), []
    encode = ours.tokenizer.encode
    monkeypatch.setattr(ours.tokenizer, "encode", lambda images: sizes.append(len(images)) or encode(images))
    nothing = torch.zeros(5, 4, 4, dtype=torch.bool)
    kept = ours.sample([0] * 5, known=known, mask=nothing, batch=2)
    assert sizes == [2, 2, 1]
    assert np.array_equal(pixels(kept), pixels(to_pil(gray(5))))


@pytest.mark.parametrize("known", [gray(2), gray(2).double(), gray(2).numpy(), to_pil(gray(2)), tuple(to_pil(gray(2)))])
@pytest.mark.parametrize("mask", [LEFT, LEFT.numpy(), LEFT.tolist()])
def test_pipeline_known_images_and_masks_of_any_kind(known: Any, mask: Any) -> None:
    drawn = pixels(TINY.sample([0, 1], known=known, mask=mask))
    assert np.array_equal(drawn[:, :, 2:], pixels(to_pil(gray(2)))[:, :, 2:])
    assert not np.array_equal(drawn[:, :, :2], pixels(to_pil(gray(2)))[:, :, :2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"known": to_pil(gray(1))[0]}, "known: got <PIL.Image.*, expected PIL pictures, or floats in"),
        ({"known": 5}, "known: got 5, expected PIL pictures"),
        ({"known": ["a.png"]}, "known: got .*a.png.*, expected PIL pictures"),
        ({"known": gray(1).log()}, "known: got values that are not finite"),
        ({"known": gray(1)[0]}, r"known: got \(1, 4, 4\) of torch.float32, expected PIL pictures"),
        ({"known": (gray(1) + 1).byte().numpy()}, r"known: got \(1, 1, 4, 4\) of torch.uint8, expected PIL pictures"),
        ({"mask": LEFT[:1].int().tolist()}, r"mask: got \(1, 4, 4\) of torch.int64, expected \(1, 4, 4\) of bool"),
        ({"mask": [[[True], [False, True]]]}, "mask: got .*True.*, expected bools"),
        ({"mask": "left"}, "mask: got 'left', expected bools"),
        ({"mask": True}, "mask: got True, expected bools"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_pipeline_invalid_image_or_mask_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        TINY.sample([0], **{"known": gray(1), "mask": LEFT[:1], **options})


def test_pipeline_known_images_are_resized_and_converted() -> None:
    large = [Image.new("RGB", (16, 12), (200, 200, 200))] * 2
    drawn = pixels(TINY.sample([0, 1], known=large, mask=LEFT))
    assert (drawn[:, :, 2:] == 200).all()


def test_pipeline_masks_may_differ_and_cover_patches() -> None:
    coarse = tiny_pipeline(patch_size=2)
    mask = torch.tensor([[[True, False], [False, False]], [[False, False], [False, False]]])
    drawn = pixels(coarse.sample([0, 1], known=to_pil(gray(2)), mask=mask))
    kept = drawn == pixels(to_pil(gray(2)))
    assert kept[1].all()
    assert kept[0, 2:].all()
    assert kept[0, :, 2:].all()
    assert not kept[0, :2, :2].all()


def test_pipeline_stream_ends_with_the_sample() -> None:
    states = list(TINY.reveal([0, "cat"], seeds=[8, 9], steps=5))
    assert [(state.step, state.steps) for state in states] == [(i, 5) for i in range(1, 6)]
    assert np.array_equal(pixels(states[-1].images), pixels(TINY.sample([0, "cat"], seeds=[8, 9], steps=5)))
    hidden = [(pixels(state.images) == 128).sum() for state in states]  # mid-grey
    assert hidden == sorted(hidden, reverse=True)
    assert hidden[0] > 16
    for before, after in pairwise(states):  # what is shown stays
        shown = pixels(before.images) != 128
        assert np.array_equal(pixels(before.images)[shown], pixels(after.images)[shown])


def test_pipeline_reveal_step_has_zero_latents_at_masked_tokens() -> None:
    for state in TINY.reveal([0, "cat"], seeds=[8, 9], steps=5):
        known = state.known.unsqueeze(1)  # a token is one cell here
        assert (state.latents[~known] == 0).all()
        assert (state.latents[known] != 0).all()
    assert torch.equal(TINY.tokenizer.decode(state.latents), TINY.sample([0, 2], [8, 9], steps=5, output="tensor"))


def test_pipeline_stream_shows_known_pixels_first() -> None:
    first = next(TINY.reveal([0, 1], known=to_pil(gray(2)), mask=LEFT))
    assert np.array_equal(pixels(first.images)[:, :, 2:], pixels(to_pil(gray(2)))[:, :, 2:])


def test_pipeline_broken_image_is_refused() -> None:
    torch.manual_seed(0)
    young = Pipeline(
        MAR(tiny_config(channels=1, head=HeadConfig(16, 1))),
        PixelTokenizer(1, 0.0, 1.0),
        classes=("a", "b", "c"),
        sampling=FAST,
    )
    with pytest.raises(BrokenLatents, match="--allow-broken"):
        young.sample([0])
    with pytest.raises(BrokenLatents):
        list(young.reveal([0]))
    assert len(young.sample([0], allow_broken=True)) == 1
    with torch.no_grad():
        young.model.head.output.bias.fill_(torch.nan)
    assert pixels(young.sample([0], allow_broken=True)).shape == (1, 4, 4)


@pytest.mark.parametrize("batch", [2, 64])
def test_pipeline_broken_image_is_named(batch: int) -> None:
    ours = tiny_pipeline()
    with torch.no_grad():
        ours.model.class_embed.weight[2] = torch.inf
    with pytest.raises(BrokenLatents, match=r"^image 3 is broken"):
        ours.sample([0, 1, 0, 2, 1], batch=batch)
    with pytest.raises(BrokenLatents, match=r"^image 3 is broken"):
        list(ours.stream([0, 1, 0, 2, 1], batch=batch))


def test_pipeline_uses_no_gradients_and_no_global_rng() -> None:
    state = torch.get_rng_state()
    assert not TINY.sample([0], output="tensor").requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_pipeline_bf16_draws_nearly_the_same() -> None:
    ours = tiny_pipeline()
    before = ours.sample([0, 1], output="tensor")
    assert ours.to("cpu", dtype=torch.bfloat16) is ours
    after = ours.sample([0, 1], output="tensor")
    assert after.dtype == torch.float32
    assert 0 < float((after - before).abs().mean()) < 0.05


def test_pipeline_bf16_file_is_loaded_in_float32(tmp_path: Path) -> None:
    ours = tiny_pipeline().to(dtype=torch.bfloat16)
    ours.save(tmp_path / "half.safetensors")
    read = Pipeline.open(tmp_path / "half.safetensors")
    assert {p.dtype for p in read.model.parameters()} == {torch.float32}
    pairs = zip(read.model.state_dict().values(), ours.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b.float()) for a, b in pairs)


def test_pipeline_images_have_the_tokenizers_mode() -> None:
    colors = tiny_pipeline(channels=3)
    (image,) = colors.sample([0])
    assert (image.mode, image.size) == ("RGB", (4, 4))


def test_pipeline_pixels_are_rounded_and_clipped() -> None:
    values = torch.tensor([-1.5, -1.0, -0.999, 0.0, 0.5, 1.0, 1.5])
    (image,) = to_pil(values.view(1, 1, 1, 7))
    assert np.asarray(image).tolist() == [[0, 0, 0, 128, 191, 255, 255]]
    every = torch.arange(256).view(1, 1, 16, 16)
    assert np.array_equal(np.asarray(to_pil(every / 127.5 - 1)[0]), every[0, 0].numpy())


def test_pipeline_hub_folder_is_opened(tmp_path: Path) -> None:
    TINY.save_pretrained(tmp_path / "mine")
    read = Pipeline.from_pretrained(str(tmp_path / "mine"))
    assert read.classes == TINY.classes
    assert np.array_equal(pixels(read.sample([0])), pixels(TINY.sample([0])))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="there is no such file"):
        Pipeline.from_pretrained(str(tmp_path / "empty"))
    for file in (tmp_path / "mine").glob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    card = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    assert "library_name: mar\n" in card
    assert 'mar.load("' in card
    assert "https://arxiv.org/abs/2406.11838" in card
    assert "license" not in card  # of which we know nothing
    assert "More Information Needed" not in card
    TINY.save_pretrained(tmp_path / "free", model_card_kwargs={"license": "mit"})
    assert "license: mit\n" in (tmp_path / "free" / "README.md").read_text(encoding="utf-8")


# ---- prompts


def test_pipeline_prompts_draw_what_their_words_say() -> None:
    words = tiny_words_pipeline()
    prompts = ["a red cat", "cat red a", "dog", None]
    whole = words.sample(prompts=prompts, seeds=[3] * 4, output="tensor", guidance_scale=2.0)
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 4
    by_label = words.sample([None], [3], output="tensor", guidance_scale=2.0)
    assert torch.equal(words.sample(prompts=[""], seeds=[3], output="tensor", guidance_scale=2.0), by_label)
    torch.testing.assert_close(by_label[0], whole[3])
    one = words.sample(prompts=prompts, seeds=[3] * 4, output="tensor", guidance_scale=2.0, batch=1)
    assert float((one - whole).abs().max()) < 1e-4
    *_, last = words.reveal(prompts=prompts, seeds=[3] * 4, guidance_scale=2.0)
    assert torch.equal(last.decode(), whole)


def test_pipeline_known_part_stays_under_another_prompt() -> None:
    words = tiny_words_pipeline()
    options: dict[str, Any] = {"seeds": [0, 0], "known": gray(2), "mask": LEFT, "output": "tensor"}
    drawn = words.sample(prompts=["dog", "a red cat"], **options)
    expected = words.tokenizer.decode(words.tokenizer.encode(gray(2)).mean)
    torch.testing.assert_close(drawn[..., 2:], expected[..., 2:])
    same = words.sample(prompts=["dog", "dog"], **{**options, "known": gray(1).repeat(2, 1, 1, 1)})
    other = words.sample(prompts=["dog", "a red cat"], **{**options, "known": gray(1).repeat(2, 1, 1, 1)})
    assert torch.equal(same[0], same[1])
    assert not torch.equal(other[0], other[1])


def test_pipeline_token_losses_depend_on_the_prompt() -> None:
    words = tiny_words_pipeline()
    picture = gray(1).repeat(2, 1, 1, 1)
    losses = words.token_losses(None, picture, prompts=["dog", "a red cat"])
    assert losses.shape == (2, 4, 4)
    assert torch.equal(losses, words.token_losses(None, picture, prompts=["dog", "a red cat"]))
    assert not torch.equal(losses[0], words.token_losses(None, picture, prompts=["cat", "cat"])[0])
    with pytest.raises(ValueError, match="prompts: got 1 for 2 images"):
        words.token_losses(None, picture, prompts=["dog"])


def test_pipeline_words_stay_in_its_file(tmp_path: Path) -> None:
    words = tiny_words_pipeline(notes={"examples": ["a red cat"]})
    words.save(tmp_path / "words.safetensors")
    again = Pipeline.open(tmp_path / "words.safetensors")
    assert again.fingerprint() == words.fingerprint()
    assert again.examples == ("a red cat",)
    drawn = [p.sample(prompts=["a red cat"], output="tensor") for p in (words, again)]
    assert torch.equal(*drawn)


@pytest.mark.usefixtures("untyped")
def test_pipeline_neither_or_both_are_refused() -> None:
    words = tiny_words_pipeline()
    for model, arguments, said in (
        (words, {}, "got neither labels nor prompts"),
        (words, {"labels": ["cat"]}, "this model draws from words; give prompts"),
        (words, {"labels": [None], "prompts": ["cat"]}, "got labels and prompts"),
        (words, {"prompts": "cat"}, "expected a list of them"),
        (TINY, {"prompts": ["cat"]}, "this model does not read words"),
    ):
        with pytest.raises(ValueError, match=said):
            model.sample(**arguments)


def test_pipeline_token_losses_of_other_shapes_are_refused() -> None:
    model = tiny_pipeline()
    height, width = model.image_size
    channels = model.tokenizer.image_channels
    assert model.token_losses([], []).shape == (0, *model.model.config.token_grid)
    with pytest.raises(ValueError, match=f"images: got {2 * height}x{width // 2} pixels, expected {height}x{width}"):
        model.token_losses([0], torch.zeros(1, channels, 2 * height, width // 2))


def test_pipeline_takes_a_guidance_interval_as_json_has_it() -> None:
    model = tiny_pipeline()
    given = model.sample([0], guidance_interval=[0.25, 1.0], guidance_scale=2.0, output="tensor", allow_broken=True)
    same = model.sample([0], guidance_interval=(0.25, 1.0), guidance_scale=2.0, output="tensor", allow_broken=True)
    assert torch.equal(given, same)
    for wrong in ([0.5], 0.5, [0, 0.5, 1]):
        with pytest.raises(ConfigError, match=r"guidance_interval is .*, but it must be two numbers"):
            model.sample([0], guidance_interval=wrong)


def test_pipeline_moved_to_a_gpu_configures_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `load` does, whose settings stay."""
    called: list[tuple[str, bool]] = []
    monkeypatch.setattr(backends, "_configured", set())
    monkeypatch.setattr(backends, "set_tf32", lambda tf32: called.append(("tf32", tf32)))
    monkeypatch.setattr(backends, "choose_attention", lambda: called.append(("attention", True)))
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *where: module)
    tiny_pipeline().to("cuda").to("cuda")
    assert called == [("tf32", False), ("attention", True)]
    monkeypatch.setattr(backends, "_configured", set())
    backends.configure(torch.device("cuda"), tf32=True)
    tiny_pipeline().to("cuda")
    assert called[2:] == [("tf32", True), ("attention", True)]
