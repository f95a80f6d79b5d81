"""Multi-query associative recall: pairs first, then many questions (Zoology, arXiv 2312.04927).

The first half of the vocabulary are keys, the rest values. An item begins with P pairs, key and
value side by side, no key and no value twice. Then, if `num_overwritten` is not 0, that many of the
keys are written again with another value, and the last one counts. The rest is questions and random
fillers: a question is one of the item's keys, its target, at the key's own place, is that key's
value. With P = 3, 1 overwritten, T = 16 (a-h keys, 1-8 values; item 2 of seed 0):

    inputs    f 1 c 4 g 3 c 7 a e c f 7 3 d g
    targets   - - - - - - - - - - 7 1 - - - 3      (- is -100: not scored)

The gap g = 0, 1, ... from the end of the writes to a question is drawn from the places that are
left, without replacement, with a weight of (g + 1)^(power_a - 1): most are asked soon, some late;
power_a = 1 is uniform. No key is asked twice.

Fillers are tokens of the whole vocabulary but for the item's own keys. So every mention of a key
that was written is a question, and what follows it is not read as a write of a key still to be
asked for: who answers with the value that last followed the key is always right. Other keys may be
followed by values, which writes what nobody asks for.

Deviations from the published generator (HazyResearch/zoology, multiquery_ar and forgetting_mqar):
its fillers may be any token, the item's keys among them, with no target; its questions stand at
every other place only, and pairs that were written first tend to be asked first, where here any
pair may be asked at any place; its token 0 is no key. Published sizes: vocabulary 8,192, T from 64
with 4 pairs to 1,024 with 256.

Item i is a function of (config, seed, i) alone: no order, batch size or worker changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from everlong.tasks._shared import IGNORED, ScoredBatch, check_least, full_rows


@dataclass(frozen=True)
class MqarConfig:
    """T tokens that begin with P pairs and the writes that overwrite some of them."""

    length: int = 64  # T
    num_pairs: int = 8  # P
    num_overwritten: int = 0  # keys that are written twice
    num_queries: int | None = None  # keys that are asked for: all P unless given
    vocab_size: int = 64
    power_a: float = 0.01

    def __post_init__(self) -> None:
        check_least(self, 4, "vocab_size")
        check_least(self, 1, "num_pairs")
        if self.num_pairs > self.num_keys:
            raise ValueError(
                f"{self.num_keys} keys are too few for {self.num_pairs} pairs: no key comes twice, "
                f"so raise vocab_size to {2 * self.num_pairs} or more"
            )
        for name, least in (("num_overwritten", 0), ("num_queries", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value <= self.num_pairs:
                raise ValueError(
                    f"{name} is {value}: give {least} to {self.num_pairs}, which is num_pairs"
                )
        if not 0 < self.power_a <= 1:
            raise ValueError(f"power_a is {self.power_a}: give a number above 0, 1 at most")
        if self.length < self.written + self.queries:
            raise ValueError(
                f"length is {self.length}: {self.written} tokens of writes and {self.queries} "
                f"questions need {self.written + self.queries} or more"
            )

    @property
    def queries(self) -> int:
        """Questions of an item."""
        return self.num_pairs if self.num_queries is None else self.num_queries

    @property
    def written(self) -> int:
        """Tokens of the writes: questions and fillers stand behind them."""
        return 2 * (self.num_pairs + self.num_overwritten)

    @property
    def num_keys(self) -> int:
        """Keys have the ids below it, values those from it on."""
        return self.vocab_size // 2

    @property
    def chance(self) -> float:
        """Accuracy of a guess among all values.

        One of those the item shows is right 1 / P of the time, if nothing is overwritten.
        """
        return 1 / (self.vocab_size - self.num_keys)

    @property
    def max_length(self) -> int:
        """T: all items have the same."""
        return self.length


@dataclass(frozen=True)
class MqarItem:
    tokens: np.ndarray  # int64 [T]
    targets: np.ndarray  # int64 [T], -100 but at the questions
    overwritten: np.ndarray  # bool [T]: questions for keys that were written twice


@dataclass(frozen=True)
class MqarBatch(ScoredBatch):
    """Accuracy on what was overwritten alone is `hits(logits)[overwritten].float().mean()`."""

    overwritten: Tensor  # bool [B, T]: questions for keys that were written twice


def make_item(config: MqarConfig, seed: int, index: int) -> MqarItem:
    """Item `index` of the stream `seed`; both are integers from 0."""
    generator = np.random.default_rng((seed, index))
    pairs, num_values = config.num_pairs, config.vocab_size - config.num_keys
    keys = generator.permutation(config.num_keys)
    keys, others = keys[:pairs], keys[pairs:]
    values = generator.permutation(num_values)[:pairs]
    again = generator.permutation(pairs)[: config.num_overwritten]
    last = values.copy()
    last[again] += generator.integers(1, num_values, len(again))  # any value but the first
    last = config.num_keys + last % num_values
    values = config.num_keys + values

    fillers = np.concatenate([others, np.arange(config.num_keys, config.vocab_size)])
    tokens = generator.choice(fillers, config.length)
    tokens[: config.written : 2] = np.concatenate([keys, keys[again]])
    tokens[1 : config.written : 2] = np.concatenate([values, last[again]])

    asked = generator.permutation(pairs)[: config.queries]
    weights = np.arange(1, config.length - config.written + 1) ** (config.power_a - 1)
    arrivals = generator.exponential(size=len(weights)) / weights
    places = config.written + np.argsort(arrivals)[: len(asked)]  # a draw without replacement
    tokens[places] = keys[asked]
    targets = np.full(config.length, IGNORED)
    targets[places] = last[asked]
    overwritten = np.zeros(config.length, dtype=bool)
    overwritten[places] = (asked[:, None] == again).any(1)
    return MqarItem(tokens, targets, overwritten)


def make_batch(config: MqarConfig, seed: int, indices: Sequence[int]) -> MqarBatch:
    """The items of `indices` as rows, in that order, on the CPU."""
    items = [make_item(config, seed, index) for index in indices]
    rows = full_rows([item.tokens for item in items], [item.targets for item in items])
    return MqarBatch(*rows, torch.from_numpy(np.stack([item.overwritten for item in items])))
