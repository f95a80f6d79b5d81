"""Keys that are written, written again, forgotten and asked for, in one stream of events.

Every event is two tokens. `key value` writes; `FORGET key` takes back what the key held; `ASK key`
is a question, and its target, at the key, is the value that was written last, or NOTHING where it
was forgotten since. Only keys that came before are asked for. With 4 keys, 4 values and T = 24
(A = ASK, F = FORGET, N = NOTHING, a-d the keys, 1-4 the values; item 5 of seed 0):

    inputs    a2 d4 d4 Fd Ad d3 Ad c4 Ad d1 a2 Aa
    targets   -- -- -- -- -N -- -3 -- -3 -- -- -2      (- is -100: not scored)

Who answers with what followed the key last is right but for what was forgotten; who answers NOTHING
is right on that alone. In text, with names and rooms, this is the task `updates`.

Item i is a function of (config, seed, i) alone: no order, batch size or worker changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from everlong.tasks._shared import IGNORED, ScoredBatch, check_least, check_share, full_rows

ASK, FORGET, NOTHING, FIRST_KEY = 0, 1, 2, 3


@dataclass(frozen=True)
class KeyUpdatesConfig:
    """T tokens, two an event: `asked` of them questions, `forgotten` take back, the rest write."""

    length: int = 64  # T
    num_keys: int = 8
    num_values: int = 16
    asked: float = 0.25
    forgotten: float = 0.15

    def __post_init__(self) -> None:
        check_least(self, 1, "num_keys")
        check_least(self, 2, "num_values")
        check_share(self, "asked")
        check_share(self, "forgotten")
        if not (self.asked > 0 and self.asked + self.forgotten < 1):
            raise ValueError(
                f"asked {self.asked} and forgotten {self.forgotten} leave out questions or writes: "
                "give asked above 0, and both together below 1"
            )
        if self.length < 4 or self.length % 2:
            raise ValueError(f"length is {self.length}: give an even number, 4 or more")

    @property
    def vocab_size(self) -> int:
        return FIRST_KEY + self.num_keys + self.num_values

    @property
    def first_value(self) -> int:
        """Keys have the ids from FIRST_KEY, values those from it on."""
        return FIRST_KEY + self.num_keys

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the values and NOTHING."""
        return 1 / (self.num_values + 1)

    @property
    def max_length(self) -> int:
        """T: all items have the same."""
        return self.length


@dataclass(frozen=True)
class KeyUpdatesBatch(ScoredBatch):
    """Accuracy on what was forgotten alone is `hits(logits)[forgotten].float().mean()`."""

    forgotten: Tensor  # bool [B, T]: questions whose answer is NOTHING


def make_item(config: KeyUpdatesConfig, seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets, int64 [T], of item `index` of the stream `seed`; both from 0."""
    generator = np.random.default_rng((seed, index))
    events = config.length // 2
    kinds = generator.random(events)
    keys = generator.integers(FIRST_KEY, config.first_value, events)
    values = generator.integers(config.first_value, config.vocab_size, events)
    picks = generator.random(events)
    tokens = np.empty(config.length, dtype=np.int64)
    targets = np.full(config.length, IGNORED)
    held: dict[int, int] = {}
    for event in range(events):
        here, kind, key = slice(2 * event, 2 * event + 2), kinds[event], int(keys[event])
        last = event == events - 1  # is a question, so that every item has one
        if held and (last or kind < config.asked):
            key = list(held)[int(picks[event] * len(held))]
            tokens[here] = ASK, key
            targets[2 * event + 1] = held[key]
        elif held and kind < config.asked + config.forgotten:
            key = list(held)[int(picks[event] * len(held))]
            tokens[here] = FORGET, key
            held[key] = NOTHING
        else:
            tokens[here] = key, values[event]
            held[key] = int(values[event])
    return tokens, targets


def make_batch(config: KeyUpdatesConfig, seed: int, indices: Sequence[int]) -> KeyUpdatesBatch:
    """The items of `indices` as rows, in that order, on the CPU."""
    items = [make_item(config, seed, index) for index in indices]
    rows = full_rows([tokens for tokens, _ in items], [targets for _, targets in items])
    return KeyUpdatesBatch(*rows, torch.from_numpy(np.stack([t == NOTHING for _, t in items])))
