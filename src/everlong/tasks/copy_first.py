"""Copy the first: one symbol is shown, a delay passes, then it is asked for.

The first token is one of the symbols. In the T tokens of the delay a quarter are symbols too,
drawn alike, which nothing but their place tells from the first. The last token is the QUERY mark,
whose target is the first. With T = 12 (Q = QUERY, . = blank, a-h the symbols):

    inputs    c . . f . a . . . c . g . Q
    targets   - - - - - - - - - - - - - c      (- is -100: not scored)

Seen one token at a time it is the smallest partially observed episode: the observation that
decides the action is long gone. Item i is a function of (config, seed, i) alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from everlong.tasks._shared import check_least, check_share, check_span
from everlong.tasks.recall import (
    BLANK,
    FIRST_SYMBOL,
    QUERY,
    RecallBatch,
    RecallItem,
    to_batch,
)


@dataclass(frozen=True)
class CopyFirstConfig:
    """T, the tokens of the delay, is uniform in min_delay..max_delay."""

    num_symbols: int = 8
    min_delay: int = 0
    max_delay: int = 50
    noise: float = 0.25  # share of symbols among the tokens of the delay

    def __post_init__(self) -> None:
        check_least(self, 2, "num_symbols")
        check_span(self, 0, "delay")
        check_share(self, "noise")

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + self.num_symbols

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the symbols."""
        return 1 / self.num_symbols

    @property
    def max_length(self) -> int:
        """Tokens of the longest item."""
        return self.max_delay + 2


def make_item(config: CopyFirstConfig, seed: int, index: int) -> np.ndarray:
    """Tokens int64 [T + 2] of item `index` of the stream `seed`; the first is the answer."""
    generator = np.random.default_rng((seed, index))
    delay = int(generator.integers(config.min_delay, config.max_delay + 1))
    symbols = generator.integers(FIRST_SYMBOL, config.vocab_size, delay + 1)
    noisy = generator.random(delay) < config.noise
    return np.array([symbols[0], *np.where(noisy, symbols[1:], BLANK), QUERY], dtype=np.int64)


def make_batch(config: CopyFirstConfig, seed: int, indices: Sequence[int]) -> RecallBatch:
    """The items of `indices` as rows, on the CPU, padded on the right with masked blanks.

    `distractors` holds each row's T.
    """
    items = [make_item(config, seed, index) for index in indices]
    asked = [RecallItem(tokens, int(tokens[0]), len(tokens) - 2) for tokens in items]
    return to_batch(asked, config.max_length)
