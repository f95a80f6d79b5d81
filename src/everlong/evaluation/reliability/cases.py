"""Random recipes and random command lines, each made from (seed, number) alone.

Recipes are shipped ones, small, with one to four changes to keys and values, or with broken text.
Command lines are of every command and option that the parser knows, with values that may do, values
that do not, typing mistakes and files of the wrong kind.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from everlong import recipes
from everlong.evaluation.reliability import odd
from everlong.evaluation.reliability.guarded import TINY
from everlong.registry import list_memories, memory_entry

# command: (option, whether it takes a value); one without a name stands for words of its own
Vocabulary = Mapping[str, Sequence[tuple[str, bool]]]


@dataclass(frozen=True)
class Case:
    """kind: "recipe" or "command"; files by name, in the folder where the words are run."""

    kind: str
    words: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    stdin: bytes = b""


def make(seed: int, number: int, vocabulary: Vocabulary) -> Case:
    """Case `number`: even ones are recipes, odd ones command lines."""
    pick = random.Random(f"{seed}:{number}")
    return _command(pick, vocabulary) if number % 2 else _recipe(pick)


def _recipe(pick: random.Random) -> Case:
    name = pick.choice(recipes.shipped())
    table = _small(name) if pick.random() < 0.95 else recipes.load(name).table()
    table = _copied(table)
    if pick.random() < 0.9:
        for _ in range(pick.choice((1, 1, 1, 2, 3))):
            odd.mutate(pick, table)
    if pick.random() < 0.05:
        table["base"] = pick.choice((name, odd.typo(pick, name), "recipe.toml", "broken.toml", 3))
    text = odd.toml(table)
    data = odd.broken(pick, text) if pick.random() < 0.08 else text.encode()
    words = ["train", "recipe.toml", "--dry-run"]
    for _ in range(pick.choice((0, 0, 0, 0, 1))):
        words += ["--set", _change(pick)]
    if pick.random() < 0.1:
        words += ["--memory", _memory(pick)]
    return Case("recipe", tuple(words), {"recipe.toml": data})


def _copied(table: Any) -> Any:
    return {key: _copied(held) for key, held in table.items()} if isinstance(table, dict) else table


@cache
def _small(name: str) -> dict[str, Any]:
    """A shipped recipe at test size, of the text in the folder."""
    recipe = recipes.load(name)
    if recipe.task:
        return recipes.load(
            name, ("task.steps=2", "task.hidden_size=8", "task.num_heads=2")
        ).table()
    model = _copied(recipe.model)
    if model.get("segment"):
        kept = {"name": model["segment"]["name"]}
        model["segment"] = kept | dict(memory_entry(kept["name"]).small)
        layers = 1
    else:
        names = [item.partition("*")[0] for item in model["layers"]]
        model["mixers"] = {each: dict(memory_entry(each).small) for each in dict.fromkeys(names)}
        layers = sum(int(item.partition("*")[2] or 1) for item in model["layers"])
    model |= {"hidden_size": 16, "num_heads": 2, "num_layers": layers}
    train = {"steps": 3, "batch_size": 2, "segments": 2, "segment_length": 8, "device": "cpu"}
    data = {"source": "text.txt", "validation": 0.05}
    return {**recipe.table(), "model": model, "train": recipe.train | train, "data": data}


def _change(pick: random.Random) -> str:
    """What stands behind --set."""
    if pick.random() < 0.5:
        return pick.choice((*TINY, "train.steps=1", "task.steps=2", "data.source=text.txt"))
    table = _small(pick.choice(recipes.shipped()))
    keys, held = [], table
    while isinstance(held, dict) and held:
        keys.append(pick.choice(list(held)))
        held = held[keys[-1]]
    if pick.random() < 0.3:
        keys[-1] = odd.typo(pick, keys[-1])
    found = odd.value(pick) if pick.random() < 0.8 else held
    text = odd.toml({"x": found} if not isinstance(found, dict) else {"x": [found]})
    sign = "=" if pick.random() < 0.95 else pick.choice(("", "==", ":"))
    return ".".join(keys) + sign + text.partition("= ")[2].strip()


def _memory(pick: random.Random) -> str:
    name = pick.choice(list_memories())
    return name if pick.random() < 0.7 else odd.typo(pick, name)


def _command(pick: random.Random, vocabulary: Vocabulary) -> Case:
    benches = [each for each in vocabulary if each.startswith("bench ")]
    others = [each for each in vocabulary if each not in benches]
    name = pick.choice(pick.choice((benches, others, others, ["train"])))
    words = [word if pick.random() < 0.97 else odd.typo(pick, word) for word in name.split()]
    options = [each for each in vocabulary[name] if each[0]]
    takes_words = len(options) < len(vocabulary[name]) or pick.random() < 0.05
    count = pick.choice((0, 1, 1, 1, 1, 1, 2)) if takes_words else 0
    words += [_positional(pick, name) for _ in range(count)]
    for option in pick.sample(options, min(len(options), pick.choice((0, 1, 1, 2, 2, 3, 5)))):
        words += _option(pick, *option)
    if pick.random() < 0.03 and options:
        words += _option(pick, *pick.choice(options))
    if name == "train" and "--dry-run" not in words and pick.random() < 0.8:
        words.append("--dry-run")
    if pick.random() < 0.08:
        words.insert(pick.randrange(len(words) + 1), _string(pick))
    if pick.random() < 0.05:
        pick.shuffle(words)
    stdin = pick.choice((b"", b"the whale", b"\xff\xfe\0", "…".encode() * 50))
    return Case("command", tuple(words), stdin=stdin)


def _option(pick: random.Random, name: str, takes_value: bool) -> list[str]:
    spelled = name if pick.random() < 0.94 else odd.typo(pick, name)
    if not takes_value and pick.random() < 0.9:
        return [spelled]
    if pick.random() < 0.04:
        return [spelled]  # the value is missing
    given = _change(pick) if name == "--set" else _value(pick, name)
    return [f"{spelled}={given}"] if pick.random() < 0.2 else [spelled, given]


_FILES = ("text.txt", "run", "run/model", "stopped", "state.safetensors", "folder", "empty", "gone")
_ODD_FILES = ("broken.toml", "binary", "loop", "dangling", "gone/x", "tokenizer.json", "half")
_FITTING: Mapping[str, Sequence[str]] = {
    "--data": ("text.txt", "sotu", "folder"),
    "--text": ("text.txt", "folder/a"),
    "--resume": ("stopped", "run", "stopped/checkpoint-00000002"),
    "--out": ("new", "new/deep", "folder/x.html"),
    "--load-state": ("state.safetensors",),
    "--save-state": ("saved", "folder/saved"),
    "--tokenizer": ("run/model", "run/model/tokenizer.json"),
    "--json": ("scores.json",),
    "--surprise": ("surprise.jsonl",),
    "--task": ("language", "needle_*", "recall", "mqar", "enwik8", "qa*"),
    "--device": ("cpu", "auto"),
    "--track": ("tensorboard", "trackio"),
    "--prompt": ("the whale", "…"),
    "--seeds": ("0", "1"),
    "--family": ("linear", "test-time"),
}
_SMALL = ("0", "1", "2", "8", "64", "0.5", "1.0")


def _value(pick: random.Random, option: str) -> str:
    if option == "--memory":
        return _memory(pick)
    kind = pick.random()
    if kind < 0.55:
        return pick.choice(_FITTING.get(option, _SMALL))
    return pick.choice((*_FILES, *_ODD_FILES)) if kind < 0.75 else _string(pick)


def _positional(pick: random.Random, command: str) -> str:
    kind = pick.random()
    if kind < 0.15:
        return _string(pick)
    if kind < 0.3:
        return pick.choice((*_FILES, *_ODD_FILES))
    if command == "train":
        return pick.choice((*recipes.shipped(), "tiny.toml", "tiny.toml", "tiny.toml"))
    if command in ("show", "list") or command.startswith("bench"):
        return _memory(pick)
    return pick.choice(("run", "stopped", "run/model"))


def _string(pick: random.Random) -> str:
    """Any word a shell can hand over: no NUL; bytes that are no UTF-8 come as surrogates."""
    if pick.random() < 0.3:
        return str(pick.choice(odd.NUMBERS))
    words = [word for word in odd.STRINGS if "\0" not in word]
    return pick.choice((*words, "\udcff\udcfe", "--", "-", "-x", "--help", "--version", "-1"))
