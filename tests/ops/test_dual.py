"""The dual form equals weights made explicit, with gradients by automatic differentiation."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from everlong.ops.biases import BIASES
from everlong.ops.block import Inner
from everlong.ops.delta import delta_rule, linear_attention
from everlong.ops.dual import Call, Pairs, dual, dual_reference, network
from everlong.ops.explicit import explicit, orthogonal, scaled
from everlong.ops.newton_schulz import newton_schulz
from everlong.ops.retention import Retention
from everlong.ops.schedule import Gates, lags

N, X, F, HIDDEN, V = 3, 2, 3, 5, 4


def draw(
    depth=2, chunk=4, window=1, *, momentum=True, full=True, bias=None, limit=None, n=N, seed=0
):
    """What a call takes, float64: (pairs, gates, full, weights, momenta, inner); and leaves."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape, uniform=False):
        make = torch.rand if uniform else torch.randn
        found = make(*shape, generator=generator, dtype=torch.float64)
        return (found if uniform else 0.5 * found).requires_grad_()

    pairs = chunk + window - 1
    query, key = leaf(n, X, chunk, F), leaf(n, X, pairs, F)
    target, level = leaf(n, X, pairs, V), leaf(n, X, 1, 1, uniform=True)
    raw_keep, slow = leaf(n, X, chunk, uniform=True), leaf(n, X, chunk, uniform=True)
    write, step = leaf(n, X, chunk, window, uniform=True), leaf(n, X, chunk, uniform=True)
    sizes = [F, *[HIDDEN] * (depth - 1), V]
    layers = [leaf(X, a, b) for a, b in itertools.pairwise(sizes)]
    moving = [leaf(X, a, b) for a, b in itertools.pairwise(sizes)] if momentum else []
    ends = torch.ones(n, X, dtype=torch.bool)
    if not full:  # row 0 stops a chunk earlier; nobody ends the last one
        ends[-1], ends[-2, 0] = False, False
    inner = Inner(limit=limit)
    if bias is not None:
        inner = Inner(lambda o, t, level: BIASES[bias](o - t, level, 3.0), limit)
    gates = Gates(
        1 - raw_keep / 2, slow if momentum else None, lags(write / (10 * window)), step / 10
    )
    extras = (target, level) if bias else (target,)
    leaves = [query, key, target, raw_keep, write, *layers, *moving]
    leaves += [level] if bias else []
    leaves += [slow] if momentum else []
    return (Pairs(query, key, extras), gates, ends, layers, moving, inner), leaves


def fast(pairs, gates, ends, weights, momenta, inner, form=dual, index=None, **options):
    return form(Call(pairs, gates, ends, index), weights, momenta, inner, **options)


def slow(*inputs, **options):
    return fast(*inputs, form=dual_reference, **options)


def everything(found, leaves, ends=None):
    """Values, and the gradients of a loss that weighs each of them differently. Behind a chunk that
    does not end a row's outputs mean nothing."""
    y, weights, momenta = found
    if ends is not None:
        before = torch.cat([torch.ones_like(ends[:1]), ends[:-1]]).cumprod(0).bool()
        y = torch.where(before[..., None, None], y, 0.0)
    values = [y, *weights, *momenta]
    loss = sum((v * torch.cos(torch.arange(v.numel()).view_as(v) * 1.0)).sum() for v in values)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return values + [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
    ]


def assert_equal(found, wanted, tolerance=1e-12):
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert b.isfinite().all()
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=number: f"result {n}: {m}"
        )


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_it_is_the_explicit_form(depth, chunk, window, momentum, full):
    inputs, leaves = draw(depth, chunk, window, momentum=momentum, full=full)
    wanted = everything(slow(*inputs), leaves, inputs[2])
    assert_equal(everything(fast(*inputs), leaves, inputs[2]), wanted, 1e-11)


