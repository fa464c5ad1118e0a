"""Configure models, sampling and training by frozen dataclasses.

They are validated on construction. A field's docstring is its command-line help. `to_dict` and `from_dict` carry a
config to JSON and back.
"""

from mar.config.fields import ConfigError, from_dict, later_defaults, rename_old_keys, to_dict, to_dict_for_hash
from mar.config.model import HeadConfig, MaskDraw, ModelConfig, NoiseSchedule, Prediction, TrunkConfig
from mar.config.sampling import (
    GuidanceSchedule,
    MaskSchedule,
    Order,
    Preset,
    RevealRule,
    SamplingConfig,
    Solver,
    TimestepSpacing,
)
from mar.config.training import (
    ActivationCheckpointing,
    LogTo,
    Optimizer,
    Precision,
    Strategy,
    TrainConfig,
    resolve_image_channels,
)

__all__ = [
    "ActivationCheckpointing",
    "ConfigError",
    "GuidanceSchedule",
    "HeadConfig",
    "LogTo",
    "MaskDraw",
    "MaskSchedule",
    "ModelConfig",
    "NoiseSchedule",
    "Optimizer",
    "Order",
    "Precision",
    "Prediction",
    "Preset",
    "RevealRule",
    "SamplingConfig",
    "Solver",
    "Strategy",
    "TimestepSpacing",
    "TrainConfig",
    "TrunkConfig",
    "from_dict",
    "later_defaults",
    "rename_old_keys",
    "resolve_image_channels",
    "to_dict",
    "to_dict_for_hash",
]
