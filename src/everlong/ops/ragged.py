"""Rows that stand at different places: packing under a mask, writing at a row's own clock.

B batch, T time, C places of a buffer. Everything is functional: no argument is changed.
"""

import torch
from torch import Tensor


def valid_positions(lengths: Tensor, length: int) -> Tensor:
    """Bool [B, length]: the first `lengths[b]` positions of row b."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def expand_like(mask: Tensor, x: Tensor) -> Tensor:
    """Trailing dimensions of size 1, so that `mask` broadcasts over `x`."""
    return mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))


def pack(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move each row's real positions to the left.

    x [B, T, ...], mask Bool [B, T] -> packed [B, T', ...], lengths Int [B], order Int [B, T'] with
    T' the longest row (at least 1). What stood behind the mask is replaced by zero, NaN included.
    """
    lengths = mask.sum(1)
    longest = max(1, int(lengths.max()))
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :longest]
    index = expand_like(order, x).expand(-1, -1, *x.shape[2:])
    keep = expand_like(valid_positions(lengths, longest), x)
    return torch.where(keep, x.gather(1, index), x.new_zeros(())), lengths, order


def unpack(y: Tensor, lengths: Tensor, order: Tensor, length: int) -> Tensor:
    """The inverse of `pack` for outputs: y [B, T', ...] -> [B, length, ...], zero where masked."""
    keep = expand_like(valid_positions(lengths, y.shape[1]), y)
    y = torch.where(keep, y, y.new_zeros(()))
    out = y.new_zeros(y.shape[0], length, *y.shape[2:])
    return out.scatter(1, expand_like(order, y).expand_as(y), y)


def common_value(clock: Tensor) -> int | None:
    """The value all rows of an integer [B] tensor share, or None."""
    values = clock.tolist()
    return values[0] if values.count(values[0]) == len(values) else None


def write_at(buffer: Tensor, values: Tensor, start: Tensor, lengths: Tensor | None) -> Tensor:
    """Write `values[b, :lengths[b]]` at places `start[b] ...` of row b (all of them if None).

    buffer [B, C, ...], values [B, T, ...], start Int [B] -> [B, C, ...]. The caller makes sure that
    they fit; where rows stand together and all is written, a buffer that they fill may grow.
    """
    length = values.shape[1]
    values = values.to(buffer.dtype)
    if lengths is None and (place := common_value(start)) is not None:
        return _replaced(buffer, values, place)
    places = start[:, None] + torch.arange(length, device=buffer.device)
    return _scatter(buffer, values, places, lengths)


def write_ring(ring: Tensor, values: Tensor, start: Tensor, lengths: Tensor | None) -> Tensor:
    """Write at place (stream position mod C); of more than C values only the last C remain.

    ring [B, C, ...], values [B, T, ...], start Int [B] (stream position of values[:, 0]).
    """
    size, length = ring.shape[1], values.shape[1]
    if lengths is None and length > size:
        values, start, length = values[:, -size:], start + (length - size), size
    if lengths is None and (first := common_value(start)) is not None:
        place = first % size
        if place + length <= size:
            return _replaced(ring, values.to(ring.dtype), place)
    index = torch.arange(length, device=ring.device)
    places = (start[:, None] + index) % size
    if lengths is not None and length > size:
        overwritten = index < lengths[:, None] - size
        places = torch.where(overwritten, size, places)
    return _scatter(ring, values.to(ring.dtype), places, lengths)


def _replaced(buffer: Tensor, values: Tensor, place: int) -> Tensor:
    """The buffer with `values` at `place` and behind it, in every row; longer if they end behind
    it."""
    parts = [buffer[:, :place], values, buffer[:, place + values.shape[1] :]]
    parts = [part for part in parts if part.shape[1]]  # the gradient of an empty one is a whole one
    return torch.cat(parts, 1)  # also of one: what is kept is a copy, and not a view of more


def _scatter(buffer: Tensor, values: Tensor, places: Tensor, lengths: Tensor | None) -> Tensor:
    """buffer[b, places[b, t]] = values[b, t]; place C, and what is behind `lengths`, is nowhere."""
    size, length = buffer.shape[1], values.shape[1]
    if lengths is not None:
        places = torch.where(valid_positions(lengths, length), places, size)
    if length == 1:
        hit = torch.arange(size, device=buffer.device) == places
        return torch.where(expand_like(hit, buffer), values, buffer)
    spare = torch.cat([buffer, buffer.new_zeros(buffer.shape[0], 1, *buffer.shape[2:])], 1)
    index = expand_like(places, values).expand_as(values)
    return spare.scatter(1, index, values)[:, :size].clone()
