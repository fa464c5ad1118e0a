"""MARPipeline: the images of `mar.Pipeline.sample`, by diffusers' conventions."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from huggingface_hub import ModelCard, RepoUrl
from PIL import Image
from tiny import tiny_pipeline, tiny_words_pipeline
from torch import Tensor

import mar
from mar.config import ConfigError
from mar.diffusers_pipeline import MARModel, MARPipeline, seeds_of
from mar.pipeline import to_pil

TINY = tiny_pipeline()
PIPE = MARPipeline(TINY)
PIPE.set_progress_bar_config(disable=True)
SEEDS = [5, 2**64 - 1]


def pixels(images: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image) for image in images])


def fresh(*seeds: int) -> list[torch.Generator]:
    """Generators that have drawn nothing yet."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def expected(labels: list[Any], seeds: list[int], **options: Any) -> Tensor:
    """Images of `mar.Pipeline.sample` in [0, 1]."""
    return (TINY.sample(labels, seeds, output="tensor", **options) / 2 + 0.5).clamp(0, 1)


def test_import_of_mar_leaves_diffusers_out() -> None:
    code = "import sys, mar, mar.cli; mar.load('fashion'); print('diffusers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


# ---- images


@pytest.mark.parametrize("arguments", [{"generator": fresh(*SEEDS)}, {"seeds": SEEDS}, {"seeds": np.uint64(SEEDS)}])
def test_call_returns_the_images_of_sample(arguments: dict[str, Any]) -> None:
    output = PIPE(["bee", None], 6, 2.5, temperature=0.9, solver="ddim", **arguments)
    assert isinstance(output, ImagePipelineOutput)
    drawn = TINY.sample(["bee", None], SEEDS, steps=6, guidance_scale=2.5, temperature=0.9, solver="ddim")
    assert np.array_equal(pixels(output.images), pixels(drawn))
    assert [image.mode for image in output.images] == ["L", "L"]
    assert (PIPE.seeds, PIPE.num_timesteps) == (SEEDS, 6)


def test_call_preset_is_that_of_sample() -> None:
    ours = tiny_pipeline()
    ours.sampling = replace(ours.sampling, steps=8, diffusion_steps=15)  # more than the preset's
    images = MARPipeline(ours)(["ant"], seeds=[3], preset="fast", output_type="pt").images
    drawn = ours.sample(["ant"], [3], preset="fast", output="tensor")
    assert torch.equal(images, drawn / 2 + 0.5)
    assert not torch.equal(drawn, ours.sample(["ant"], [3], output="tensor"))


def test_call_output_types_hold_the_same_image() -> None:
    tensor = PIPE("cat", seeds=4, output_type="pt").images
    assert (tensor.shape, tensor.dtype) == ((1, 1, 4, 4), torch.float32)
    assert torch.equal(tensor, expected(["cat"], [4]))
    array = PIPE("cat", seeds=4, output_type="np").images
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    (images,) = PIPE("cat", seeds=4, return_dict=False)
    assert np.array_equal(pixels(images), pixels(to_pil(tensor * 2 - 1)))
    latents = PIPE("cat", seeds=4, output_type="latent").images
    assert torch.equal((TINY.tokenizer.decode(latents) / 2 + 0.5).clamp(0, 1), tensor)


@pytest.mark.parametrize("one", ["cat", 2, np.int64(2), torch.tensor(2)])
def test_call_one_label_gives_one_image(one: Any) -> None:
    assert torch.equal(PIPE(one, seeds=[4], output_type="pt").images, expected([2], [4]))


@pytest.mark.parametrize("several", [("cat", "ant"), np.array([2, 0]), torch.tensor([2, 0]), iter([2, 0])])
def test_call_several_labels_give_as_many_images(several: Any) -> None:
    assert torch.equal(PIPE(several, seeds=range(2), output_type="pt").images, expected([2, 0], [0, 1]))


def test_call_without_label_has_no_class() -> None:
    assert torch.equal(PIPE(seeds=1, output_type="pt").images, expected([None], [1]))


def test_call_repeats_each_label() -> None:
    images = PIPE(["cat", 0], seeds=range(6), num_images_per_prompt=3, output_type="pt").images
    assert torch.equal(images, expected([2, 2, 2, 0, 0, 0], list(range(6))))


