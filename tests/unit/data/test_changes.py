"""What is changed of a picture at random."""

from __future__ import annotations

import pytest
import torch

from mar.data.loader import NO_AUGMENTATION, Augmentation, Augmentations, random_flip, random_shift

PICTURE = torch.arange(24.0).reshape(2, 3, 4)


def test_a_picture_is_moved_and_its_edges_are_repeated() -> None:
    row = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert Augmentation(right=1)(row).tolist() == [[[1, 1, 2, 3]]]
    assert Augmentation(right=-2)(row).tolist() == [[[3, 4, 4, 4]]]
    assert Augmentation(right=9)(row).tolist() == [[[1, 1, 1, 1]]]
    assert Augmentation(down=5)(row).tolist() == row.tolist()
    down = Augmentation(down=1)(PICTURE)
    assert torch.equal(down[:, 1:], PICTURE[:, :-1])
    assert torch.equal(down[:, 0], PICTURE[:, 0])
    both = Augmentation(down=-1, right=1)(PICTURE)
    assert torch.equal(both[:, :-1, 1:], PICTURE[:, 1:, :-1])


def test_it_is_mirrored_after_that() -> None:
    assert torch.equal(Augmentation(flip=True)(PICTURE), PICTURE.flip(-1))
    assert torch.equal(Augmentation(True, 1, 2)(PICTURE), Augmentation(False, 1, 2)(PICTURE).flip(-1))
    assert NO_AUGMENTATION(PICTURE) is PICTURE


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 5])
def test_what_is_changed_follows_the_position(flip: bool, shift: int) -> None:
    changes = Augmentations(7, flip, shift)
    for position in range(40):
        expected = Augmentation(
            flip and random_flip(7, position), *(random_shift(7, position, shift) if shift else (0, 0))
        )
        assert changes.at(position) == expected
        assert max(abs(expected.down), abs(expected.right)) <= shift
