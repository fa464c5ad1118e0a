"""MAR: masked autoregressive image generation with a diffusion loss.

    import mar
    model = mar.load("fashion")
    images = model.sample(labels=["dress", "sneaker"], seeds=[0, 1])

Source: Li et al., "Autoregressive Image Generation without Vector Quantization" (arXiv 2406.11838).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mar.config import HeadConfig, ModelConfig, SamplingConfig, TrainConfig, TrunkConfig
    from mar.model.mar import MAR
    from mar.pipeline import Pipeline
    from mar.sampling.generate import BrokenLatents
    from mar.tokenizer import Tokenizer
    from mar.zoo import load

__all__ = [
    "MAR",
    "BrokenLatents",
    "HeadConfig",
    "ModelConfig",
    "Pipeline",
    "SamplingConfig",
    "Tokenizer",
    "TrainConfig",
    "TrunkConfig",
    "load",
]

_MODULES = {
    "MAR": "mar.model.mar",
    "BrokenLatents": "mar.sampling.generate",
    "HeadConfig": "mar.config",
    "ModelConfig": "mar.config",
    "Pipeline": "mar.pipeline",
    "SamplingConfig": "mar.config",
    "Tokenizer": "mar.tokenizer",
    "TrainConfig": "mar.config",
    "TrunkConfig": "mar.config",
    "load": "mar.zoo",
}


def __getattr__(name: str) -> Any:
    """Import a public name at first use: `import mar` stays quick."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'mar' has no attribute {name!r}")
