"""What a run is said to need is what a step keeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mar.checkpoint.files import CheckpointError
from mar.config import HeadConfig, ModelConfig, TrainConfig, TrunkConfig
from mar.model.mar import MAR
from mar.presets import FASHION, MODELS
from mar.training.estimate import activation_floats, estimate
from mar.training.loss import DiffusionLoss, draw_step

SMALL = TrunkConfig(width=96, depth=2, heads=6)
CONFIGS = {
    "fashion": FASHION.model,
    "latents": ModelConfig(
        grid=(8, 8), encoder=SMALL, decoder=SMALL, head=HeadConfig(128, 2), buffer=16, classes=5, mask_ratio_min=0.7
    ),
    "deep head": ModelConfig(
        grid=(4, 4), encoder=SMALL, decoder=SMALL, head=HeadConfig(160, 6), buffer=4, classes=5, mask_ratio_min=0.9
    ),
}


def kept(config: ModelConfig, images: int) -> int:
    """Bytes of the tensors that autograd keeps in one step, parameters apart."""
    loss = DiffusionLoss(MAR(config).train())
    parameters = {p.data_ptr() for p in loss.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    draws = draw_step(config, 0, 1, range(images))
    latents = torch.randn(images, config.channels, *config.grid)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(latents, torch.zeros(images, dtype=torch.long), draws)
    assert value.isfinite()
    return sum(storages.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_told_to_within_a_third(name: str) -> None:
    said = 4 * activation_floats(CONFIGS[name], 4)
    assert said == pytest.approx(kept(CONFIGS[name], 4), rel=1 / 3)


def test_the_state_of_mar_base() -> None:
    needs = estimate(TrainConfig(model=MODELS["mar-base"], batch=8))
    assert needs.parameters == pytest.approx(208e6, rel=0.01)
    assert needs.weights == 20 * needs.parameters
    assert "208" in needs.text() or "207" in needs.text()


def test_more_processes_need_less_each() -> None:
    assert estimate(FASHION, processes=2).activations == pytest.approx(estimate(FASHION).activations / 2, rel=0.01)


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mar.checkpoint.files.shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(CheckpointError, match="make room"):
        estimate(FASHION).check_disk(tmp_path / "run")
