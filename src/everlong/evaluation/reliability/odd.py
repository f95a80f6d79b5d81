"""Odd values, near-miss words, broken TOML: what random recipes and command lines are made of."""

import json
import random
from collections.abc import Mapping
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 16, 255, 1000, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30),
    *(0.0, -0.0, 0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
)
STRINGS = (
    *("", " ", "none", "true", "0", "x", "null", "memformer", "attention", "replay", "cuda"),
    *("attention*3", "attention*0", "attention*-1", "attention*1000000", "hgrn*", "*", "ünïcödé"),
    *("\u202e", "\n", "\t", "\0", "\x1b[31m", "💾", "a" * 5000, "..", ".", "/", "~", "%s{}"),
    *("text.txt", "run", "folder", "empty", "gone", "broken.toml", "/dev/null", "/proc/self/mem"),
)
CHARACTERS = "[]{}=\"\\\n#.,'\0\ufeff€💾-+eE0xnan"


def value(pick: random.Random, depth: int = 0) -> Any:
    """Of any type that TOML has."""
    kind = pick.random()
    if kind < 0.4:
        return pick.choice(NUMBERS)
    if kind < 0.7:
        return pick.choice(STRINGS)
    if kind < 0.8:
        return pick.random() < 0.5
    if depth > 2:
        return {}
    if kind < 0.9:
        return [value(pick, depth + 1) for _ in range(pick.randrange(4))]
    return {typo(pick, "name"): value(pick, depth + 1) for _ in range(pick.randrange(3))}


def typo(pick: random.Random, word: str) -> str:
    """The word with a letter lost, doubled, swapped with its neighbour or replaced; or as it is."""
    if not word:
        return word
    at = pick.randrange(len(word))
    before, letter, after = word[:at], word[at], word[at + 1 :]
    ways = (
        before + after,
        before + letter * 2 + after,
        before + after[:1] + letter + after[1:],
        before + pick.choice("xyz_-é") + after,
        word.upper(),
        word,
    )
    return pick.choice(ways)


def mutate(pick: random.Random, table: dict[str, Any]) -> None:
    """One change somewhere in nested tables, in place: most times to a value, of its own kind."""
    owner = table
    while True:  # down a random way
        below = [key for key, held in owner.items() if isinstance(held, dict) and held]
        if not below or pick.random() < 0.3:
            break
        owner = owner[pick.choice(below)]
    if not owner:
        owner[pick.choice(STRINGS)] = value(pick)
        return
    key = pick.choice(list(owner))
    way = pick.randrange(16)
    if way == 0:
        del owner[key]
    elif way == 1:
        owner[typo(pick, key)] = owner.pop(key)
    elif way == 2:
        owner[pick.choice(STRINGS)] = value(pick)
    elif way == 3:
        owner[key] = {key: owner[key]}
    elif way == 4:
        owner[key] = owner[pick.choice(list(owner))]
    elif way == 5:
        owner[key] = value(pick)
    else:
        owner[key] = alike(pick, owner[key])


def alike(pick: random.Random, held: Any) -> Any:
    """Another value of the same type, which may do."""
    if isinstance(held, bool):
        return not held
    if isinstance(held, int):
        near = held + pick.choice((-1, 1, 2)), held * pick.choice((2, 3, 10, 1000)), held // 2
        return pick.choice((*near, *near, *(n for n in NUMBERS if type(n) is int)))
    if isinstance(held, float):
        near = held * pick.choice((0.5, 2.0, 10.0)), 1 - held
        return pick.choice((*near, *near, *(n for n in NUMBERS if type(n) is float)))
    if isinstance(held, str):
        return pick.choice((typo(pick, held), pick.choice(STRINGS)))
    if isinstance(held, list):
        ways = held[::-1], held * 2, held[1:], [*held, value(pick)]
        return pick.choice(ways)
    if isinstance(held, dict):
        changed = dict(held)
        if changed:
            key = pick.choice(list(changed))
            changed[key] = alike(pick, changed[key])
        return changed
    return value(pick)


def toml(table: Mapping[str, Any]) -> str:
    """Tables as TOML: sections where they are sections, inline below."""
    lines = [f"{_word(k)} = {_toml(v)}" for k, v in table.items() if not isinstance(v, Mapping)]
    for key, held in table.items():
        if isinstance(held, Mapping):
            lines.append(f"[{_word(key)}]")
            lines += [f"{_word(k)} = {_toml(v)}" for k, v in held.items()]
    return "\n".join(lines) + "\n"


def _toml(held: Any) -> str:
    if isinstance(held, Mapping):
        return "{" + ", ".join(f"{_word(k)} = {_toml(v)}" for k, v in held.items()) + "}"
    if isinstance(held, list | tuple):
        return "[" + ", ".join(map(_toml, held)) + "]"
    if isinstance(held, bool):
        return "true" if held else "false"
    return _word(held) if isinstance(held, str) else repr(held)


def _word(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def broken(pick: random.Random, text: str) -> bytes:
    """A recipe's text that is TOML no more, or of which nobody knows."""
    at = pick.randrange(len(text) + 1)
    ways = (
        lambda: text[:at].encode(),
        lambda: (text[:at] + pick.choice(CHARACTERS) + text[at:]).encode(),
        lambda: (text[:at] + text[at + 1 + pick.randrange(9) :]).encode(),
        lambda: text[:at].encode() + bytes(pick.randrange(256) for _ in range(4)) + b"\n",
        lambda: text.encode("utf-16"),
        lambda: ("[train]\nsteps = " + "9" * 5000 + "\n").encode(),
        lambda: ("[train]\nsteps = " + "[" * 5000 + "\n").encode(),
        lambda: ("a." * 3000 + "b = 1\n" + text).encode(),
        lambda: (text + "\n" + text).encode(),
        lambda: b"",
    )
    return pick.choice(ways)()
