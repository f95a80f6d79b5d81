"""Pairs, then one question: how many key-value pairs does a memory hold at once?

Each of the first n segments holds one pair, a key and its value side by side among blanks; no key
comes twice. The last segment ends with the QUERY mark and one of the keys, whose target is that
key's value. With segments of 4 and n = 3 (Q = QUERY, . = blank, a-h keys, 1-4 values):

    inputs    . c 2 .  f 4 . .  . . a 1  . . Q f
    targets   - - - -  - - - -  - - - -  - - - 4      (- is -100: not scored)

Item i is a function of (config, seed, i) alone: no order, batch size or worker changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from everlong.tasks._shared import check_least, check_span
from everlong.tasks.recall import (
    BLANK,
    FIRST_SYMBOL,
    QUERY,
    RecallBatch,
    RecallItem,
    to_batch,
)


@dataclass(frozen=True)
class AssociativeConfig:
    """n, the number of pairs, is uniform in min_pairs..max_pairs."""

    segment_length: int = 4
    num_keys: int = 32
    num_values: int = 8
    min_pairs: int = 1
    max_pairs: int = 4

    def __post_init__(self) -> None:
        check_least(self, 2, "segment_length", "num_values")
        check_span(self, 1, "pairs")
        if self.num_keys < self.max_pairs:
            raise ValueError(
                f"{self.num_keys} keys are too few for {self.max_pairs} pairs: no key comes twice, "
                "so raise num_keys"
            )

    @property
    def first_value(self) -> int:
        """The id of the first value: keys have those from FIRST_SYMBOL to here."""
        return FIRST_SYMBOL + self.num_keys

    @property
    def vocab_size(self) -> int:
        return self.first_value + self.num_values

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the values."""
        return 1 / self.num_values

    @property
    def max_length(self) -> int:
        """T: the tokens of the longest item."""
        return (self.max_pairs + 1) * self.segment_length


def make_item(config: AssociativeConfig, seed: int, index: int) -> RecallItem:
    """Item `index` of the stream `seed`; both are integers from 0.

    tokens int64 [(n + 1) * segment_length]; distractors is the number of pairs behind the one
    that is asked for.
    """
    generator = np.random.default_rng((seed, index))
    pairs = int(generator.integers(config.min_pairs, config.max_pairs + 1))
    keys = FIRST_SYMBOL + generator.permutation(config.num_keys)[:pairs]
    values = generator.integers(config.first_value, config.vocab_size, pairs)
    places = generator.integers(config.segment_length - 1, size=pairs)
    asked = int(generator.integers(pairs))

    tokens = np.full((pairs + 1, config.segment_length), BLANK, dtype=np.int64)
    tokens[np.arange(pairs), places] = keys
    tokens[np.arange(pairs), places + 1] = values
    tokens[-1, -2:] = QUERY, keys[asked]
    return RecallItem(tokens.reshape(-1), int(values[asked]), pairs - 1 - asked)


def make_batch(config: AssociativeConfig, seed: int, indices: Sequence[int]) -> RecallBatch:
    """The items of `indices` as rows, in that order, on the CPU; `distractors` as in an item."""
    return to_batch([make_item(config, seed, index) for index in indices], config.max_length)
