"""Polynomial features: a kernel sum_i a_i (q . k)^i as a plain product of two vectors.

d width, p degree, F features.
"""

from functools import lru_cache
from itertools import combinations_with_replacement
from math import comb, factorial, prod

import torch
from torch import Tensor


def polynomial_size(width: int, degree: int) -> int:
    """F = C(d + p, p): the monomials of at most `degree` in `width` variables."""
    if width < 1 or degree < 0:
        raise ValueError(
            f"width {width} and degree {degree}: give at least 1 variable and a degree from 0"
        )
    return comb(width + degree, degree)


def polynomial(x: Tensor, coefficients: Tensor) -> Tensor:
    """x [..., d], coefficients a [p + 1] -> phi(x) [..., F], with

        phi(q) . phi(k) = sum_i a_i (q . k)^i

    exactly; a_i = 1 / i! makes that the start of exp(q . k) (Behrouz et al. 2025, arXiv 2505.23735,
    section 3.1). Features are the monomials x^n of degree |n| = i times sqrt(a_i i! / n!), degree
    by degree (1, x, ...), each in ascending variables. Every block is there, whatever a_i is.

    Differentiable in x and in a. The root wants a_i >= 0 (`ValueError` otherwise), and learning
    wants more: at a_i = 0 a block is switched off, and there a_i has no gradient. So learn the
    logarithms of the coefficients, not the coefficients.
    """
    if coefficients.dim() != 1 or coefficients.shape[0] == 0:
        raise ValueError(
            f"coefficients must be [p + 1], one a degree from 0; got {list(coefficients.shape)}"
        )
    if bool((coefficients < 0).any()):
        raise ValueError(
            f"coefficients must not be negative, got {coefficients.tolist()}: a kernel with such a "
            "term is no product of features (learn their logarithms)"
        )
    on = coefficients > 0
    roots = torch.where(on, torch.where(on, coefficients, 1).sqrt(), 0).to(x.dtype)
    block, features = torch.ones_like(x[..., :1]), []
    for degree, root in enumerate(roots):
        before, last, weights = _monomials(x.shape[-1], degree)
        if degree:
            before, last = (torch.tensor(places, device=x.device) for places in (before, last))
            block = block.index_select(-1, before) * x.index_select(-1, last)
        features.append(block * (root * torch.tensor(weights, device=x.device, dtype=x.dtype)))
    return torch.cat(features, -1)


@lru_cache(maxsize=64)
def _monomials(width: int, degree: int) -> tuple[list[int], list[int], list[float]]:
    """Of each monomial of `degree`: the one of a degree less that it is, times which variable, and
    the root of how many orders its factors have, i! / n!."""
    if degree == 0:
        return [0], [0], [1.0]
    lower = combinations_with_replacement(range(width), degree - 1)
    places = {monomial: place for place, monomial in enumerate(lower)}
    all_of_them = list(combinations_with_replacement(range(width), degree))
    orders = [
        factorial(degree) // prod(factorial(monomial.count(v)) for v in set(monomial))
        for monomial in all_of_them
    ]
    return (
        [places[monomial[:-1]] for monomial in all_of_them],
        [monomial[-1] for monomial in all_of_them],
        [order**0.5 for order in orders],
    )