# ---- seeds


def test_generator_gives_its_seed_then_what_it_draws() -> None:
    generator = torch.Generator().manual_seed(7)
    images = PIPE([0, 0, 0], generator=generator, output_type="pt").images
    seeds = PIPE.seeds
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert torch.equal(images, expected([0, 0, 0], seeds))
    again = PIPE([0], generator=generator, output_type="pt").images
    assert PIPE.seeds[0] not in seeds
    assert not torch.equal(again, images[:1])


def test_generator_of_one_seed_is_reproducible() -> None:
    assert seeds_of(4, torch.Generator().manual_seed(7)) == seeds_of(4, torch.Generator().manual_seed(7))
    assert seeds_of(4, torch.Generator().manual_seed(7)) != seeds_of(4, torch.Generator().manual_seed(8))


def test_generator_that_has_drawn_gives_another_seed() -> None:
    used = torch.Generator().manual_seed(7)
    torch.rand(1, generator=used)
    (seed,) = seeds_of(1, used)
    assert seed != 7
    torch.rand(1, generator=(same := torch.Generator().manual_seed(7)))
    assert seeds_of(1, [same]) == [seed]


def test_generator_restored_to_its_start_gives_its_seed() -> None:
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    seeds_of(1, generator)
    assert seeds_of(1, generator.set_state(state)) == [7]


def test_no_generator_follows_the_default_one() -> None:
    with torch.random.fork_rng():
        first = seeds_of(2, torch.manual_seed(11))
        torch.manual_seed(11)
        assert seeds_of(2) == first
        assert seeds_of(2) != first
        assert first[0] == 11


def test_no_generator_draws_other_images_each_time() -> None:
    first = PIPE("cat", output_type="pt").images
    seeds = PIPE.seeds
    assert not torch.equal(PIPE("cat", output_type="pt").images, first)
    assert torch.equal(PIPE("cat", seeds=seeds, output_type="pt").images, first)


# ---- callbacks


def test_callback_sees_every_step() -> None:
    seen: list[tuple[int, int, Tensor]] = []

    def callback(pipe: MARPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        assert pipe is PIPE
        seen.append((step, timestep, tensors["latents"]))
        return tensors

    output = PIPE([0, 1], 5, seeds=[8, 9], callback_on_step_end=callback, output_type="latent")
    assert [(step, timestep) for step, timestep, _ in seen] == [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0)]
    assert PIPE.num_timesteps == 5
    masked = [int((latents == 0).sum()) for _, _, latents in seen]
    assert masked == sorted(masked, reverse=True)
    assert masked[0] > masked[-1] == 0
    assert torch.equal(seen[-1][2], output.images)


def test_callback_may_ask_for_no_tensors_and_return_nothing() -> None:
    given: list[dict[str, Any]] = []
    PIPE(
        0, seeds=1, callback_on_step_end=lambda *arguments: given.append(arguments[3]),
        callback_on_step_end_tensor_inputs=[],
    )  # fmt: skip
    assert given == [{}] * 4


