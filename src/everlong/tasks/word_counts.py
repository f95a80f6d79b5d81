"""Which words are the most common in a long list of words?

    Words: pudiko mazufe gelobi pudiko ... Which 3 words are the most common? They are
    -> pudiko, mazufe, gelobi

`common_words`: three words are in the list `often` times each, whatever its length, and as many
others as it has room for once or twice each. `frequent_words`: the r-th word is in the list in
proportion to r^-alpha, and the first three are asked for. In the shape of two tasks of RULER
(Hsieh et al. 2024, arXiv 2404.06654), in words and sizes of our own: no score is one of RULER's.
Words are coined anew for each item. Candidates are the words asked for and seven others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from everlong.tasks._shared import check_least
from everlong.tasks._words import COINED, coined
from everlong.tasks.questions import Count, Question, TooLong, TooShort, num_bytes, register_task

_ALL = "the most common"
_OTHERS = 7  # candidates that are no answer


@dataclass(frozen=True)
class CommonWordsConfig:
    """num_common words are there `often` times each, all others `rare` times at most."""

    length: int = 1024
    num_common: int = 3
    often: int = 6
    rare: int = 2

    def __post_init__(self) -> None:
        check_least(self, 1, "num_common", "rare")
        if self.often <= self.rare:
            raise ValueError(f"often is {self.often}: give more than rare, {self.rare}")


@dataclass(frozen=True)
class FrequentWordsConfig:
    """alpha: the larger, the rarer are the words behind the first."""

    length: int = 1024
    num_common: int = 3
    num_words: int = 20
    alpha: float = 1.5

    def __post_init__(self) -> None:
        check_least(self, 1, "num_common")
        check_least(self, self.num_common + _OTHERS, "num_words")
        if self.alpha <= 0:
            raise ValueError(f"alpha is {self.alpha}: give a number above 0")


def make_common(
    config: CommonWordsConfig, seed: int, index: int, count: Count = num_bytes
) -> Question:
    """Item `index` of the stream `seed`; both are integers from 0."""

    def times(others: int) -> list[int]:
        # a list has no place for one more word: the last may come less often than the rest
        full, left = divmod(others, config.rare)
        return [config.often] * config.num_common + [config.rare] * full + [left] * bool(left)

    return _listed(config, seed, index, count, times, config.rare * _OTHERS)


def make_frequent(
    config: FrequentWordsConfig, seed: int, index: int, count: Count = num_bytes
) -> Question:
    """Item `index` of the stream `seed`; both are integers from 0."""
    weights = np.arange(1, config.num_words + 1) ** -config.alpha
    first = weights[: config.num_common + 1]

    def times(scale: int) -> list[int]:
        return [max(1, n) for n in np.floor(scale * weights).astype(int).tolist()]

    # the last that is asked for comes more often than the first that is not
    least = int(np.ceil(2 / (first[-2] - first[-1])))
    return _listed(config, seed, index, count, times, least)


def _listed(
    config: Any,
    seed: int,
    index: int,
    count: Count,
    times: Callable[[int], list[int]],
    least: int,
) -> Question:
    """The longest list that fits: `times(size)` says how often the words are in it, for the
    largest `size` from `least` on."""
    generator = np.random.default_rng((seed, index))
    asked = config.num_common
    before = "Words:"
    after = f" Which {asked} words are the most common? They are"
    words = coined(generator, len(times(least)))
    sizes = [count(" " + word) for word in words]
    room = config.length - count(before) - count(after)

    def needed(size: int) -> int:
        wanted = times(size)
        if len(wanted) > COINED:
            return room + 1
        fresh = len(wanted) - len(words)
        if fresh > 0:
            words.extend(coined(generator, fresh, set(words)))
            sizes.extend(count(" " + word) for word in words[len(sizes) :])
        return sum(n * own for n, own in zip(wanted, sizes, strict=False))

    if needed(least) > room:
        raise TooShort(config.length, config.length - room + needed(least))
    size = _largest(least, lambda size: needed(size) <= room)
    if len(times(size + 1)) > COINED:
        raise TooLong(f"there are {COINED} words, which end before {config.length} tokens")
    listed = np.repeat(np.arange(len(times(size))), times(size))
    text = " ".join(words[i] for i in generator.permutation(listed))
    chosen = words[: asked + _OTHERS]
    return Question(
        f"{before} {text}{after}",
        tuple(chosen[:asked]),
        tuple(chosen),
        group=_ALL,
    )


def _largest(low: int, fits: Callable[[int], bool]) -> int:
    """The largest whole number from `low` that fits; `low` does, and what is too large does not."""
    high = 2 * low
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


for _name, _make, _config, _about in (
    ("common", make_common, CommonWordsConfig(), "words that come often in a list"),
    ("frequent", make_frequent, FrequentWordsConfig(), "the head of a list by a power law"),
):
    register_task(f"{_name}_words", _make, _config, (_ALL,), _about)
