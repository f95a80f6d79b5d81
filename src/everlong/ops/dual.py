"""A small network a row and head, trained on its stream while it reads it: loop and dual form.

N chunks, X = B * H networks, C positions of a chunk, K pairs a chunk learns from, Q positions it is
read at, F width of keys, V width of values, I and O widths into and out of a layer.

The network is x W_1 for one matrix, else gelu(... gelu(x W_1) W_2 ...) W_L, without biases; what is
added to its output, and how an error turns into the cotangent of it, is the caller's (`Inner`).
Gradients u of a chunk are taken at the weights it starts from, so the weights in between are linear
in them (`everlong.ops.schedule`). They are outer products of what enters a layer and what comes
back to it: reading needs Q x K matrices and no weights or gradients a position,

    x W_t = into_t x W_0 - drift_t x S_0 - sum_j pairs_tj (x a_j^T) g_j

for a_j what entered the layer for pair j and g_j the cotangent that came back to it (TTT,
arXiv 2407.04620, section 2.5 and app. A, whose gates are all 1; Titans, arXiv 2501.00663, eq. 16 to
18; a window of pairs, arXiv 2505.23735, section 3.3). **The chunk is part of the function.**

Short chunks are taken several at a time, as a block: what a chunk starts from is read off the
block's start and the pairs since, by the same sum, so that weights are formed once a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.block import TINY, Inner, Parts, fit_blocks, stacked
from everlong.ops.newton_schulz import newton_schulz
from everlong.ops.schedule import Gates, schedule

Read = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
BLOCK = 64  # positions that are read at once: a question of speed only


@dataclass(frozen=True)
class Pairs:
    """What is read with and learned from: query [N, X, Q, F], key [N, X, K, F], extras of `Inner`
    ([N, X, K or 1, V or 1] each), probe: keys at which errors are taken, None: the keys."""

    query: Tensor
    key: Tensor
    extras: tuple[Tensor, ...]
    probe: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """One call: `full` Bool [N, X] are the chunks that end; behind one that does not a row has no
    other, and its outputs mean nothing. `index` Int [X, Q]: positions of the chunk (N = 1) that the
    queries are of; None: of all, Q = C."""

    pairs: Pairs
    gates: Gates
    full: Tensor
    index: Tensor | None = None

    @property
    def live(self) -> int:
        """How many chunks some row ends."""
        return int(self.full.any(1).sum())

    def part(self, chunks: slice) -> "Call":
        """Some of its chunks."""
        pairs, gates = self.pairs, self.gates
        cut = [None if x is None else x[chunks] for x in (pairs.probe, gates.momentum, gates.step)]
        return Call(
            Pairs(
                pairs.query[chunks],
                pairs.key[chunks],
                tuple(extra[chunks] for extra in pairs.extras),
                cut[0],
            ),
            Gates(gates.keep[chunks], cut[1], gates.write[chunks], cut[2]),
            self.full[chunks],
            self.index,
        )


def network(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """x [..., I] through the layers [..., I, O]."""
    *hidden, last = weights
    for weight in hidden:
        x = F.gelu(x @ weight)
    return x @ last


def dual_reference(
    call: Call,
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    inner: Inner,
    read: Read = lambda now, start: now,
    every: int = 0,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Position by position, the definition: weights and gradients of every position, the gradients
    by automatic differentiation. `read(now, start)`: the network's weights, from what is
    accumulated now and at the chunk's start. `every` m: at each m-th position of a chunk a step
    along the orthogonalised momentum is taken (`everlong.ops.explicit`)."""
    assert call.index is None, "the definition reads at every position"
    pairs, gates, full = call.pairs, call.gates, call.full
    now, moving, outputs = list(weights), list(momenta), []
    for n, query in enumerate(pairs.query):
        start, before = now, moving
        grads, seen = _gradients(pairs, n, read(start, start), inner), []
        for t in range(query.shape[1]):
            keep, write = gates.keep[n, :, t, None, None], gates.write[n, :, t]
            drive = [torch.einsum("xk,xkio->xio", write, u) for u in grads]
            if gates.momentum is not None:
                slow = gates.momentum[n, :, t, None, None]
                moving = drive = [slow * s + u for s, u in zip(moving, drive, strict=True)]
            if every:
                assert gates.step is not None
                step = gates.step[n, :, t, None, None] * ((t + 1) % every == 0)
                drive = [step * newton_schulz(s) for s in moving]
            now = [keep * w - u for w, u in zip(now, drive, strict=True)]
            seen.append(network(read(now, start), query[:, t, None])[:, 0])
        outputs.append(torch.stack(seen, 1))
        ends = full[n, :, None, None]
        now = [torch.where(ends, a, b) for a, b in zip(now, start, strict=True)]
        moving = [torch.where(ends, a, b) for a, b in zip(moving, before, strict=True)]
    return torch.stack(outputs), now, moving


