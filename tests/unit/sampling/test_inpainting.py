"""Masks of pixels: what is generated, and what stays."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from orientations import file_bytes, stored
from PIL import Image
from tiny import tiny_pipeline
from torch import Tensor

from mar.data.images import Transform, to_tensor
from mar.pipeline import Pipeline
from mar.sampling.generate import as_images
from mar.sampling.inpainting import Paste, read_masks, soft_seam, tokens_to_generate

SIDE = 4
"""Pixels of a token's side in `pipeline`."""


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """Gray pictures of 16x16 pixels, of 4x4 tokens."""
    pipeline = tiny_pipeline(grid=(16, 16), patch_size=SIDE)
    pipeline.sampling = replace(pipeline.sampling, x0_bound=2.0)
    return pipeline


def picture(seed: int = 0, size: tuple[int, int] = (16, 16), mode: str = "L") -> Image.Image:
    values = torch.randint(0, 256, (size[1], size[0]), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy()).convert(mode)


def painted(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (16, 16)) -> Image.Image:
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(255, box)
    return mask


def test_tokens_to_generate_one_pixel_grows_by_one_token_each_way() -> None:
    pixels = torch.zeros(1, 16, 16, dtype=torch.bool)
    pixels[0, 7, 8] = True  # the last row of token row 1, the first column of token column 2
    expected = torch.zeros(1, 4, 4, dtype=torch.bool)
    expected[0, 0:3, 1:4] = True
    assert torch.equal(tokens_to_generate(pixels, (4, 4)), expected)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), side=st.integers(1, 4), data=st.data())
def test_tokens_to_generate_every_painted_pixel_is_covered(rows: int, columns: int, side: int, data: Any) -> None:
    flags = data.draw(st.lists(st.booleans(), min_size=rows * columns * side**2, max_size=rows * columns * side**2))
    pixels = torch.tensor(flags).view(1, rows * side, columns * side)
    tokens = tokens_to_generate(pixels, (rows, columns))[0]
    for row in range(rows):
        for column in range(columns):
            near = pixels[
                0,
                max(row - 1, 0) * side : (row + 2) * side,
                max(column - 1, 0) * side : (column + 2) * side,
            ]
            assert bool(tokens[row, column]) == bool(near.any())


def test_soft_seam_rises_inside_and_is_zero_outside() -> None:
    pixels = torch.zeros(1, 1, 8, dtype=torch.bool)
    pixels[..., 2:] = True  # up to the image's border, which is no seam
    expected = torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1])
    assert torch.allclose(soft_seam(pixels, 2)[0, 0, 0], expected)


def test_paste_outside_the_mask_is_the_original_to_the_bit() -> None:
    originals, images = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = torch.zeros(2, 8, 8, dtype=torch.bool)
    pixels[0, 2:6, 2:6] = True
    pasted = Paste(originals, soft_seam(pixels, 1))(images)
    outside = ~pixels.unsqueeze(1).expand_as(pasted)
    assert torch.equal(pasted[outside], originals[outside])
    assert torch.equal(pasted[0, :, 3:5, 3:5], images[0, :, 3:5, 3:5])


@pytest.mark.parametrize("output", ["pil", "tensor"])
def test_sample_pixel_mask_keeps_the_rest_and_changes_the_inside(pipeline: Pipeline, output: Any) -> None:
    known, mask = [picture(1), picture(2)], [painted((5, 5, 9, 9)), painted((0, 0, 16, 3))]
    results = pipeline.sample(["ant", "bee"], [3, 4], known=known, mask=mask, output=output)
    for i, result in enumerate(results):
        values: Tensor = to_tensor(result, 1)[0] if isinstance(result, Image.Image) else result[0]
        original, inside = to_tensor(known[i], 1)[0], to_tensor(mask[i], 1)[0] > 0
        assert torch.equal(values[~inside], original[~inside])
        assert not torch.equal(values[inside], original[inside])