@pytest.mark.parametrize("in_place", [True, False])
def test_callback_that_changes_latents_is_refused(in_place: bool) -> None:
    def callback(pipe: MARPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"].mul_(0.5) if in_place else tensors["latents"] * 0.5}

    with pytest.raises(ValueError, match=r"^callback_on_step_end: got other latents back, expected those"):
        PIPE(0, seeds=1, callback_on_step_end=callback)


def test_callback_objects_of_diffusers_name_their_tensors() -> None:
    seen = []

    class Watch(PipelineCallback):  # type: ignore[misc]
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(tensors["latents"].shape)
            return tensors

    for callback in (Watch(), MultiPipelineCallbacks([Watch()])):
        PIPE(0, 2, seeds=1, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
    assert seen == [(1, 1, 4, 4)] * 4


def test_interrupt_stops_after_the_step() -> None:
    steps = []

    def stop(pipe: MARPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> None:
        steps.append(step)
        pipe._interrupt = step == 1

    latents = PIPE("cat", 6, seeds=4, callback_on_step_end=stop, output_type="latent").images
    assert steps == [0, 1]
    assert PIPE.interrupt
    whole = PIPE("cat", 6, seeds=4, output_type="latent").images
    assert not PIPE.interrupt  # the next call starts anew
    drawn = latents != 0
    assert 0 < drawn.sum() < 16
    assert torch.equal(latents[drawn], whole[drawn])
    images = PIPE("cat", 6, seeds=4, callback_on_step_end=stop).images
    assert np.array_equal(pixels(images), pixels(to_pil(TINY.tokenizer.decode(latents))))


def test_progress_bar_counts_reveal_steps(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = MARPipeline(TINY)
    pipe(0, 3, seeds=1)
    captured = capsys.readouterr()
    assert "3/3" in captured.err
    assert captured.out == ""
    pipe.set_progress_bar_config(disable=True)
    pipe(0, 3, seeds=1)
    assert capsys.readouterr().err == ""


# ---- known parts

LEFT = torch.zeros(4, 4, dtype=torch.bool)
LEFT[:, :2] = True  # generate the left half
GRAY = torch.linspace(0.1, 0.9, 32).view(2, 1, 4, 4)


@pytest.mark.parametrize("kind", ["pil", "pt", "np"])
def test_image_is_kept_outside_the_mask(kind: str) -> None:
    pil = to_pil(GRAY * 2 - 1)
    image: Any = {"pil": pil, "pt": GRAY, "np": GRAY.permute(0, 2, 3, 1).numpy()}[kind]
    drawn = PIPE([0, 1], seeds=[1, 2], image=image, mask_image=LEFT, output_type="pt").images
    known = pil if kind == "pil" else GRAY * 2 - 1
    assert torch.equal(drawn, expected([0, 1], [1, 2], known=known, mask=LEFT.expand(2, 4, 4)))
    kept = torch.from_numpy(pixels(pil)).float().div(255).unsqueeze(1) if kind == "pil" else GRAY
    assert torch.allclose(drawn[..., 2:], kept[..., 2:], atol=1e-6)
    assert not torch.isclose(drawn[..., :2], kept[..., :2]).any()


@pytest.mark.parametrize("mask", [LEFT, LEFT.numpy(), LEFT[None].numpy(), Image.fromarray(LEFT.numpy())])
def test_mask_image_of_one_serves_all(mask: Any) -> None:
    pipeline = tiny_pipeline(patch_size=2)  # so that pixels are not tokens
    (image,) = to_pil(GRAY[:1] * 2 - 1)
    drawn = MARPipeline(pipeline)(
        ["ant", "bee"], seeds=range(4), num_images_per_prompt=2, image=image, mask_image=mask, x0_bound=2.0
    ).images
    masks = LEFT.expand(4, 4, 4)
    ours = pipeline.sample([0, 0, 1, 1], range(4), known=[image] * 4, mask=masks, x0_bound=2.0)
    assert np.array_equal(pixels(drawn), pixels(ours))
    assert np.array_equal(pixels(drawn)[:, :, 2:], pixels([image] * 4)[:, :, 2:])


@pytest.mark.parametrize("grow", [0, 1])
def test_grow_is_that_of_sample(grow: int) -> None:
    pipeline = tiny_pipeline(patch_size=2)
    (image,) = to_pil(GRAY[:1] * 2 - 1)
    drawn = MARPipeline(pipeline)("ant", seeds=3, image=image, mask_image=LEFT, grow=grow, x0_bound=2.0).images
    ours = pipeline.sample([0], [3], known=[image], mask=LEFT[None], grow=grow, x0_bound=2.0)
    other = pipeline.sample([0], [3], known=[image], mask=LEFT[None], grow=1 - grow, x0_bound=2.0)
    assert np.array_equal(pixels(drawn), pixels(ours))
    assert not np.array_equal(pixels(drawn), pixels(other))


def test_image_of_each_label_is_repeated_like_it() -> None:
    images = to_pil(GRAY * 2 - 1)
    drawn = PIPE([0, 1], seeds=range(4), num_images_per_prompt=2, image=images, mask_image=LEFT).images
    known = [images[0], images[0], images[1], images[1]]
    assert np.array_equal(
        pixels(drawn), pixels(TINY.sample([0, 0, 1, 1], range(4), known=known, mask=LEFT.expand(4, 4, 4)))
    )


def test_mask_image_of_nothing_keeps_the_image() -> None:
    seen: list[int] = []
    drawn = PIPE(
        0, seeds=1, image=GRAY[:1], mask_image=torch.zeros_like(LEFT), output_type="pt",
        callback_on_step_end=lambda *arguments: seen.append(1),
    ).images  # fmt: skip
    assert torch.allclose(drawn, GRAY[:1], atol=1e-6)
    assert seen == []
    assert PIPE.num_timesteps == 0


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": "a cat"}, r"prompt: got 'a cat', but this model takes classes; use class_labels"),
        ({"class_labels": []}, r"class_labels: got \[\], expected class names, class numbers or None, at least one"),
        ({"class_labels": 1.5}, r"class_labels: got 1.5, expected"),
        ({"class_labels": torch.tensor(1.5)}, r"class_labels: got tensor\(1.5000\), expected"),
        ({"class_labels": ["dog"]}, r"label 'dog' is not a class; the 3 classes are ant, bee, cat"),
        ({"class_labels": 3}, r"label 3 is out of range"),
        ({"output_type": "jpg"}, r"output_type: got 'jpg', expected one of pil, pt, np, latent"),
        ({"num_images_per_prompt": 0}, r"num_images_per_prompt: got 0, expected at least 1"),
        ({"num_inference_steps": 0}, r"steps"),
        ({"guidance_scale": float("nan")}, r"guidance_scale is nan"),
        ({"preset": "slow"}, r"preset is 'slow'"),
        (
            {"negative_prompt": "blur", "eta": 1.0},
            r"got eta, negative_prompt, expected preset, or settings: d",
        ),
        ({"steps": 3, "num_inference_steps": 4}, r"steps: got it twice"),
        ({"seeds": [1], "generator": torch.Generator()}, r"generator and seeds: got both"),
        ({"seeds": [1, 2]}, r"seeds: got 2, expected 1, one per image"),
        ({"seeds": 1.5}, r"seeds: got \[1.5\], expected whole numbers"),
        ({"generator": fresh(1, 2)}, r"generator: got \[.*\], expected a torch.Generator, or a list of 1"),
        ({"generator": [7]}, r"generator: got \[7\], expected a torch.Generator"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "x"]}, r"_tensor_inputs: got x, expected latents"),
        ({"image": GRAY[0]}, r"image and mask_image: got only one of them"),
        ({"mask_image": LEFT}, r"image and mask_image: got only one of them"),
        (
            {"image": GRAY[0] * 2 - 1, "mask_image": LEFT},
            r"image: got \(1, 4, 4\) of torch.float32, expected float",
        ),
        ({"image": GRAY[0] * torch.nan, "mask_image": LEFT}, r"expected floats in \[0, 1\]"),
        ({"image": torch.zeros(4, 4), "mask_image": LEFT}, r"image: got \(4, 4\) of torch.float32"),
        ({"image": np.zeros((4, 4, 1), np.uint8), "mask_image": LEFT}, r"image: got \(4, 4, 1\) of uint8"),
        ({"image": GRAY, "mask_image": LEFT}, r"known: got 2 for 1 labels"),
        ({"image": GRAY[:1], "mask_image": "left"}, r"mask: got 'left'"),
        ({"image": "a.png", "mask_image": LEFT}, r"known: got"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_call_invalid_arguments_are_refused_in_one_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        PIPE(**{"class_labels": "cat", **arguments})
    assert "\n" not in str(error.value)


def test_call_takes_old_names_of_settings() -> None:
    images = PIPE("cat", seeds=4, guidance=2.0, output_type="pt").images
    assert torch.equal(images, expected(["cat"], [4], guidance_scale=2.0))


def test_broken_latents_are_refused_unless_allowed() -> None:
    pipeline = tiny_pipeline()
    with torch.no_grad():
        for parameter in pipeline.model.head.parameters():
            parameter.fill_(torch.nan)
    pipe = MARPipeline(pipeline)
    with pytest.raises(mar.BrokenLatents, match="Some weights are not finite"):
        pipe(0, seeds=1)
    seen: list[Tensor] = []

    def callback(pipe: MARPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return tensors

    assert len(pipe(0, seeds=1, allow_broken=True, callback_on_step_end=callback).images) == 1
    assert seen[-1].isnan().all()


# ---- saving, loading, moving


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers copies the code of folders here, not to the user's folder."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers_modules"]:
        monkeypatch.delitem(sys.modules, name)


def test_saved_folder_gives_the_same_images(tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path / "saved")
    images = expected(["cat", 0], [1, 2])
    loaded = MARPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(["cat", 0], seeds=[1, 2], output_type="pt").images, images)
    again = MARPipeline(mar.load(tmp_path / "saved", device="cpu"))
    assert torch.equal(again(["cat", 0], seeds=[1, 2], output_type="pt").images, images)
    assert loaded.labels == {"ant": 0, "bee": 1, "cat": 2}
    loaded.save_pretrained(tmp_path / "copy")
    for name in ("model.safetensors", "model_index.json", "pipeline.py"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


@pytest.mark.usefixtures("modules")
def test_generic_class_loads_a_saved_folder_if_trusted(tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"contains custom code in pipeline\.py"):
        DiffusionPipeline.from_pretrained(tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(loaded) is MARPipeline
    assert torch.equal(loaded(["cat", 0], seeds=[1, 2], output_type="pt").images, expected(["cat", 0], [1, 2]))
    loaded.save_pretrained(tmp_path / "copy")
    copy = DiffusionPipeline.from_pretrained(tmp_path / "copy", trust_remote_code=True, dtype=torch.bfloat16)
    assert copy.dtype is torch.bfloat16


def test_saved_bfloat16_gives_the_same_images_in_bfloat16(tmp_path: Path) -> None:
    pipe = MARPipeline(tiny_pipeline()).to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    loaded = MARPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True)
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(loaded(0, seeds=1, output_type="pt").images, pipe(0, seeds=1, output_type="pt").images)


def test_from_pretrained_opens_what_mar_load_opens() -> None:
    pipe = MARPipeline.from_pretrained("fashion", dtype=torch.bfloat16)
    ours = mar.load("fashion", device="cpu", dtype=torch.bfloat16)
    images = pipe("dress", 4, seeds=1, preset="fast").images
    assert np.array_equal(pixels(images), pixels(ours.sample(["dress"], [1], preset="fast", steps=4)))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fashion", {"device_map": "cuda", "variant": "fp16"}, "from_pretrained: got device_map, variant, which mar"),
        ("fashion", {"dtype": torch.float16}, "got torch.float16, expected float32 or bfloat16"),
        ("nothing-like-it", {}, "model: got 'nothing-like-it', expected emoji, fashion"),
        ("owner/name", {}, "can't get owner/name from the Hub"),
    ],
)
def test_from_pretrained_mistakes_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MARPipeline.from_pretrained(name, **options)


def test_from_pretrained_hands_options_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def from_pretrained(name: str, **options: Any) -> mar.Pipeline:
        asked.append((name, options))
        return tiny_pipeline()

    monkeypatch.setattr(mar.Pipeline, "from_pretrained", from_pretrained)
    pipe = MARPipeline.from_pretrained("owner/name", revision="v1", token="t", dtype=torch.bfloat16)
    assert asked == [("owner/name", {"revision": "v1", "token": "t"})]
    assert pipe.dtype is torch.bfloat16
    assert MARPipeline.from_pretrained("fashion", revision="v1").labels["Dress"] == 3  # it is no repository
    assert len(asked) == 1


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"variant": "fp16"}, {"max_shard_size": "1GB"}])
def test_save_pretrained_options_without_meaning_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="save_pretrained: got"):
        PIPE.save_pretrained(tmp_path, **options)


