"""Tokens that are sent to a few of several places, sorted into groups and batched without waste.

B batch, T time, E places, k choices of a token, N tokens that are sent (k times the real ones),
G groups. A group is what one row sends to one place, in time.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from everlong.ops.chunks import CHUNK


def groups(chosen: Tensor, real: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Sort by place, then row, then time: chosen Int [B, T, k] (different places of `count`), real
    Bool [B, T] or None -> which of all B * T * k choices these are, Int [N], and the lengths of the
    groups, Int [E, B]."""
    rows = len(chosen)
    group = chosen * rows + torch.arange(rows, device=chosen.device)[:, None, None]
    if real is not None:
        group = torch.where(real[..., None], group, count * rows)  # behind all others
    lengths = torch.bincount(group.flatten(), minlength=count * rows)[: count * rows]
    order = group.flatten().argsort(stable=True)  # in time within a group
    return order[: int(lengths.sum())], lengths.view(count, rows)


def pieces(lengths: Tensor, chunk_size: int = CHUNK) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Groups that lie one behind the other, Int [G] of them, as batches of their next pieces: which
    groups go on, Int [R]; the places of their tokens, Int [R, P]; and how many these are, Int [R].

    P is about the mean length, in chunks. However unlike the groups are, there is no more padding
    than tokens and a chunk a group; an empty group is never met.
    """
    total, longest = int(lengths.sum()), int(lengths.max())
    starts, filled = lengths.cumsum(0) - lengths, int((lengths > 0).sum())
    size = chunk_size * max(1, math.ceil(total / max(1, filled) / chunk_size))
    for begin in range(0, longest, size):
        group = (lengths > begin).nonzero()[:, 0]
        width = min(size, longest - begin)
        index = (starts[group] + begin)[:, None] + torch.arange(width, device=lengths.device)
        yield group, index.clamp(max=total - 1), (lengths[group] - begin).clamp(max=width)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [N, ...], index Int [R, P] -> [R, P, ...]."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)
