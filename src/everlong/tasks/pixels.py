"""Real handwritten digits as streams of pixels, row by row: the shape of sequential MNIST.

The 1,797 digits of 8 x 8 pixels that scikit-learn ships (the test half of the UCI set "Optical
Recognition of Handwritten Digits"; `pip install 'everlong[digits]'`). Grey values 0 to 16 are
quantised to `levels`. A row of a batch is bos and then the 64 pixels of one digit but the last;
its targets are all 64 pixels. The class is not given. B batch, T = 64 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Literal

import numpy as np

from everlong.errors import UserError
from everlong.tasks._shared import ScoredBatch, check_least, full_rows

SIDE = 8  # pixels
LENGTH = SIDE * SIDE
_GREYS = 17  # 0 to 16


@dataclass(frozen=True)
class PixelsConfig:
    """levels: grey values a pixel has here, tokens 0 to levels - 1, of equally many of the greys
    where that divides; test: digits held out, others with every seed."""

    levels: int = 4
    test: int = 400

    def __post_init__(self) -> None:
        check_least(self, 2, "levels")
        check_least(self, 1, "test")
        if self.levels > _GREYS:
            raise ValueError(f"levels is {self.levels}: the digits have {_GREYS}")

    @property
    def bos(self) -> int:
        """The first token of a row, behind those of the pixels."""
        return self.levels

    @property
    def vocab_size(self) -> int:
        """With bos."""
        return self.levels + 1


@cache
def digits(levels: int) -> np.ndarray:
    """All digits as tokens int64 [1797, 64]; `UserError` where scikit-learn is not installed."""
    try:
        datasets = import_module("sklearn.datasets")
    except ImportError as error:
        raise UserError(
            "the digits come with scikit-learn: pip install 'everlong[digits]'"
        ) from error
    images = datasets.load_digits().images
    tokens = (images * levels / _GREYS).astype(np.int64).reshape(len(images), LENGTH)
    tokens.setflags(write=False)
    return tokens


def indices(config: PixelsConfig, seed: int, part: Literal["train", "test"]) -> np.ndarray:
    """Of the digits that are trained on, or held out, under `seed`: int64, in a drawn order.

    `ValueError` where `test` leaves nothing to train on.
    """
    count = len(digits(config.levels))
    if config.test >= count:
        raise ValueError(f"test is {config.test}: there are {count} digits, leave some to train on")
    order = np.random.default_rng(seed).permutation(count)
    return order[: config.test] if part == "test" else order[config.test :]


def make_batch(config: PixelsConfig, chosen: Sequence[int] | np.ndarray) -> ScoredBatch:
    """The digits `chosen` as rows, in that order, on the CPU."""
    targets = [digits(config.levels)[index] for index in chosen]
    inputs = [np.append(config.bos, tokens[:-1]) for tokens in targets]
    return ScoredBatch(*full_rows(inputs, targets))


def epochs(config: PixelsConfig, seed: int, batch_size: int, steps: int) -> list[np.ndarray]:
    """Which digits each of `steps` training batches holds: every one once, in an order of its own,
    then all again; the last of an epoch that fill no batch are left out."""
    train, generator = indices(config, seed, "train"), np.random.default_rng((seed, 1))
    if batch_size > len(train):
        raise ValueError(f"batch_size is {batch_size}: there are {len(train)} digits to train on")
    found: list[np.ndarray] = []
    while len(found) < steps:
        order = generator.permutation(train)
        found += np.split(order, range(batch_size, len(order), batch_size))
        if len(found[-1]) < batch_size:
            found.pop()
    return found[:steps]
