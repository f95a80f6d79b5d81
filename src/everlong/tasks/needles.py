"""Needles in a haystack: numbers of things, spread in a long text; one or several are asked for.

    Numbers of things are hidden in this text: remember them. ... The number of the amber lantern
    is 48715. ... What is the number of the amber lantern? It is
    -> 48715

Four shapes of the public definition (RULER, Hsieh et al. 2024, arXiv 2404.06654), in words, sizes
and fillers of our own, so that no score here is one of RULER's:

    needle_single      one thing, one number
    needle_multikey    four things, one of which is asked for
    needle_multivalue  one thing with four numbers, all of which are asked for
    needle_multiquery  four things, all of which are asked for
    needle_crowd       as multikey, and the haystack itself is made of other things' numbers
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from everlong.tasks._shared import check_least
from everlong.tasks._words import ADJECTIVES, THINGS, number, numbers, things
from everlong.tasks.questions import (
    DEPTHS,
    Count,
    Frame,
    Question,
    check_filler,
    depth_group,
    num_bytes,
    register_task,
    sentences,
    spread,
)

_ALL = "all at once"
_BEFORE = "Numbers of things are hidden in this text: remember them."


@dataclass(frozen=True)
class NeedlesConfig:
    """num_values: numbers of each thing; num_queries: things that are asked for. filler: "plain",
    "prose" (Moby-Dick) or "needles", numbers of things that are not asked for."""

    length: int = 1024
    num_things: int = 1
    num_values: int = 1
    num_queries: int = 1
    digits: int = 5
    num_candidates: int = 10
    filler: str = "plain"

    def __post_init__(self) -> None:
        check_least(self, 1, "num_things", "num_values", "num_queries")
        check_least(self, 4, "digits")
        check_filler(self.filler, "needles")
        if self.num_queries > self.num_things:
            raise ValueError(
                f"num_queries is {self.num_queries}: give at most num_things, {self.num_things}"
            )
        if self.num_things > len(ADJECTIVES) * len(THINGS) // 2:
            raise ValueError(f"num_things is {self.num_things}: there are not so many words")
        if self.num_candidates <= self.num_values * self.num_queries:
            raise ValueError(
                f"num_candidates is {self.num_candidates}: give more than num_values * num_queries"
            )


def make_item(config: NeedlesConfig, seed: int, index: int, count: Count = num_bytes) -> Question:
    """Item `index` of the stream `seed`. Groups: the depth of what is asked for, in quarters, if
    that is one number."""
    generator = np.random.default_rng((seed, index))
    told = config.num_things * config.num_values
    crowded = config.filler == "needles"
    names = things(generator, len(ADJECTIVES) * len(THINGS) if crowded else config.num_things)
    values = numbers(generator, told + config.num_candidates, config.digits)
    owners = np.repeat(np.arange(config.num_things), config.num_values)
    depths = generator.random(told)
    facts = [
        (float(depth), _needle(names[owner], value))
        for depth, owner, value in zip(depths, owners, values, strict=False)
    ]
    if crowded:
        filler = _others(names[config.num_things :], config.digits, set(values), generator)
    else:
        filler = sentences(config.filler, generator)
    asked = config.num_queries * config.num_values
    frame = Frame(_BEFORE, _question(names[: config.num_queries], asked > 1))
    prompt = spread(config.length, frame, facts, filler, count)

    candidates = values[:told][: config.num_candidates]
    unseen = values[told:][: config.num_candidates - len(candidates)]
    one = asked == 1
    return Question(
        prompt,
        answers=tuple(values[:asked]),
        candidates=(*candidates, *unseen),
        group=depth_group(prompt, frame, facts[0][1]) if one else _ALL,
        roles=dict.fromkeys(unseen, "unseen"),
    )


def _needle(name: str, value: str) -> str:
    return f"The number of the {name} is {value}."


def _question(names: list[str], several: bool) -> str:
    each = " and ".join(f"the {name}" for name in names)
    if several:
        return f"What are all the numbers of {each}? They are"
    return f"What is the number of {each}? It is"


def _others(
    names: list[str], digits: int, taken: set[str], generator: np.random.Generator
) -> Iterator[str]:
    """Endless needles of other things; beyond their number, things have several."""
    while True:
        for name in names:
            value = number(generator, digits)
            if value not in taken:
                yield _needle(name, value)


for _name, _config, _about in (
    ("single", NeedlesConfig(), "the number of one thing"),
    ("multikey", NeedlesConfig(num_things=4), "the number of one thing among four"),
    ("multivalue", NeedlesConfig(num_values=4), "all four numbers of one thing"),
    ("multiquery", NeedlesConfig(num_things=4, num_queries=4), "the numbers of all four things"),
    ("crowd", NeedlesConfig(num_things=4, filler="needles"), "one needle in a stack of needles"),
):
    _groups = (_ALL,) if _config.num_values * _config.num_queries > 1 else DEPTHS
    register_task(f"needle_{_name}", make_item, _config, _groups, _about)
