"""Texts that end in a question, at any length: what they are, and how facts are spread in filler.

Item i of a task is a function of (config, seed, i) and of how tokens are counted, alone: no order,
batch size or worker changes it. A prompt has `length` tokens at most and is shorter by less than a
sentence of filler. By default a token is a byte; `count` may be that of any tokenizer.

A module of `everlong.tasks` that calls `register_task` has made a task: `list_tasks` finds it.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from everlong.registry import check_choice, suggest

Count = Callable[[str], int]
FILLERS = ("plain", "prose")
DEPTHS = ("depth 0-25 %", "depth 25-50 %", "depth 50-75 %", "depth 75-100 %")
_DRAWN_PROSE = "moby_dick"


def num_bytes(text: str) -> int:
    """Tokens of a text where each byte is one."""
    return len(text.encode())


@dataclass(frozen=True)
class Question:
    """`prompt` ends right before the answer, without white space.

    answers: single words, all of which are to be named, in any order. candidates: different words,
    the answers among them, none of which begins with another. group: what is asked, for results
    apart. roles: what candidates are ("stale", "unseen", ...), else an answer or "other".
    """

    prompt: str
    answers: tuple[str, ...]
    candidates: tuple[str, ...]
    group: str
    roles: Mapping[str, str] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The continuation of `prompt` that is right."""
        return " " + ", ".join(self.answers)

    @property
    def chance(self) -> float:
        """How often candidates in random order have all the answers first."""
        share, rest = 1.0, len(self.candidates)
        for left in range(len(self.answers), 0, -1):
            share, rest = share * left / rest, rest - 1
        return share

    def role(self, candidate: str) -> str:
        """Of one of the candidates."""
        return "answer" if candidate in self.answers else self.roles.get(candidate, "other")


class TooLong(ValueError):
    """A length that no item fills."""


class TooShort(ValueError):
    """A length in which an item has no room; `needed` tokens would do."""

    def __init__(self, length: int, needed: int):
        self.needed = needed
        super().__init__(f"length is {length}: this item needs {needed} tokens without any filler")


@dataclass(frozen=True)
class TextTask:
    """`config` has a `length`; `make_item(config, seed, index, count)` is a `Question`; `groups`:
    what a question's group may be, in the order in which results are shown."""

    name: str
    make_item: Callable[[Any, int, int, Count], Question]
    config: Any
    groups: tuple[str, ...]
    about: str

    def item(self, length: int, seed: int, index: int, count: Count = num_bytes) -> Question:
        """Item `index` of the stream `seed` at a length; `TooShort` says how many it needs."""
        return self.make_item(replace(self.config, length=length), seed, index, count)

    def needed(self, seed: int, index: int, count: Count = num_bytes) -> int:
        """The least length of an item, at which it has no filler."""
        try:
            self.item(0, seed, index, count)
        except TooShort as error:
            return error.needed
        raise AssertionError(f"an item of {self.name} without a token")

    def needed_by_all(self, samples: int, seed: int, count: Count = num_bytes) -> int:
        """The least length of a stream in which each of the first items has room behind a bos."""
        return 1 + max(self.needed(seed, index, count) for index in range(samples))

    def behind_bos(self, length: int, seed: int, index: int, count: Count = num_bytes) -> Question:
        """`item`, for a stream of `length` tokens of which the first is its bos."""
        return self.item(length - 1, seed, index, count)


_TASKS: dict[str, TextTask] = {}


def register_task(
    name: str,
    make_item: Callable[[Any, int, int, Count], Question],
    config: Any,
    groups: tuple[str, ...],
    about: str,
) -> None:
    """Give a generator with these defaults a name; `about` says in one line what is asked."""
    if name in _TASKS and _TASKS[name].make_item.__module__ != make_item.__module__:
        raise ValueError(f"the name {name!r} is taken by {_TASKS[name].make_item.__module__}")
    _TASKS[name] = TextTask(name, make_item, config, groups, about)


def list_tasks() -> list[str]:
    """The names of all text tasks, sorted."""
    package = importlib.import_module("everlong.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"everlong.tasks.{module.name}")
    return sorted(_TASKS)


def text_task(name: str) -> TextTask:
    """The task of that name; `ValueError` with a suggestion for an unknown one."""
    if name not in list_tasks():
        raise ValueError(
            f"unknown task {name!r}{suggest(name, _TASKS)} (tasks: {', '.join(list_tasks())})"
        )
    return _TASKS[name]


def check_filler(filler: str, *more: str) -> None:
    """`ValueError` unless it is "plain", "prose", or one of `more`."""
    check_choice("filler", filler, (*FILLERS, *more))


def sentences(filler: str, generator: np.random.Generator) -> Iterator[str]:
    """Endless filler: "plain" sentences of few words, or "prose", Moby-Dick from a random place."""
    from everlong.tasks._words import plain_sentence

    if filler == "plain":
        while True:
            yield plain_sentence(generator)
    book = _prose()
    place = int(generator.integers(len(book)))
    while True:
        yield book[place % len(book)]
        place += 1


@lru_cache
def _prose() -> tuple[str, ...]:
    from everlong.tasks.text import load_documents

    text = " ".join(load_documents(_DRAWN_PROSE)[0][:].tobytes().decode().split())
    found = [part.strip() + "." for part in text.split(". ")]
    # no numbers: they might be those that are asked for
    return tuple(each for each in found if 20 < len(each) < 300 and not re.search(r"\d", each))


@dataclass(frozen=True)
class Frame:
    """What stands around the filler: the text before it and the question behind it."""

    before: str
    after: str


def spread(
    length: int,
    frame: Frame,
    facts: Sequence[tuple[float, str]],
    filler: Iterator[str],
    count: Count,
) -> str:
    """A prompt: the frame, and in it filler with the facts at their places.

    facts: (place, sentence), the place from 0, before all filler, to 1, behind it; of two at one
    place the first comes first. Raises `TooShort` where the frame and the facts alone are too
    long.
    """
    facts = sorted(facts, key=lambda each: each[0])
    needed = count(frame.before) + count(" " + frame.after)
    needed += sum(count(" " + text) for _, text in facts)
    if needed > length:
        raise TooShort(length, needed)
    left, fill = length - needed, []
    for sentence in filler:
        size = count(" " + sentence)
        if size > left:
            break
        left -= size
        fill.append(sentence)
    parts, written = [frame.before], 0
    for place, text in facts:
        stop = round(place * len(fill))
        parts += [*fill[written:stop], text]
        written = stop
    return " ".join([*parts, *fill[written:], frame.after])


def filled(
    config: Any,
    frame: Frame,
    facts: Sequence[tuple[float, str]],
    generator: np.random.Generator,
    count: Count,
) -> str:
    """`spread` in the filler and the length of a task's config."""
    return spread(config.length, frame, facts, sentences(config.filler, generator), count)


def depth_group(prompt: str, frame: Frame, fact: str) -> str:
    """The one of `DEPTHS` in which a fact stands: with little filler not that it was drawn for."""
    return DEPTHS[min(int(4 * place_of(prompt, frame, fact)), 3)]


def place_of(prompt: str, frame: Frame, fact: str) -> float:
    """How much of what is between the frame, the fact left out, is before it: 0 to 1."""
    inside = prompt.removeprefix(frame.before).removesuffix(frame.after)
    return inside.index(fact) / max(len(inside) - len(fact), 1)
