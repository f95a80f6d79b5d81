"""Spans: a call cut where any row of it fills a segment.

B batch, T time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Positions `start` to `stop` of a call, which cross no boundary of any row. lengths Int [B]:
    how many of them are real (None: all). full Bool [B]: rows that fill a segment with their last
    one (None: no row)."""

    start: int
    stop: int
    lengths: Tensor | None
    full: Tensor | None


def spans(position: Tensor, length: int, lengths: Tensor | None, period: int) -> Iterator[Span]:
    """The spans of a call of T = `length` positions on rows that stand at stream positions
    `position` (Int [B]); boundaries lie at the multiples of `period`.

    Of row b the first `lengths[b]` positions are real (None: all). Where no row has any left, the
    spans end: behind them, or in a call that is masked throughout, nothing is to be read.
    """
    start = 0
    while start < length:
        room = period - position % period
        if lengths is None:
            step = min(length - start, int(room.min()))
            moved, inside = torch.full_like(position, step), None
        else:
            left = (lengths - start).clamp(min=0)
            if not bool(left.any()):
                return
            step = min(length - start, int(room[left > 0].min()))
            moved = inside = left.clamp(max=step)
        full = moved == room
        yield Span(start, start + step, inside, full if bool(full.any()) else None)
        position, start = position + moved, start + step
