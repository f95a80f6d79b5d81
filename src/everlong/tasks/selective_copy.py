"""Selective copying: symbols stand somewhere in noise, and are asked for in their order.

The task of Gu & Dao 2023 (Mamba, arXiv 2312.00752, section 4.3.1). Of the first T - n places, n
drawn at random hold a symbol each, the rest are blanks, the noise. Then n MARKs follow, whose
targets are the symbols in the order in which they stood. When a symbol comes is not known before,
so that what is written has to depend on the token: a fixed convolution cannot tell. With T = 16,
n = 4 (M = MARK, . = blank, a-h the symbols; item 0 of seed 0):

    inputs    . . g . a . . f . c . . M M M M
    targets   - - - - - - - - - - - - g a f c      (- is -100: not scored)

Published size: 4,096 tokens before the marks, n = 16, a vocabulary of 16 with the noise.

Item i is a function of (config, seed, i) alone: no order, batch size or worker changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from everlong.tasks._shared import IGNORED, ScoredBatch, check_least, full_rows
from everlong.tasks.copying import FIRST_SYMBOL, MARK
from everlong.tasks.recall import BLANK


@dataclass(frozen=True)
class SelectiveCopyConfig:
    """T tokens, the last n of which are marks."""

    length: int = 64  # T
    num_copied: int = 8  # n
    num_symbols: int = 8

    def __post_init__(self) -> None:
        check_least(self, 1, "num_copied")
        check_least(self, 2, "num_symbols")
        if self.length < 2 * self.num_copied:
            raise ValueError(
                f"length is {self.length}: {self.num_copied} symbols and as many marks need "
                f"{2 * self.num_copied} or more"
            )

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + self.num_symbols

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the symbols."""
        return 1 / self.num_symbols

    @property
    def max_length(self) -> int:
        """T: all items have the same."""
        return self.length


def make_source(config: SelectiveCopyConfig, seed: int, index: int) -> np.ndarray:
    """Tokens int64 [T - n] before the marks of item `index` of the stream `seed`; both from 0."""
    generator = np.random.default_rng((seed, index))
    places = generator.permutation(config.length - config.num_copied)[: config.num_copied]
    source = np.full(config.length - config.num_copied, BLANK, dtype=np.int64)
    source[places] = generator.integers(FIRST_SYMBOL, config.vocab_size, config.num_copied)
    return source


def make_batch(config: SelectiveCopyConfig, seed: int, indices: Sequence[int]) -> ScoredBatch:
    """The items of `indices` as rows, in that order, on the CPU."""
    inputs, targets = [], []
    for index in indices:
        source = make_source(config, seed, index)
        inputs.append(np.append(source, [MARK] * config.num_copied))
        targets.append(np.append(np.full(len(source), IGNORED), source[source != BLANK]))
    return ScoredBatch(*full_rows(inputs, targets))
