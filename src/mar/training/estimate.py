"""What a run will need of memory and disk, said before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mar.checkpoint.files import require_room, size_text
from mar.checkpoint.store import model_shapes
from mar.config import ModelConfig, Recompute, TrainConfig

# Floats that a step keeps for its backward pass, as measured (tests/unit/training/test_estimate.py), by what is
# recomputed of them.
_BLOCK = {"none": 18, "selective": 10.5, "full": 1}
"""Of a transformer block, per token and unit of width; 2 fewer without dropout, where all is kept."""
_HEAD_BLOCK = {"none": 10, "selective": 6, "full": 1}
"""Of a block of the head, per row and unit of width."""
_HEAD = 8
"""Of the head outside its blocks, per row and unit of width."""
_KEPT = ("state-*", ".saving-*", "model*.safetensors")
"""What a run keeps in its folder, and what a killed one left there, which goes before the next state is written."""


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
        """Raises CheckpointError where the disk of `folder` has too little room for the run.

        What it holds of the run already is written over or removed; but a state, or a file of weights, is only given up
        once the next one is there.
        """
        there = sum(_size(path) for pattern in _KEPT for path in folder.glob(pattern))
        require_room(folder, max(self.disk - there, self.state + 4 * self.parameters))


def estimate(config: TrainConfig, processes: int = 1) -> Estimate:
    """The needs of a run, for each of `processes` processes."""
    parameters = sum(shape.numel() for shape in model_shapes(config.model).values())
    others = len(config.ema_others)
    state = 4 * (4 + others) * parameters  # weights, EMA, two moments
    cuts = processes * config.accumulate
    exports = (3 if config.patience else 2) + others  # EMA and raw weights, and the best
    return Estimate(
        parameters=parameters,
        weights=4 * (5 + others) * parameters,
        activations=4 * activation_floats(config.model, config.batch // cuts, config.recompute),
        state=state,
        disk=(config.keep + 1) * state + exports * 4 * parameters,  # one state more while it is being written
    )


def _size(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def activation_floats(model: ModelConfig, images: int, recompute: Recompute = "none") -> int:
    """Numbers that a step over `images` images keeps, at the mean mask ratio, the block at hand being whole."""
    masked = round(model.tokens * (1 + model.mask_ratio_min) / 2)
    seen = model.buffer + model.tokens - masked
    trunks = ((model.encoder, seen), (model.decoder, model.buffer + model.tokens))
    rows = masked * model.head.batch_mul
    kept = sum(t.depth * tokens * t.width * _BLOCK[recompute] for t, tokens in trunks)
    kept += rows * model.head.width * (_HEAD_BLOCK[recompute] * model.head.depth + _HEAD)
    if recompute == "none":  # a byte, a quarter of a float, for each weight of attention: its dropout
        kept += sum(t.depth * t.heads * tokens**2 / 4 for t, tokens in trunks if model.attention_dropout)
    else:
        whole = [tokens * t.width * _BLOCK["none"] for t, tokens in trunks]
        kept += max(*whole, rows * model.head.width * _HEAD_BLOCK["none"])
    return round(images * kept)
