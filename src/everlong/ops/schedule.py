"""How far each pair has been written, and what is left of the start, at every position of a chunk.

N chunks, X = B * H, Q positions that are read at, K pairs that are learned from (those of the chunk
and, with a window, the ones before it).

Inside a chunk all gradients u are taken at the weights M_0 it starts from, so the weights are
linear in them, whatever the gates are:

    S_t = momentum_t S_{t-1} + sum_j write_tj u_j,   M_t = keep_t M_{t-1} - S_t
    M_t = into_t M_0 + drift_t S_0 + sum_j pairs_tj u_j

(without momentum M_t = keep_t M_{t-1} - sum_j write_tj u_j, and there is no S).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.scan import scan


@dataclass(frozen=True)
class Gates:
    """keep, momentum (or None) in [0, 1], [N, X, C]; write [N, X, C, K], zero for pairs to come;
    step [N, X, C]: of a momentum that is orthogonalised, for which alone it is."""

    keep: Tensor
    momentum: Tensor | None
    write: Tensor
    step: Tensor | None = None


class Rows(NamedTuple):
    """At some positions: into and drift [N, X, Q, 1], pairs [N, X, Q, K]; of the momentum S_t =
    slow_t S_0 + sum_j push_tj u_j also slow and push. drift, slow and push None without it."""

    into: Tensor
    pairs: Tensor
    drift: Tensor | None = None
    slow: Tensor | None = None
    push: Tensor | None = None

    def _each(self, change: Callable[[Tensor, float], Tensor]) -> "Rows":
        """`change(part, what it is where nothing moves)` of every part there is."""
        still = (1.0, 0.0, 0.0, 1.0, 0.0)
        found = (None if x is None else change(x, at) for x, at in zip(self, still, strict=True))
        return Rows(*found)  # type: ignore[arg-type]

    def take(self, index: Tensor) -> "Rows":
        """Other positions, index Int [X, Q]."""
        index = index[None, ..., None]
        return self._each(lambda x, _: x.gather(2, index.expand(len(x), -1, -1, x.shape[-1])))

    def pick(self, positions: slice) -> "Rows":
        """Some positions of every chunk."""
        return self._each(lambda x, _: x[..., positions, :])

    def at(self, count: Tensor) -> "Rows":
        """Behind the first `count` positions, Int [N, X], of every chunk; Q = 1. Of 0 positions
        nothing has moved."""
        index, moved = (count - 1).clamp(min=0)[..., None, None], (count > 0)[..., None, None]

        def end(x: Tensor, still: float) -> Tensor:
            found = x.gather(2, index.expand(-1, -1, -1, x.shape[-1]))
            return torch.where(moved, found, still)

        return self._each(end)

    def before(self, chunk: int, each: int) -> "Rows":
        """At the start of each chunk of `chunk` positions, for the `each` pairs of it."""

        def start(x: Tensor, still: float) -> Tensor:
            ends = x[..., chunk - 1 : -1 : chunk, :]
            ends = torch.cat([torch.full_like(x[..., :1, :], still), ends], -2)
            return ends.repeat_interleave(each, -2)

        return self._each(start)


def schedule(gates: Gates) -> Rows:
    """At every position of every chunk (Q = C), by recurrences: nothing is divided, so that gates
    may be 0."""
    write, width = gates.write, gates.write.shape[-1]
    if gates.momentum is None:
        found = _recur(gates.keep, F.pad(write, (0, 1)), start=(width,))
        return Rows(found[..., width:], -found[..., :width])
    moved = _recur(gates.momentum, F.pad(write, (0, 1)), start=(width,))
    found = _recur(gates.keep, F.pad(moved, (0, 1)), start=(width + 1,))
    pairs, drift, into = found.split([width, 1, 1], -1)
    return Rows(into, -pairs, -drift, moved[..., width:], moved[..., :width])


def last(gates: Gates) -> Rows:
    """`schedule` at the last position alone (Q = 1), from products of what is behind a position."""
    keep, write, momentum = gates.keep, gates.write, gates.momentum
    product = keep.flip(-1).cumprod(-1)
    into = product[..., None, -1:]
    fade = F.pad(product[..., :-1], (1, 0), value=1.0).flip(-1)[..., None, :]  # behind a position
    if momentum is None:
        return Rows(into, -fade @ write)
    later = torch.ones_like(write[..., : keep.shape[-1]], dtype=torch.bool).tril(-1)
    # what is left at position s of a push at j
    left = torch.where(later, momentum[..., None], 1.0).cumprod(-2).tril()
    pushed, first = fade @ left, momentum[..., :1, None]
    final = left[..., -1:, :]
    return Rows(
        into,
        -pushed @ write,
        -first * pushed[..., :1],
        first * final[..., :1],
        final @ write,
    )


def _recur(decay: Tensor, drive: Tensor, start: tuple[int, ...]) -> Tensor:
    """h_t = decay_t h_{t-1} + drive_t in each chunk; h_0 is 1 in the columns `start`, else 0."""
    rows, width = drive.flatten(0, 1), drive.shape[-1]
    first = rows.new_zeros(len(rows), width)
    first[:, list(start)] = 1
    decay = decay.flatten(0, 1)[..., None].expand_as(rows)
    return scan(decay, rows, first)[0].view_as(drive)


def lags(write: Tensor, real: Tensor | None = None) -> Tensor:
    """What each position writes of the pairs up to W - 1 before it: write [N, X, C, W], by lag, to
    [N, X, C, C + W - 1], whose column t + W - 1 is the pair of position t. `real` Bool
    [N, X, C + W - 1]: columns that hold a pair."""
    size, window = write.shape[-2:]
    if window == 1:
        return torch.diag_embed(write[..., 0])
    columns = torch.arange(size + window - 1, device=write.device)
    lag = torch.arange(size, device=write.device)[:, None] + window - 1 - columns
    inside = (lag >= 0) & (lag < window)
    found = write.gather(-1, lag.clamp(0, window - 1).expand(*write.shape[:2], -1, -1))
    if real is not None:
        inside = inside & real[..., None, :]
    return torch.where(inside, found, 0.0)
