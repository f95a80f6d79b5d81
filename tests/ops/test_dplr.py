"""The chunked DPLR scan equals its loop in values and gradients, and no decay overflows it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.ops.chunks import pairs
from everlong.ops.dplr import dplr, dplr_reference

B, H, K, V, C = 2, 2, 6, 5, 8


def parts(length, channels, *, seed=0, dtype=torch.float64):
    """q, k, v, g, a, b, state: all kinds of decay, none to strong."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    g = -draw(B, length, H, *channels).abs() * draw(B, length, H, *channels).exp()
    q, k, a, b = (0.5 * draw(B, length, H, K) for _ in range(4))
    return [q, k, draw(B, length, H, V), g, a, b, draw(B, H, K, V)]


def paired(form, **options):
    return lambda q, k, v, g, a, b, state: form(q, k, v, g, (a, b), state, **options)


def everything(form, inputs):
    """Outputs, the last state, and the gradients of a loss that weighs every entry of both."""
    inputs = [part.detach().clone().requires_grad_() for part in inputs]
    found = form(*inputs)
    loss = sum(
        (y * torch.linspace(0.5, 2, y.numel(), device=y.device).view_as(y)).sum() for y in found
    )
    return [y.detach() for y in found] + list(torch.autograd.grad(loss, inputs))


def assert_equal(found, wanted, tolerance=1e-11):
    assert len(found) == len(wanted)
    for place, (got, expected) in enumerate(zip(found, wanted, strict=True)):
        assert got.shape == expected.shape
        assert got.isfinite().all(), place
        error = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{place}: relative error {error:.1e}"


@pytest.mark.parametrize("channels", [(), (K,)])
@pytest.mark.parametrize("length", [1, C - 1, C, C + 1, 5 * C + 3])
def test_the_chunks_are_the_loop(length, channels):
    inputs = parts(length, channels)
    wanted = everything(paired(dplr_reference), inputs)
    for size in (1, C, 64):
        assert_equal(everything(paired(dplr, chunk_size=size), inputs), wanted)
    inputs[-1] = torch.zeros_like(inputs[-1])
    wanted = everything(paired(dplr_reference), inputs)
    assert_equal(everything(paired(dplr, chunk_size=C), inputs), wanted)


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(0, 40), st.sampled_from([1, 4, 16]), st.booleans())
def test_any_cut_is_one_call(length, cut, size, by_channel):
    *inputs, state = parts(length, (K,) if by_channel else (), seed=length)
    y, last = paired(dplr, chunk_size=size)(*inputs, state)
    cuts = sorted({0, min(cut, length), length})
    found = []
    for start, stop in pairwise(cuts):
        piece = [part[:, start:stop] for part in inputs]
        out, state = paired(dplr, chunk_size=size)(*piece, state)
        found.append(out)
    assert_equal([torch.cat(found, 1), state], [y, last])


@pytest.mark.parametrize("form", [dplr_reference, dplr])
def test_behind_its_length_a_row_neither_decays_nor_writes(form):
    inputs = parts(11, (K,))
    lengths = torch.tensor([7, 0])
    for part in inputs[:-1]:
        part[0, 7:] = part[1] = torch.nan
    y, last = paired(form, lengths=lengths)(*inputs)
    assert torch.equal(last[1], inputs[-1][1])  # bit for bit
    assert not y[0, 7:].any()
    assert not y[1].any()
    alone = [part[:1, :7] for part in inputs[:-1]] + [inputs[-1][:1]]
    assert_equal([y[:1, :7], last[:1]], paired(dplr_reference)(*alone))
    found = everything(paired(form, lengths=lengths), [torch.nan_to_num(p) for p in inputs])
    assert not any(grad[0, 7:].any() or grad[1].any() for grad in found[2:-1])


def test_gradients_are_those_of_differences():
    for channels in ((), (K,)):
        *inputs, state = parts(5, channels)
        inputs = [
            part[:1, :, :1][..., :3] if part.dim() == 4 else part[:1, :, :1] for part in inputs
        ]
        inputs = [part.requires_grad_() for part in [*inputs, state[:1, :1, :3, :3]]]
        assert torch.autograd.gradcheck(paired(dplr, chunk_size=4), inputs)


def test_one_decay_a_head_is_equal_decays_of_all_channels():
    inputs = parts(37, ())
    wanted = paired(dplr)(*inputs)
    inputs[3] = inputs[3][..., None].expand(-1, -1, -1, K)
    assert_equal(paired(dplr)(*inputs), wanted)


@pytest.mark.parametrize("channels", [(), (K,)])
@pytest.mark.parametrize("kind", ["strong", "mixed"])
def test_strong_decay_over_4096_positions(channels, kind):
    """In float32 against float64; `mixed` has memories that live on beside and after erasures."""
    length = 4096
    inputs = [0.5 * part[:1, :, :1] for part in parts(length, channels)[:-1]]
    g = inputs[3].zero_()
    if kind == "mixed":
        g -= 1e-3
        g[:, ::7] -= 20 * torch.linspace(0, 1, K, dtype=g.dtype).round() if channels else 20
    else:
        g -= 20
    inputs[4], inputs[5] = -0.1 * inputs[4], 0.1 * inputs[5]
    inputs.append(parts(1, channels)[-1][:1, :1])
    wanted = everything(paired(dplr), inputs)
    found = everything(paired(dplr), [part.float() for part in inputs])
    assert_equal([part.double() for part in found], wanted, 1e-5)
    short = [part[:, :200] for part in inputs[:-1]] + inputs[-1:]
    assert_equal(everything(paired(dplr), short), everything(paired(dplr_reference), short))


def test_pairs_are_their_definition():
    q, k, _, g, *_ = (part.transpose(1, 2) for part in parts(16, (K,))[:4])
    total = g.cumsum(-2)
    decay = (total[..., :, None, :] - total[..., None, :, :]).exp()
    wanted = torch.einsum("bhik,bhjk,bhijk->bhij", q, k, decay).tril()
    assert_equal(pairs((q,), (k,), g)[0], [wanted])


def test_half_precision_is_computed_in_float32():
    inputs = parts(20, (K,), dtype=torch.float32)
    inputs[:-1] = [part.bfloat16() for part in inputs[:-1]]
    y, last = paired(dplr, chunk_size=C)(*inputs)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        same = paired(dplr, chunk_size=C)(*inputs)
    assert torch.equal(same[1], last)
    wanted = paired(dplr)(*(part.float() for part in inputs))
    assert_equal([y.float(), last], wanted, 1e-2)
    assert_equal([last], [wanted[1]], 1e-6)
