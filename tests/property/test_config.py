"""A config is what its JSON says, for any config that can be."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mar.config import (
    ActivationCheckpointing,
    ConfigError,
    GuidanceSchedule,
    HeadConfig,
    LogTo,
    MaskSchedule,
    ModelConfig,
    NoiseSchedule,
    Optimizer,
    Order,
    Precision,
    Prediction,
    RevealRule,
    SamplingConfig,
    Solver,
    Strategy,
    TimestepSpacing,
    TrainConfig,
    TrunkConfig,
    from_dict,
    to_dict,
)

# Of a tuple of any length, the check of types looks at one item drawn by `random`; hypothesis would draw all itself.
beartype_draws = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")

COUNT = st.integers(1, 5000)
NOT_NEGATIVE = st.integers(0, 10**9)
FRACTION = st.floats(0, 1, exclude_max=True)
POSITIVE = st.floats(1e-9, 1e6)

TRUNKS = st.builds(
    lambda heads, per_head, depth, ratio: TrunkConfig(heads * per_head, depth, heads, ratio),
    st.integers(1, 20), st.integers(1, 128), COUNT, st.floats(0.1, 10),
)  # fmt: skip
HEADS = st.builds(
    HeadConfig, COUNT, COUNT, COUNT, st.sampled_from(get_args(NoiseSchedule)), st.sampled_from(get_args(Prediction)),
    COUNT,
)  # fmt: skip


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    patch = draw(st.integers(1, 8))
    grid = (patch * draw(st.integers(1, 64)), patch * draw(st.integers(1, 64)))
    return ModelConfig(
        draw(COUNT), grid, patch, draw(TRUNKS), draw(TRUNKS), draw(HEADS), draw(COUNT), draw(st.integers(0, 2000)),
        draw(FRACTION), draw(FRACTION), draw(FRACTION), draw(st.floats(0.01, 1)),
    )  # fmt: skip


SAMPLINGS = st.builds(
    SamplingConfig, COUNT, COUNT, st.floats(0, 20), st.sampled_from(get_args(GuidanceSchedule)), st.floats(0, 5),
    st.none() | POSITIVE, st.sampled_from(get_args(Solver)), st.sampled_from(get_args(TimestepSpacing)),
    st.none() | COUNT, st.floats(0.01, 1), st.tuples(st.floats(0, 0.5), st.floats(0.5, 1)), COUNT,
    st.sampled_from(get_args(MaskSchedule)), st.sampled_from(get_args(Order)), st.sampled_from(get_args(RevealRule)),
    st.tuples(st.floats(0, 0.5), st.floats(0.5, 1)),
)  # fmt: skip


@st.composite
def runs(draw: st.DrawFn) -> TrainConfig:
    model = draw(models())
    drawn = draw(SAMPLINGS)
    timesteps = round(drawn.start_t * (model.head.diffusion_steps - 1)) + 1
    sampling = replace(
        drawn, guidance_scale=drawn.guidance_scale if model.guidable else 1.0,
        diffusion_steps=min(drawn.diffusion_steps, timesteps),
        diffusion_steps_end=drawn.diffusion_steps_end and min(drawn.diffusion_steps_end, timesteps),
    )  # fmt: skip
    validate_every = draw(NOT_NEGATIVE)
    return TrainConfig(
        model=model, sampling=sampling, data=draw(st.text()), tokenizer=draw(st.text()), images=draw(COUNT),
        batch=draw(COUNT), lr=draw(POSITIVE), warmup=draw(NOT_NEGATIVE), decay=draw(NOT_NEGATIVE),
        optimizer=draw(st.sampled_from(get_args(Optimizer))), muon_factor=draw(POSITIVE), weight_decay=draw(FRACTION),
        beta1=draw(FRACTION), beta2=draw(FRACTION), clip=draw(POSITIVE), ema=draw(FRACTION),
        precision=draw(st.sampled_from(get_args(Precision))), strategy=draw(st.sampled_from(get_args(Strategy))),
        accumulate=draw(COUNT), activation_checkpointing=draw(st.sampled_from(get_args(ActivationCheckpointing))),
        compile=draw(st.booleans()), flip=draw(st.none() | st.booleans()), shift=draw(NOT_NEGATIVE),
        seed=draw(st.integers(1 - 2**64, 2**64 - 1)), workers=draw(NOT_NEGATIVE),
        save_every=draw(COUNT), keep=draw(COUNT), sample_every=draw(NOT_NEGATIVE), log_every=draw(COUNT),
        log_to=tuple(draw(st.lists(st.sampled_from(get_args(LogTo))))), validate_every=validate_every,
        patience=draw(NOT_NEGATIVE) if validate_every else 0, validate_on=draw(st.none() | st.text()),
        validate_count=draw(COUNT), hold_out=draw(st.just(0) | st.integers(2, 10**9)), init=draw(st.none() | st.text()),
    )  # fmt: skip


@beartype_draws
@settings(max_examples=30)
@given(config=TRUNKS | HEADS | models() | SAMPLINGS | runs())
def test_config_json_round_trip_is_equal(config: Any) -> None:
    text = json.dumps(to_dict(config))
    assert from_dict(type(config), json.loads(text)) == config


@beartype_draws
@settings(max_examples=10)
@given(config=runs(), name=st.text(st.characters(categories=["L"]), min_size=1).map(lambda name: f"x_{name}"))
def test_config_unknown_field_is_refused_by_name(config: TrainConfig, name: str) -> None:
    values = to_dict(config)
    for place in (values, values["model"], values["model"]["decoder"], values["model"]["head"], values["sampling"]):
        place[name] = 1
        with pytest.raises(ConfigError, match=f"has no field {name}"):
            from_dict(TrainConfig, values)
        del place[name]
    assert from_dict(TrainConfig, values) == config


@settings(max_examples=10)
@given(config=models())
def test_config_missing_fields_get_defaults(config: ModelConfig) -> None:
    values = to_dict(config)
    del values["buffer_size"], values["head"]["width"]
    read = from_dict(ModelConfig, values)
    assert (read.buffer_size, read.head.width) == (ModelConfig().buffer_size, HeadConfig().width)
    assert (read.grid, read.head.depth) == (config.grid, config.head.depth)
