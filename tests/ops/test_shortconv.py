"""The short convolution with a carried tail is one convolution of the whole stream."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.ops.shortconv import short_convolution

B, D = 2, 5


def parts(length, width):
    generator = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(B, length, D), draw(D, width), draw(B, width - 1, D), draw(D)


def whole(x, weight, tail, bias):
    """torch's convolution of everything there is; W - 1 zeros stand before a stream."""
    seen = torch.cat([tail, x], 1)
    return F.conv1d(seen.mT, weight[:, None], bias, groups=D).mT


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 12))
def test_any_cut_is_torch_s_convolution_of_the_whole(length, width, cut):
    x, weight, tail, bias = inputs = [part.requires_grad_() for part in parts(length, width)]
    wanted = whole(*inputs)
    weights = torch.linspace(0.5, 2, wanted.numel()).view_as(wanted)
    expected = torch.autograd.grad((wanted * weights).sum(), inputs)
    found, carried = [], tail
    for piece in (x[:, :cut], x[:, cut:]):
        if piece.shape[1]:
            y, carried = short_convolution(piece, weight, carried, bias=bias)
            found.append(y)
    y = torch.cat(found, 1)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(carried, torch.cat([tail, x], 1)[:, length:])
    assert carried.untyped_storage().nbytes() == carried.nbytes  # it keeps itself alone
    grads = torch.autograd.grad((y * weights).sum(), inputs)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_rows_of_their_own_length_keep_their_own_tail(width):
    x, weight, tail, _ = parts(6, width)
    lengths = torch.tensor([4, 0])
    x[0, 4:] = x[1] = torch.nan
    y, carried = short_convolution(x, weight, tail, lengths=lengths)
    alone, kept = short_convolution(x[:1, :4], weight, tail[:1])
    torch.testing.assert_close(y[:1, :4], alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(carried[:1], kept)
    assert torch.equal(carried[1], tail[1])


def test_the_last_weight_meets_the_newest_input():
    x, _, tail, _ = parts(6, 4)
    weight = torch.zeros(D, 4, dtype=x.dtype)
    weight[:, -1] = 2
    y, _ = short_convolution(x, weight, tail)
    torch.testing.assert_close(y, 2 * x)


def test_gradients_of_a_carried_tail():
    inputs = [part.requires_grad_() for part in parts(5, 3)[:3]]
    assert torch.autograd.gradcheck(short_convolution, inputs)
