"""Memories whose weights are not linear in the gradients, and so have no dual form, or half of one.

Shapes, and what gradients of a chunk are, as in `everlong.ops.dual`; A is what is accumulated, W(A)
the network's weights. Where weights are made at many positions of a chunk, they are made again for
its gradients: across chunks only what they start from is kept.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from everlong.ops.block import TINY, Inner
from everlong.ops.dual import Call, Pairs, Read, network
from everlong.ops.newton_schulz import newton_schulz
from everlong.ops.schedule import Gates, Rows, last, schedule

Found = tuple[Tensor, list[Tensor], list[Tensor]]
_gelu_backward = torch.ops.aten.gelu_backward  # (g, z): g times the derivative of gelu at z


def _chunks(
    step: Callable[..., Any], call: Call, *others: Any, start: list, again: bool = True
) -> Found:
    """`step(pairs, *others, weights, momenta)` of each chunk, its inputs without N, in turn; with
    `again` what it makes is made again for its gradients."""

    weights, momenta = start
    outputs, live = [], call.live
    for n in range(len(call.full)):
        inputs = _at(call.pairs, n), *(_at(part, n) for part in others)
        inputs = *inputs, weights, momenta
        if again:
            y, *after = checkpoint(step, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            y, *after = step(*inputs)
        outputs.append(y)
        if n < live:
            weights, momenta = after
    return torch.stack(outputs), list(weights), list(momenta)


def _at(part: Any, n: int) -> Any:
    """Of chunk n."""
    if part is None or isinstance(part, Tensor):
        return None if part is None else part[n]
    if isinstance(part, Rows):
        return Rows(*(_at(x, n) for x in part))
    if isinstance(part, tuple):
        return tuple(_at(x, n) for x in part)
    return Pairs(**{name: _at(x, n) for name, x in vars(part).items()})


def _rows(call: Call) -> tuple[Rows, Rows]:
    """The schedule where it is read, and at each chunk's end."""
    rows, count = schedule(call.gates), call.full * call.gates.keep.shape[-1]
    return rows if call.index is None else rows.take(call.index), rows.at(count)


def _moved(start: Tensor, momentum: Tensor | None, rows: Rows, a: Tensor, g: Tensor) -> Tensor:
    """A at `rows`, [X, R, I, O], from where the chunk starts."""
    now = rows.into[..., None] * start[:, None] + _sums(rows.pairs, a, g)
    if momentum is None or rows.drift is None:
        return now
    return now + rows.drift[..., None] * momentum[:, None]


