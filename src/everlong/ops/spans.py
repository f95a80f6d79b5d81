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
    places = [each % period for each in position.tolist()]
    left = None if lengths is None else lengths.tolist()
    start, inside = 0, None
    while start < length:
        room = [period - place for place in places]
        if left is None:
            step = min(length - start, *room)
            moved = [step] * len(room)
        else:
            if not any(left):
                return
            waits = (space for space, more in zip(room, left, strict=True) if more)
            step = min(length - start, *waits)
            moved = [min(more, step) for more in left]
            left = [more - read for more, read in zip(left, moved, strict=True)]
            inside = position.new_tensor(moved)
        full = [read == space for read, space in zip(moved, room, strict=True)]
        ends = torch.tensor(full, device=position.device) if any(full) else None
        yield Span(start, start + step, inside, ends)
        places = [(place + read) % period for place, read in zip(places, moved, strict=True)]
        start += step