def _gradients(pairs: Pairs, n: int, weights: Sequence[Tensor], inner: Inner) -> list[Tensor]:
    """Of every pair of chunk n by every layer, [X, K, I, O], at `weights`."""
    probe = pairs.key if pairs.probe is None else pairs.probe
    extras = [extra[n][..., None, :] for extra in pairs.extras]
    each = [w[:, None].expand(-1, probe.shape[2], -1, -1) for w in weights]
    o, pull, *_ = torch.func.vjp(lambda *layers: network(layers, probe[n][..., None, :]), *each)
    error = inner.error(o, extras)
    grads = list(pull(error))
    if pairs.probe is not None:
        assert len(weights) == 1, "only a linear memory takes errors elsewhere than it writes"
        grads = [pairs.key[n][..., None] * error]
    if inner.limit is not None:
        square = torch.stack([u.square().sum((-1, -2), keepdim=True) for u in grads]).sum(0)
        grads = [u * (inner.limit / (square + TINY).sqrt()).clamp(max=1) for u in grads]
    return grads


def dual(
    call: Call, weights: Sequence[Tensor], momenta: Sequence[Tensor], inner: Inner
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same in the dual form: outputs [N, X, Q, V], the new weights and momenta [X, I, O] of
    every layer (momenta [] without momentum). Gradients are of first order."""
    chunks, size = len(call.full), max(1, BLOCK // call.gates.keep.shape[-1])
    whole = chunks // size * size
    outputs = []
    for start, end in ((0, whole), (whole, chunks)):
        if start < end:
            part = call.part(slice(start, end))
            y, weights, momenta = _blocks(part, weights, momenta, inner, min(size, end - start))
            outputs.append(y)
    return torch.cat(outputs), list(weights), list(momenta)


def _blocks(
    call: Call, weights: Sequence[Tensor], momenta: Sequence[Tensor], inner: Inner, size: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`dual` of blocks of `size` chunks each."""
    pairs, gates = call.pairs, call.gates
    chunk, learned = gates.keep.shape[-1], pairs.key.shape[2]

    def joined(x: Tensor | None) -> Any:
        """Chunks side by side: [N, X, C, ...] -> [N / size, X, size C, ...]."""
        if x is None or size == 1:
            return x
        return x.unflatten(0, (-1, size)).transpose(1, 2).flatten(2, 3)

    def wide(x: Tensor) -> Tensor:
        return x.expand(-1, -1, learned, -1)

    write = gates.write
    if size > 1:
        eye = torch.eye(size, dtype=write.dtype, device=write.device)[:, None, :, None]
        write = write.unflatten(0, (-1, size)).transpose(1, 2)[..., None, :] * eye
        write = write.flatten(2, 3).flatten(3, 4)
    rows = schedule(Gates(joined(gates.keep), joined(gates.momentum), write))
    ended = (
        call.full.unflatten(0, (-1, size)).sum(1) * chunk
    )  # positions of full chunks, [N / size, X]
    end, early = rows.at(ended), rows.before(chunk, learned) if size > 1 else None
    rows = rows if call.index is None else rows.take(call.index)
    query, key, probe = joined(pairs.query), joined(pairs.key), joined(pairs.probe)
    probe = key if probe is None else probe
    parts = Parts(
        probe=probe if early is None else stacked(probe, early.into, early.drift),
        early=None if early is None else (probe @ key.mT) * early.pairs,
        query=stacked(query, rows.into, rows.drift),
        first=(query @ key.mT) * rows.pairs,
        key=stacked(key, end.pairs.mT, None if end.push is None else end.push.mT),
        reach=None if inner.limit is None else key.square().sum(-1, keepdim=True),
        into=rows.into,
        drift=rows.drift,
        pairs=rows.pairs,
        early_into=None if early is None else early.into,
        early_drift=None if early is None else early.drift,
        early_pairs=None if early is None else early.pairs,
        end_into=end.into,
        end_drift=end.drift,
        end_slow=end.slow,
        end_pairs=end.pairs.mT,
        end_push=None if end.push is None else end.push.mT,
    )
    extras = [joined(wide(extra)) for extra in pairs.extras]
    layers = zip(weights, *[momenta] * bool(momenta), strict=True)
    starts = [torch.cat(layer, 1) for layer in layers]
    y, states = fit_blocks(inner, -(-call.live // size), size, parts, extras, starts)
    if size > 1:
        y = y.unflatten(2, (size, chunk)).transpose(1, 2).flatten(0, 1)
    split = [state.chunk(1 + bool(momenta), 1) for state in states]
    return y, [part[0] for part in split], [part[1] for part in split if momenta]
