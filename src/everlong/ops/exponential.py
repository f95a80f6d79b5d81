"""A memory under the exponential kernel: step form and blocked form.

B batch, T time, P places of a cache, N = P + T, H heads, K and V widths of keys and values, C
positions of a block, X = B * H.

For every head the memory is M = sum_i z_i phi(k_i)^T, with phi the infinite feature map of

    phi(x) . phi(y) = exp(c (x . y - 1)),    c = sharpness.

It is never made: what is kept are the pairs (k_i, z_i). A vector of length 1 has a phi of length 1.
Reads are o_t = M_t phi(q_t), behind the position's own write, which is

    z_t = v_t                                with beta None, or
    z_t = beta_t (v_t - M_{t-1} phi(k_t))    the delta rule.

Written with the kernel exp(x . y) of the paper (ATLAS, arXiv 2505.23735) the delta rule at c = 1 is
the same function: its step is beta / e, and its z are these divided by e. Sums of values have
another unit there, all o times e.

Both forms take q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H] or None, and the pairs of earlier
calls, keys [B, P, H, K] and values (the z) [B, P, H, V], with zeros for values in unused places;
they return o and z [B, T, H, V], all in float32 at least. With `lengths` Int [B], z is 0 behind a
row's length, and o means nothing there.
"""

from typing import Any

import torch
from torch import Tensor

from everlong.ops.chunks import prepare
from everlong.ops.first_order import first_order

BLOCK = 64  # positions


def exponential_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    keys: Tensor,
    values: Tensor,
    *,
    sharpness: float = 1.0,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Position by position, the definition: what a key holds and a query reads are one product of
    both with the pairs so far."""
    with torch.autocast(v.device.type, enabled=False):
        values, parts = prepare([q, k, v] if beta is None else [q, k, v, beta], values, lengths)
        keys, outputs, before = keys.to(values.dtype), [], values.shape[1]
        for q_t, k_t, v_t, *beta_t in zip(*(part.unbind(1) for part in parts), strict=True):
            rows = torch.stack([q_t, k_t] if beta_t else [q_t], 2)  # [B, H, 2 or 1, K]
            weights = (sharpness * (rows @ keys.permute(0, 2, 3, 1) - 1)).exp()
            read, *held = (weights @ values.transpose(1, 2)).unbind(2)
            z = beta_t[0][..., None] * (v_t - held[0]) if beta_t else v_t
            own = (sharpness * ((q_t * k_t).sum(-1, keepdim=True) - 1)).exp()
            outputs.append(read + own * z)
            keys = torch.cat([keys, k_t[:, None]], 1)
            values = torch.cat([values, z[:, None]], 1)
        return torch.stack(outputs, 1), values[:, before:]


def exponential_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    keys: Tensor,
    values: Tensor,
    *,
    sharpness: float = 1.0,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, block by block: matrices against what is earlier, one triangular solve inside.

    Time T N, memory linear in N, backward too: its weights are computed again. Gradients are of
    first order.
    """
    if v.shape[1] == 1:  # a block of one position is the loop
        return exponential_reference(
            q, k, v, beta, keys, values, sharpness=sharpness, lengths=lengths
        )
    with torch.autocast(v.device.type, enabled=False):
        values, parts = prepare([q, k, v] if beta is None else [q, k, v, beta], values, lengths)
        q, k, v, *rest = (_by_head(part) for part in parts)
        heads = parts[0].shape[2]
        keys = torch.cat([_by_head(keys.to(values.dtype)), k], 1)
        beta = rest[0][..., None] if rest else None
        found: Any = _Blocks.apply(q, keys, v, beta, _by_head(values), sharpness)
        o, z = (_whole(part, heads) for part in found)
        return o, z


def _by_head(x: Tensor) -> Tensor:
    """[B, T, H, ...] -> [X, T, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def _whole(x: Tensor, heads: int) -> Tensor:
    """[X, T, V] -> [B, T, H, V], which keeps itself alone."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2).contiguous()


