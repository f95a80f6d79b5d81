"""What the chunked forms of `everlong.ops.dplr` and `everlong.ops.delta` are made of.

B batch, T time, H heads, K width of keys, V width of values, C positions of a chunk, N chunks,
X = B * H. Parts of chunks are [N, X, C, ...]: all that happens inside chunks is one batch of
matrices, and only the state goes from chunk to chunk. Gradients are of first order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.first_order import first_order
from everlong.ops.ragged import expand_like, valid_positions

CHUNK = 64  # positions
SOLVED_CHUNK = 32  # where a triangular system is solved, the cost of which grows with the chunk


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
    assert chunk_size & (chunk_size - 1) == 0, "chunk_size is a power of two"
    length = x.shape[1]
    width = min(chunk_size, 1 << (length - 1).bit_length())
    if (missing := -length % width) > 0:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    x = x.unflatten(1, (-1, width)).movedim(0, 1).transpose(2, 3)  # [N, B, H, C, ...]
    x = x.flatten(1, 2).contiguous()
    return x if x.dim() > 3 else x[..., None]


def whole(o: Tensor, state: Tensor, length: int) -> Tensor:
    """[N, X, C, V] -> [B, T, H, V]."""
    o = o.unflatten(1, state.shape[:2])  # [N, B, H, C, V]
    return o.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]


def pairs(
    left: Sequence[Tensor], right: Sequence[Tensor], g: Tensor
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """What decays inside the chunks, for rows [N, X, C, K] and g [N, X, C, 1 or K]:

    A[x, y]_ij = sum_d x_id y_jd exp(g_{j+1,d} + ... + g_id) for i >= j, else 0, for all x of `left`
    with all y of `right` [N, X, C, C]; the decays from a chunk's start to each position (its own
    included) and from each position to the chunk's end [N, X, C, 1 or K]; and that of the chunk
    [N, X, 1 or K, 1]. Decays are products of exp(g), never quotients: they may underflow and not
    overflow, and a strong decay takes no digits from a weak one beside it. The chunk's is the exp
    of a sum, so that rounding does not add up over the chunks of a long stream.
    """
    form = _ByHead if g.shape[-1] == 1 else _ByChannel
    found: Any = form.apply(len(left), g, *left, *right)
    *matrices, into, out, total = found
    return matrices, into, out, total


class _ByHead(torch.autograd.Function):
    """One decay a head: the decays between all positions are one matrix."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        count, g, *rows = inputs
        between = torch.diag_embed(torch.ones_like(g.squeeze(-1)))
        into, out = g.exp(), torch.ones_like(g)
        for size, second, first in _halves(into, out):
            torch.mul(second, first.mT, out=_corner(between, size))
        found = [(x @ y.mT).mul_(between) for x in rows[:count] for y in rows[count:]]
        edges = into, out, g.sum(-2)[..., None].exp()
        ctx.save_for_backward(between, *edges, *found, *rows)
        ctx.count = count
        return *found, *edges

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        between, *others = ctx.saved_tensors
        count, size = ctx.count, len(grads) - 3
        edges, found, rows = others[:3], others[3 : 3 + size], others[3 + size :]
        left, right = rows[:count], rows[count:]
        d_left, d_right = [torch.zeros_like(x) for x in left], [torch.zeros_like(y) for y in right]
        moved = torch.zeros_like(between)
        for n, (matrix, grad) in enumerate(zip(found, grads, strict=False)):
            i, j = divmod(n, len(right))
            moved.addcmul_(matrix, grad)
            grad = grad * between
            _add(d_left[i], grad, right[j])
            _add(d_right[j], grad.mT, left[i])
        moved.diagonal(dim1=-2, dim2=-1).zero_()  # a position does not decay itself
        by_into = (moved.sum(-1) - moved.sum(-2))[..., None]
        return None, _by_decay(by_into, edges, grads[-3:]), *d_left, *d_right


