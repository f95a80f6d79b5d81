"""Attention that says how much it saw, so that what it sees later can be added exactly.

B batch, T queries, K keys, H heads, d head width. A result is (context [B, T, H, d], log_sum
[B, T, H]): the attention result and the log of its softmax denominator, float32 at least.
"""

import torch
from torch import Tensor

from everlong.ops.relative import shift

Sum = tuple[Tensor, Tensor]


def attend(scores: Tensor, visible: Tensor, values: Tensor) -> Sum:
    """Softmax of scaled scores [B, H, T, K] over the `visible` (Bool, broadcast) keys, at least one
    a query; values [B, K, H, d]."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~visible, float("-inf"))
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum[..., None]).exp().to(values.dtype)
    context = (weights @ values.transpose(1, 2)).transpose(1, 2)
    return context.to(log_sum.dtype), log_sum.transpose(1, 2)


def merge(old: Sum, new: Sum) -> Sum:
    """The attention result over two disjoint sets of keys, from the results over each."""
    log_sum = torch.logaddexp(old[1], new[1])
    shares = ((part[1] - log_sum).exp()[..., None] * part[0] for part in (old, new))
    return sum(shares, torch.zeros_like(old[0])), log_sum


def shift_ahead(scores: Tensor, window: int) -> Tensor:
    """Scores by distance to scores by key, for keys on the right of their queries.

    scores [..., M, M + 1]: column r belongs to distance M - r. Queries stand at places 0 to M - 1,
    keys at the last `window` of the places 1 to M. Returned [..., M, window], of which entries of
    keys that are not on the right are meaningless.
    """
    return shift(scores.flip(-2))[..., :window].flip(-2, -1)


def pick(scores: Tensor, places: Tensor, keys: int) -> Tensor:
    """Scores by distance to scores by key, for rows that stand at different places.

    scores [B, H, T, K]: column r belongs to distance K - 1 - r; places Int [B, T] of the queries
    among the keys 0 to K - 1. Entries of keys on the right are meaningless.
    """
    index = torch.arange(keys, device=scores.device) - places[..., None] + keys - 1
    index = index.clamp(0, keys - 1)[:, None]
    return scores.gather(-1, index.expand(*scores.shape[:3], keys))
