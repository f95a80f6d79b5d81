"""Tracing: names that are given to names; which of them have the value of the first?

    Names are given values in this text. ... Let pudiko be 48213. ... Let mazufe be pudiko. ...
    Which names have the value 48213? They are
    -> pudiko, mazufe

Each of `num_chains` chains begins with a number and goes on over `num_hops` names, in order and at
random places; all of the asked chain's names are wanted. The shape of variable tracking in RULER
(Hsieh et al. 2024, arXiv 2404.06654), in words and sizes of our own: no score is one of RULER's.
"""

from dataclasses import dataclass

import numpy as np

from everlong.tasks._shared import check_least
from everlong.tasks._words import coined, numbers
from everlong.tasks.questions import (
    Count,
    Frame,
    Question,
    check_filler,
    filled,
    num_bytes,
    register_task,
)

_ALL = "the whole chain"


@dataclass(frozen=True)
class TracingConfig:
    """num_hops: names of a chain that are given the name before; with the first one more."""

    length: int = 1024
    num_chains: int = 2
    num_hops: int = 2
    digits: int = 5
    filler: str = "plain"

    def __post_init__(self) -> None:
        check_least(self, 2, "num_chains")
        check_least(self, 0, "num_hops")
        check_least(self, 3, "digits")
        check_filler(self.filler)


def make_item(config: TracingConfig, seed: int, index: int, count: Count = num_bytes) -> Question:
    """Item `index` of the stream `seed`; both are integers from 0."""
    generator = np.random.default_rng((seed, index))
    size = config.num_hops + 1
    names = coined(generator, config.num_chains * size)
    values = numbers(generator, config.num_chains, config.digits)
    facts = []
    for chain, value in enumerate(values):
        own = names[chain * size : (chain + 1) * size]
        places = np.sort(generator.random(size)).tolist()
        given = zip(places, own, [value, *own], strict=False)
        facts += [(place, f"Let {name} be {known}.") for place, name, known in given]
    frame = Frame(
        "Names are given values in this text.",
        f"Which names have the value {values[0]}? They are",
    )
    prompt = filled(config, frame, facts, generator, count)
    return Question(prompt, tuple(names[:size]), tuple(names), group=_ALL)


register_task("tracing", make_item, TracingConfig(), (_ALL,), "all names of one value")
