"""A matrix memory that is calibrated cell by cell, then written by an outer product.

B batch, T time, V rows (values), K columns (keys). Both forms take theta [B, T, V], c [B, T, K]
(the two factors of the calibration), v [B, T, V] (what is written, gate included), k and q
[B, T, K], and memory [B, V, K]; they return y [B, T, V] and the last memory. theta = 0 and k = 0
at a position leave the memory as it is, bit for bit. Cells are clamped to [-limit, limit] after
every position's write; a clamped one passes no gradient to what came before it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.first_order import first_order
from everlong.ops.scan import places, recur


def hadamard_reference(
    theta: Tensor,
    c: Tensor,
    v: Tensor,
    k: Tensor,
    q: Tensor,
    memory: Tensor,
    *,
    limit: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Position by position, the definition: M = clamp(M * C + v k^T) with C = 1 + tanh(theta c^T),
    in (0, 2), then y = M q."""
    outputs = []
    for t in range(v.shape[1]):
        calibration = 1 + torch.tanh(theta[:, t, :, None] * c[:, t, None, :])
        memory = memory * calibration + v[:, t, :, None] * k[:, t, None, :]
        memory = memory.clamp(-limit, limit)
        outputs.append((memory * q[:, t, None, :]).sum(-1))
    return torch.stack(outputs, 1), memory


def hadamard(
    theta: Tensor,
    c: Tensor,
    v: Tensor,
    k: Tensor,
    q: Tensor,
    memory: Tensor,
    *,
    limit: float = math.inf,
    sizes: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in blocks of positions, each a scan over chunks of them; `sizes` is (positions of a
    block, of a chunk).

    Inside a block the places of all chunks are read at once: maps x -> clamp(a x + b, low, high)
    with a >= 0, as each position's is, compose to such maps, and nothing is ever divided by a
    product of C's, which may be 0. For the gradient only the memory before each block is kept, the
    rest is made again. Sizes change the result by rounding alone; by default one chunk a block on
    a CPU, where launches cost little, many elsewhere. Gradients are of first order.
    """
    block, width = sizes or ((16, 16) if v.device.type == "cpu" else (512, 32))
    length = v.shape[1]
    width = min(width, block, length)
    parts = [F.pad(part, (0, 0, 0, -length % width)) for part in (theta, c, v, k, q)]
    with torch.autocast(v.device.type, enabled=False):
        found: Any = _Scan.apply(*parts, memory, max(1, block // width) * width, width, limit)
    y, memory = found
    return y[:, :length], memory


class _Scan(torch.autograd.Function):
    """Time first inside: theta [T, B, V] and so on, T a multiple of width."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *parts, memory, block, width, limit = inputs
        outputs, starts = [], []
        for theta, c, v, k, q in _blocks(parts, block):
            starts.append(memory)
            states = _outer(v, k)
            gates = places(_calibration(theta, c), width)
            _walk(gates, places(states, width), memory, limit)
            outputs.append(_times(states, q))
            memory = states[-1].clone()
        ctx.save_for_backward(*parts, *starts)
        ctx.sizes = block, width, limit
        return torch.cat(outputs).transpose(0, 1), memory

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_y, carried = grads
        block, width, limit = ctx.sizes
        saved = ctx.saved_tensors  # once: a checkpoint unpacks what is saved a single time
        parts, starts = saved[:5], saved[5:]
        found = []
        pieces = zip(_blocks([*parts, grad_y], block), starts, strict=True)
        for (theta, c, v, k, q, dy), start in reversed(list(pieces)):
            gate = _calibration(theta, c)
            states = _outer(v, k)
            inside = torch.empty_like(states)
            within = places(inside, width)
            _walk(places(gate, width), places(states, width), start, limit, within)
            # the gradient by each memory passes the calibration of the position behind it,
            # then the clamp of its own
            behind = torch.cat([gate[1:], torch.ones_like(gate[:1])]).mul_(inside)
            grad = _outer(dy, q).mul_(inside)
            recur(places(behind, width), places(grad, width), carried, backwards=True)
            carried = gate[0] * grad[0]
            dv, dk = _times(grad, k), _times_left(v, grad)
            dq = _times_left(dy, states)
            slope = torch.sub(2, gate).mul_(gate).mul_(grad)  # tanh' = C (2 - C)
            slope[1:].mul_(states[:-1])
            slope[0].mul_(start)
            found.append((_times(slope, c), _times_left(theta, slope), dv, dk, dq))
        joined = (torch.cat(part[::-1]).transpose(0, 1) for part in zip(*found, strict=True))
        return *joined, carried, None, None, None


def _walk(
    gates: list[Tensor],
    drives: list[Tensor],
    start: Tensor,
    limit: float,
    inside: list[Tensor] | None = None,
) -> None:
    """M = clamp(C M + U) over the `places` of chunks, written over those of the drives U; those of
    `inside` become 1 where a cell is not clamped and 0 where it is."""
    limit = min(limit, torch.finfo(start.dtype).max)  # 0 times infinity would be no number
    entering = [start]
    if len(drives[0]) > 1:  # the map of each chunk as a whole: x -> clamp(a x + b, low, high)
        a, b = gates[0].clone(), drives[0].clone()
        low, high = torch.full_like(b, -limit), torch.full_like(b, limit)
        for gate, drive in zip(gates[1:], drives[1:], strict=True):
            a.mul_(gate)
            b.mul_(gate).add_(drive)
            low.mul_(gate).add_(drive).clamp_(-limit, limit)
            high.mul_(gate).add_(drive).clamp_(-limit, limit)
        for chunk in range(len(b) - 1):
            after = torch.addcmul(b[chunk], a[chunk], entering[-1])
            entering.append(torch.clamp(after, low[chunk], high[chunk]))
    before = torch.stack(entering)
    for place, (gate, here) in enumerate(zip(gates, drives, strict=True)):
        here.addcmul_(gate, before)
        if inside is not None:
            inside[place].copy_(here.abs() <= limit)
        before = here.clamp_(-limit, limit)


def _blocks(parts: Any, block: int) -> Any:
    """The parts [B, T, ...] cut into blocks, time first."""
    return zip(*(part.transpose(0, 1).split(block) for part in parts), strict=True)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _calibration(theta: Tensor, c: Tensor) -> Tensor:
    """1 + tanh(z) as 2 sigmoid(2 z): a quarter of the time, and exact near 0."""
    return _outer(2 * theta, c).sigmoid_().mul_(2)


def _times(matrix: Tensor, b: Tensor) -> Tensor:
    """[..., V, K] by [..., K] -> [..., V]; many small matrices, for which a matmul is slow."""
    return (matrix * b[..., None, :]).sum(-1)


def _times_left(a: Tensor, matrix: Tensor) -> Tensor:
    """[..., V] by [..., V, K] -> [..., K]."""
    return (a[..., None, :] @ matrix).squeeze(-2)