class _ByChannel(torch.autograd.Function):
    """One decay a channel, by halves: for rows i of the second half of a block and j of the first,
    the decay is exp(from the middle to i) * exp(from j to the middle), two factors that are at most
    1; then each half is a block. log2 C matmuls, of all of left with all of right in one, and
    nothing of size C * C * K."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        count, g, *rows = inputs
        left, right = rows[:count], rows[count:]
        found = [torch.diag_embed((x * y).sum(-1)) for x in left for y in right]
        into, out = g.exp(), torch.ones_like(g)
        for size, second, first in _halves(into, out):
            xs = _stacked([_second(x, size) for x in left], second)
            ys = _stacked([_first(y, size) for y in right], first)
            for matrix, corner in zip(found, _split(xs @ ys.mT, size), strict=True):
                _corner(matrix, size).copy_(corner)
        edges = into, out, g.sum(-2)[..., None].exp()
        ctx.save_for_backward(g, *edges, *rows)
        ctx.count = count
        return *found, *edges

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        g, *others = ctx.saved_tensors
        edges, left, right = others[:3], others[3 : 3 + ctx.count], others[3 + ctx.count :]
        d_left = [torch.zeros_like(x) for x in left]
        d_right = [torch.zeros_like(y) for y in right]
        for size, second, first in _halves(g.exp(), torch.ones_like(g)):
            xs = _stacked([_second(x, size) for x in left], second)
            ys = _stacked([_first(y, size) for y in right], first)
            corners = xs.new_empty(*xs.shape[:-1], ys.shape[-2])
            for grad, corner in zip(grads[:-3], _split(corners, size), strict=True):
                corner.copy_(_corner(grad, size))
            by_left = _times(corners, ys).split(size, -2)
            by_right = _times(corners.mT, xs).split(size, -2)
            for x, dx in zip(d_left, by_left, strict=True):
                _second(x, size).addcmul_(dx, second)
            for y, dy in zip(d_right, by_right, strict=True):
                _first(y, size).addcmul_(dy, first)
        # a decay up to position i scales what i reads, and unscales what i wrote
        by_into = torch.zeros_like(g)
        for x, dx in zip(left, d_left, strict=True):
            by_into.addcmul_(x, dx)
        for y, dy in zip(right, d_right, strict=True):
            by_into.addcmul_(y, dy, value=-1)
        for n, grad in enumerate(grads[:-3]):
            i, j = divmod(n, len(right))
            diagonal = grad.diagonal(dim1=-2, dim2=-1)[..., None]
            d_left[i].addcmul_(diagonal, right[j])
            d_right[j].addcmul_(diagonal, left[i])
        return None, _by_decay(by_into, edges, grads[-3:]), *d_left, *d_right


def _halves(into: Tensor, out: Tensor) -> Any:
    """For blocks of 2, 4, ... C: the size of a half, the decay from the middle to each row of the
    second half, and from each row of the first half to the middle, [..., blocks, size, K].

    into is the decay of each position and out is 1 at first; they become those from the start and
    to the end of a block.
    """
    size = 1
    while size < into.shape[-2]:
        second, first = _second(into, size), _first(out, size)
        yield size, second, first
        first.mul_(second[..., -1:, :])
        second.mul_(_first(into, size)[..., -1:, :])
        size *= 2


def _by_decay(by_into: Tensor, edges: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """The gradient by g from that by its sums and by the decays at the edges."""
    (into, out, total), (d_into, d_out, d_total) = edges, grads
    by_into.addcmul_(into, d_into)
    by_into[..., -1, :] += (total * d_total).squeeze(-1)
    by_out = F.pad((out * d_out)[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)
    return by_into.flip(-2).cumsum(-2).flip(-2).add_(by_out)


def _first(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, size))[..., 0, :, :]


def _second(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, size))[..., 1, :, :]


def _corner(x: Tensor, size: int) -> Tensor:
    """Of [..., C, C] the blocks on the diagonal, of each the second rows by the first columns."""
    blocks = x.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _stacked(halves: Sequence[Tensor], decay: Tensor) -> Tensor:
    """Halves [..., blocks, size, K], each times the decay, one below the other in their block."""
    size = decay.shape[-2]
    rows = decay.new_empty(*decay.shape[:-2], len(halves) * size, decay.shape[-1])
    for half, place in zip(halves, rows.split(size, -2), strict=True):
        torch.mul(half, decay, out=place)
    return rows


def _split(products: Tensor, size: int) -> list[Tensor]:
    """[..., size * any, size * any] -> the parts of [..., size, size], row by row; views."""
    return [part for row in products.split(size, -2) for part in row.split(size, -1)]


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, for which many tiny matrices are slow."""
    if a.shape[-1] > 2:
        return a @ b
    first = a[..., :1] * b[..., :1, :]
    return first if a.shape[-1] == 1 else first.addcmul_(a[..., 1:], b[..., 1:, :])


