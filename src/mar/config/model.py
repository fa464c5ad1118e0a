"""Configure a model: latents, encoder, decoder and diffusion head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mar.config.fields import accept_old_names, fraction, one_of, positive, require

Prediction = Literal["noise", "v", "x0", "flow"]
"""Predict noise, v, clean tokens or the flow's velocity."""
Condition = Literal["none", "class", "words", "text"]
"""Kinds of conditions (`mar.model.conditions`)."""
NoiseSchedule = Literal["cosine", "linear"]
"""Follow the cosine schedule or the linear path of flow matching."""
MaskDraw = Literal["normal", "exp"]
"""Draw mask ratios from a truncated normal, or by eMIGM's exponential schedule."""


@accept_old_names
@dataclass(frozen=True)
class TrunkConfig:
    """A stack of transformer blocks: the encoder or the decoder."""

    width: int = 768
    """Features of a token inside the stack."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads; divides the width."""
    mlp_ratio: float = 4.0
    """Width of a block's MLP as a multiple of `width`."""
    rotary: bool = False
    """Rotary position embeddings on the grid of tokens, beside the learned ones."""

    def __post_init__(self) -> None:
        positive(self, "width", "depth", "num_heads")
        require(self.mlp_ratio > 0, f"mlp_ratio is {self.mlp_ratio}, but it must be positive")
        require(self.width % self.num_heads == 0, f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        require(
            not self.rotary or self.head_width % 4 == 0,
            f"rotary needs heads of a multiple of 4 features, but they have {self.head_width}; change the width",
        )

    @property
    def head_width(self) -> int:
        """Features of an attention head."""
        return self.width // self.num_heads

    @property
    def hidden(self) -> int:
        """Features inside a block's MLP."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class HeadConfig:
    """The diffusion head: an MLP that samples a token given z.

    Paper, sections 3.2 and 4.1. Another head has a subclass with a `kind` of its own, which saved configs name.
    """

    kind: ClassVar[str] = "diffusion"
    width: int = 1024
    """Features of the MLP."""
    depth: int = 6
    """Residual blocks."""
    diffusion_steps: int = 1000
    """Length of the training noise schedule."""
    path: NoiseSchedule = "cosine"
    """Noise schedule: `cosine` (the paper), or `linear`, the path of flow matching."""
    prediction: Prediction = "noise"
    """`noise` (the paper), `v` = sqrt(a) noise - sqrt(1-a) x0, the clean token `x0`, or the `flow` noise - x0."""
    batch_mul: int = 4
    """Pairs of timestep and noise for each token in a training step."""

    def __post_init__(self) -> None:
        positive(self, "width", "depth", "diffusion_steps", "batch_mul")
        one_of(self, "path", NoiseSchedule)
        one_of(self, "prediction", Prediction)


@accept_old_names
@dataclass(frozen=True)
class ModelConfig:
    """A MAR: latents, encoder, decoder and diffusion head."""

    channels: int = 16
    """Channels of the tokenizer's latents."""
    grid: tuple[int, int] = (16, 16)
    """Height and width of the latents, in latent cells."""
    patch_size: int = 1
    """Side of a token in latent cells: a token is a square of them."""
    encoder: TrunkConfig = field(default_factory=TrunkConfig)
    decoder: TrunkConfig = field(default_factory=TrunkConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    buffer_size: int = 64
    """Tokens in front of the sequence, which carry the condition; captions are cut to so many tokens."""
    classes: int = 1000
    """Number of classes; 0 for a model without classes."""
    label_drop: float = 0.1
    """Probability of training an image without its class or caption; 0 makes guidance impossible."""
    attention_dropout: float = 0.1
    """Dropout of attention weights, in training."""
    projection_dropout: float = 0.1
    """Dropout after the projections of attention and MLP, in training."""
    mask_ratio_min: float = 0.7
    """Lower end of the truncated normal(1, 0.25) of mask ratios."""
    words: int = 0
    """Number of words that captions may have, for a model that learns them."""
    text_width: int = 0
    """Features of a frozen text encoder's tokens, for a model that reads captions by one."""
    mask_schedule: MaskDraw = "normal"
    """Mask ratios in training: `normal`, truncated at `mask_ratio_min` (the paper), or `exp` (eMIGM)."""
    tie_null: bool = False
    """Share one vector between mask token and null class (eMIGM)."""

    def __post_init__(self) -> None:
        positive(self, "channels", "patch_size", "buffer_size")
        require(self.classes >= 0, f"classes is {self.classes}, but it must be 0 (unconditional) or more")
        require(min(self.words, self.text_width) >= 0, "words and text_width must not be negative")
        kinds = [name for name in ("classes", "words", "text_width") if getattr(self, name)]
        require(len(kinds) <= 1, f"a model has one kind of condition, but {' and '.join(kinds)} are set; leave one")
        fraction(self, "label_drop", "attention_dropout", "projection_dropout")
        one_of(self, "mask_schedule", MaskDraw)
        require(
            not self.tie_null or self.encoder.width == self.decoder.width,
            f"tie_null shares a vector of encoder and decoder, whose widths are {self.encoder.width} and "
            f"{self.decoder.width}; make them equal",
        )
        require(0 < self.mask_ratio_min <= 1, f"mask_ratio_min is {self.mask_ratio_min}, outside (0, 1]")
        height, width = self.grid
        side = self.patch_size
        require(
            min(height, width) >= 1 and height % side == 0 and width % side == 0,
            f"a latent grid of {height}x{width} cells can't be cut into patches of {side}x{side}: "
            "choose an image size or a patch_size that divides it",
        )

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        return self.grid[0] // self.patch_size, self.grid[1] // self.patch_size

    @property
    def tokens(self) -> int:
        """L: the number of tokens of an image."""
        rows, columns = self.token_grid
        return rows * columns

    @property
    def token_width(self) -> int:
        """d: the number of values of a token."""
        return self.channels * self.patch_size**2

    @property
    def condition(self) -> Condition:
        """Kind of condition: none, a class, a caption's words, or its encoded text."""
        return "class" if self.classes else "words" if self.words else "text" if self.text_width else "none"

    @property
    def takes_captions(self) -> bool:
        """True for a model that draws from words."""
        return self.condition in ("words", "text")

    @property
    def guidable(self) -> bool:
        """True for a model trained with and without conditions, as guidance needs."""
        return self.condition != "none" and self.label_drop > 0
