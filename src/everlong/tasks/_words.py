"""Words for the text tasks: no word begins with another of its list or is in two lists."""

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Agnes Boris Clara Dimitri Elena Fergus Greta Hassan Ingrid Jonas Katya Leopold Mirela Nikolai "
    "Olga Petra Quentin Rosalind Stefan Tamara"
)
PLACES = _words(
    "attic bakery cellar dairy foundry garage harbour infirmary library nursery orchard pantry "
    "quarry stable tavern vineyard"
)
OBJECTS = _words(
    "anvil bucket compass drum envelope flute goblet hammer inkwell kettle ladder mirror needle "
    "oilcan pillow rope"
)
ADJECTIVES = _words(
    "amber brittle copper dusty elegant frozen gilded hollow ivory jagged knotted lacquered marble "
    "narrow oval painted quilted rusty silver tarnished umber velvet woven yellow"
)
THINGS = _words(
    "almanac barrel candle drawer easel fiddle gate hourglass icon jug key lantern medal notebook "
    "organ parasol quiver ribbon saddle telescope urn violin wagon xylophone"
)

_SCENES = _words("brook cloud dune field glacier hill island meadow path river shore valley")
_LOOKS = _words("broad calm deep even gentle high long mild open quiet steep wide")
_DOINGS = _words(
    "borders crosses feeds follows hides joins leaves meets passes reaches shades touches"
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def plain_sentence(generator: np.random.Generator) -> str:
    """One of some two hundred thousand sentences that hold no word of the lists, and no number."""
    first, second = generator.permutation(len(_SCENES))[:2]
    looks, doing = generator.integers(len(_LOOKS), size=2), generator.integers(len(_DOINGS))
    return (
        f"The {_LOOKS[looks[0]]} {_SCENES[first]} {_DOINGS[doing]} "
        f"the {_LOOKS[looks[1]]} {_SCENES[second]}."
    )


COINED = (len(_CONSONANTS) * len(_VOWELS)) ** 3 * 9 // 10  # the last ones are rarely drawn


def coined(generator: np.random.Generator, count: int, taken: set[str] | None = None) -> list[str]:
    """Different words of three syllables that mean nothing, none of them `taken`."""
    found: dict[str, None] = {}
    while len(found) < count:
        consonants = generator.integers(len(_CONSONANTS), size=3)
        vowels = generator.integers(len(_VOWELS), size=3)
        word = "".join(_CONSONANTS[c] + _VOWELS[v] for c, v in zip(consonants, vowels, strict=True))
        if taken is None or word not in taken:
            found[word] = None
    return list(found)


def number(generator: np.random.Generator, digits: int) -> str:
    """One of so many digits."""
    least = 10 ** (digits - 1)
    return str(generator.integers(least, 10 * least))


def numbers(generator: np.random.Generator, count: int, digits: int) -> list[str]:
    """Different numbers of so many digits, in no order, and not all there are; `ValueError` where
    there are too few."""
    every = 9 * 10 ** (digits - 1)
    if count >= every:
        raise ValueError(
            f"{count} different numbers are needed, and {every} have {digits} digits: raise digits"
        )
    found: dict[str, None] = {}
    while len(found) < count:
        found[number(generator, digits)] = None
    return list(found)


def things(generator: np.random.Generator, count: int) -> list[str]:
    """Different things by two words each, such as "amber lantern"."""
    every = len(ADJECTIVES) * len(THINGS)
    chosen = generator.choice(every, count, replace=False)
    return [f"{ADJECTIVES[i // len(THINGS)]} {THINGS[i % len(THINGS)]}" for i in chosen]