def test_save_pretrained_uploads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[Any] = []

    def create_repo(name: str, **options: Any) -> RepoUrl:
        return RepoUrl(f"https://huggingface.co/{name if '/' in name else 'me/' + name}")

    def upload(repo_id: str, folder_path: str, **options: Any) -> None:
        uploads.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir()), options["token"]))

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", create_repo)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload)
    monkeypatch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", lambda *_, **__: ModelCard("---\n---\n"))
    PIPE.save_pretrained(tmp_path / "saved", push_to_hub=True)
    PIPE.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="owner/name", token="t")
    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert uploads == [("me/saved", files, None), ("owner/name", files, "t")]


def test_pipeline_moves_and_casts_the_model() -> None:
    pipeline = tiny_pipeline()
    pipe = MARPipeline(pipeline)
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert (pipe.dtype, pipe.model.dtype) == (torch.bfloat16, torch.bfloat16)
    assert pipeline.model.mask_token.dtype is torch.float32  # matrices alone, as `mar.Pipeline.to` casts
    assert pipe.model.to(torch.float32) is pipe.model
    assert pipe.dtype is torch.float32
    with pytest.raises(ValueError, match=r"got torch\.float16, expected float32 or bfloat16"):
        pipe.to(torch.float16)
    pipe.to("meta")
    assert pipe.device == pipeline.device == torch.device("meta")
    assert {parameter.device.type for parameter in pipeline.tokenizer.state_dict().values()} <= {"meta"}


