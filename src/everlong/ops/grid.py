"""A call's positions in whole chunks of each row's stream, with what the rows have left over.

B batch, T time, H heads, C positions of a chunk, W window (a chunk also sees W - 1 positions before
it), N chunks, X = B * H, P = W + C - 2 places of what is left over.

A row keeps the positions of its unfinished chunk, behind the W - 1 before that chunk; the next call
puts them in front of its own, so that chunks begin at multiples of C in every row's stream,
whatever the calls are. Unused places hold zero.
"""

import torch
from torch import Tensor

from everlong.ops.ragged import common_value, expand_like, write_at


class Grid:
    """Of T positions behind `position` Int [B], `lengths[b]` are real (None: all).

    A call of one position is read at that position alone (`index` Int [X, 1] says which of its
    chunk it is), others at all C positions of every chunk (`index` None), as `dense` wants always.
    Where `cut` allows it and all rows stand at the same place, that position is the `last` of a
    chunk of `size` positions, those there are.
    """

    def __init__(
        self,
        position: Tensor,
        length: int,
        lengths: Tensor | None,
        *,
        chunk_size: int,
        window: int,
        heads: int,
        dense: bool = False,
        cut: bool = False,
    ):
        self.chunk_size, self.before, self.heads = chunk_size, window - 1, heads
        self.position, self.length, self.lengths = position, length, lengths
        self.pending, self.size = position % chunk_size, chunk_size
        self.same = common_value(self.pending)
        alone = length == 1 and chunk_size > 1 and not dense
        self.last = alone and cut and lengths is None and self.same is not None
        if self.last and self.same is not None:
            self.size, self.count, self.index = self.same + 1, 1, None
            self.live = int(self.size == chunk_size)
            return
        total = self.pending + (length if lengths is None else lengths)
        self.ended, self.rest = total // chunk_size, total % chunk_size
        self.count = max(1, -(-int(self.pending.max() + length) // chunk_size))
        self.live = int(self.ended.max())  # chunks that some row ends
        self.index = self.pending.repeat_interleave(heads)[:, None] if alone else None

    def join(self, held: Tensor | None, new: Tensor) -> Tensor:
        """held [B, P, ...] (None where P = 0) and new [B, T, ...] -> [B, W - 1 + N C, ...]."""
        if held is None:
            return new
        return self._behind(held, self.before, new, self.before + self.count * self.size)

    def left(self, held: Tensor | None, joined: Tensor) -> Tensor | None:
        """What of `joined` is held for the next call."""
        if held is None:
            return None
        if self.last:
            kept = joined[:, self.chunk_size :] if self.live else joined
            unused = held.shape[1] - kept.shape[1]
            return torch.cat([kept, kept.new_zeros(len(kept), unused, *kept.shape[2:])], 1)
        place = torch.arange(held.shape[1], device=joined.device)
        index = (self.ended * self.chunk_size)[:, None] + place
        index = expand_like(index.clamp(max=joined.shape[1] - 1), joined)
        found = joined.gather(1, index.expand(-1, -1, *joined.shape[2:]))
        used = place < self.before + self.rest[:, None]
        found = torch.where(expand_like(used, found), found, 0.0)
        if self.lengths is None:
            return found
        return torch.where(expand_like(self.lengths > 0, found), found, held)

    def chunks(self, joined: Tensor) -> Tensor:
        """[B, W - 1 + N C, H, ...] -> [N, X, W - 1 + C, ...]."""
        if self.count == 1:
            return joined.transpose(1, 2).flatten(0, 1)[None]
        if self.before:
            x = joined.unfold(1, self.before + self.chunk_size, self.chunk_size).movedim(-1, 2)
        else:
            x = joined.unflatten(1, (self.count, self.chunk_size))
        return x.movedim(1, 0).transpose(2, 3).flatten(1, 2).contiguous()

    def queries(self, q: Tensor) -> Tensor:
        """[B, T, H, F] -> [N, X, C, F], or [1, X, 1, F] with `index` and of the `last`."""
        if self.index is not None or self.last:
            return q.transpose(1, 2).flatten(0, 1)[None]
        size = self.count * self.chunk_size
        if q.shape[1] != size:
            q = self._behind(q.new_zeros(len(q), self.chunk_size - 1, *q.shape[2:]), 0, q, size)
        x = q.unflatten(1, (self.count, self.chunk_size)).movedim(1, 0)
        return x.transpose(2, 3).flatten(1, 2).contiguous()

    def outputs(self, y: Tensor) -> Tensor:
        """The inverse of `queries`: [B, T, H, V]; what is behind a row's length may be anything."""
        y = y.unflatten(1, (-1, self.heads))  # [N, B, H, C, V]
        y = y.permute(1, 0, 3, 2, 4).flatten(1, 2)
        if self.index is not None or y.shape[1] == self.length:
            return y
        if self.same is not None:
            return y[:, self.same : self.same + self.length]
        index = self.pending[:, None] + torch.arange(self.length, device=y.device)
        return y.gather(1, expand_like(index, y).expand(-1, -1, *y.shape[2:]))

    def real(self) -> Tensor | None:
        """Bool [N, X, W - 1 + C]: positions of `chunks` that are not before the stream's start;
        None: all."""
        if not self.before:
            return None
        device = self.position.device
        first = torch.arange(self.count, device=device) * self.chunk_size - self.before
        place = torch.arange(self.before + self.size, device=device)
        stream = (self.position - self.pending)[:, None] + first[:, None, None] + place
        return (stream >= 0).repeat_interleave(self.heads, 1)

    def full(self) -> Tensor:
        """Bool [N, X]: chunks that their row ends."""
        chunk = torch.arange(self.count, device=self.ended.device)
        return (chunk[:, None] < self.ended).repeat_interleave(self.heads, 1)

    def _behind(self, held: Tensor, before: int, new: Tensor, size: int) -> Tensor:
        """new from the place before + pending on, behind what is held there, zeros behind it."""
        shape = new.shape[2:]
        if self.same is not None and self.lengths is None:
            start = before + self.same
            if size == start + self.length:
                return torch.cat([held[:, :start], new], 1)
            rest = new.new_zeros(len(new), size - start - self.length, *shape)
            return torch.cat([held[:, :start], new, rest], 1)
        base = torch.cat([held, new.new_zeros(len(new), size, *shape)], 1)[:, :size]
        return write_at(base, new, before + self.pending, self.lengths)
