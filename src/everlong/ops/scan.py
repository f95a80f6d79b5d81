"""The first-order scan h_t = f_t * h_{t-1} + i_t, the recurrence of HGRN (arXiv 2311.04823).

B batch, T time, D width.
"""

import math
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.first_order import first_order
from everlong.ops.ragged import valid_positions


def scan_reference(
    f: Tensor, i: Tensor, state: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Position by position, the definition of `scan`."""
    f, i, state = _real(f, i, state, lengths)
    outputs = []
    for f_t, i_t in zip(f.unbind(1), i.unbind(1), strict=True):
        state = f_t * state + i_t
        outputs.append(state)
    return torch.stack(outputs, 1), state


def scan(
    f: Tensor, i: Tensor, state: Tensor, lengths: Tensor | None = None, *, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = f_t * h_{t-1} + i_t for all t: f, i [B, T, D], state h_0 [B, D] -> h [B, T, D], h_T.

    Position j of all chunks of `width` positions (sqrt(T) by default) is computed at once, then
    what enters each chunk is carried over them: nothing is divided by a product of decays, so f may
    be 0. With `lengths` Int [B], positions behind a row's length neither decay nor write (their h
    is the last state). Results are float32 at least; gradients are of first order.
    """
    length = i.shape[1]
    if length == 1:
        return scan_reference(f, i, state, lengths)
    f, i, state = _real(f, i, state, lengths)
    width = min(width or math.isqrt(length), length)
    f, i = (F.pad(x, (0, 0, 0, -length % width)).transpose(0, 1) for x in (f, i))
    found: Any = _Scan.apply(f, i, state, width)
    h = found[:length]
    return h.transpose(0, 1), h[-1].clone()  # which must not keep all of h


class _Scan(torch.autograd.Function):
    """f, i [T, B, D], T a multiple of width. Backwards it is the same scan from the other end: the
    gradient by each h passes the decay of the position behind it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        f, i, start, width = inputs
        h = i.clone(memory_format=torch.contiguous_format)
        recur(places(f, width), places(h, width), start)
        ctx.save_for_backward(f, h, start)
        ctx.width = width
        return h

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        f, h, start = ctx.saved_tensors
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        behind = torch.cat([f[1:], torch.ones_like(f[:1])])
        decays, drives = places(behind, ctx.width), places(grad, ctx.width)
        recur(decays, drives, torch.zeros_like(start), backwards=True)
        by_f = None
        if ctx.needs_input_grad[0]:
            by_f = grad * torch.cat([start[None], h[:-1]])
        return by_f, grad, f[0] * grad[0], None


def _real(
    f: Tensor, i: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 at least; f = 1 and i = 0 behind a row's length."""
    dtype = torch.promote_types(torch.promote_types(i.dtype, state.dtype), torch.float32)
    f, i, state = f.to(dtype), i.to(dtype), state.to(dtype)
    if lengths is not None:
        real = valid_positions(lengths, i.shape[1])[..., None]
        f, i = torch.where(real, f, 1.0), torch.where(real, i, 0.0)
    return f, i, state


def places(x: Tensor, width: int) -> list[Tensor]:
    """[T, ...] -> place j of every chunk, [T / width, ...] for each j; views."""
    return list(x.unflatten(0, (-1, width)).unbind(1))


def recur(
    decays: list[Tensor], drives: list[Tensor], start: Tensor, backwards: bool = False
) -> None:
    """The scan over `places` of chunks, written over those of the drives: `start` stands before the
    first position, or with `backwards` behind the last."""
    order = slice(None, None, -1) if backwards else slice(None)
    decays, drives = decays[order], drives[order]
    chunks = len(drives[0])
    if chunks == 1:
        drives[0].addcmul_(decays[0], start)
    for (before, here), decay in zip(pairwise(drives), decays[1:], strict=True):
        here.addcmul_(decay, before)
    if chunks == 1:
        return
    products = list(accumulate(decays, torch.mul))
    entering = [start]
    for chunk in range(chunks)[order][:-1]:
        entering.append(torch.addcmul(drives[-1][chunk], products[-1][chunk], entering[-1]))
    carried = torch.stack(entering[order])
    for here, product in zip(drives, products, strict=True):
        here.addcmul_(product, carried)
