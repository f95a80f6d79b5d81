"""A matrix memory that is calibrated cell by cell, then written by an outer product.

B batch, T time, V rows (values), K columns (keys). Both forms take theta [B, T, V], c [B, T, K]
(the two factors of the calibration), v [B, T, V] (what is written, gate included), k and q
[B, T, K], and memory [B, V, K]; they return y [B, T, V] and the last memory. theta = 0 and k = 0
at a position leave the memory as it is, bit for bit.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from everlong.ops.scan import places, recur


def hadamard_reference(
    theta: Tensor, c: Tensor, v: Tensor, k: Tensor, q: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Position by position, the definition: M = M * C + v k^T with C = 1 + tanh(theta c^T), in
    (0, 2), then y = M q."""
    outputs = []
    for t in range(v.shape[1]):
        calibration = 1 + torch.tanh(theta[:, t, :, None] * c[:, t, None, :])
        memory = memory * calibration + v[:, t, :, None] * k[:, t, None, :]
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
    block: int | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in blocks of `block` positions, each a scan over chunks of `width` of them.

    Inside a block the places of all chunks are read at once: pairs (C, U) compose as
    (C2 * C1, C2 * U1 + U2), and nothing is ever divided by a product, which may be 0. For the
    gradient only the memory before each block is kept, the rest is made again. Neither number
    changes the result but for rounding; by default one chunk a block on a CPU, where launches cost
    little, many elsewhere. Gradients are of first order.
    """
    if block is None or width is None:
        block, width = (16, 16) if v.device.type == "cpu" else (512, 32)
    length = v.shape[1]
    width = min(width, block, length)
    parts = [F.pad(part, (0, 0, 0, -length % width)) for part in (theta, c, v, k, q)]
    with torch.autocast(v.device.type, enabled=False):
        found: Any = _Scan.apply(*parts, memory, max(1, block // width) * width, width)
    y, memory = found
    return y[:, :length], memory


class _Scan(torch.autograd.Function):
    """Time first inside: theta [T, B, V] and so on, T a multiple of width."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *parts, memory, block, width = inputs
        outputs, starts = [], []
        for theta, c, v, k, q in _blocks(parts, block):
            starts.append(memory)
            states = _outer(v, k)
            recur(places(_calibration(theta, c), width), places(states, width), memory)
            outputs.append(_times(states, q))
            memory = states[-1].clone()
        ctx.save_for_backward(*parts, *starts)
        ctx.sizes = block, width
        return torch.cat(outputs).transpose(0, 1), memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_y, carried = grads
        block, width = ctx.sizes
        parts, starts = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        found = []
        with torch.autocast(carried.device.type, enabled=False):
            pieces = zip(_blocks([*parts, grad_y], block), starts, strict=True)
            for (theta, c, v, k, q, dy), start in reversed(list(pieces)):
                gate = _calibration(theta, c)
                states = _outer(v, k)
                first, *others = gates = places(gate, width)
                recur(gates, places(states, width), start)
                # the gradient by each memory passes the calibration of the position behind it
                others.append(torch.cat([first[1:], torch.ones_like(first[:1])]))
                grad = _outer(dy, q)
                recur(others, places(grad, width), carried, backwards=True)
                carried = gate[0] * grad[0]
                dv, dk = _times(grad, k), _times_left(v, grad)
                dq = _times_left(dy, states)
                slope = torch.sub(2, gate).mul_(gate).mul_(grad)  # tanh' = C (2 - C)
                slope[1:].mul_(states[:-1])
                slope[0].mul_(start)
                found.append((_times(slope, c), _times_left(theta, slope), dv, dk, dq))
        joined = (torch.cat(part[::-1]).transpose(0, 1) for part in zip(*found, strict=True))
        return *joined, carried, None, None


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
