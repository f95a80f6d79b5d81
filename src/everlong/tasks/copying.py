"""Copy: a source of random symbols, and then the same once more from memory.

The source fills k whole segments, the reproduction the k after it. It begins with the MARK and is
read back as it should have been written, one symbol late, so that every position of it has the
next symbol of the source as its target, and the source lies k segments back. With segments of 4
and k = 2, 8 symbols in 4 segments (M = MARK, a-h the symbols):

    inputs    c a h b  e e d a  M c a h  b e e d
    targets   - - - -  - - - -  c a h b  e e d a      (- is -100: not scored)

Symbols are drawn one by one, so that those of the reproduction say nothing of the next. A layer
with a cache of one segment lets a position look as far as the first token of the segment before
its own, n layers as far as the first of the n-th before: with k > n no symbol of the source is in
its own query's reach, and all are with k <= n.

Item i is a function of (config, seed, i) alone: no order, batch size or worker changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from everlong.tasks._shared import IGNORED, ScoredBatch, check_least, check_span
from everlong.tasks.recall import BLANK

MARK, FIRST_SYMBOL = 1, 2


@dataclass(frozen=True)
class CopyConfig:
    """k, the segments of the source, is uniform in min_segments..max_segments."""

    segment_length: int = 4
    num_symbols: int = 8
    min_segments: int = 1
    max_segments: int = 2

    def __post_init__(self) -> None:
        check_least(self, 1, "segment_length")
        check_least(self, 2, "num_symbols")
        check_span(self, 1, "segments")

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
        return 2 * self.max_segments * self.segment_length


@dataclass(frozen=True)
class CopyBatch(ScoredBatch):
    """Rows are padded on the right with masked blanks to T = config.max_length.

    Targets are the source, from each row's mark on.
    """

    lengths: Tensor  # int64 [B]: the source is the first half of them


def make_source(config: CopyConfig, seed: int, index: int) -> np.ndarray:
    """The source of item `index` of the stream `seed`, int64 [k * segment_length]; both from 0."""
    generator = np.random.default_rng((seed, index))
    segments = int(generator.integers(config.min_segments, config.max_segments + 1))
    size = segments * config.segment_length
    return generator.integers(FIRST_SYMBOL, config.vocab_size, size, dtype=np.int64)


def make_batch(config: CopyConfig, seed: int, indices: Sequence[int]) -> CopyBatch:
    """The items of `indices` as rows, in that order, on the CPU."""
    sources = [make_source(config, seed, index) for index in indices]
    inputs = np.full((len(sources), config.max_length), BLANK, dtype=np.int64)
    targets = np.full_like(inputs, IGNORED)
    lengths = np.array([2 * len(source) for source in sources], dtype=np.int64)
    for row, source in enumerate(sources):
        size = len(source)
        inputs[row, : 2 * size] = [*source, MARK, *source[:-1]]
        targets[row, size : 2 * size] = source
    return CopyBatch(
        inputs=torch.from_numpy(inputs),
        targets=torch.from_numpy(targets),
        mask=torch.from_numpy(np.arange(config.max_length) < lengths[:, None]),
        lengths=torch.from_numpy(lengths),
    )
