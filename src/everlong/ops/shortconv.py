"""A short causal convolution, channel by channel, that carries its last inputs from call to call.

B batch, T time, D width, W positions the convolution sees (4 in the linear-attention layers).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.first_order import first_order
from everlong.ops.ragged import expand_like


def short_convolution(
    x: Tensor,
    weight: Tensor,
    tail: Tensor,
    *,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = sum_w weight[:, w] * x_{t-W+1+w} (+ bias): the last weight meets the newest input.

    x [B, T, D], weight [D, W], bias [D], tail [B, W - 1, D] the inputs before x (zeros at the start
    of a stream) -> y [B, T, D] and the next tail. With `lengths` Int [B] the tail ends at a row's
    own last real position; y behind it is meaningless, and x there may hold anything.
    """
    length, width = x.shape[1], weight.shape[-1]
    seen = torch.cat([tail.to(x.dtype), x], 1)
    if length == 1:
        y: Any = (seen * weight.T).sum(1, keepdim=True)
    else:
        y = _Convolution.apply(seen, weight)
    y = y if bias is None else y + bias
    if lengths is None:
        return y, seen[:, length:].clone()  # which must not keep all that was seen
    places = lengths[:, None] + torch.arange(width - 1, device=x.device)
    index = expand_like(places, x).expand(-1, -1, x.shape[-1])
    return y, seen.gather(1, index)


class _Convolution(torch.autograd.Function):
    """seen [B, T + W - 1, D], weight [D, W] -> [B, T, D]: W products of the tensor as it lies;
    torch's convolution would turn it around first, and back."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        seen, weight = inputs
        ctx.save_for_backward(seen, weight)
        return _sum_of_shifts(seen, weight)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        seen, weight = ctx.saved_tensors
        (grad,) = grads
        length, behind = grad.shape[1], weight.shape[-1] - 1
        by_seen = _sum_of_shifts(F.pad(grad, (0, 0, behind, behind)), weight.flip(-1))
        shifts = (seen[:, w : w + length] for w in range(behind + 1))
        return by_seen, torch.stack([(grad * x).sum((0, 1)) for x in shifts], -1)


def _sum_of_shifts(x: Tensor, weight: Tensor) -> Tensor:
    length = x.shape[1] - weight.shape[-1] + 1
    first, *others = weight.T.contiguous()
    y = x[:, :length] * first
    for w, row in enumerate(others, 1):
        y.addcmul_(x[:, w : w + length], row)
    return y