@pytest.mark.parametrize(
    ("chunk", "window"), [(4, 4), (16, 4), (64, 4), (4, 16), (16, 16), (64, 16)]
)
def test_of_windows_longer_and_shorter_than_a_chunk(chunk, window):
    inputs, leaves = draw(2, chunk, window, momentum=False, n=3)
    assert_equal(everything(fast(*inputs), leaves), everything(slow(*inputs), leaves), 1e-10)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("depth", [1, 3])
def test_of_every_bias(bias, depth):
    inputs, leaves = draw(depth, bias=bias)
    assert_equal(everything(fast(*inputs), leaves), everything(slow(*inputs), leaves))


@pytest.mark.parametrize("limit", [0.05, 0.7, 100.0])
def test_of_shortened_gradients(limit):
    inputs, leaves = draw(3, window=2, limit=limit)
    assert_equal(everything(fast(*inputs), leaves), everything(slow(*inputs), leaves))
    if limit == 100.0:  # it never lengthens
        free, _ = draw(3, window=2)
        assert_equal(fast(*inputs)[1], fast(*free)[1])


def test_a_gradient_is_no_longer_than_the_limit():
    (pairs, gates, ends, weights, _, _), _ = draw(2, 1, momentum=False, n=1)
    still = Gates(torch.ones_like(gates.keep), None, torch.ones_like(gates.write))
    _, moved, _ = fast(pairs, still, ends, weights, [], Inner(limit=0.05))
    change = sum((a - b).square().sum((-1, -2)) for a, b in zip(moved, weights, strict=True)).sqrt()
    torch.testing.assert_close(change, torch.full_like(change, 0.05))