def test_sample_pixel_mask_generates_the_tokens_of_the_grown_mask(pipeline: Pipeline) -> None:
    known, mask = picture(1), painted((5, 5, 7, 7))
    flags = read_masks([mask], (16, 16), None)
    tokens = tokens_to_generate(flags, (4, 4))
    assert tokens.sum() == 9
    whole = pipeline.sample(["ant"], [3], known=[known], mask=tokens, output="tensor")
    pasted = pipeline.sample(["ant"], [3], known=[known], mask=[mask], output="tensor")
    assert torch.equal(pasted, Paste(to_tensor(known, 1)[None], soft_seam(flags, SIDE // 2))(whole))


def test_sample_mask_of_pixels_as_array_and_as_picture_agree(pipeline: Pipeline) -> None:
    mask = painted((5, 2, 9, 9))
    flags = read_masks([mask], (16, 16), None)
    results = [
        pipeline.sample(["ant"], known=[picture()], mask=each, output="tensor")
        for each in ([mask], flags, flags.numpy())
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_sample_pixel_masks_in_batches_equal_one_batch(pipeline: Pipeline) -> None:
    known, mask = [picture(i) for i in range(3)], [painted((i, i, i + 6, i + 6)) for i in range(3)]
    together = pipeline.sample(["ant"] * 3, known=known, mask=mask, output="tensor")
    alone = pipeline.sample(["ant"] * 3, known=known, mask=mask, output="tensor", batch=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_reveal_pixel_mask_ends_as_sample_does(pipeline: Pipeline) -> None:
    known, mask = [picture(1)], [painted((5, 5, 9, 9))]
    *_, last = pipeline.reveal(["ant"], [3], known=known, mask=mask)
    [image] = pipeline.sample(["ant"], [3], known=known, mask=mask)
    assert last.images[0].tobytes() == image.tobytes()
    assert last.known.all()


def test_sample_mask_of_a_large_picture_is_cropped_with_it(pipeline: Pipeline) -> None:
    known, mask = picture(1, (40, 32)), painted((4, 0, 20, 32), size=(40, 32))
    [image] = pipeline.sample(["ant"], known=[known], mask=[mask])
    original = Transform((16, 16), 1)(known)[0]
    # the middle 32 of 40 columns are kept and halved: columns 4 to 20 become 0 to 8
    result = to_tensor(image, 1)[0]
    assert torch.equal(result[:, 8:], original[:, 8:])
    assert not torch.equal(result[:, :8], original[:, :8])


@pytest.mark.parametrize("orientation", [3, 6])
def test_sample_lying_picture_and_mask_are_turned_upright(pipeline: Pipeline, orientation: int) -> None:
    """As a camera stores the one, and whatever painted it the other, or not."""
    known, mask = picture(1, (40, 32)), painted((4, 0, 20, 32), size=(40, 32))
    [expected] = pipeline.sample(["ant"], [3], known=[known], mask=[mask])
    lying = [Image.open(BytesIO(file_bytes(image, orientation))) for image in (known, mask)]
    for pair in ([lying[0], mask], lying):
        [image] = pipeline.sample(["ant"], [3], known=pair[:1], mask=pair[1:])
        assert image.tobytes() == expected.tobytes()
    assert torch.equal(pipeline.token_losses(["ant"], lying[:1]), pipeline.token_losses(["ant"], [known]))
    if orientation == 6:
        with pytest.raises(ValueError, match="got 32x40 pixels, expected 40x32, the size of its picture"):
            pipeline.sample(["ant"], known=lying[:1], mask=[stored(mask, 6)])


def test_sample_empty_mask_returns_the_picture(pipeline: Pipeline) -> None:
    [image] = pipeline.sample(["ant"], known=[picture(1)], mask=[painted()])
    assert image.tobytes() == picture(1).tobytes()


def test_sample_pixel_mask_without_growth_generates_painted_tokens_alone(pipeline: Pipeline) -> None:
    known, tokens = picture(1), torch.zeros(1, 4, 4, dtype=torch.bool)
    tokens[0, 1, 2] = tokens[0, 3, 0] = True
    by_tokens = pipeline.sample(["ant"], [3], known=[known], mask=tokens)
    by_pixels = pipeline.sample(["ant"], [3], known=[known], mask=[painted((8, 4, 12, 8), (0, 12, 4, 16))], grow=0)
    assert by_pixels[0].tobytes() == by_tokens[0].tobytes()


def test_reveal_tokens_become_known_at_their_steps(pipeline: Pipeline) -> None:
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, 0] = False
    for step in pipeline.reveal(["ant", "bee"], known=[picture(1), picture(2)], mask=mask):
        assert torch.equal(step.known, step.revealed_at <= step.step)
    assert torch.equal(step.revealed_at == 0, ~mask)


def test_sample_mask_of_tokens_is_not_grown(pipeline: Pipeline) -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1, 1] = True
    result = pipeline.sample(["ant"], known=[picture(1)], mask=mask, output="tensor")
    changed = (result - to_tensor(picture(1), 1)).abs() > 1e-5
    assert changed[0, 0, SIDE : 2 * SIDE, SIDE : 2 * SIDE].any()
    changed[0, 0, SIDE : 2 * SIDE, SIDE : 2 * SIDE] = False
    assert not changed.any()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([Image.new("L", (8, 8))], r"mask: got 8x8 pixels, expected 16x16, the size of its picture"),
        ([Image.new("RGBA", (16, 16))], r"mask: got a transparent picture, expected white"),
        (torch.zeros(1, 16, 16, dtype=torch.uint8), r"mask: got \(1, 16, 16\) of torch.uint8"),
        (torch.zeros(1, 5, 5, dtype=torch.bool), r"mask: got \(1, 5, 5\) of torch.bool, expected \(1, 4, 4\)"),
        ([Image.new("L", (16, 16))] * 2, r"mask: got 2 for 1 labels"),
    ],
)
def test_sample_bad_mask_is_refused(pipeline: Pipeline, mask: Any, message: str, untyped: None) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.sample(["ant"], known=[picture()], mask=mask)


def test_sample_mask_without_known_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="only one of them"):
        pipeline.sample(["ant"], mask=[painted((0, 0, 4, 4))])


def test_mask_of_which_nothing_white_is_left_is_refused() -> None:
    """Outside the square crop, or thinner than half a pixel of the model's size."""
    beside, thin = Image.new("L", (48, 16)), Image.new("L", (160, 160))
    beside.paste(255, (0, 0, 8, 16))
    thin.paste(255, (80, 0, 81, 160))
    for mask in (beside, thin):
        with pytest.raises(ValueError, match=r"mask: nothing white is left of it .* cut to 16x16 pixels"):
            read_masks([mask], (16, 16), [mask.size])
    assert not read_masks([Image.new("L", (48, 16))], (16, 16), [(48, 16)]).any()


def test_known_values_of_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"known: got values up to 255, expected numbers in \[-1, 1\]"):
        as_images(torch.full((1, 1, 4, 4), 255.0))
    assert isinstance(as_images(torch.full((1, 1, 4, 4), 1.01)), torch.Tensor)  # of a decoder
