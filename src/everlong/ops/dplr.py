"""The state of linear attention, decayed and corrected at rank one (DPLR): loop and chunked form.

B batch, T time, H heads, K width of keys, V width of values. For every head the state S [K, V] is,
with all vectors rows,

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

The chunked forms serve all tensors, but for one choice by device and dtype: CUDA tensors in
bfloat16 go through the kernels of the extra `gpu` where it is installed (`everlong.ops.kernels`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops import kernels
from everlong.ops.chunks import SOLVED_CHUNK, carry, chunked, pairs, prepare, solve, whole
from everlong.ops.ragged import expand_like


def dplr_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    low_rank: tuple[Tensor, Tensor] | None,
    state: Tensor,
    *,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Position by position, the definition; `low_rank` is (a, b), each [B, T, H, K], or None."""
    dtype, outputs = v.dtype, []
    with torch.autocast(v.device.type, enabled=False):
        state, parts = prepare([q, k, v, g, *(low_rank or ())], state, lengths)
        for q_t, k_t, v_t, g_t, *rest in zip(*(part.unbind(1) for part in parts), strict=True):
            kept = expand_like(g_t.exp(), state) * state
            if rest:
                a_t, b_t = rest
                kept = kept + b_t[..., None] * (a_t[..., None, :] @ state)
            state = kept + k_t[..., None] * v_t[..., None, :]
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
    chunk_size: int = SOLVED_CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of `chunk_size` positions (a power of two), which changes the rounding
    only. Gradients are of first order.

    What a position reads from its own chunk is one triangular system: with A[x, y]_ij =
    x_i diag(exp(g_{j+1} + ... + g_i)) y_j^T and u_t = a_t S_{t-1},
    (I - A[a, b]) U = A[a, k] V + (a * decay) S, where a's decays end before its position.
    """
    length, dtype = v.shape[1], v.dtype
    if length == 1:  # a chunk of one position is the loop
        return dplr_reference(q, k, v, g, low_rank, state, lengths=lengths)
    served = kernels.serve(q, v, state)
    with torch.autocast(v.device.type, enabled=False):
        state, parts = prepare([q, k, v, g, *low_rank], state, lengths)
        if served:
            o, last = kernels.dplr(state, *parts)
            return o.to(dtype), last
        q, k, v, g, a, b = (chunked(part, chunk_size) for part in parts)
        # a reads what the position before it left: its pairs are those of a query there
        ahead = F.pad(a[..., 1:, :], (0, 0, 0, 1))
        (ab, ak, qb, qk), into, out, total = pairs((ahead, q), (b, k), g)
        ab, ak = (F.pad(x[..., :-1, :], (0, 0, 1, 0)) for x in (ab, ak))
        before = F.pad(into[..., :-1, :], (0, 0, 1, 0), value=1.0)
        u, w = solve(-ab, ak @ v, a * before)
        start, more = state.flatten(0, 1), (k * out).mT @ v
        states, last, u = carry(start, total, b * out, u, w, more)
        o = (q * into) @ states + qb @ u + qk @ v
        return whole(o, state, length).to(dtype), last.view_as(state)