def test_pipeline_int8_draws_but_is_not_saved(tmp_path: Path) -> None:
    pipe = MARPipeline(tiny_pipeline()).to(torch.int8)
    assert pipe.dtype is torch.int8
    ours = tiny_pipeline().to(dtype=torch.int8).sample([0], [1], output="tensor")
    assert torch.equal(pipe(0, seeds=1, output_type="pt").images, (ours / 2 + 0.5).clamp(0, 1))
    with pytest.raises(ConfigError, match="int8 weights can't be saved"):
        pipe.save_pretrained(tmp_path)


def test_components_make_another_pipeline() -> None:
    assert set(PIPE.components) == {"model"}
    other = MARPipeline(**PIPE.components)
    assert isinstance(other.model, MARModel)
    assert other.model is PIPE.model
    assert json.loads(other.to_json_string())["model"] == ["mar.diffusers_pipeline", "MARModel"]


# ---- prompts


WORDS = tiny_words_pipeline()
TEXT_PIPE = MARPipeline(WORDS)
TEXT_PIPE.set_progress_bar_config(disable=True)


def drawn_from(prompts: list[str | None], seeds: list[int]) -> Tensor:
    """Images of `mar.Pipeline.sample` in [0, 1]."""
    return (WORDS.sample(prompts=prompts, seeds=seeds, output="tensor") / 2 + 0.5).clamp(0, 1)