def _sums(pairs: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """sum_j pairs_rj a_j^T g_j: pairs [X, R, K], a [X, K, I], g [X, K, O] -> [X, R, I, O]."""
    if pairs.shape[1] == 1:
        return ((pairs.mT * a).mT @ g)[:, None]
    each = pairs[..., None, :] * a.mT[:, None]  # [X, R, I, K]
    return (each.flatten(1, 2) @ g).unflatten(1, each.shape[1:3])


def _moved_momenta(momenta: Sequence[Tensor], rows: Rows, a: Any, g: Any) -> list[Tensor]:
    if not momenta:
        return []
    assert rows.slow is not None
    assert rows.push is not None
    return [
        rows.slow[..., None] * s[:, None] + _sums(rows.push, x, y)
        for s, x, y in zip(momenta, a, g, strict=True)
    ]


def _learned(
    inner: Inner, pairs: Pairs, weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What enters each layer, as it is written, and what comes back to it, shortened."""
    x = pairs.key if pairs.probe is None else pairs.probe
    entering, below = [pairs.key], []
    for w in weights[:-1]:
        below.append(x @ w)
        x = F.gelu(below[-1])
        entering.append(x)
    g = [inner.error(x @ weights[-1], pairs.extras)]
    for w, z in zip(reversed(weights[1:]), reversed(below), strict=True):
        g.insert(0, _gelu_backward(g[0] @ w.mT, z))
    if inner.limit is None:
        return entering, g
    squares = [a.square().sum(-1) * b.square().sum(-1) for a, b in zip(entering, g, strict=True)]
    length = (torch.stack(squares).sum(0) + TINY).sqrt()[..., None]
    return entering, [x * (inner.limit / length).clamp(max=1) for x in g]


def one(
    pairs: Pairs,
    gates: Gates,
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    inner: Inner,
    ends: bool,
) -> Found:
    """`dual` of a single chunk that is read at its last position alone, as one token is; `ends`:
    whether all rows end it there, or none does."""
    rows, pairs = _at(last(gates), 0), _at(pairs, 0)
    a, g = _learned(inner, pairs, weights)
    held = [*momenta] or [None] * len(weights)
    x = pairs.query
    for i, (w, s) in enumerate(zip(weights, held, strict=True)):
        x = F.gelu(x) if i else x
        y = rows.into * (x @ w) + ((x @ a[i].mT) * rows.pairs) @ g[i]
        x = y if s is None else y + rows.drift * (x @ s)
    if not ends:
        return x[None], list(weights), list(momenta)
    parts = zip(weights, held, a, g, strict=True)
    after = [_moved(w, s, rows, x, y)[:, 0] for w, s, x, y in parts]
    return x[None], after, [s[:, 0] for s in _moved_momenta(momenta, rows, a, g)]


def explicit(
    call: Call,
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    inner: Inner,
    read: Read,
) -> Found:
    """`dual_reference` with a `read` for every position's A."""

    def step(pairs: Pairs, rows: Rows, end: Rows, weights: Any, momenta: Any) -> Any:
        a, g = _learned(inner, pairs, read(weights, weights))
        held = [*momenta] or [None] * len(weights)
        parts = list(zip(weights, held, a, g, strict=True))
        now = read([_moved(w, s, rows, x, y) for w, s, x, y in parts], weights)
        y = network(now, pairs.query[..., None, :]).squeeze(-2)
        last = [_moved(w, s, end, x, y)[:, 0] for w, s, x, y in parts]
        return y, last, [s[:, 0] for s in _moved_momenta(momenta, end, a, g)]

    return _chunks(step, call, *_rows(call), start=[weights, momenta])


def scaled(
    call: Call,
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    inner: Inner,
    scale: Callable[[Tensor], Tensor],
) -> Found:
    """`dual_reference` with read(now, start) = scale(start) * now, a number [X, 1, 1] a layer: in
    the dual form, for it stays linear within a chunk."""

    def step(pairs: Pairs, rows: Rows, end: Rows, weights: Any, momenta: Any) -> Any:
        assert not momenta, "a scaled memory has no momentum"
        factors = [scale(w) for w in weights]
        now = [w * c for w, c in zip(weights, factors, strict=True)]
        a, g = _learned(inner, pairs, now)
        x = pairs.query
        for i, (w, c) in enumerate(zip(now, factors, strict=True)):
            x = F.gelu(x) if i else x
            x = rows.into * (x @ w) + ((x @ a[i].mT) * rows.pairs) @ (c * g[i])
        parts = zip(weights, a, g, strict=True)
        return x, [_moved(w, None, end, x, y)[:, 0] for w, x, y in parts], []

    return _chunks(step, call, *_rows(call), start=[weights, momenta], again=False)


def orthogonal(
    call: Call,
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    inner: Inner,
    every: int,
) -> Found:
    """Muon inside (Atlas, arXiv 2505.23735, eq. 32 and 33): at every m-th position of a chunk

        M_t = keep_t M_{t-1} - step_t NS(S_t),   at the others M_t = keep_t M_{t-1}

    m divides C."""

    def step(
        pairs: Pairs,
        keep: Tensor,
        size: Tensor,
        rows: Rows,
        full: Tensor,
        weights: Any,
        momenta: Any,
    ) -> Any:
        a, g = _learned(inner, pairs, weights)
        steps = rows.pick(slice(every - 1, None, every))
        moved = _moved_momenta(momenta, steps, a, g)
        pushed = [newton_schulz(s) for s in moved]
        kept = keep.unflatten(-1, (-1, every)).cumprod(-1)  # [X, C / m, m]
        size = size.unflatten(-1, (-1, every))[..., -1]
        seen = [[w] for w in weights]  # what each m-th position leaves
        for layer, push in zip(seen, pushed, strict=True):
            for r in range(push.shape[1]):
                decay, length = (part[:, r, None, None] for part in (kept[..., -1], size))
                layer.append(decay * layer[-1] - length * push[:, r])
        y = _read_between(pairs.query, [torch.stack(layer, 1) for layer in seen], kept, index)
        ends = full[:, None, None]
        last = [torch.where(ends, layer[-1], layer[0]) for layer in seen]
        after = [torch.where(ends, s[:, -1], old) for s, old in zip(moved, momenta, strict=True)]
        return y, last, after

    gates, index = call.gates, call.index
    assert gates.step is not None, "what is orthogonalised has a step of its own"
    parts = gates.keep, gates.step, schedule(gates), call.full
    return _chunks(step, call, *parts, start=[weights, momenta])


def _read_between(
    query: Tensor, layers: list[Tensor], kept: Tensor, index: Tensor | None
) -> Tensor:
    """y [X, Q, V] from layers [X, 1 + C / m, I, O] at the chunk's start and at each m-th position,
    which fade by kept [X, C / m, m] in between."""
    every = kept.shape[-1]
    fade = torch.cat([kept[..., :-1], torch.ones_like(kept[..., :1])], -1).flatten(1)  # [X, C]
    if index is not None:
        fade = fade.gather(1, index)[..., None, None]
        place = ((index + 1) // every)[..., None, None]
        x = query[:, :, None]
        for i, w in enumerate(layers):
            x = F.gelu(x) if i else x
            x = fade * (x @ w.gather(1, place.expand(-1, -1, *w.shape[2:])))
        return x[:, :, 0]
    # position t reads what the (t + 1) // m-th step left
    x = F.pad(query, (0, 0, 1, every - 1)).unflatten(1, (-1, every))
    fade = F.pad(fade, (1, every - 1), value=1.0).unflatten(1, (-1, every))[..., None]
    for i, w in enumerate(layers):
        x = F.gelu(x) if i else x
        x = fade * (x @ w)
    return x.flatten(1, 2)[:, 1 : 1 + query.shape[1]]
