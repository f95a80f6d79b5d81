"""Store, distract, query: the smallest stream that a model without memory cannot read.

The first segment holds a STORE mark and one of the symbols. Then F segments pass in which a
quarter of the tokens are symbols without a mark, so that the last symbol seen is no answer. The
last segment ends with the QUERY mark, whose target is the stored symbol. With segments of 8 and
F = 1 (S = STORE, Q = QUERY, . = blank, a-h the symbols):

    inputs    . . S c . . . .  . f . . a . . .  . . . . . . . Q
    targets   - - - - - - - -  - - - - - - - -  - - - - - - - c      (- is -100: not scored)

Item i is a function of (config, seed, i) alone: no order, batch size or worker changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from everlong.tasks._shared import IGNORED, check_least, check_share, check_span

BLANK, STORE, QUERY, FIRST_SYMBOL = 0, 1, 2, 3


@dataclass(frozen=True)
class RecallConfig:
    """F, the number of distractor segments, is uniform in min_distractors..max_distractors."""

    segment_length: int = 8
    num_symbols: int = 8
    min_distractors: int = 0
    max_distractors: int = 4
    noise: float = 0.25  # share of symbols among the tokens of a distractor segment

    def __post_init__(self) -> None:
        check_least(self, 2, "segment_length", "num_symbols")
        check_span(self, 0, "distractors")
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
        """T: the tokens of the longest item."""
        return (self.max_distractors + 2) * self.segment_length


@dataclass(frozen=True)
class RecallItem:
    tokens: np.ndarray  # int64 [(F + 2) * segment_length]
    answer: int  # token id of the stored symbol
    distractors: int  # F


@dataclass(frozen=True)
class RecallBatch:
    """Rows are padded on the right with masked blanks to T = config.max_length."""

    inputs: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], -100 but at each row's query
    mask: Tensor  # bool [B, T], True = a token of the row
    lengths: Tensor  # int64 [B]; the query stands at lengths - 1
    answers: Tensor  # int64 [B]
    distractors: Tensor  # int64 [B]: F of each row

    def correct(self, logits: Tensor) -> Tensor:
        """Whether each row's likeliest token at its query is the answer: [B, T, V] -> bool [B]."""
        rows = torch.arange(len(logits), device=logits.device)
        at_query = logits[rows, self.lengths.to(logits.device) - 1]
        return at_query.argmax(-1) == self.answers.to(logits.device)


def make_item(config: RecallConfig, seed: int, index: int) -> RecallItem:
    """Item `index` of the stream `seed`; both are integers from 0."""
    generator = np.random.default_rng((seed, index))
    length = config.segment_length
    distractors = int(generator.integers(config.min_distractors, config.max_distractors + 1))
    answer = int(generator.integers(FIRST_SYMBOL, config.vocab_size))

    tokens = np.full((distractors + 2, length), BLANK, dtype=np.int64)
    place = int(generator.integers(length - 1))
    tokens[0, place : place + 2] = STORE, answer
    noisy = generator.random((distractors, length)) < config.noise
    symbols = generator.integers(FIRST_SYMBOL, config.vocab_size, (distractors, length))
    tokens[1:-1] = np.where(noisy, symbols, BLANK)
    tokens[-1, -1] = QUERY
    return RecallItem(tokens.reshape(-1), answer, distractors)


def make_batch(config: RecallConfig, seed: int, indices: Sequence[int]) -> RecallBatch:
    """The items of `indices` as rows, in that order, on the CPU."""
    return to_batch([make_item(config, seed, index) for index in indices], config.max_length)


def to_batch(items: Sequence[RecallItem], max_length: int) -> RecallBatch:
    """Items that end with their query as rows, padded on the right with masked blanks."""
    inputs = np.full((len(items), max_length), BLANK, dtype=np.int64)
    targets = np.full_like(inputs, IGNORED)
    lengths = np.array([len(item.tokens) for item in items], dtype=np.int64)
    for row, item in enumerate(items):
        inputs[row, : len(item.tokens)] = item.tokens
        targets[row, len(item.tokens) - 1] = item.answer
    return RecallBatch(
        inputs=torch.from_numpy(inputs),
        targets=torch.from_numpy(targets),
        mask=torch.from_numpy(np.arange(max_length) < lengths[:, None]),
        lengths=torch.from_numpy(lengths),
        answers=torch.tensor([item.answer for item in items], dtype=torch.int64),
        distractors=torch.tensor([item.distractors for item in items], dtype=torch.int64),
    )
