"""Rotary positions (Su et al., arXiv 2104.09864) that stay exact at stream position 10,000,000.

Angles are computed in float64 and reduced there; only their cosines and sines are rounded to the
tensor's dtype. B batch, T time, H heads, d head width.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from everlong.ops.first_order import first_order


def rotate(x: Tensor, position: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn x [B, T, H, d] by its stream positions position[b] + t (Int [B]); d must be even."""
    cos, sin = angles(position, x.shape[1], x.shape[-1], base, x.dtype)
    return apply(x, cos, sin)


def angles(
    position: Tensor, length: int, width: int, base: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `apply` takes of positions position[b] ... position[b] + T - 1, [B or 1, T, 1, d] each:
    cosines, and sines of which the first d/2 are negative."""
    if length > 1:
        return _angles(position, length, width, base, dtype)
    return _of_one(tuple(position.tolist()), width, base, dtype, position.device)


@lru_cache(maxsize=8)
def _of_one(
    positions: tuple[int, ...], width: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of a single token, the same in every layer: computed by the first of them."""
    with torch.inference_mode(False):  # whoever asks next may want gradients
        return _angles(torch.tensor(positions, device=device), 1, width, base, dtype)


def _angles(
    position: Tensor, length: int, width: int, base: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    device = position.device
    exact = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    position = position.to(exact)
    if position.shape[0] > 1 and bool((position == position[0]).all()):
        position = position[:1]
    steps = position[:, None] + torch.arange(length, device=exact)
    exponent = torch.arange(0, width, 2, device=exact, dtype=torch.float64) / width
    turn = steps[..., None].double() * base**-exponent
    cos, sin = (f(turn)[:, :, None].to(dtype).to(device) for f in (torch.cos, torch.sin))
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of x [B, T, H, d]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def turn(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`apply` to queries and keys of qkv [B, T, 3 H, d] (first H heads of queries, then of keys,
    then of values) -> queries, keys, values [B, T, H, d]; the gradient by qkv is written once."""
    if not torch.is_grad_enabled():
        asked, values = qkv.split([2 * heads, heads], 2)
        q, k = apply(asked, cos, sin).split(heads, 2)
        return q, k, values
    found: Any = _Turn.apply(qkv, heads, cos, sin)
    return found


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        qkv, heads, cos, sin = inputs
        ctx.save_for_backward(cos, sin)
        asked, values = qkv.split([2 * heads, heads], 2)
        turned = qkv.new_empty(asked.shape)
        _write(turned, asked, cos, sin)
        return *turned.split(heads, 2), values

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        back = sin.neg()
        found = grads[0].new_empty(*grads[0].shape[:2], 3, *grads[0].shape[2:])
        for i, grad in enumerate(grads[:2]):
            _write(found[:, :, i], grad, cos, back)
        found[:, :, 2] = grads[2]
        return found.flatten(2, 3), None, None, None


def _write(turned: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`apply` into `turned`, half by half: nothing is rolled."""
    torch.mul(x, cos, out=turned)
    (low, high), (first, second) = x.chunk(2, -1), turned.chunk(2, -1)
    by_high, by_low = sin.chunk(2, -1)
    first.addcmul_(high, by_high)
    second.addcmul_(low, by_low)
