"""Cutting latents into tokens and picking tokens lose nothing, whatever the sizes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import noise

from mar.model.tokens import gather_tokens, patchify, scatter_tokens, unpatchify

SIDES = st.integers(1, 5)


@given(n=st.integers(1, 3), c=st.integers(1, 5), patch=st.integers(1, 4), rows=SIDES, columns=SIDES)
def test_unpatchify_undoes_patchify(n: int, c: int, patch: int, rows: int, columns: int) -> None:
    latents = noise(n, c, rows * patch, columns * patch)
    tokens = patchify(latents, patch)
    assert tokens.shape == (n, rows * columns, c * patch * patch)
    assert torch.equal(unpatchify(tokens, patch, (rows * patch, columns * patch)), latents)


@given(c=st.integers(1, 3), patch=st.integers(1, 3), rows=SIDES, columns=SIDES, data=st.data())
def test_patchify_token_is_a_square_of_cells(c: int, patch: int, rows: int, columns: int, data: st.DataObject) -> None:
    latents = noise(1, c, rows * patch, columns * patch)
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    square = latents[0, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
    assert torch.equal(patchify(latents, patch)[0, row * columns + column], square.flatten())


@given(n=st.integers(1, 3), length=st.integers(1, 8), width=st.integers(1, 3), data=st.data())
def test_gather_tokens_reads_what_scatter_wrote(n: int, length: int, width: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, length))
    index = torch.stack([torch.tensor(data.draw(st.permutations(range(length)))[:count]).long() for _ in range(n)])
    background, values = noise(n, length, width), noise(n, count, width, seed=1)
    written = scatter_tokens(background, index, values)
    assert torch.equal(gather_tokens(written, index), values)
    untouched = torch.ones(n, length, dtype=torch.bool).scatter(1, index, False)
    assert torch.equal(written[untouched], background[untouched])


@given(length=st.integers(1, 6), padding=st.integers(1, 3))
def test_gather_padding_reads_zeros_and_scatter_ignores_it(length: int, padding: int) -> None:
    background = noise(2, length, 3)
    index = torch.full((2, padding), length)
    assert not gather_tokens(background, index).any()
    assert torch.equal(scatter_tokens(background, index, noise(2, padding, 3, seed=1)), background)
