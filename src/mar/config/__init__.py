"""The configuration of a model, of sampling and of a training run: frozen dataclasses, validated on construction.

A field's docstring is its command-line help. `to_dict` and `from_dict` carry a config to JSON and back.
"""

from mar.config.fields import ConfigError, from_dict, to_dict
from mar.config.model import HeadConfig, ModelConfig, NoisePath, Prediction, TrunkConfig
from mar.config.sampling import GuidanceSchedule, Order, Preset, RevealSchedule, SamplingConfig, Solver, Spacing
from mar.config.training import LogTo, Optimizer, Precision, Recompute, Strategy, TrainConfig, image_channels

__all__ = [
    "ConfigError",
    "GuidanceSchedule",
    "HeadConfig",
    "LogTo",
    "ModelConfig",
    "NoisePath",
    "Optimizer",
    "Order",
    "Precision",
    "Prediction",
    "Preset",
    "Recompute",
    "RevealSchedule",
    "SamplingConfig",
    "Solver",
    "Spacing",
    "Strategy",
    "TrainConfig",
    "TrunkConfig",
    "from_dict",
    "image_channels",
    "to_dict",
]
