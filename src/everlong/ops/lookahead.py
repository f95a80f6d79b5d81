"""Attention that says how much it saw, so that what it sees later can be added exactly.

B batch, T queries, K keys, H heads, d head width. A result is (context [B, T, H, d], log_sum
[B, T, H]): the attention result and the log of its softmax denominator, float32 at least. Scores
come in two parts, both scaled: by content [B, H, T, K], and by distance [B, H, T, R], whose column
r belongs to distance R - 1 - r; values are [B, K, H, d].
"""

import torch
from torch import Tensor

from everlong.ops.ragged import common_value
from everlong.ops.relative import shift

Sum = tuple[Tensor, Tensor]


def attend(scores: Tensor, visible: Tensor, values: Tensor) -> Sum:
    """Softmax of scores [B, H, T, K] over the `visible` keys (Bool, broadcast), at least one a
    query."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~visible, float("-inf"))
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum[..., None]).exp().to(values.dtype)
    context = (weights @ values.transpose(1, 2)).transpose(1, 2)
    return context.to(log_sum.dtype), log_sum.transpose(1, 2)


def merge(old: Sum, new: Sum) -> Sum:
    """The result over two disjoint sets of keys, from the results over each."""
    log_sum = torch.logaddexp(old[1], new[1])
    old_share, new_share = ((part[1] - log_sum).exp()[..., None] for part in (old, new))
    return old_share * old[0] + new_share * new[0], log_sum


def look_back(
    content: Tensor, distance: Tensor, values: Tensor, start: Tensor, filled: Tensor | None
) -> Sum:
    """Attention of queries to the keys at and before them (R = K).

    Query t of row b stands at the place start[b] + t (Int [B]) of the keys; `filled` Bool [B, K]:
    the places that hold a key, None: all.
    """
    keys, queries = content.shape[-1], content.shape[-2]
    index = torch.arange(keys, device=content.device)
    places = start[:, None] + torch.arange(queries, device=content.device)
    if common_value(start) is not None and queries + int(start[0]) == keys:
        distance, places = shift(distance), places[:1]
    else:
        column = (index - places[..., None] + keys - 1).clamp(0, keys - 1)[:, None]
        distance = distance.gather(-1, column.expand_as(content))
    visible = index <= places[..., None]
    if filled is not None:
        visible = visible & filled[:, None]
    return attend(content + distance, visible[:, None], values)


def look_ahead(content: Tensor, distance: Tensor, values: Tensor) -> Sum:
    """Attention of queries at the places 0 to T - 1 to keys at the last K of the places 1 to T, of
    which each query sees those after it (R = T + 1)."""
    window, places = content.shape[-1], content.shape[-2] + 1
    index = torch.arange(places, device=content.device)
    visible = index[-window:] > index[:-1, None]
    # seen from the right, what lies ahead lies behind
    distance = shift(distance.flip(-2))[..., :window].flip(-2, -1)
    return attend(content + distance, visible, values)
