"""The scan equals the loop in values and gradients; draws are SplitMix64's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.ops.counter import integers, mix
from everlong.ops.hadamard import hadamard, hadamard_reference


def parts(length, rows=5, columns=4, dtype=torch.float64, strength=1.0):
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    found = [strength * draw(2, length, rows), draw(2, length, columns), draw(2, length, rows)]
    found += [draw(2, length, columns).relu() for _ in range(2)] + [draw(2, rows, columns)]
    return [part.requires_grad_() for part in found]


def everything(form, inputs, **options):
    """Outputs, the last memory, and gradients of a loss that weighs every entry of both."""
    outputs = form(*inputs, **options)
    loss = sum((y * torch.linspace(0.5, 2, y.numel()).view_as(y)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def assert_equal(found, wanted, tolerance):
    for got, expected in zip(found, wanted, strict=True):
        error = (got - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"relative error {error:.1e}"


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_the_scan_is_the_loop_at_any_length_block_and_width(length, block, width):
    inputs = parts(length)
    wanted = everything(hadamard_reference, inputs)
    assert_equal(everything(hadamard, inputs, sizes=(block, width)), wanted, 1e-12)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.2, 1.0, 3.0]))
def test_the_clamped_scan_is_the_clamped_loop(length, block, width, limit):
    inputs = parts(length)
    wanted = everything(hadamard_reference, inputs, limit=limit)
    found = everything(hadamard, inputs, limit=limit, sizes=(block, width))
    assert_equal(found, wanted, 1e-10)
    assert found[1].abs().max() == limit or length < 4


def test_a_clamped_cell_passes_no_gradient_and_keeps_it_once_it_stands_still():
    inputs = parts(9)
    inputs[5].data.fill_(7.0)
    with torch.no_grad():  # the first position clamps every cell, the others are neutral
        inputs[0].zero_()
        inputs[3][:, 1:] = 0
    for sizes in (None, (9, 3)):
        memory = hadamard(*inputs, limit=1.0, sizes=sizes)[1]
        assert torch.equal(memory, torch.ones_like(memory))
        theta, start = torch.autograd.grad(memory.sum(), [inputs[0], inputs[5]])
        assert not start.any()
        assert theta[:, 1:].any()


def test_gradients_of_the_clamped_scan_are_those_of_differences():
    inputs = parts(6, 4, 4)
    with torch.no_grad():
        inputs[3].add_(0.1)
    for sizes in (None, (6, 2)):
        assert torch.autograd.gradcheck(
            lambda *x, s=sizes: hadamard(*x, limit=0.7, sizes=s), inputs
        )


@pytest.mark.parametrize("sizes", [None, (64, 8)])
def test_the_card_s_size(sizes):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = parts(64, 16, 16, dtype, 0.3)
        wanted = everything(hadamard_reference, inputs)
        assert_equal(everything(hadamard, inputs, sizes=sizes), wanted, tolerance)


def test_gradients_are_those_of_differences():
    inputs = parts(5, 4, 4)
    with torch.no_grad():
        inputs[3].add_(0.1)
    for form in (hadamard, lambda *given: hadamard(*given, sizes=(4, 2))):
        assert torch.autograd.gradcheck(form, inputs)


def test_the_last_memory_alone_carries_a_gradient():
    inputs = parts(7)
    found, wanted = (
        torch.autograd.grad(form(*inputs)[1].square().sum(), inputs, allow_unused=True)
        for form in (hadamard, hadamard_reference)
    )
    assert not found[4].any()  # queries read, they do not write
    assert wanted[4] is None
    assert_equal(found[:4] + found[5:], wanted[:4] + wanted[5:], 1e-12)


def test_saturated_gates_divide_by_nothing():
    """Products of C reach 0: cumulative products and a division give NaN, the scan does not."""
    inputs = parts(64, dtype=torch.float32, strength=40.0)
    theta, c, v, k, _, start = (part.detach() for part in inputs)
    gates = 1 + torch.tanh(theta[..., :, None] * c[..., None, :])
    assert (gates == 0).any()
    products = gates.cumprod(1)
    written = v[..., :, None] * k[..., None, :]
    divided = products * (start[:, None] + (written / products).cumsum(1))
    assert not divided.isfinite().all()
    for sizes in (None, (64, 8)):
        for found in everything(hadamard, inputs, sizes=sizes):
            assert found.isfinite().all()


def test_a_neutral_position_keeps_the_memory_bit_for_bit():
    theta, c, v, k, q, start = (part.detach() for part in parts(12, dtype=torch.float32))
    theta, k = torch.zeros_like(theta), torch.zeros_like(k)
    for sizes in (None, (12, 3)):
        assert torch.equal(hadamard(theta, c, v, k, q, start, sizes=sizes)[1], start)


def test_mix_is_splitmix64():
    """The published generator's first numbers from state 1234567, as int64 of the same bits."""
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + gamma * step) % 2**64 for step in range(1, 4)]
    signed = torch.tensor([state - 2**64 if state >= 2**63 else state for state in states])
    found = [bits % 2**64 for bits in mix(signed).tolist()]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_draws_depend_on_seed_and_position_alone():
    seed, position = torch.tensor([0, 0, 7, -(2**63)]), torch.tensor([0, 5, 5, 2**40])
    whole = integers(seed, position, 20, 128)
    assert torch.equal(whole[0, 5:], whole[1, :15])
    assert not torch.equal(whole[1], whole[2])
    alone = torch.cat([integers(seed, position + t, 1, 128) for t in range(20)], 1)
    assert torch.equal(whole, alone)
    before = torch.get_rng_state()
    integers(seed, position, 4, 2**31)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("high", [1, 3, 128])
def test_draws_are_uniform_and_independent(high):
    seeds = torch.arange(50)
    drawn = integers(seeds, torch.zeros_like(seeds), 2000, high)
    assert drawn.min() >= 0
    counts = torch.bincount(drawn.flatten(), minlength=high)
    assert len(counts) == high
    expected = drawn.numel() / high
    assert (counts - expected).abs().max() <= 5 * expected**0.5
    for pairs in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])):  # in time, over seeds
        equal = (pairs[0] == pairs[1]).double().mean()
        sigma = (1 / high * (1 - 1 / high) / pairs[0].numel()) ** 0.5
        assert abs(equal - 1 / high) <= 5 * sigma
