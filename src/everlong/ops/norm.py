"""Norms with their gradients written out: root mean square (Zhang and Sennrich 2019, arXiv
1910.07467), and length.

D width of what is normed, in the last dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong.ops.first_order import first_order

_OWN = (torch.float32, torch.float64)
_FEW = 1 << 14  # numbers: a token or some


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, x [..., D], weight [D].

    On a CPU torch has no kernel for it: its gradient is a chain of passes over x, three times as
    long as the one here. Elsewhere, and in half precision, all is torch's.
    """
    own = x.device.type == "cpu" and x.dtype in _OWN and x.dtype == weight.dtype
    if not own:
        return F.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled():
        found: Any = _RMSNorm.apply(x, weight, eps)
        return found
    return _forward(x, weight, eps)


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.numel() > _FEW:
        return F.rms_norm(x, weight.shape, weight, eps)
    # [x, -x] has mean 0: torch's layer norm of it is one kernel, its rms_norm of x are seven
    both = torch.cat([x, -x], -1)
    return torch.layer_norm(both, both.shape[-1:], eps=eps)[..., : x.shape[-1]] * weight


class RMSNorm(nn.RMSNorm):
    """torch's module with the gradient of `rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


def unit(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(|x|^2 + eps), x [..., D]: vectors of length 1, and those near 0 finite."""
    if not torch.is_grad_enabled():
        return x * _rate(x, eps)
    found: Any = _Unit.apply(x, eps)
    return found


def _rate(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        x, eps = inputs
        rate = _rate(x, eps)
        found = x * rate
        ctx.save_for_backward(found, rate)
        return found

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (found, rate) = grads, ctx.saved_tensors
        along = (grad * found).sum(-1, keepdim=True)
        return torch.addcmul(grad, found, along, value=-1).mul_(rate), None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        x, weight, eps = inputs
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, weight, eps)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        (grad,), width = grads, x.shape[-1]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rate = length.square_().div_(width).add_(ctx.eps).rsqrt_()
        flat = x * rate
        moved = grad * flat
        rows = moved.flatten(0, -2) if moved.dim() > 1 else moved[None]
        by_weight = torch.mv(rows.T, rows.new_ones(len(rows)))
        along = torch.mv(rows, weight).div_(width).view_as(rate)
        by_x = torch.mul(grad, weight, out=moved).addcmul_(flat, along, value=-1).mul_(rate)
        return by_x, by_weight, None
