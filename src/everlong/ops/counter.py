"""Draws that are a function of (seed, position): the same in any cut, batch, replay and device.

B batch, T time. The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in int64, whose
products wrap around; nothing is taken from torch's generators.
"""

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as the int64 of the same bits
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of int64 in which every bit of the input counts."""
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    return bits ^ _shift(bits, 31)


def integers(seed: Tensor, position: Tensor, length: int, high: int) -> Tensor:
    """Uniform draws from 0 .. high - 1 for stream positions position[b] ... position[b] + T - 1.

    seed, position Int64 [B], high from 1 to 2^31 -> Int64 [B, length]. A value's probability is
    off by less than 2^-31.
    """
    steps = position[:, None] + torch.arange(1, length + 1, device=position.device)
    drawn = mix(mix(seed)[:, None] + steps * _GAMMA)
    return (_shift(drawn, 33) * high) >> 31


def _shift(bits: Tensor, places: int) -> Tensor:
    """Shift right and fill with zeros, where >> would copy the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)
