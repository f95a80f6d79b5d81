"""SwiGLU's gate (Shazeer 2020, arXiv 2002.05202) with its gradient written out.

F width of what is gated.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.first_order import first_order


def gated(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, in the wider of their dtypes. Held for the gradient are the two alone:
    silu(gate) is made again."""
    dtype = torch.promote_types(gate.dtype, value.dtype)
    gate, value = gate.to(dtype), value.to(dtype)
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(value)
    found: Any = _Gated.apply(gate, value)
    return found


def swiglu(both: Tensor) -> Tensor:
    """`gated` of the halves of [..., 2 F] -> [..., F], whose gradient is one tensor, too."""
    if not torch.is_grad_enabled():
        gate, value = both.chunk(2, -1)
        return F.silu(gate).mul_(value)
    found: Any = _SwiGLU.apply(both)
    return found


def _backward(grad: Tensor, gate: Tensor, value: Tensor, by_gate: Tensor, by_value: Tensor) -> None:
    """Written into the last two."""
    torch.ops.aten.silu.out(gate, out=by_value).mul_(grad)
    torch.mul(grad, value, out=by_gate)
    torch.ops.aten.silu_backward.grad_input(by_gate, gate, grad_input=by_gate)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        ctx.save_for_backward(*inputs)
        gate, value = inputs
        return F.silu(gate).mul_(value)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (gate, value) = grads, ctx.saved_tensors
        by_gate, by_value = torch.empty_like(gate), torch.empty_like(value)
        _backward(grad, gate, value, by_gate, by_value)
        return by_gate, by_value


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        ctx.save_for_backward(*inputs)
        gate, value = inputs[0].chunk(2, -1)
        return F.silu(gate).mul_(value)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (both,) = grads, ctx.saved_tensors
        by_both = torch.empty_like(both)
        (gate, value), (by_gate, by_value) = both.chunk(2, -1), by_both.chunk(2, -1)
        _backward(grad, gate, value, by_gate, by_value)
        return by_both
