"""Packing and writing at a row's own clock, against loops over rows and positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.ops.ragged import (
    common_value,
    expand_like,
    pack,
    unpack,
    valid_positions,
    write_at,
    write_ring,
)

row_masks = st.integers(1, 7).flatmap(
    lambda length: st.lists(
        st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4
    )
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_valid_positions_counts_from_the_left():
    got = valid_positions(torch.tensor([0, 2, 3]), 3)
    assert got.tolist() == [[False] * 3, [True, True, False], [True] * 3]


def test_expand_like_adds_trailing_dimensions():
    assert expand_like(torch.ones(2, 3), torch.ones(2, 3, 4, 5)).shape == (2, 3, 1, 1)


@settings(max_examples=40)
@given(row_masks, st.sampled_from([(), (2,), (2, 3)]))
def test_pack_moves_real_positions_left_and_unpack_puts_them_back(rows, trailing):
    mask = torch.tensor(rows)
    clean = numbers(*mask.shape, *trailing)
    x = torch.where(expand_like(mask, clean), clean, torch.nan)
    packed, lengths, order = pack(x, mask)
    assert lengths.tolist() == [sum(row) for row in rows]
    assert packed.shape[1] == max(1, int(lengths.max()))
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(packed[row, :length], x[row, mask[row]])
        assert not packed[row, length:].any()
    back = unpack(packed + 1, lengths, order, mask.shape[1])
    wanted = torch.where(expand_like(mask, clean), clean + 1, 0.0)
    assert torch.equal(back, wanted)


def test_pack_keeps_the_order_of_long_rows():
    mask = torch.rand(2, 3000, generator=torch.Generator().manual_seed(0)) < 0.5
    x = torch.arange(6000).view(2, 3000)
    packed, lengths, _ = pack(x, mask)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(packed[row, :length], x[row, mask[row]])


def test_pack_and_unpack_give_masked_positions_no_gradient_and_no_nan():
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    x = torch.where(mask[..., None], numbers(2, 4, 3), torch.nan).requires_grad_()
    packed, lengths, order = pack(x, mask)
    y = unpack(packed.square().where(packed != 0, torch.inf), lengths, order, 4)
    assert y.isfinite().all()
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(mask[..., None], 2 * x.detach(), 0.0))


def test_pack_keeps_the_type_of_token_ids():
    mask = torch.tensor([[False, True], [True, True]])
    packed, _, _ = pack(torch.tensor([[7, 8], [9, 10]]), mask)
    assert packed.tolist() == [[8, 0], [9, 10]]
    assert packed.dtype == torch.long


def test_common_value():
    assert common_value(torch.tensor([4, 4])) == 4
    assert common_value(torch.tensor([4, 5])) is None


@st.composite
def writes(draw, ring: bool):
    """A buffer of `size` places, rows at their own clocks, `length` values; lengths or None."""
    rows, size = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    length = draw(st.integers(1, 3 * size if ring else size))
    latest = 20 if ring else size - length
    same = draw(st.booleans())
    start = [draw(st.integers(0, latest))] * rows if same else None
    start = start or [draw(st.integers(0, latest)) for _ in range(rows)]
    lengths = draw(st.none() | st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    return size, length, start, lengths


def by_loop(buffer, values, start, lengths):
    """Place (position mod C), one after the other."""
    buffer = buffer.clone()
    for row, first in enumerate(start):
        for t in range(values.shape[1] if lengths is None else lengths[row]):
            buffer[row, (first + t) % buffer.shape[1]] = values[row, t]
    return buffer


def check_write(write, case) -> None:
    size, length, start, lengths = case
    buffer = numbers(len(start), size, 2, seed=1).requires_grad_()
    values = numbers(len(start), length, 2, seed=2).requires_grad_()
    before = buffer.detach().clone()
    given_lengths = None if lengths is None else torch.tensor(lengths)
    got = write(buffer, values, torch.tensor(start), given_lengths)
    wanted = by_loop(buffer, values, start, lengths)
    assert torch.equal(got, wanted)
    assert torch.equal(buffer.detach(), before), "the argument was edited"
    weights = numbers(*got.shape, seed=3)
    found = torch.autograd.grad((got * weights).sum(), [buffer, values], allow_unused=True)
    exact = torch.autograd.grad((wanted * weights).sum(), [buffer, values], allow_unused=True)
    for name, a, b in zip(("buffer", "values"), found, exact, strict=True):
        zero = torch.zeros(())
        a, b = (zero if grad is None or not grad.any() else grad for grad in (a, b))
        assert torch.equal(a, b), f"gradient of {name}"


@settings(max_examples=60)
@given(writes(ring=False))
def test_write_at_is_the_loop(case):
    check_write(write_at, case)


@settings(max_examples=80)
@given(writes(ring=True))
def test_write_ring_is_the_loop(case):
    check_write(write_ring, case)


@pytest.mark.parametrize("write", [write_at, write_ring])
def test_written_values_take_the_type_of_the_buffer(write):
    buffer = torch.zeros(2, 3, 1, dtype=torch.bfloat16)
    for start in (torch.tensor([0, 0]), torch.tensor([0, 2])):
        assert write(buffer, torch.ones(2, 1, 1), start, None).dtype == torch.bfloat16


def test_what_is_not_written_may_be_nan():
    """Behind a row's length outputs are anything; NaN must not reach the buffer."""
    values = torch.full((2, 3, 1), torch.nan)
    values[0, 0] = 1.0
    lengths, start = torch.tensor([1, 0]), torch.tensor([1, 2])
    for write in (write_at, write_ring):
        got = write(torch.zeros(2, 5, 1), values, start, lengths)
        assert got.flatten().tolist() == [0.0, 1.0] + [0.0] * 8


@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_buffer_that_is_filled_may_grow(place):
    """Also where what is written is as long as the buffer."""
    buffer, values = torch.arange(3.0)[None, :, None], torch.ones(1, 3, 1)
    got = write_at(buffer, values, torch.tensor([place]), None)
    assert got.flatten().tolist() == [0.0, 1.0, 2.0][:place] + [1.0] * 3