def _add(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1) -> None:
    """total += alpha * a @ b."""
    total.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), alpha=alpha)


def solve(lower: Tensor, *right: Tensor) -> tuple[Tensor, ...]:
    """(I + tril(lower, -1))^-1 r for every r of `right`: lower [..., C, C], r [..., C, any]."""
    found: Any = _Solve.apply(lower, *right)
    return found


class _Solve(torch.autograd.Function):
    """One triangular solve makes the inverse, which the gradient uses again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        lower, *right = inputs
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        found = [inverse @ r for r in right]
        ctx.save_for_backward(inverse, *found)
        return tuple(found)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        inverse, *found = ctx.saved_tensors
        by_right = [inverse.mT @ grad for grad in grads]
        # not as the solver lays it out: summing into columns goes matrix by matrix
        by_lower = torch.zeros_like(inverse, memory_format=torch.contiguous_format)
        for grad, r in zip(by_right, found, strict=True):
            _add(by_lower, grad, r.mT, -1)
        return by_lower.tril_(-1), *by_right


def carry(
    state: Tensor, decay: Tensor, key: Tensor, u: Tensor, w: Tensor, more: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk by chunk: e = u + w S, then S <- decay * S + key^T e + more.

    state [X, K, V], decay [N, X, 1 or K, 1], u [N, X, C, V], w and key [N, X, C, K], more
    [N, X, K, V] -> the state before each chunk [N, X, K, V], the last, and e like u.
    """
    found: Any = _Carry.apply(state, decay, more, key, u, w)
    return found


def carry_sums(state: Tensor, decay: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """`carry` where nothing is read: S <- decay * S + more."""
    found: Any = _Carry.apply(state, decay, more)
    return found


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        state, decay, more, *rest = inputs
        states = state.new_empty(len(decay) + 1, *state.shape)
        states[0] = state
        e = [torch.empty_like(rest[1])] if rest else []
        for n in range(len(decay)):
            kept = torch.mul(states[n], decay[n], out=states[n + 1])
            if more is not None:
                kept.add_(more[n])
            if rest:
                key, u, w = (part[n] for part in rest)
                kept.baddbmm_(key.mT, torch.baddbmm(u, w, states[n], out=e[0][n]))
        ctx.save_for_backward(states, decay, *rest[:1], *rest[2:], *e)
        ctx.more = more is not None
        return states[:-1], states[-1].clone(), *e  # a state that is kept must keep itself alone

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        states, decay, *rest = ctx.saved_tensors
        by_states, by_last, *by_e = grads
        after = torch.empty_like(states)
        after[-1] = by_last
        by_u = torch.empty_like(by_e[0]) if rest else None
        for n in reversed(range(len(decay))):
            before = torch.addcmul(by_states[n], after[n + 1], decay[n], out=after[n])
            if by_u is not None:
                key, w = rest[0][n], rest[1][n]
                torch.baddbmm(by_e[0][n], key, after[n + 1], out=by_u[n])
                before.baddbmm_(w.mT, by_u[n])
        behind, before = after[1:], states[:-1]
        by_decay = (behind * before).sum_to_size(decay.shape)
        found = [after[0].clone(), by_decay, behind if ctx.more else None]
        if by_u is not None:
            found += [rest[2] @ behind.mT, by_u, by_u @ before.mT]
        return tuple(found)