def test_call_prompts_are_those_of_sample() -> None:
    images = TEXT_PIPE(prompt=["a red cat", None], seeds=SEEDS, output_type="pt").images
    assert torch.equal(images, drawn_from(["a red cat", None], SEEDS))
    assert torch.equal(TEXT_PIPE(prompt="dog", seeds=3, output_type="pt").images, drawn_from(["dog"], [3]))
    assert torch.equal(TEXT_PIPE("dog", seeds=3, output_type="pt").images, drawn_from(["dog"], [3]))  # as others do
    assert torch.equal(TEXT_PIPE(seeds=3, output_type="pt").images, drawn_from([None], [3]))
    two = TEXT_PIPE(prompt=["dog", "cat"], seeds=range(4), num_images_per_prompt=2, output_type="pt").images
    assert torch.equal(two, drawn_from(["dog", "dog", "cat", "cat"], [0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"class_labels": 2}, "class_labels: got 2, but this model draws from words"),
        ({"class_labels": "dog", "prompt": "cat"}, "class_labels: got 'dog' and a prompt, expected a prompt alone"),
        ({"prompt": []}, r"prompt: got \[\], but this model draws from words; expected prompts, at least one"),
        ({"prompt": "cot"}, r"unknown words: cot \(cat\?\)"),
    ],
)
def test_call_invalid_prompts_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TEXT_PIPE(**arguments)


def test_saved_folder_keeps_the_words(tmp_path: Path) -> None:
    TEXT_PIPE.save_pretrained(tmp_path)
    again = MARPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(prompt="dog", seeds=3, output_type="pt").images, drawn_from(["dog"], [3]))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "text-to-image"
    assert 'model.sample(prompts=["..."])' in card.text
