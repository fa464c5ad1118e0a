"""Configs that can't be are refused with what was got and what was expected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mar.config import (
    ConfigError,
    HeadConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    TrunkConfig,
    from_dict,
    to_dict,
)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (TrunkConfig, {"width": 10, "num_heads": 3}, "width 10 is not a multiple of num_heads 3"),
        (TrunkConfig, {"depth": 0}, "depth is 0, but it must be at least 1"),
        (TrunkConfig, {"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        (HeadConfig, {"batch_mul": 0}, "batch_mul is 0"),
        (
            ModelConfig,
            {"grid": (16, 15), "patch_size": 2},
            "16x15 cells can't be cut into patches of 2x2.*image size or a",
        ),
        (ModelConfig, {"grid": (0, 16)}, "0x16"),
        (ModelConfig, {"classes": -1}, "classes is -1"),
        (ModelConfig, {"label_drop": 1.0}, "label_drop is 1.0.*less than 1"),
        (ModelConfig, {"mask_ratio_min": 0.0}, "mask_ratio_min is 0.0"),
        (SamplingConfig, {"steps": 0}, "steps is 0, but it must be at least 1"),
        (SamplingConfig, {"diffusion_steps": 0}, "diffusion_steps is 0"),
        (SamplingConfig, {"guidance_scale": -0.1}, "guidance_scale is -0.1"),
        (SamplingConfig, {"guidance_scale": float("nan")}, "guidance_scale is nan"),
        (SamplingConfig, {"temperature": float("inf")}, "temperature is inf"),
        (SamplingConfig, {"x0_bound": 0.0}, "x0_bound is 0.0"),
        (SamplingConfig, {"x0_bound": float("inf")}, "x0_bound is inf"),
        (SamplingConfig, {"diffusion_steps_end": 0}, "diffusion_steps_end is 0, but it must be at least 1"),
        (SamplingConfig, {"start_t": 0.0}, r"start_t is 0.0, outside \(0, 1\]"),
        (SamplingConfig, {"start_t": 1.01}, "start_t is 1.01"),
        (SamplingConfig, {"guidance_interval": (0.6, 0.5)}, "guidance_interval is 0.6 0.5, but it must be two numbers"),
        (SamplingConfig, {"guidance_interval": (0.0, 1.5)}, "guidance_interval is 0.0 1.5"),
        (SamplingConfig, {"uncond_interval": 0}, "uncond_interval is 0, but it must be at least 1"),
        (TrainConfig, {"batch": 0}, "batch is 0"),
        (TrainConfig, {"lr": 0.0}, "lr is 0.0, but it must be positive"),
        (TrainConfig, {"warmup": -1}, "warmup is -1, but it must not be negative"),
        (TrainConfig, {"ema": 1.0}, "ema is 1.0"),
        (TrainConfig, {"hold_out": 1}, r"hold_out is 1, but it must be 0 \(none\) or at least 2"),
        (TrainConfig, {"hold_out": -2}, "hold_out is -2"),
        (TrainConfig, {"image_channels": 2}, r"image_channels is 2, but it must be 1 \(gray\) or 3"),
        (TrainConfig, {"validate_count": 0}, "validate_count is 0, but it must be at least 1"),
        (TrainConfig, {"validate_every": -1}, "validate_every is -1, but it must not be negative"),
        (
            TrainConfig,
            {"model": ModelConfig(classes=0), "sampling": SamplingConfig(guidance_scale=2.0)},
            "guidance_scale 2.0 needs",
        ),
    ],
)
def test_config_invalid_value_is_refused(kind: type, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kind(**settings)


@pytest.mark.parametrize("name", ["steps", "diffusion_steps", "diffusion_steps_end", "uncond_interval"])
@pytest.mark.usefixtures("untyped")
def test_config_fractional_step_is_refused(name: str) -> None:
    assert getattr(SamplingConfig(**{name: np.int64(2)}), name) == 2
    for value in (2.5, "2"):
        with pytest.raises(ConfigError, match=f"{name} is {value!r}, but it must be a whole number"):
            SamplingConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "name", "value", "words"),
    [
        (HeadConfig(), "prediction", "x", "prediction is 'x', but it must be noise, v, x0 or flow"),
        (HeadConfig(), "path", "straight", "path is 'straight', but it must be cosine or linear"),
        (SamplingConfig(), "guidance_schedule", "cosine", "'cosine', but it must be linear or constant"),
        (SamplingConfig(), "solver", "euler", "solver is 'euler', but it must be ancestral, ddim, .* or dpm"),
        (SamplingConfig(), "timestep_spacing", "even", "timestep_spacing is 'even', but it must be time or log-snr"),
        (SamplingConfig(), "mask_schedule", "linear", "'linear', but it must be cosine or exponential"),
        (SamplingConfig(), "order", "raster", "'raster', but it must be random, checkerboard or halton"),
        (TrainConfig(), "precision", "fp16", "precision is 'fp16', but it must be fp32 or bf16"),
        (
            TrainConfig(),
            "activation_checkpointing",
            "half",
            "activation_checkpointing is .half., but it must be none, selective or full",
        ),
    ],
)
def test_config_unknown_choice_is_refused(config: Any, name: str, value: str, words: str) -> None:
    object.__setattr__(config, name, value)  # under pytest the types of arguments are checked before the config is
    with pytest.raises(ConfigError, match=words):
        config.__post_init__()


def test_config_grid_from_json_is_a_tuple() -> None:
    config = from_dict(ModelConfig, {"grid": [8, 4], "encoder": {"width": 32, "heads": 4}})
    assert config.grid == (8, 4)
    assert config.encoder == TrunkConfig(width=32, num_heads=4)
    assert hash(config) == hash(from_dict(ModelConfig, to_dict(config)))


def test_config_removed_field_with_the_fixed_value_is_ignored() -> None:
    old = {"width": 32, "heads": 4, "norm": "layer", "mlp": "gelu", "qk_norm": False}
    assert from_dict(TrunkConfig, old) == TrunkConfig(32, num_heads=4)
    assert from_dict(HeadConfig, {"timesteps": "uniform"}) == HeadConfig()
    with pytest.raises(ConfigError, match="TrunkConfig has no field mlp; it has depth"):
        from_dict(TrunkConfig, {"norm": "layer", "mlp": "swiglu"})
    with pytest.raises(ConfigError, match="HeadConfig has no field steps"):
        from_dict(HeadConfig, {"steps": None})


def test_config_unknown_nested_field_is_named() -> None:
    with pytest.raises(ConfigError, match="HeadConfig has no field steps; it has batch_mul, depth"):
        from_dict(TrainConfig, {"model": {"head": {"steps": 3}}})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"diffusion_steps": 51}, "diffusion_steps is 51, but the model's schedule has 50$"),
        ({"diffusion_steps": 5, "diffusion_steps_end": 51}, "diffusion_steps_end is 51, but"),
        ({"diffusion_steps": 49, "start_t": 0.95}, "49, but the model's schedule has 50, of which start_t 0.95"),
    ],
)
def test_sampling_config_beyond_the_model_is_refused(settings: dict[str, Any], words: str) -> None:
    model = ModelConfig(head=HeadConfig(diffusion_steps=50))
    with pytest.raises(ConfigError, match=words):
        SamplingConfig(**settings).check(model)
    SamplingConfig(diffusion_steps=48, start_t=0.95).check(model)


def test_config_of_an_older_version_means_the_same() -> None:
    old = {"steps": 20, "diffusion_steps": 25, "guidance": 4.0, "guidance_schedule": "linear", "temperature": 1.0}
    read = from_dict(SamplingConfig, {**old, "x0_bound": 2.2})
    assert (read.solver, read.timestep_spacing, read.diffusion_steps_end, read.start_t) == (
        "ancestral",
        "time",
        None,
        1.0,
    )
    assert (read.guidance_interval, read.uncond_interval) == ((0.0, 1.0), 1)
    assert (read.mask_schedule, read.order) == ("cosine", "random")


def test_model_config_derived_values_are_right() -> None:
    config = ModelConfig(channels=4, grid=(8, 12), patch_size=2)
    assert (config.tokens, config.token_width) == (24, 16)
    assert [ModelConfig(classes=c, label_drop=d).guidable for c, d in ((10, 0.1), (0, 0.1), (10, 0.0))] == [
        True, False, False,
    ]  # fmt: skip
    assert TrainConfig(batch=2048).scaled_lr == pytest.approx(8e-4)