def _blocks(length: int, before: int) -> list[tuple[slice, int, int]]:
    """Of each block: its positions, its first place, and the place behind its last."""
    starts = range(0, length, BLOCK)
    stops = [min(start + BLOCK, length) for start in starts]
    return [(slice(a, b), before + a, before + b) for a, b in zip(starts, stops, strict=True)]


def _weights(rows: Tensor, keys: Tensor, last: int, sharpness: float) -> Tensor:
    """The kernel of rows [X, C, K] with keys [X, any, K], for row i with those up to last + i."""
    scores = (sharpness * rows) @ keys.mT
    return scores.sub_(sharpness).exp_().tril_(last)


class _Blocks(torch.autograd.Function):
    """q [X, T, K], keys [X, N, K] (the last T those of q's positions), v [X, T, V], beta [X, T, 1]
    or None, and the z before [X, P, V] -> o and z [X, T, V].

    Inside a block (I + diag(beta) A) Z = diag(beta) (V - A' Z'), with A the weights of its keys for
    those strictly before them, A' for those of earlier blocks and Z' theirs. The backward pass
    meets reads and writes block by block as well: the sum of all reads' gradients would be large,
    and nearly undone by the writes'.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        q, keys, v, beta, before, c = inputs
        z, o = torch.cat([before, v], 1), torch.empty_like(v)
        errors = torch.empty_like(v[:, :0] if beta is None else v)  # v less what its key held
        for here, first, end in _blocks(v.shape[1], before.shape[1]):
            if beta is not None:
                weights = _weights(keys[:, first:end], keys[:, :end], first - 1, c)
                earlier, inside = weights.split([first, end - first], -1)
                left = torch.baddbmm(v[:, here], earlier, z[:, :first], alpha=-1)
                z[:, first:end] = torch.linalg.solve_triangular(
                    beta[:, here] * inside, beta[:, here] * left, upper=False, unitriangular=True
                )
                errors[:, here] = left.baddbmm_(inside, z[:, first:end], alpha=-1)
            o[:, here] = _weights(q[:, here], keys[:, :end], first, c) @ z[:, :end]
        ctx.save_for_backward(q, keys, z, beta, errors)
        ctx.sharpness = c
        return o, z[:, before.shape[1] :].clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        (q, keys, z, beta, errors), c = ctx.saved_tensors, ctx.sharpness
        by_o, by_new = grads
        before = z.shape[1] - q.shape[1]
        by_z = torch.cat([torch.zeros_like(z[:, :before]), by_new], 1)
        by_q, by_keys = torch.zeros_like(q), torch.zeros_like(keys)
        by_v, by_beta = by_z[:, before:], None if beta is None else torch.empty_like(beta)

        def by_scores(weights: Tensor, grad: Tensor, end: int) -> Tensor:
            return (grad @ z[:, :end].mT).mul_(weights).mul_(c)

        for here, first, end in reversed(_blocks(q.shape[1], before)):
            weights = _weights(q[:, here], keys[:, :end], first, c)
            by_z[:, :end].baddbmm_(weights.mT, by_o[:, here])
            scores = by_scores(weights, by_o[:, here], end)
            by_q[:, here] = scores @ keys[:, :end]
            by_keys[:, :end].baddbmm_(scores.mT, q[:, here])
            if beta is None or by_beta is None:
                continue
            weights = _weights(keys[:, first:end], keys[:, :end], first - 1, c)
            earlier, inside = weights.split([first, end - first], -1)
            by_left = torch.linalg.solve_triangular(
                (beta[:, here] * inside).mT, by_z[:, first:end], upper=True, unitriangular=True
            )
            by_beta[:, here] = (by_left * errors[:, here]).sum(-1, keepdim=True)
            by_v[:, here] = by_left.mul_(beta[:, here])
            by_z[:, :first].baddbmm_(earlier.mT, by_v[:, here], alpha=-1)
            scores = by_scores(weights, -by_v[:, here], end)
            by_keys[:, first:end].baddbmm_(scores, keys[:, :end])
            by_keys[:, :end].baddbmm_(scores.mT, keys[:, first:end])
        return by_q, by_keys, by_v, by_beta, by_z[:, :before], None
