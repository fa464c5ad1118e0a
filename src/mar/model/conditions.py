"""Conditions: what an image is to show -> buffer tokens, which carry it through the trunk.

A condition is a tensor with a row for each image; a row of `NO_CONDITION` means none. The kinds:

- class: a class number, shape (n);
- words: numbers of the words of a caption, shape (n, w); `NO_CONDITION` after the last one;
- text: features of the tokens of a caption from a frozen text encoder, shape (n, w, c + 1); the last value is 1 for a
  token, and not positive after the last one.

The paper has classes alone (section 3.3); embeddings of text in front of the sequence are as in Fluid
(arXiv 2410.13863). Letters of shapes: n images, b buffer tokens, w words or text tokens, e encoder width, c features of
a text encoder.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mar.config import ModelConfig
from mar.nn import Linear

NO_CONDITION = -1
"""The label of an image without a class; the value of a row without a condition."""


class ClassCondition(nn.Embedding):
    """Class numbers -> one embedding, which all buffer tokens share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.classes, config.encoder.width)

    def init_weights(self) -> None:
        """Draw embeddings normal(0.02)."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, condition: Int[Tensor, " n"]) -> Float[Tensor, "n 1 e"]:
        """Return embeddings; of class 0 where there is none."""
        return super().forward(condition.clamp(min=0)).unsqueeze(1)


class _CaptionCondition(nn.Module):
    """A caption -> a buffer token for each of its words, and learned ones after the last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.length = config.buffer_size
        self.padding = nn.Parameter(torch.empty(config.encoder.width))

    def fill(self, embedded: Float[Tensor, "n w e"], there: Bool[Tensor, "n w"]) -> Float[Tensor, "n b e"]:
        """Put the learned padding where there is no word.

        ValueError for captions longer than the buffer.
        """
        if embedded.shape[1] > self.length:
            raise ValueError(f"captions: got {embedded.shape[1]} tokens, expected at most {self.length}; cut them")
        tokens = torch.where(there.unsqueeze(2), embedded, self.padding)
        missing = self.padding.expand(len(tokens), self.length - tokens.shape[1], -1)
        return torch.cat([tokens, missing.to(tokens.dtype)], dim=1)


class WordsCondition(_CaptionCondition):
    """Numbers of words -> their embeddings, learned with the model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.words, config.encoder.width)

    def init_weights(self) -> None:
        """Draw embeddings normal(0.02)."""
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.padding, std=0.02)

    def forward(self, condition: Int[Tensor, "n w"]) -> Float[Tensor, "n b e"]:
        """Return an embedding for each word."""
        return self.fill(self.words(condition.clamp(min=0)), condition != NO_CONDITION)


class TextCondition(_CaptionCondition):
    """Features of a frozen text encoder -> normalized, projected tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.text_width)
        self.project = Linear(config.text_width, config.encoder.width)

    def init_weights(self) -> None:
        """Draw the projection: tokens are as large as other embeddings."""
        nn.init.normal_(self.project.weight, std=0.02 / self.project.in_features**0.5)
        nn.init.zeros_(self.project.bias)
        nn.init.normal_(self.padding, std=0.02)

    def forward(self, condition: Float[Tensor, "n w c_and_1"]) -> Float[Tensor, "n b e"]:
        """Return a projection for each text token."""
        features, there = condition[..., :-1], condition[..., -1] > 0
        return self.fill(self.project(self.norm(features)), there)


Conditioner = ClassCondition | WordsCondition | TextCondition
_KINDS: dict[str, tuple[str, type[Conditioner]]] = {
    "class": ("class_embed", ClassCondition),
    "words": ("words_embed", WordsCondition),
    "text": ("text_embed", TextCondition),
}


def build_conditioner(config: ModelConfig) -> tuple[str, Conditioner | None]:
    """Return the model's conditioner and the name of its weights; None for an unconditional model."""
    if config.condition == "none":
        return "class_embed", None
    name, kind = _KINDS[config.condition]
    return name, kind(config)


def has_condition(condition: Shaped[Tensor, "n ..."]) -> Bool[Tensor, " n"]:
    """Tell which images have a condition."""
    return (condition != NO_CONDITION).flatten(1).any(1) if condition.ndim > 1 else condition != NO_CONDITION


def drop_condition(condition: Shaped[Tensor, "n ..."], drop: Bool[Tensor, " n"]) -> Shaped[Tensor, "n ..."]:
    """Return conditions without those of the images in `drop`."""
    return torch.where(drop.view(-1, *[1] * (condition.ndim - 1)), NO_CONDITION, condition)
