"""Special forms of the DPLR state, with less to compute: no correction, and the delta rule.

Shapes, signatures, what `lengths` does and where kernels serve are those of `everlong.ops.dplr`.
"""

import torch
from torch import Tensor

from everlong.ops import kernels
from everlong.ops.chunks import (
    CHUNK,
    SOLVED_CHUNK,
    carry,
    carry_sums,
    chunked,
    pairs,
    prepare,
    solve,
    whole,
)
from everlong.ops.dplr import dplr_reference
from everlong.ops.ragged import expand_like


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    *,
    lengths: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t, o_t = q_t S_t: nothing is solved.

    One g a head: RetNet, Mamba2, and linear attention (arXiv 2006.16236) with g = 0. One a channel:
    GLA, HGRN2 (arXiv 2404.07904).
    """
    length, dtype = v.shape[1], v.dtype
    if length == 1:  # a chunk of one position is the loop
        return dplr_reference(q, k, v, g, None, state, lengths=lengths)
    served = kernels.serve(q, v, state)
    with torch.autocast(v.device.type, enabled=False):
        state, parts = prepare([q, k, v, g], state, lengths)
        if served:
            o, last = kernels.linear_attention(state, *parts)
            return o.to(dtype), last
        q, k, v, g = (chunked(part, chunk_size) for part in parts)
        (qk,), into, out, total = pairs((q,), (k,), g)
        states, last = carry_sums(state.flatten(0, 1), total, (k * out).mT @ v)
        o = (q * into) @ states + qk @ v
        return whole(o, state, length).to(dtype), last.view_as(state)


def _delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`delta_rule` at one position, whose dimension is left out."""
    state = expand_like(g.exp(), state) * state
    k, q = k[:, :, None], q[:, :, None]  # [B, H, 1, K]
    e = beta[..., None, None] * (v[:, :, None] - k @ state)
    state = torch.addcmul(state, k.mT, e)
    return (q @ state).squeeze(2), state


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    lengths: Tensor | None = None,
    chunk_size: int = SOLVED_CHUNK,
) -> tuple[Tensor, Tensor]:
    """S' = diag(exp(g_t)) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S'), o_t = q_t S_t.

    beta [B, T, H]. DeltaNet (arXiv 2406.06484) with g = 0; GatedDeltaNet (arXiv 2412.06464) with
    one g a head; Kimi Delta Attention (arXiv 2510.26692) with one a channel. What S holds never
    grows by itself for |k| = 1 and beta in [0, 2].
    """
    length, dtype = v.shape[1], v.dtype
    served = kernels.serve(q, v, state)
    with torch.autocast(v.device.type, enabled=False):
        state, parts = prepare([q, k, v, g, beta], state, lengths)
        if served:
            o, last = kernels.delta_rule(state, *parts)
            return o.to(dtype), last
        if length == 1:
            q, k, v, g, beta = (part.squeeze(1) for part in parts)
            o, state = _delta_step(q, k, v, g, beta, state)
            return o[:, None].to(dtype), state
        q, k, v, g, beta = (chunked(part, chunk_size) for part in parts)
        (kk, qk), into, out, total = pairs((k, q), (k,), g)
        u, w = solve(beta * kk, beta * v, -beta * into * k)
        states, last, e = carry(state.flatten(0, 1), total, k * out, u, w)
        o = (q * into) @ states + qk @ e
        return whole(o, state, length).to(dtype), last.view_as(state)
