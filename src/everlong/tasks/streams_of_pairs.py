"""Streams of pairs that interleave: the same keys, other values, and the stream is in the token.

Each of S streams gives n keys a value each, in an order that mixes the streams; no key comes twice
in one stream, and all streams draw their keys from the same ones. Then every pair is asked for, in
another order: the target of a key is the value that followed it in its stream. A token is its
stream and its symbol. With 2 streams (a, A: the same key in the first and the second) and n = 2:

    inputs    a 1  B 4  A 2  b 3   B a A b
    targets   - -  - -  - -  - -   4 1 2 3      (- is -100: not scored)

A memory that keeps streams apart needs room for n keys at once, another for S n. Item i is a
function of (config, seed, i) alone: no order, batch size or worker changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from everlong.tasks.recall import IGNORED


@dataclass(frozen=True)
class StreamsConfig:
    """num_pairs: n, of each stream. Keys and values are numbered the same in all streams."""

    num_streams: int = 2
    num_pairs: int = 16
    num_keys: int = 16
    num_values: int = 8

    def __post_init__(self) -> None:
        for name, least in (("num_streams", 1), ("num_pairs", 1), ("num_values", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give {least} or more")
        if self.num_keys < self.num_pairs:
            raise ValueError(
                f"{self.num_keys} keys are too few for {self.num_pairs} pairs: no key comes twice "
                "in a stream, so raise num_keys"
            )

    @property
    def first_value(self) -> int:
        """The id of the first value of the first stream: below are keys, stream by stream."""
        return self.num_streams * self.num_keys

    @property
    def vocab_size(self) -> int:
        return self.first_value + self.num_streams * self.num_values

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the values of the right stream."""
        return 1 / self.num_values

    @property
    def max_length(self) -> int:
        """T: the tokens of every item."""
        return 3 * self.num_streams * self.num_pairs

    def streams(self) -> Tensor:
        """The stream of each token id, int64 [vocab_size]."""
        each = torch.arange(self.num_streams)
        return torch.cat([each.repeat_interleave(n) for n in (self.num_keys, self.num_values)])


@dataclass(frozen=True)
class StreamsItem:
    tokens: np.ndarray  # int64 [max_length]
    targets: np.ndarray  # int64 [max_length], -100 but at the keys that are asked for


@dataclass(frozen=True)
class StreamsBatch:
    inputs: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T], all True: items are equally long

    def correct(self, logits: Tensor) -> Tensor:
        """Whether the likeliest token at a question is its answer: [B, T, V] -> bool [B, S n]."""
        asked = self.targets != IGNORED
        right = logits.argmax(-1).to(self.targets.device) == self.targets
        return right[asked].view(len(self.inputs), -1)


def make_item(config: StreamsConfig, seed: int, index: int) -> StreamsItem:
    """Item `index` of the stream of items `seed`; both are integers from 0."""
    generator = np.random.default_rng((seed, index))
    streams, pairs = config.num_streams, config.num_pairs
    keys = np.stack([generator.permutation(config.num_keys)[:pairs] for _ in range(streams)])
    values = generator.integers(config.num_values, size=(streams, pairs))
    number = np.arange(streams)[:, None]
    keys = (number * config.num_keys + keys).reshape(-1)
    values = (config.first_value + number * config.num_values + values).reshape(-1)
    told, asked = (generator.permutation(streams * pairs) for _ in range(2))

    written = np.stack([keys, values], 1)[told].reshape(-1)
    tokens = np.concatenate([written, keys[asked]])
    targets = np.concatenate([np.full_like(written, IGNORED), values[asked]])
    return StreamsItem(tokens, targets)


def make_batch(config: StreamsConfig, seed: int, indices: Sequence[int]) -> StreamsBatch:
    """The items of `indices` as rows, in that order, on the CPU."""
    items = [make_item(config, seed, index) for index in indices]
    inputs = torch.from_numpy(np.stack([item.tokens for item in items]))
    targets = torch.from_numpy(np.stack([item.targets for item in items]))
    return StreamsBatch(inputs, targets, torch.ones_like(inputs, dtype=torch.bool))
