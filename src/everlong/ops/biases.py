"""Attentional biases: what a memory that learns at test time takes from its error.

e is the error M(k) - v of a head, [..., V]; a bias gives the cotangent g of M(k), like e. Loss and
cotangent are those of arXiv 2504.13173 (Miras), sections 3 to 5; l2 is half the squared error.
`level` [..., 1 or V] is the threshold of the Huber forms and the radius of "shift", p the exponent
of "lp"; |e| and sign(e) are smooth where it is near 0, as published.
"""

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-6  # inside |e| = sqrt(e^2 + EPS), of a number or of a vector
SHARP = 10.0  # sign(e) = tanh(SHARP e); the paper gives no number

Bias = Callable[[Tensor, Tensor, float], Tensor]


def _size(e: Tensor) -> Tensor:
    return (e.square() + EPS).sqrt()


def _length(e: Tensor) -> Tensor:
    return (e.square().sum(-1, keepdim=True) + EPS).sqrt()


def l2(e: Tensor, level: Tensor, p: float) -> Tensor:
    """|e|^2 / 2."""
    return e


def l1(e: Tensor, level: Tensor, p: float) -> Tensor:
    """sum |e_j| (eq. 11: "value-less": only the direction of an error counts)."""
    return torch.tanh(SHARP * e)


def lp(e: Tensor, level: Tensor, p: float) -> Tensor:
    """sum |e_j|^p (eq. 10)."""
    return p * torch.tanh(SHARP * e) * _size(e) ** (p - 1)


def huber(e: Tensor, level: Tensor, p: float) -> Tensor:
    """|e|^2 / 2 up to |e| = level, linear in |e| beyond (eq. 15): an update is bounded."""
    return e * (level / _length(e)).clamp(max=1)


def huber_coordinate(e: Tensor, level: Tensor, p: float) -> Tensor:
    """The same of each coordinate, each with a level of its own if it has one (eq. 14)."""
    return torch.minimum(torch.maximum(e, -level), level)


def huber_mixture(e: Tensor, level: Tensor, p: float) -> Tensor:
    """The gradient of l2 while |e| <= level, level times that of l1 beyond (eq. 16 and 26). It
    jumps there, from length level to level * sqrt(V)."""
    return torch.where(_length(e) <= level, e, level * torch.tanh(SHARP * e))


def shift(e: Tensor, level: Tensor, p: float) -> Tensor:
    """(|e| + level)^2 / 2: the worst value within `level` of the one that was given (eq. 17)."""
    return e * (1 + level / _length(e))


BIASES: dict[str, Bias] = {
    "l2": l2,
    "l1": l1,
    "lp": lp,
    "huber": huber,
    "huber_coordinate": huber_coordinate,
    "huber_mixture": huber_mixture,
    "shift": shift,
}
LEVELLED = ("huber", "huber_coordinate", "huber_mixture", "shift")
