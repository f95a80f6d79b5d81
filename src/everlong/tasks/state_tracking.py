"""State tracking: the product so far of a sequence of group elements, asked for at every position.

The word problem (Merrill et al. 2024, arXiv 2404.08819): every token is an element of a group,
drawn uniformly, and its target is the product of the tokens up to it, itself included. The groups
S3, S4 and S5 are all permutations of 3, 4 or 5 things, numbered in lexicographic order: of S3, 0-5
are 012, 021, 102, 120, 201, 210, where p sends thing i to its i-th digit p[i]. Products are
composed from left to right: p and then q sends i to q[p[i]]. S3, T = 12 (item 0 of seed 0):

    inputs    5 3 3 1 1 0 0 0 1 4 3 5
    targets   5 1 2 4 2 2 2 2 4 3 4 1

`parity` is the same for two things: is the number of ones so far odd? T = 12 (item 0 of seed 0):

    inputs    1 1 1 0 0 0 0 0 0 1 1 1
    targets   1 0 1 1 1 1 1 1 1 0 1 0

No fixed number of layers of attention, or of linear recurrence with diagonal transitions, solves S5
at every length, unless TC0 is NC1. For parity, a linear recurrence of finite precision needs an
eigenvalue that is negative or complex (Grazzi et al. 2024, arXiv 2411.12537).

Item i is a function of (config, seed, i) alone: no order, batch size or worker changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, permutations
from math import factorial

import numpy as np

from everlong.tasks._shared import ScoredBatch, check_least, full_rows

GROUPS = {"parity": 2, "S3": 3, "S4": 4, "S5": 5}  # things of which it is all permutations


@dataclass(frozen=True)
class StateTrackingConfig:
    """T tokens of a group: "parity", "S3", "S4" or "S5"."""

    group: str = "parity"
    length: int = 32  # T

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"unknown group {self.group!r}: give one of {', '.join(GROUPS)}")
        check_least(self, 1, "length")

    @property
    def vocab_size(self) -> int:
        """Elements of the group: 2, 6, 24 or 120."""
        return factorial(GROUPS[self.group])

    @property
    def chance(self) -> float:
        """Accuracy of a guess, and of who misses one token: products are uniform."""
        return 1 / self.vocab_size

    @property
    def max_length(self) -> int:
        """T: all items have the same."""
        return self.length


@lru_cache
def products(group: str) -> tuple[tuple[int, ...], ...]:
    """Element a and then element b of the group is `products(group)[a][b]`."""
    elements = list(permutations(range(GROUPS[group])))
    number = {element: i for i, element in enumerate(elements)}
    return tuple(tuple(number[tuple(b[i] for i in a)] for b in elements) for a in elements)


def make_item(config: StateTrackingConfig, seed: int, index: int) -> np.ndarray:
    """Tokens int64 [T] of item `index` of the stream `seed`; both from 0."""
    generator = np.random.default_rng((seed, index))
    return generator.integers(config.vocab_size, size=config.length)


def make_batch(config: StateTrackingConfig, seed: int, indices: Sequence[int]) -> ScoredBatch:
    """The items of `indices` as rows, in that order, on the CPU."""
    table = products(config.group)
    inputs = [make_item(config, seed, index) for index in indices]
    targets = [list(accumulate(tokens, lambda a, b: table[a][b])) for tokens in inputs]
    return ScoredBatch(*full_rows(inputs, [np.array(row) for row in targets]))
