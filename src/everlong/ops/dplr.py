"""The state of linear attention, decayed and corrected at rank one (DPLR): loop and chunked form.

B batch, T time, H heads, K width of keys, V width of values, C positions of a chunk, N chunks,
X = B * H. For every head the state S [K, V] is, with all vectors rows,

    S_t = diag(exp(g_t)) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t,    o_t = q_t S_t.

**a reads the state before it decays.** A rule that corrects the decayed state, as GatedDeltaNet
(arXiv 2412.06464) does with strength beta, has a = exp(g) * k, b = -beta k and beta v for v. RWKV-7
(arXiv 2503.14456) is a = -kk, b = kk * a. Without a and b this is GLA (arXiv 2312.06635); with one
g per head RetNet (arXiv 2307.08621) and Mamba2 (arXiv 2405.21060). `delta` has faster forms of
these. Queries are not scaled and keys are not normalised here.

All forms take q, k [B, T, H, K], v [B, T, H, V], the log decay g <= 0 as [B, T, H] (one a head) or
[B, T, H, K] (one a key channel), and the state [B, H, K, V]; they return o [B, T, H, V] in v's
dtype and the new state, float32 at least, in which everything is computed. With `lengths` Int [B],
positions behind a row's length neither decay nor write, and their o is 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from everlong.ops.ragged import expand_like, valid_positions

CHUNK = 64


def dplr_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    low_rank: tuple[Tensor, Tensor],
    state: Tensor,
    *,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Position by position, the definition; `low_rank` is (a, b), each [B, T, H, K]."""
    dtype = v.dtype
    state, parts = prepare([q, k, v, g, *low_rank], state, lengths)
    outputs = []
    for t in range(v.shape[1]):
        q_t, k_t, v_t, g_t, a_t, b_t = (part[:, t] for part in parts)
        read = a_t[..., None, :] @ state
        kept = expand_like(g_t.exp(), state) * state
        state = kept + b_t[..., None] * read + k_t[..., None] * v_t[..., None, :]
        outputs.append((q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 1).to(dtype), state


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    low_rank: tuple[Tensor, Tensor],
    state: Tensor,
    *,
    lengths: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of `chunk_size` positions (a power of two), which changes the rounding
    only. Gradients are of first order.

    What a position reads from its own chunk is one triangular system: with A[x, y]_ij =
    x_i diag(exp(g_{j+1} + ... + g_i)) y_j^T and u_t = a_t S_{t-1},
    (I - A[a, b]) U = A[a, k] V + (a * decay) S, where a's decays end before its position.
    """
    length, dtype = v.shape[1], v.dtype
    with torch.autocast(v.device.type, enabled=False):
        state, parts = prepare([q, k, v, g, *low_rank], state, lengths)
        q, k, v, g, a, b = (chunked(part, chunk_size) for part in parts)
        into, out, total = decays(g)
        # a reads what the position before it left: its pairs are those of a query there
        ahead = F.pad(a[..., 1:, :], (0, 0, 0, 1))
        ab, ak, qb, qk = pairs((ahead, q), (b, k), g)
        ab, ak = (F.pad(x[..., :-1, :], (0, 0, 1, 0)) for x in (ab, ak))
        before = F.pad(into[..., :-1, :], (0, 0, 1, 0), value=1.0)
        found = solve(-ab, torch.cat([ak @ v, a * before], -1))
        u, w = found.split([v.shape[-1], a.shape[-1]], -1)
        u, states, last = carry(u, w, b * out, total, (k * out).mT @ v, state.flatten(0, 1))
        o = (q * into) @ states + qb @ u + qk @ v
        return whole(o, state, length).to(dtype), last.view_as(state)


def prepare(
    parts: Sequence[Tensor], state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """In float32 at least, and zero behind a row's length: no decay, no key, no query."""
    dtype = torch.promote_types(torch.promote_types(parts[0].dtype, state.dtype), torch.float32)
    parts = [part.to(dtype) for part in parts]
    if lengths is not None:
        real = valid_positions(lengths, parts[0].shape[1])
        parts = [torch.where(expand_like(real, part), part, 0.0) for part in parts]
    return state.to(dtype), list(parts)


def chunked(x: Tensor, chunk_size: int) -> Tensor:
    """[B, T, H, ...] -> [N, X, C, ...], filled up with zeros; a short T is one short chunk."""
    length = x.shape[1]
    width = min(chunk_size, 1 << (length - 1).bit_length())
    if (missing := -length % width) > 0:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    x = x.unflatten(1, (-1, width)).movedim(0, 1).transpose(2, 3)  # [N, B, H, C, ...]
    return x.flatten(1, 2) if x.dim() > 4 else x.flatten(1, 2)[..., None]


def whole(o: Tensor, state: Tensor, length: int) -> Tensor:
    """[N, X, C, V] -> [B, T, H, V]."""
    o = o.unflatten(1, state.shape[:2])  # [N, B, H, C, V]
    return o.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]


def decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each position of a chunk [N, X, C, 1 or K]: the decay from the chunk's start to it (its
    own included), and from it to the chunk's end; and that of the chunk, [N, X, 1 or K, 1]. Both
    are sums, never differences, so that a strong decay takes no digits from a weak one."""
    into = g.cumsum(-2)
    out = F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
    return into.exp(), out.exp(), into[..., -1, :, None].exp()


def pairs(left: Sequence[Tensor], right: Sequence[Tensor], g: Tensor) -> list[Tensor]:
    """A[x, y]_ij = sum_d x_id y_jd exp(g_{j+1,d} + ... + g_id) for i >= j, else 0: [N, X, C, C].

    For all x of `left` with all y of `right`, each [N, X, C, K]; g [N, X, C, 1 or K].
    """
    if g.shape[-1] == left[0].shape[-1]:
        found: Any = _Pairs.apply(len(left), g, *left, *right)
        return list(found)
    ones = torch.ones_like(g)
    decay: Any = _Pairs.apply(1, g, ones, ones)
    return [(x @ y.mT) * decay[0] for x in left for y in right]


class _Pairs(torch.autograd.Function):
    """`pairs` with a decay for every channel, by halves: for rows i of the second half of a block
    and j of the first, the decay is exp(from the middle to i) * exp(from j to the middle), two
    factors that are at most 1; then each half is a block. log2 C matmuls, and nothing of size
    C * C * K.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        count, g, *rows = inputs
        left, right = rows[:count], rows[count:]
        found = [torch.diag_embed((x * y).sum(-1)) for x in left for y in right]
        for size, into, out in _halves(g):
            for place, (x, y) in enumerate((x, y) for x in left for y in right):
                block = (_second(x, size) * into) @ (_first(y, size) * out).mT
                _corner(found[place], size).copy_(block)
        ctx.save_for_backward(g, *rows)
        ctx.count = count
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        g, *rows = ctx.saved_tensors
        left, right = rows[: ctx.count], rows[ctx.count :]
        found = [torch.zeros_like(g) for _ in rows]
        d_left, d_right = found[: ctx.count], found[ctx.count :]
        each = [(i, j) for i in range(len(left)) for j in range(len(right))]
        for size, into, out in _halves(g):
            for (i, j), grad in zip(each, grads, strict=True):
                corner = _corner(grad, size)
                x, y = _second(left[i], size) * into, _first(right[j], size) * out
                _second(d_left[i], size).addcmul_(corner @ y, into)
                _first(d_right[j], size).addcmul_(corner.mT @ x, out)
        # a decay up to position i scales what i reads, and unscales what j >= i wrote
        by_total = torch.zeros_like(g)
        for x, dx in zip(left, d_left, strict=True):
            by_total.addcmul_(x, dx)
        for y, dy in zip(right, d_right, strict=True):
            by_total.addcmul_(y, dy, value=-1)
        by_g = by_total.flip(-2).cumsum(-2).flip(-2)
        for (i, j), grad in zip(each, grads, strict=True):
            diagonal = grad.diagonal(dim1=-2, dim2=-1)[..., None]
            d_left[i].addcmul_(diagonal, right[j])
            d_right[j].addcmul_(diagonal, left[i])
        return None, by_g, *found


def _halves(g: Tensor) -> Any:
    """For blocks of 2, 4, ... C: (size of a half, decay from the middle to each row of the second
    half, decay from each row of the first half to the middle), [..., blocks, size, K]."""
    into, out, size = g.clone(memory_format=torch.contiguous_format), torch.zeros_like(g), 1
    while size < g.shape[-2]:
        yield size, _second(into, size).exp(), _first(out, size).exp()
        first, second = _first(into, size)[..., -1:, :], _second(into, size)
        _first(out, size).add_(second[..., -1:, :])
        second.add_(first)
        size *= 2


def _first(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, size))[..., 0, :, :]


def _second(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, size))[..., 1, :, :]


def _corner(x: Tensor, size: int) -> Tensor:
    """Of [..., C, C] the blocks on the diagonal, of each the second rows by the first columns."""
    blocks = x.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def solve(lower: Tensor, rhs: Tensor) -> Tensor:
    """(I + tril(lower, -1))^-1 rhs."""
    return torch.linalg.solve_triangular(lower, rhs, upper=False, unitriangular=True)


def carry(
    u: Tensor, w: Tensor, key: Tensor, decay: Tensor, more: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk by chunk: e = u + w S, then S <- decay * S + key^T e + more.

    u [N, X, C, V], w and key [N, X, C, K], decay [N, X, 1 or K, 1], more [N, X, K, V], state
    [X, K, V] -> e like u, the state before each chunk [N, X, K, V], and the last.
    """
    found: Any = _Carry.apply(u, w, key, decay, more, state)
    return found


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        u, w, key, decay, more, state = inputs
        e = torch.empty_like(u)
        states = u.new_empty(len(u) + 1, *state.shape)
        states[0] = state
        for n in range(len(u)):
            torch.baddbmm(u[n], w[n], states[n], out=e[n])
            kept = torch.mul(states[n], decay[n], out=states[n + 1])
            if more is not None:
                kept.add_(more[n])
            kept.baddbmm_(key[n].mT, e[n])
        ctx.save_for_backward(w, key, decay, e, states)
        ctx.more = more is not None
        return e, states[:-1], states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        w, key, decay, e, states = ctx.saved_tensors
        by_e, by_states, by_last = grads
        by_u, after = torch.empty_like(e), torch.empty_like(states)
        after[-1] = by_last
        for n in reversed(range(len(e))):
            torch.baddbmm(by_e[n], key[n], after[n + 1], out=by_u[n])
            torch.addcmul(by_states[n], after[n + 1], decay[n], out=after[n])
            after[n].baddbmm_(w[n].mT, by_u[n])
        behind, before = after[1:], states[:-1]
        by_decay = (behind * before).sum_to_size(decay.shape)
        by_w, by_key = by_u @ before.mT, e @ behind.mT
        return by_u, by_w, by_key, by_decay, behind if ctx.more else None, after[0]
