"""Rotary positions (Su et al., arXiv 2104.09864) that stay exact at stream position 10,000,000.

Angles are computed in float64 and reduced there; only their cosines and sines are rounded to the
tensor's dtype. B batch, T time, H heads, d head width.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn x [B, T, H, d] by its stream positions position[b] + t (Int [B]); d must be even."""
    cos, sin = angles(position, x.shape[1], x.shape[-1], base, x.dtype)
    return apply(x, cos, sin)


def angles(
    position: Tensor, length: int, width: int, base: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B or 1, T, 1, d/2] of positions position[b] ... position[b] + T - 1."""
    device = position.device
    exact = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    position = position.to(exact)
    if position.shape[0] > 1 and bool((position == position[0]).all()):
        position = position[:1]
    steps = position[:, None] + torch.arange(length, device=exact)
    exponent = torch.arange(0, width, 2, device=exact, dtype=torch.float64) / width
    turn = steps[..., None].double() * base**-exponent
    cos, sin = (f(turn)[:, :, None].to(dtype).to(device) for f in (torch.cos, torch.sin))
    return cos, sin


def apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of x [B, T, H, d]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
