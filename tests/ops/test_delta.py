"""The special forms equal the general one, and each other where one is a case of the other."""

import pytest
import torch

from everlong.ops.delta import delta_rule, linear_attention
from everlong.ops.dplr import dplr, dplr_reference
from ops.test_dplr import assert_equal, everything, parts

B, H, K, V, C = 2, 2, 6, 5, 8
LENGTHS = [1, C - 1, C, C + 1, 4 * C + 3]


def general(form, **options):
    """The general form behind the signature of `linear_attention` (beta None) or `delta_rule`."""

    def call(q, k, v, g, *rest):
        *beta, state = rest
        if not beta:
            return form(q, k, v, g, (torch.zeros_like(k), torch.zeros_like(k)), state, **options)
        beta = beta[0][..., None]
        decay = (g if g.dim() == 4 else g[..., None]).exp()
        return form(q, k, beta * v, g, (decay * k, -beta * k), state, **options)

    return call


def inputs_of(form, length, channels=(), *, strength=2.0):
    q, k, v, g, a, _, state = parts(length, channels)
    k = k / k.norm(dim=-1, keepdim=True)
    beta = strength * a[..., 0].sigmoid()
    return [q, k, v, g, *([beta] if form is delta_rule else []), state]


@pytest.mark.parametrize("form", [linear_attention, delta_rule])
@pytest.mark.parametrize("channels", [(), (K,)])
@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_the_general_form(form, channels, length):
    inputs = inputs_of(form, length, channels)
    for lengths in (None, torch.tensor([length // 2, length])):
        wanted = everything(general(dplr_reference, lengths=lengths), inputs)
        fast = everything(general(dplr, lengths=lengths, chunk_size=C), inputs)
        assert_equal(fast, wanted)
        for size in (1, C, 64):
            special = lambda *given, n=size, m=lengths: form(*given, lengths=m, chunk_size=n)  # noqa: E731
            assert_equal(everything(special, inputs), wanted)


@pytest.mark.parametrize("form", [linear_attention, delta_rule])
@pytest.mark.parametrize("channels", [(), (K,)])
def test_any_cut_is_one_call(form, channels):
    *inputs, state = inputs_of(form, 21, channels)
    wanted = form(*inputs, state, chunk_size=C)
    for pieces in ([1] * 21, [5, 16], [8, 13], [20, 1]):
        found, carried = [], state
        for piece in zip(*(part.split(pieces, 1) for part in inputs), strict=True):
            y, carried = form(*piece, carried, chunk_size=C)
            found.append(y)
        assert_equal([torch.cat(found, 1), carried], wanted)
        assert carried.untyped_storage().nbytes() == carried.nbytes  # it keeps itself alone


def test_without_decay_and_by_equal_channels():
    for form in (linear_attention, delta_rule):
        inputs = inputs_of(form, 19)
        wanted = everything(form, inputs)
        by_channel = lambda q, k, v, g, *rest, f=form: f(  # noqa: E731
            q, k, v, g[..., None].expand(-1, -1, -1, K), *rest
        )
        assert_equal(everything(by_channel, inputs), wanted)
    q, k, v, g, state = inputs_of(linear_attention, 19)
    y, last = linear_attention(q, k, v, 0 * g, state)
    assert_equal([last], [state + torch.einsum("bthk,bthv->bhkv", k, v)])
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    wanted = torch.einsum("bhts,bshv->bthv", scores, v)
    assert_equal([y], [wanted + torch.einsum("bthk,bhkv->bthv", q, state)])


def test_the_delta_rule_recalls_what_was_written_last():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    k = torch.eye(K, dtype=torch.float64).repeat(2, 1)[None, :, None]  # every key twice
    v, g, beta = draw(1, 2 * K, 1, V), torch.zeros(1, 2 * K, 1), torch.ones(1, 2 * K, 1)
    y, last = delta_rule(k, k, v, g, beta, draw(1, 1, K, V), chunk_size=C)
    assert_equal([y, last[:, 0]], [v, v[:, K:, 0]])


@pytest.mark.parametrize("channels", [(), (K,)])
def test_reflections_and_strong_decay_over_4096_positions(channels):
    """beta = 2 and unit keys turn the state over, thousands of times, without growth."""
    *inputs, state = inputs_of(delta_rule, 4096, channels)
    q, k, v, g, beta = (part[:1, :, :1] for part in inputs)
    state, beta, v = state[:1, :1], torch.full_like(beta, 2.0), 0 * v
    for decay in (0 * g, 0 * g - 20):
        inputs = [q, k, v, decay, beta, state]
        wanted = everything(delta_rule, inputs)
        assert wanted[1].norm() <= state.norm() * (1 + 1e-9)
        found = everything(delta_rule, [part.float() for part in inputs])
        for got, expected in zip(found, wanted, strict=True):
            assert got.isfinite().all()
            error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
            assert error < 1e-3
    wanted = everything(general(dplr_reference), [*(p[:, :100] for p in inputs[:-1]), state])
    assert_equal(everything(delta_rule, [*(p[:, :100] for p in inputs[:-1]), state]), wanted)


def test_transformers_computes_the_same():
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, k, v, g, beta, state = (part.float() for part in inputs_of(delta_rule, 75))
    wanted = torch_chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=state, output_final_state=True
    )
    assert_equal(delta_rule(q * K**-0.5, k, v, g, beta, state), wanted, 1e-5)
