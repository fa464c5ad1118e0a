"""The named models and recipes are those of the paper."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

from mar.assets import asset
from mar.checkpoint.store import read_header
from mar.config import ConfigError, ModelConfig, SamplingConfig, from_dict, to_dict
from mar.model.mar import MAR
from mar.model.masking import mask_schedule
from mar.presets import RECIPES, SAMPLING_PRESETS, SamplingPreset, apply_preset, recipe
from mar.published import MODELS, PUBLISHED, SAMPLING
from mar.sampling.guidance import step_settings
from mar.zoo import BUNDLED


@pytest.mark.parametrize(
    ("name", "millions", "tensors"), [("mar-base", 207.9, 364), ("mar-large", 478.3, 476), ("mar-huge", 942.4, 604)]
)
def test_official_models_have_the_published_sizes(name: str, millions: float, tensors: int) -> None:
    with torch.device("meta"):
        model = MAR(MODELS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert MODELS[name].tokens == 256
    assert abs(len(list(model.parameters())) - tensors) <= 2  # the reference keeps a buffer or two besides
    SAMPLING[name].check(MODELS[name])
    assert SAMPLING[name].x0_bound is None  # off for official weights


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_json_round_trip_is_equal(name: str) -> None:
    config = recipe(name)
    assert from_dict(type(config), to_dict(config)) == config
    assert config.warmup + config.decay <= config.images
    assert config.batch < config.save_every < config.images


def test_paper_recipe_matches_the_paper() -> None:
    config = recipe("imagenet-large")
    assert config.scaled_lr == pytest.approx(8e-4)
    assert (config.beta1, config.beta2, config.weight_decay, config.clip) == (0.9, 0.95, 0.02, 3.0)
    assert config.images / config.warmup == 8  # 800 epochs, 100 of warm-up
    assert (config.model.label_drop, config.model.head.batch_mul, config.model.mask_ratio_min) == (0.1, 4, 0.7)


def test_bundled_recipe_fits_data_and_size() -> None:
    config = recipe("fashion")
    with torch.device("meta"):
        model = MAR(config.model)
    assert 4 * sum(p.numel() for p in model.parameters()) < 16e6  # bytes in float32; half of it ships
    assert (config.model.grid, config.model.channels, config.model.classes) == ((28, 28), 1, 10)
    assert config.flip is not True  # shoes all face one way


def test_cifar10_recipe_is_as_small_as_fashion() -> None:
    config = recipe("cifar10")
    assert (config.model.grid, config.model.channels, config.model.classes) == ((8, 8), 16, 10)
    assert (config.model.tokens, config.model.token_width, config.model.head.prediction) == (64, 16, "x0")
    assert (config.model.encoder, config.tokenizer) == (recipe("fashion").model.encoder, "pca4")
    assert config.flip is None  # as the data says


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="no recipe 'fasion'; there are fashion, cifar10, imagenet-base"):
        recipe("fasion")


@pytest.mark.parametrize("name", RECIPES)
def test_presets_are_ordered_by_cost(name: str) -> None:
    config = recipe(name)
    own, tokens = config.sampling, config.model.tokens
    exact, balanced, fast = (apply_preset(own, tokens, preset) for preset in ("exact", "balanced", "fast"))
    assert exact == own
    for sooner, later in ((balanced, own), (fast, balanced)):
        few = own.steps <= math.sqrt(tokens)  # as published for eMIGM: no preset has fewer
        assert sooner.steps == own.steps if few else sooner.steps < later.steps
        assert sooner.diffusion_steps <= later.diffusion_steps
        sooner.check(config.model)
    kept = ("guidance_scale", "guidance_schedule", "temperature", "x0_bound")
    assert {tuple(getattr(way, field) for field in kept) for way in (own, balanced, fast)} == {
        tuple(getattr(own, field) for field in kept)
    }


def test_preset_never_exceeds_the_models_settings() -> None:
    few = SamplingConfig(steps=3, diffusion_steps=2)
    for preset in SAMPLING_PRESETS:
        way = apply_preset(few, 256, preset)
        assert way.steps <= 3
        assert max(way.diffusion_steps, way.diffusion_steps_end or 1) <= 2


def _cost(sampling: SamplingConfig, config: ModelConfig) -> tuple[int, int]:
    """Runs of the trunk, and of the head for all tokens, on one image."""
    schedule = tuple(mask_schedule(config.tokens, sampling.steps, sampling.mask_schedule))
    settings = step_settings(sampling, schedule, config.tokens)
    revealed = [before - after for before, after in pairwise([config.tokens, *schedule])]
    trunk = sum(1 + each.run_uncond for each in settings)
    return trunk, sum(
        (1 + each.guided) * each.diffusion_steps * count for each, count in zip(settings, revealed, strict=True)
    )


@cache
def _drawn_models() -> dict[str, tuple[SamplingConfig, ModelConfig]]:
    """Settings and shape of every model that has a name."""
    models = {name: (model.sampling, model.config) for name, model in PUBLISHED.items()}
    models |= {f"recipe {name}": (recipe(name).sampling, recipe(name).model) for name in RECIPES}
    for name in BUNDLED:
        header = read_header(asset(f"{name}.safetensors"))
        models[f"bundled {name}"] = (header.sampling, header.model)
    return models


@pytest.mark.parametrize("preset", ["balanced", "fast"])
@pytest.mark.parametrize("name", _drawn_models())
def test_preset_of_a_named_model_never_costs_more(name: str, preset: str) -> None:
    own, config = _drawn_models()[name]
    way = apply_preset(own, config.tokens, preset)
    trunk, head = _cost(way, config)
    own_trunk, own_head = _cost(own, config)
    assert trunk <= own_trunk
    assert head <= own_head
    if "emigm" in name:
        assert way == own
    else:
        assert trunk < own_trunk
        assert head < own_head or own.diffusion_steps == way.diffusion_steps


@pytest.mark.parametrize("preset", ["balanced", "fast"])
def test_preset_leaves_settings_within_its_bounds(preset: str) -> None:
    bounds = SAMPLING_PRESETS[preset]
    assert bounds.steps is not None
    assert bounds.diffusion_steps is not None
    steps, tokens = math.ceil(bounds.steps * 16), 256
    own = SamplingConfig(steps=steps, diffusion_steps=bounds.diffusion_steps, solver="dpm++3s", guidance_scale=4.0)
    assert apply_preset(own, tokens, preset) == own
    falling = replace(own, diffusion_steps_end=2)
    assert apply_preset(falling, tokens, preset) == falling
    more = {"steps": steps + 1}, {"diffusion_steps": own.diffusion_steps + 1}, {"diffusion_steps_end": 100}
    for change in more:
        way = apply_preset(replace(own, **change), tokens, preset)
        assert (way.solver, way.timestep_spacing, way.start_t) == ("dpm++2m-sde", "log-snr", 0.95)
        assert way.steps == steps


def test_preset_values_in_numbers() -> None:
    bounds = SamplingPreset(steps=1.5, diffusion_steps=8, guidance_interval=(0.2, 1.0), uncond_interval=2)
    own = SamplingConfig(steps=64, diffusion_steps=25, diffusion_steps_end=5, guidance_scale=3.0, solver="ddim")
    way = bounds.apply(own, 256)
    assert (way.steps, way.diffusion_steps, way.diffusion_steps_end) == (24, 8, 5)
    assert (way.solver, way.guidance_scale, way.guidance_interval, way.uncond_interval) == ("ddim", 3.0, (0.2, 1.0), 2)
    assert bounds.apply(replace(own, guidance_interval=(0.0, 0.1)), 256).guidance_interval == (0.1, 0.1)
    assert bounds.apply(replace(own, guidance_interval=(0.5, 1.0)), 256).guidance_interval == (0.5, 1.0)
    assert bounds.apply(own, 49).steps == 11
    unusual = SamplingConfig(
        steps=100, diffusion_steps=10, diffusion_steps_end=25, solver="dpm++2m", start_t=0.9, uncond_interval=3
    )
    assert SamplingPreset().apply(own, 49) == own
    assert SamplingPreset().apply(unusual, 49) == unusual
    assert SamplingPreset(start_t=0.95, uncond_interval=2).apply(unusual, 49) == unusual