def test_the_chunk_is_part_of_the_function():
    """48 positions as chunks of 4 and of 16 are two memories."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 48, w, generator=generator).double() for w in (F, F, V))
    w = torch.randn(1, F, V, generator=generator).double()
    found = []
    for chunk in (4, 16):
        cut = [x.unflatten(1, (-1, chunk)).transpose(0, 1) for x in (q, k, v)]
        keep = torch.ones(48 // chunk, 1, chunk).double()
        gates = Gates(keep, None, lags(0.02 * keep[..., None]))
        ends = torch.ones(len(keep), 1, dtype=torch.bool)
        y, *_ = fast(Pairs(cut[0], cut[1], (cut[2],)), gates, ends, [w], [], Inner())
        found.append(y.transpose(0, 1).flatten(1, 2))
    assert (found[0] - found[1]).norm() > 0.01 * found[0].norm()


def test_gradcheck_through_two_chunks():
    inputs, _ = draw(2, 2, n=2, bias="huber", limit=2.0)
    pairs, gates, ends, weights, momenta, inner = inputs

    def run(query, key, target, level, keep, slow, write, *layers):
        found = fast(
            Pairs(query, key, (target, level)),
            Gates(keep, slow, write),
            ends,
            layers[:2],
            layers[2:],
            inner,
        )
        return found[0], *found[1], *found[2]

    flat = [pairs.query, pairs.key, *pairs.extras, gates.keep, gates.momentum, gates.write]
    flat = [x.detach().requires_grad_() for x in (*flat, *weights, *momenta)]
    assert gradcheck(run, flat)


@pytest.mark.parametrize("kind", ["softmax", "lq_dual", "elastic"])
@pytest.mark.parametrize("full", [True, False])
def test_explicit_weights(kind, full):
    kept = Retention(kind, threshold=0.3)
    inputs, leaves = draw(2, window=2, momentum=False, full=full)
    wanted = everything(slow(*inputs, read=kept.read), leaves)
    found = everything(fast(*inputs, form=explicit, read=kept.read), leaves)
    assert_equal(found, wanted, 1e-10)  # of lq_dual gradients are 1e8 where A is near 0


def test_explicit_weights_without_a_map_are_the_dual_form():
    inputs, leaves = draw(3, window=2, limit=0.5)
    found = fast(*inputs, form=explicit, read=lambda now, start: now)
    assert_equal(everything(found, leaves), everything(fast(*inputs), leaves))


@pytest.mark.parametrize("depth", [1, 2])
def test_scaled_weights(depth):
    kept = Retention("lq")
    inputs, leaves = draw(depth, momentum=False, limit=0.7)
    wanted = everything(slow(*inputs, read=kept.read), leaves)
    assert_equal(everything(fast(*inputs, form=scaled, scale=kept.scale), leaves), wanted)


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("full", [True, False])
def test_orthogonal_steps(every, full):
    inputs, leaves = draw(2, 4, 2, full=full)
    pairs, gates, ends, weights, momenta, inner = inputs
    wanted = everything(slow(*inputs, every=every), leaves)
    assert_equal(everything(fast(*inputs, form=orthogonal, every=every), leaves), wanted, 1e-9)
    last = torch.full((X, 1), 2)  # the third position of the last chunk alone
    call = Call(pairs, gates, torch.ones_like(ends))
    start = dual_reference(call.part(slice(-1)), weights, momenta, inner, every=every)
    part = call.part(slice(-1, None))
    alone = Pairs(part.pairs.query[:, :, 2:3], part.pairs.key, part.pairs.extras)
    y, *_ = orthogonal(
        Call(alone, part.gates, ends[-1:], last), start[1], start[2], inner, every=every
    )
    if full:
        torch.testing.assert_close(y[0, :, 0], slow(*inputs, every=every)[0][-1, :, 2])


def test_an_orthogonal_step_has_its_own_length():
    """Surprise of any size moves a matrix by `step` in every direction it has."""
    (pairs, gates, ends, weights, momenta, inner), _ = draw(1, 1, n=1)
    for size in (1.0, 1e3):
        now = Gates(torch.ones_like(gates.keep), gates.momentum, size * gates.write, gates.step)
        moving = [size * s for s in momenta]
        _, moved, _ = fast(pairs, now, ends, weights, moving, inner, form=orthogonal, every=1)
        values = torch.linalg.svdvals(moved[0] - weights[0]) / gates.step[0]
        assert ((values > 0.6) & (values < 1.25)).all()
    assert not newton_schulz(torch.zeros(3, 4)).any()


def as_chunks(x):
    """[B, T, H, ...] as T chunks of one position."""
    return x.transpose(0, 1).flatten(1, 2)[:, :, None]


def test_a_linear_memory_is_linear_attention_and_the_delta_rules():
    """Chunks of one position: bias "dot" without and with decay, l2, and l2 after the decay."""
    generator = torch.Generator().manual_seed(3)
    b, t, h = 2, 7, 2
    q, k, v = (torch.randn(b, t, h, w, generator=generator).double() for w in (F, F, V))
    k = k / k.norm(dim=-1, keepdim=True)
    g = -torch.rand(b, t, h, generator=generator).double()
    beta = torch.rand(b, t, h, generator=generator).double()
    state = torch.randn(b, h, F, V, generator=generator).double()
    ends = torch.ones(t, b * h, dtype=torch.bool)
    hebbian = Inner(lambda o, target: -target)

    def found(keep, step, inner, decay_first=False):
        gates = Gates(as_chunks(keep)[..., 0, None], None, lags(as_chunks(step)[..., None]))
        key = as_chunks(k)
        probe = gates.keep[..., None] * key if decay_first else None
        pairs = Pairs(as_chunks(q), key, (as_chunks(v),), probe)
        y, (last,), _ = fast(pairs, gates, ends, [state.flatten(0, 1)], [], inner)
        return y.squeeze(2).unflatten(1, (b, h)).transpose(0, 1), last.view_as(state)

    one, none = torch.ones_like(beta), torch.zeros_like(g)
    for decay in (none, g):
        wanted = linear_attention(q, k, v, decay, state)
        assert_equal(found(decay.exp(), one, hebbian), wanted)
        gated = found(decay.exp(), beta, Inner(), decay_first=True)
        assert_equal(gated, delta_rule(q, k, v, decay, beta, state))
    assert_equal(found(none.exp(), beta, Inner()), delta_rule(q, k, v, none, beta, state))
    late = found(g.exp(), beta, Inner())[1]  # where the error is that of the memory before it fades
    assert (late - delta_rule(q, k, v, g, beta, state)[1]).abs().max() > 1e-3


def test_erasing_and_standing_still():
    """keep 0 and momentum 0 leave S alone; step 0 leaves keep times the start."""
    (pairs, gates, ends, weights, momenta, inner), _ = draw(2, 4, n=1)
    nothing = torch.zeros_like(gates.keep)
    erased = Gates(nothing, nothing, gates.write)
    _, moved, left = fast(pairs, erased, ends, weights, momenta, inner)
    assert_equal(moved, [-s for s in left])
    still = Gates(gates.keep, nothing, torch.zeros_like(gates.write))
    _, moved, _ = fast(pairs, still, ends, weights, [torch.zeros_like(s) for s in momenta], inner)
    faded = gates.keep.prod(-1)[0, :, None, None]
    assert_equal(moved, [faded * w for w in weights])


def test_a_chunk_that_does_not_end_moves_no_bit():
    (pairs, gates, ends, weights, momenta, inner), _ = draw(2, full=False)
    found = fast(pairs, gates, torch.zeros_like(ends), weights, momenta, inner)
    for a, b in zip([*found[1], *found[2]], [*weights, *momenta], strict=True):
        assert torch.equal(a, b)


def test_a_pair_with_gate_zero_is_never_seen():
    """Of a window, pair 4 has no gate in any row: its key and value may be anything."""
    inputs, _ = draw(2, 4, 3, n=2)
    pairs, gates, *rest = inputs
    write = gates.write.detach().clone()
    write[0, ..., 4], write[1, ..., 0] = 0, 0  # the same pair, seen from both chunks
    gates = Gates(gates.keep, gates.momentum, write)
    wanted = fast(pairs, gates, *rest)
    key = pairs.key.detach().clone()
    key[0, :, 4], key[1, :, 0] = 9.0, 9.0
    other = fast(Pairs(pairs.query, key, pairs.extras), gates, *rest)
    assert_equal([other[0], *other[1]], [wanted[0], *wanted[1]])


def test_surprise_falls_after_the_first_refresh():
    """One pair, 64 times, chunks of 8: the error falls to a tenth with the first new weights."""
    generator = torch.Generator().manual_seed(0)
    key = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    value = torch.randn(16, generator=generator)
    layers = [0.2 * torch.randn(1, *s, generator=generator) for s in ((16, 64), (64, 16))]
    k, v = key.expand(8, 1, 8, 16), value.expand(8, 1, 8, 16)
    gates = Gates(torch.ones(8, 1, 8), None, lags(torch.full((8, 1, 8, 1), 0.08)))
    ends = torch.ones(8, 1, dtype=torch.bool)
    before = (network(layers, key[None, None]) - value).square().sum()
    _, after, _ = fast(
        Pairs(k[:1], k[:1], (v[:1],)), Gates(gates.keep[:1], None, gates.write[:1]), ends[:1],
        layers, [], Inner(),
    )  # fmt: skip
    assert (network(after, key[None, None]) - value).square().sum() < before / 10


def test_the_state_stays_finite_for_ten_thousand_positions():
    generator = torch.Generator().manual_seed(0)
    n, x, c, d = 625, 2, 16, 8
    k = torch.nn.functional.normalize(torch.randn(n, x, c, d, generator=generator), dim=-1)
    v = torch.randn(n, x, c, d, generator=generator)
    layers = [0.3 * torch.randn(x, *s, generator=generator) for s in ((d, 32), (32, d))]
    momenta = [torch.zeros_like(w) for w in layers]
    keep, write = torch.full((n, x, c), 0.99), torch.full((n, x, c, 1), 0.05)
    gates = Gates(keep, torch.full((n, x, c), 0.5), lags(write))
    ends = torch.ones(n, x, dtype=torch.bool)
    y, weights, _ = fast(Pairs(k, k, (v,)), gates, ends, layers, momenta, Inner())
    assert y.isfinite().all()
    assert max(float(w.abs().max()) for w in weights) < 10
