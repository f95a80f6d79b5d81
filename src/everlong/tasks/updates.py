"""Facts that change: what a memory forgets, when it should and when it should not.

A text tells codes of things. A code may be replaced any number of times, contradicted by a later
one without a word, or be told to be forgotten; then one code is asked for. With plain filler:

    Codes are told in this text. The last code of a thing counts, and one to be forgotten is
    unknown. ... The code of the amber lantern is 4821. ... The code of the amber lantern is now
    7733. ... What is the code of the amber lantern? It is
    -> 7733

Groups, of which item i has the (i mod 10)-th (of the ages, that of its text):

    told 0-25 % back ...     told once, so far back from the question (four groups, by age)
    rewritten 1, 2, 4 times  the last code counts; earlier ones are "stale"
    contradicted             a second code, stated as if it were the first; the last counts
    deleted                  told and then to be forgotten: "unknown"; the code is "erased"
    never told               "unknown", of a thing that the text does not speak of

Every item tells codes of `num_others` other things too, once each. Candidates are all codes of the
text, "unknown", and codes that it does not hold ("unseen"). How much likelier a code is than the
unseen ones, in nats, is its trace, which needs no obedience to be measured: what is left of a code
that was replaced or deleted, and what of one that was not. Item i is a function of (config, seed,
i) and of how tokens are counted.
"""

from dataclasses import dataclass

import numpy as np

from everlong.tasks._shared import check_least
from everlong.tasks._words import numbers, things
from everlong.tasks.questions import (
    Count,
    Frame,
    Question,
    check_filler,
    filled,
    num_bytes,
    place_of,
    register_task,
)

UNKNOWN = "unknown"
REWRITES = (1, 2, 4)
GROUPS = (
    *(f"told {low}-{low + 25} % back" for low in (0, 25, 50, 75)),
    *(f"rewritten {times} time{'s' * (times > 1)}" for times in REWRITES),
    "contradicted",
    "deleted",
    "never told",
)
_AGES = 4
_BEFORE = (
    "Codes are told in this text. The last code of a thing counts, and one to be forgotten is "
    "unknown."
)


@dataclass(frozen=True)
class UpdatesConfig:
    """filler: "plain", or "prose" (Moby-Dick)."""

    length: int = 1024
    num_others: int = 3
    num_unseen: int = 4
    digits: int = 4
    filler: str = "plain"

    def __post_init__(self) -> None:
        check_least(self, 0, "num_others")
        check_least(self, 1, "num_unseen")
        check_least(self, 3, "digits")
        check_filler(self.filler)


def make_item(config: UpdatesConfig, seed: int, index: int, count: Count = num_bytes) -> Question:
    """Item `index` of the stream `seed`; both are integers from 0."""
    generator = np.random.default_rng((seed, index))
    group = GROUPS[index % len(GROUPS)]
    asked, *others = things(generator, 1 + config.num_others)
    codes = numbers(generator, 8 + config.num_others + config.num_unseen, config.digits)
    unseen, codes = codes[: config.num_unseen], codes[config.num_unseen :]
    theirs, codes = codes[: len(others)], codes[len(others) :]

    facts = [
        (float(place), _told(name, code))
        for place, name, code in zip(generator.random(len(others)), others, theirs, strict=True)
    ]
    own, answer, roles = _history(group, asked, codes, generator)
    frame = Frame(_BEFORE, f"What is the code of the {asked}? It is")
    prompt = filled(config, frame, [*facts, *own], generator, count)
    if GROUPS.index(group) < _AGES:  # with little filler not the age that was drawn
        group = GROUPS[min(int(_AGES * (1 - place_of(prompt, frame, own[0][1]))), _AGES - 1)]
    roles |= dict.fromkeys(unseen, "unseen")
    roles[UNKNOWN] = UNKNOWN  # a word: its trace is compared with no code's
    candidates = dict.fromkeys((answer, *roles, *theirs))
    return Question(prompt, (answer,), tuple(candidates), group, roles)


def _told(name: str, code: str) -> str:
    return f"The code of the {name} is {code}."


def _history(
    group: str, name: str, codes: list[str], generator: np.random.Generator
) -> tuple[list[tuple[float, str]], str, dict[str, str]]:
    """What the text says of the thing that is asked for, the right answer, and other roles."""
    kind = GROUPS.index(group)
    if kind < _AGES:
        place = 1 - (kind + generator.random()) / _AGES
        return [(place, _told(name, codes[0]))], codes[0], {}
    if group == "never told":
        return [], UNKNOWN, {}
    rewritten = kind - _AGES < len(REWRITES)
    times = REWRITES[kind - _AGES] if rewritten else 1
    places = np.sort(generator.random(times + 1)).tolist()
    facts = [(places[0], _told(name, codes[0]))]
    if group == "deleted":
        facts.append((places[1], f"Forget the code of the {name}."))
        return facts, UNKNOWN, {codes[0]: "erased"}
    now = "is now" if rewritten else "is"
    for place, code in zip(places[1:], codes[1:], strict=False):
        facts.append((place, f"The code of the {name} {now} {code}."))
    return facts, codes[times], dict.fromkeys(codes[:times], "stale")


register_task(
    "updates", make_item, UpdatesConfig(), GROUPS, "codes that are kept, rewritten, deleted"
)
