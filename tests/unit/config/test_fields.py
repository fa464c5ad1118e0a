"""Names that options had before still work: in files, on the command line and in Python, and say the new one once."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from mar import zoo
from mar.autoconfig.sizes import DatasetSummary
from mar.cli.convert import ConvertOptions
from mar.cli.options import parse
from mar.cli.sample import SampleOptions
from mar.cli.tokenizer import TokenizerTrainOptions
from mar.cli.train import TrainOptions
from mar.config import (
    ConfigError,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    TrunkConfig,
    from_dict,
    rename_old_keys,
    to_dict,
    to_dict_for_hash,
)
from mar.config.tokenizer import TokenizerTrainConfig
from mar.evaluation.sweep import Table, fixed_settings, points

FASHION = "24dca85e67afdf165ef736ccd4383bc370cfb28530353c3446b230f41ba8c482"
"""Fingerprint of the bundled model, as the version before the renaming computed it."""
OLD_SAMPLING = {
    "guidance": 3.0,
    "spacing": "log-snr",
    "noisiest": 0.95,
    "guidance_from": 0.1,
    "guidance_until": 0.9,
    "guidance_refresh": 2,
    "reveal_schedule": "exponential",
}
NEW_SAMPLING = SamplingConfig(
    guidance_scale=3.0,
    timestep_spacing="log-snr",
    start_t=0.95,
    guidance_interval=(0.1, 0.9),
    uncond_interval=2,
    mask_schedule="exponential",
)


def test_old_keys_in_files_are_read_silently(caplog: pytest.LogCaptureFixture) -> None:
    assert from_dict(SamplingConfig, OLD_SAMPLING) == NEW_SAMPLING
    trunk = {"width": 32, "heads": 4}
    model = from_dict(ModelConfig, {"patch": 2, "buffer": 8, "encoder": trunk, "decoder": trunk})
    assert model == ModelConfig(
        patch_size=2, buffer_size=8, encoder=TrunkConfig(32, num_heads=4), decoder=model.encoder
    )
    run = from_dict(TrainConfig, {"model": {"patch": 2}, "sampling": OLD_SAMPLING, "recompute": True, "colours": 1})
    assert (run.model.patch_size, run.sampling, run.activation_checkpointing, run.image_channels) == (
        2,
        NEW_SAMPLING,
        "full",
        1,
    )
    assert from_dict(TokenizerTrainConfig, {"colours": 1}).image_channels == 1
    summary = from_dict(DatasetSummary, {"count": 20, "side": 8, "colours": 1, "reach": 3.0})
    assert summary == DatasetSummary(20, 8, 1, max_abs_z=3.0)
    assert not caplog.records


def test_old_guidance_until_alone_keeps_the_start() -> None:
    assert rename_old_keys(SamplingConfig, {"guidance_until": 0.5}) == {"guidance_interval": (0.0, 0.5)}
    own = SamplingConfig(guidance_interval=(0.2, 0.8))
    assert rename_old_keys(SamplingConfig, {"guidance_from": 0.5}, own) == {"guidance_interval": (0.5, 0.8)}


def test_other_keys_are_unchanged() -> None:
    values = {"weights": "abc", "guidance_scale": 2.0, "odd]": [1], "a[0]": {}}
    assert rename_old_keys(SamplingConfig, values) == values


def test_old_name_beside_new_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="got both guidance and guidance_scale, expected guidance_scale alone"):
        rename_old_keys(SamplingConfig, {"guidance_scale": 1.0, "guidance": 2.0})


def test_old_name_in_python_logs_the_new_one_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.tiny_pipeline()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            old = model.sampling_with(guidance=3.0, guidance_from=0.5)
    assert old == replace(model.sampling, guidance_scale=3.0, guidance_interval=(0.5, 1.0))
    assert caplog.messages == [
        "guidance is now called guidance_scale; the old name still works",
        "guidance_from is now called guidance_interval[0]; the old name still works",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert ModelConfig(patch=2) == ModelConfig(patch_size=2)  # type: ignore[call-arg]
    assert caplog.messages == ["patch is now called patch_size; the old name still works"]


@pytest.mark.parametrize("words", ["--guidance 3 --guidance-from=.1", "--guidance=3 --guidance_from .1"])
def test_old_option_of_sample_is_an_alias(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--spacing", "log-snr", "--noisiest", "0.95", "--guidance-refresh=2", "--reveal-schedule", "exponential"]
    for _ in range(2):
        options = parse(SampleOptions, "sample", ["fashion", *words.split(), *rest])
    model = tiny.tiny_pipeline()
    assert model.sampling_with(**options.settings()) == replace(
        NEW_SAMPLING,
        steps=model.sampling.steps,
        diffusion_steps=model.sampling.diffusion_steps,
        x0_bound=model.sampling.x0_bound,
        guidance_interval=(0.1, 1.0),
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert "mar: --guidance is now --guidance-scale; the old name still works" in lines
    assert any(line.startswith("mar: --guidance") and "number 1 of --guidance-interval" in line for line in lines)
    assert "mar: --reveal-schedule is now --mask-schedule; the old name still works" in lines


def test_old_option_of_train_is_an_alias(capsys: pytest.CaptureFixture[str]) -> None:
    own = TrainOptions(config=TrainConfig(sampling=SamplingConfig(guidance_interval=(0.2, 0.8))))
    words = "--model.patch 2 --model.buffer=8 --model.encoder.heads 6 --model.decoder.heads 4 --recompute full"
    words += " --colours 1 --sampling.guidance 2 --sampling.guidance-until 0.7"
    config = parse(TrainOptions, "train", words.split(), own).config
    assert (config.model.patch_size, config.model.buffer_size) == (2, 8)
    assert (config.model.encoder.num_heads, config.model.decoder.num_heads) == (6, 4)
    assert (config.activation_checkpointing, config.image_channels) == ("full", 1)
    assert config.sampling == SamplingConfig(guidance_scale=2.0, guidance_interval=(0.2, 0.7))
    said = capsys.readouterr().err
    assert "mar: --model.encoder.heads is now --model.encoder.num-heads; the old name still works\n" in said
    assert said.count("num-heads") == 1
    assert "mar: --sampling.guidance-until is now number 2 of --sampling.guidance-interval; the old" in said


def test_old_option_of_other_verbs_is_an_alias() -> None:
    assert parse(TokenizerTrainOptions, "tokenizer train", ["--colours", "3"]).config.image_channels == 3
    options = parse(ConvertOptions, "convert", ["a.pth", "b.safetensors", "--heads", "2", "--patch", "1"])
    assert (options.num_heads, options.patch_size) == (2, 1)
    with pytest.raises(ValueError, match="--guidance"):
        parse(ConvertOptions, "convert", ["a.pth", "b.safetensors", "--guidance", "2"])


def test_sweep_with_old_names_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = {"distance": 1.0, "seconds": 2.0, "count": 2}
    settings = {"weights": "abc", "steps": 8, "guidance_from": 0.0, "guidance_until": 1.0, "noisiest": 1.0}
    held = {
        "settings": {**settings, "swept": "guidance, spacing"},
        "rows": [{"point": {"guidance": 2.0}, "report": report}],
    }
    (tmp_path / "sweep.json").write_text(json.dumps(held))
    point = {"guidance_scale": 2.0, "timestep_spacing": "time"}
    fixed = fixed_settings(SamplingConfig(steps=8), point)
    assert not {*point} & {*fixed}
    assert fixed["guidance_until"] == 1.0
    now = {name: fixed[name] for name in ("steps", "guidance_from", "guidance_until", "start_t")}
    table = Table(tmp_path, {"weights": "abc", **now, "swept": "guidance_scale, timestep_spacing"})
    assert table.has({"guidance_scale": 2.0})
    with caplog.at_level(logging.WARNING):
        assert points(["guidance=1,2"]) == [{"guidance_scale": 1.0}, {"guidance_scale": 2.0}]
    assert len(caplog.messages) == 1
    assert "guidance_until" not in fixed_settings(SamplingConfig(), {"guidance_until": 0.5})


def test_config_digest_uses_the_first_names() -> None:
    values = to_dict_for_hash(ModelConfig())
    assert {"patch", "buffer", "channels"} <= {*values}
    assert {"heads", "width"} <= {*values["encoder"]}
    assert {*to_dict(ModelConfig())} - {*values} == {
        "patch_size",
        "buffer_size",
        "words",
        "text_width",
        "mask_schedule",
        "tie_null",
    }
    assert to_dict_for_hash(ModelConfig(classes=0, words=7))["words"] == 7
    assert zoo.load("fashion").fingerprint() == FASHION
