"""The chunked first-order scan is its loop, in values and gradients, whatever the decays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.ops.scan import scan, scan_reference


def parts(length, *, strength=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    f = (strength * draw(2, length, 3)).sigmoid()
    return [f, draw(2, length, 3), draw(2, 3)]


def everything(form, inputs, **options):
    inputs = [part.detach().clone().requires_grad_() for part in inputs]
    found = form(*inputs, **options)
    loss = sum((y * torch.linspace(0.5, 2, y.numel()).view_as(y)).sum() for y in found)
    return [y.detach() for y in found] + list(torch.autograd.grad(loss, inputs))


def assert_equal(found, wanted, tolerance=1e-12):
    for got, expected in zip(found, wanted, strict=True):
        error = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert got.isfinite().all()
        assert error <= tolerance, f"relative error {error:.1e}"


@settings(max_examples=40)
@given(st.integers(1, 70), st.sampled_from([0.0, 1.0, 30.0]))
def test_the_scan_is_the_loop(length, strength):
    inputs = parts(length, strength=strength)
    assert_equal(everything(scan, inputs), everything(scan_reference, inputs))


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(0, 40))
def test_any_cut_is_one_call(length, cut):
    f, i, state = parts(length)
    wanted = scan(f, i, state)
    found = []
    for piece in (slice(0, cut), slice(cut, None)):
        if i[:, piece].shape[1]:
            h, state = scan(f[:, piece], i[:, piece], state)
            found.append(h)
    assert_equal([torch.cat(found, 1), state], wanted)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 45))
def test_any_width_is_the_loop(length, width):
    inputs = parts(length)
    assert_equal(everything(scan, inputs, width=width), everything(scan_reference, inputs))


def test_a_state_keeps_itself_alone():
    _, last = scan(*parts(50))
    assert last.untyped_storage().nbytes() == last.nbytes


def test_gradients_are_those_of_differences():
    assert torch.autograd.gradcheck(scan, [part.requires_grad_() for part in parts(7)])


def test_zeros_and_strong_decay_lose_nothing():
    """Where a division by the product of decays is 0 / 0."""
    f, i, state = parts(4096, dtype=torch.float32)
    f[:, ::5] = 0
    f[:, 1::5] = torch.tensor(-20.0).exp()
    f[:, 2::5] = 1
    wanted = everything(scan_reference, [part.double() for part in (f, i, state)])
    found = everything(scan, [f, i, state])
    assert_equal([part.double() for part in found], wanted, 1e-5)


def test_behind_its_length_a_row_stays_as_it_is():
    f, i, state = parts(23)
    lengths = torch.tensor([9, 0])
    f[0, 9:] = f[1] = i[0, 9:] = i[1] = torch.nan
    for form in (scan, scan_reference):
        h, last = form(f, i, state, lengths)
        assert torch.equal(last[1], state[1])  # bit for bit
        alone = scan_reference(f[:1, :9], i[:1, :9], state[:1])
        assert_equal([h[:1, :9], last[:1]], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_float32_at_least(dtype):
    h, last = scan(*(part.to(dtype) for part in parts(5)))
    assert h.dtype == last.dtype == torch.promote_types(dtype, torch.float32)
