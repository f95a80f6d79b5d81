"""A small world told in sentences, stretched to any length by filler, and a question about it.

People walk between places, pick things up and put them down. The story stands in order, spread
evenly at random through the filler. In the manner of bAbI's tasks 1, 2, 3, 6 and 7 (Weston et al.
2015, arXiv 1502.05698) and of their stretched form (BABILong, Kuratov et al. 2024, arXiv
2406.10149); world, words and proportions are of our own, so that no score is one of theirs:

    where a person is      Where is Greta? In the            -> cellar
    where a thing is       Where is the drum? In the         -> attic    it moves with who holds it
    where a thing was      Where was the drum before the attic? In the  -> cellar
    yes or no              Is Greta in the cellar?           -> yes      as often as no
    counting               How many things does Greta hold?  -> two      none, one, two, three

Item i asks the (i mod 5)-th of them, and is a function of (config, seed, i) and of how tokens are
counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np

from everlong.tasks._shared import check_least
from everlong.tasks._words import NAMES, OBJECTS, PLACES
from everlong.tasks.questions import (
    Count,
    Frame,
    Question,
    check_filler,
    filled,
    num_bytes,
    register_task,
)

GROUPS = ("where a person is", "where a thing is", "where a thing was", "yes or no", "counting")
HELD = ("none", "one", "two", "three")  # nobody holds more
_MOST_EVENTS = 1000  # a story with an answer is far shorter
_Any = TypeVar("_Any")


@dataclass(frozen=True)
class BabiSimConfig:
    """num_events: sentences of the story; more where the question needs them."""

    length: int = 1024
    num_events: int = 8
    num_people: int = 3
    num_places: int = 5
    num_things: int = 3
    filler: str = "plain"

    def __post_init__(self) -> None:
        check_least(self, 1, "num_events", "num_people", "num_things")
        check_least(self, 2, "num_places")
        for name, words in (("people", NAMES), ("places", PLACES), ("things", OBJECTS)):
            if getattr(self, f"num_{name}") > len(words):
                raise ValueError(f"num_{name} is more than {len(words)}: there are no more names")
        check_filler(self.filler)


@dataclass
class World:
    """Who is where and holds what. A person's place is unknown before the first walk, a thing's
    before it is first picked up."""

    people: list[str]
    places: list[str]
    things: list[str]
    at: dict[str, str] = field(default_factory=dict)  # a person's place
    held: dict[str, str] = field(default_factory=dict)  # who holds a thing
    seen: dict[str, list[str]] = field(default_factory=dict)  # the places a thing has been at

    def holds(self, person: str) -> list[str]:
        return [thing for thing, holder in self.held.items() if holder == person]

    def event(self, generator: np.random.Generator) -> str:
        """Something happens that can: a third each of walking, picking up, putting down."""
        kind = generator.integers(3)
        person = _one(self.people, generator)
        here, mine = self.at.get(person), self.holds(person)
        near = [
            thing
            for thing in self.things
            if thing not in self.held and self.seen.get(thing, [here])[-1] == here
        ]
        if kind == 1 and here and near and len(mine) < len(HELD) - 1:
            thing = _one(near, generator)
            self.held[thing] = person
            self.seen.setdefault(thing, [here])
            return f"{person} picks up the {thing}."
        if kind == 2 and mine:
            thing = _one(mine, generator)
            del self.held[thing]
            return f"{person} puts down the {thing}."
        here = _one([place for place in self.places if place != here], generator)
        self.at[person] = here
        for thing in mine:
            self.seen[thing].append(here)
        return f"{person} walks to the {here}."

    def ask(self, group: str, generator: np.random.Generator) -> tuple[str, str, list[str]] | None:
        """A question, its answer and the candidates; None where the world has none yet."""
        if group == "yes or no" and self.at:
            person = _one(list(self.at), generator)
            place, yes = self.at[person], bool(generator.integers(2))
            if not yes:
                place = _one([other for other in self.places if other != place], generator)
            return f"Is {person} in the {place}?", "yes" if yes else "no", ["yes", "no"]
        if group == "where a person is" and self.at:
            person = _one(list(self.at), generator)
            return f"Where is {person}? In the", self.at[person], self.places
        if group == "where a thing is" and self.seen:
            thing = _one(list(self.seen), generator)
            return f"Where is the {thing}? In the", self.seen[thing][-1], self.places
        if group == "where a thing was":
            return self._ask_before(generator)
        if group == "counting" and self.held:
            counts = {len(self.holds(person)) for person in self.people}
            asked = _one(sorted(counts), generator)
            person = _one([p for p in self.people if len(self.holds(p)) == asked], generator)
            return f"How many things does {person} hold?", HELD[asked], list(HELD)
        return None

    def _ask_before(self, generator: np.random.Generator) -> tuple[str, str, list[str]] | None:
        # only of a place where the thing was once: before what is then clear
        clear = [
            (thing, before, place)
            for thing, seen in self.seen.items()
            for before, place in pairwise(seen)
            if seen.count(place) == 1
        ]
        if not clear:
            return None
        thing, before, place = clear[int(generator.integers(len(clear)))]
        return f"Where was the {thing} before the {place}? In the", before, self.places


def make_item(config: BabiSimConfig, seed: int, index: int, count: Count = num_bytes) -> Question:
    """Item `index` of the stream `seed`; both are integers from 0."""
    generator = np.random.default_rng((seed, index))
    group = GROUPS[index % len(GROUPS)]
    story, (question, answer, candidates) = _story(config, group, generator)
    places = np.sort(generator.random(len(story))).tolist()
    frame = Frame("This is what happened.", question)
    prompt = filled(config, frame, list(zip(places, story, strict=True)), generator, count)
    return Question(prompt, (answer,), tuple(candidates), group)


def _story(
    config: BabiSimConfig, group: str, generator: np.random.Generator
) -> tuple[list[str], tuple[str, str, list[str]]]:
    def drawn(words: tuple[str, ...], count: int) -> list[str]:
        return [words[i] for i in generator.permutation(len(words))[:count]]

    world = World(
        drawn(NAMES, config.num_people),
        drawn(PLACES, config.num_places),
        drawn(OBJECTS, config.num_things),
    )
    story: list[str] = []
    while len(story) < _MOST_EVENTS:
        story.append(world.event(generator))
        asked = world.ask(group, generator) if len(story) >= config.num_events else None
        if asked is not None:
            return story, asked
    raise AssertionError(f"no question of {group!r} in {_MOST_EVENTS} events")


def _one(choices: Sequence[_Any], generator: np.random.Generator) -> _Any:
    return choices[int(generator.integers(len(choices)))]


register_task(
    "babi_sim", make_item, BabiSimConfig(), GROUPS, "who and what is where, in a small world"
)
