"""Losses of tokens: what the model would draw otherwise has a high one."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_pipeline

from mar.pipeline import to_pil
from mar.sampling.confidence import token_losses
from mar.zoo import load


def test_token_losses_depend_on_each_image_alone() -> None:
    model = tiny_model()
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, -1])
    together = token_losses(model, latents, labels)
    assert together.shape == (3, 4, 4)
    for i in range(3):
        alone = token_losses(model, latents[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(together, token_losses(model, latents, labels))
    assert not torch.equal(together, token_losses(model, latents, labels, seed=1))


def test_token_losses_of_foreign_tokens_are_the_highest() -> None:
    model = load("fashion", device="cpu")
    [image] = model.sample(["T-shirt/top"], [0], output="tensor")
    image = image.clone()
    image[:, 12:16, 12:16] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)  # a chessboard on a shirt
    losses = model.token_losses(["T-shirt/top"], to_pil(image.unsqueeze(0)))[0]
    assert losses.argmax() == 3 * 7 + 3


def test_token_losses_count_of_labels_must_match() -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="labels: got 2 for 1 images, expected one per image"):
        pipeline.token_losses(["ant", "bee"], torch.zeros(1, 1, 4, 4))
