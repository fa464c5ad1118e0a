"""What a run will need of memory and disk, said before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mar.checkpoint.files import require_room, size_text
from mar.checkpoint.store import model_shapes
from mar.config import ModelConfig, TrainConfig

# Floats that autograd keeps, fitted to measurements of one step (tests/unit/training/test_estimate.py).
_BLOCK = 18
"""Of a transformer block, per token and unit of width."""
_HEAD_BLOCK = 14
"""Of a block of the head, per row and unit of width."""


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, and parameters."""

    parameters: int
    weights: int
    """Weights, gradients, AdamW's two moments and the EMA, float32."""
    activations: int
    """What a step keeps for its gradient."""
    state: int
    """One saved state."""
    disk: int
    """All that the run keeps on the disk at once."""

    def text(self) -> str:
        """One line for people."""
        return (
            f"{self.parameters / 1e6:.1f} million parameters; about {size_text(self.weights + self.activations)} of "
            f"memory ({size_text(self.activations)} of it for a batch), {size_text(self.disk)} of disk"
        )

    def check_disk(self, folder: Path) -> None:
        """Raises CheckpointError where the disk of `folder` has too little room for the run."""
        require_room(folder, self.disk)


def estimate(config: TrainConfig, processes: int = 1) -> Estimate:
    """The needs of a run, for each of `processes` processes."""
    parameters = sum(shape.numel() for shape in model_shapes(config.model).values())
    state = 4 * 4 * parameters  # weights, EMA, two moments
    return Estimate(
        parameters=parameters,
        weights=5 * 4 * parameters,
        activations=4 * activation_floats(config.model, config.batch // processes),
        state=state,
        disk=(config.keep + 1) * state + 2 * 4 * parameters,  # one state more while it is being written; two exports
    )


def activation_floats(model: ModelConfig, images: int) -> int:
    """Numbers that a step over `images` images keeps, at the mean mask ratio."""
    masked = round(model.tokens * (1 + model.mask_ratio_min) / 2)
    seen = model.buffer + model.tokens - masked
    trunks = ((model.encoder, seen), (model.decoder, model.buffer + model.tokens))
    blocks = sum(t.depth * tokens * (_BLOCK * t.width + t.heads * tokens) for t, tokens in trunks)
    rows = masked * model.head.batch_mul
    return images * (blocks + rows * model.head.width * (_HEAD_BLOCK * model.head.depth + 8))
