"""Images <-> normalised latents, behind one contract: `base.Tokenizer`.

`KLTokenizer` and what else needs diffusers, which takes seconds to import, are imported when first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mar.tokenizer.base import Posterior, Tokenizer
from mar.tokenizer.pixels import PixelTokenizer

if TYPE_CHECKING:
    from mar.tokenizer.kl import KLTokenizer

__all__ = ["KLTokenizer", "PixelTokenizer", "Posterior", "Tokenizer", "build"]


def __getattr__(name: str) -> Any:
    if name == "KLTokenizer":
        from mar.tokenizer.kl import KLTokenizer

        return KLTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build(spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.spec()` describes, its weights and statistics still to come by `load_state_dict`.

    Raises ValueError for a kind that this version does not know, and for a "kl" without its config.
    """
    kind = spec.get("kind")
    if kind == "pixels":
        tokenizer: Tokenizer = PixelTokenizer(spec.get("image_channels", 3))
    elif kind == "kl":
        if not isinstance(spec.get("config"), Mapping):
            raise ValueError(
                f"tokenizer: got config {spec.get('config')!r}, expected that of a diffusers AutoencoderKL"
            )
        from mar.tokenizer import kl

        tokenizer = kl.from_config(spec["config"])
    else:
        raise ValueError(f"tokenizer: got kind {kind!r}, expected pixels or kl")
    tokenizer.prepare(spec)
    return tokenizer
