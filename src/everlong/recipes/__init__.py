"""Recipes: TOML files that say what to train, on what, how. The shipped ones lie beside this file.

Sections: [model] (EverlongConfig, with [model.segment] and [model.mixers]), [data], [train]
(TrainConfig); `base` names a recipe to start from, `twin` trains a memory-less twin beside it,
`task` trains on a generated task instead of a text.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from everlong.registry import suggest

Table = dict[str, Any]
_SECTIONS = ("model", "data", "train", "task")


@dataclass(frozen=True)
class Data:
    """Where text comes from. source: a packaged text, a file or a folder; validation: the fraction
    held out; tokenizer: a folder of a Hugging Face tokenizer, empty for bytes; context: tokens
    after which a document is read on as another, from a fresh state (0: never)."""

    source: str = "moby_dick"
    validation: float = 0.1
    tokenizer: str = ""
    context: int = 0

    def __post_init__(self) -> None:
        if self.context < 0:
            raise ValueError(
                f"data.context is {self.context}: give tokens, or 0 for whole documents"
            )


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe. `origin` is what errors call it."""

    origin: str
    twin: bool = False
    model: Table = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    train: Table = field(default_factory=dict)
    task: Table = field(default_factory=dict)

    @classmethod
    def from_table(cls, table: Table, origin: str) -> "Recipe":
        """Of `table()` of another recipe; `ValueError` as for a file."""
        if not isinstance(table, dict):
            raise ValueError(f"{origin}: a recipe must be a section")
        _check({key: value for key, value in table.items() if value}, origin)
        return cls(origin, **{**table, "data": Data(**table.get("data", {}))})

    def table(self) -> Table:
        """The recipe as plain tables, without a base."""
        return {key: value for key, value in asdict(self).items() if key != "origin"}


def shipped() -> list[str]:
    """Names of the recipes that come with everlong."""
    names = (entry.name for entry in files("everlong.recipes").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load(source: str, changes: Iterable[str] = ()) -> Recipe:
    """The recipe of a file, or a shipped one by name, with `changes` ("section.key=value") made.

    Raises `ValueError`, naming the file and what was probably meant, for an unknown file, section
    or key and for TOML that cannot be read.
    """
    table = _read(source, ())
    for change in changes:
        table = _merge(table, parse_change(change))
    return Recipe.from_table(table, _origin(source))


def with_memory(recipe: Recipe, name: str) -> Recipe:
    """The recipe with another memory.

    A segment memory takes the old one's place (what both configs call the same is kept); a mixer
    becomes every layer, and no segment memory stands around it.
    """
    from everlong.registry import memory_entry

    entry = memory_entry(name)
    old = recipe.model.get("segment") or {}
    if entry.room == "segments":
        return replace(recipe, model={**recipe.model, "segment": _renamed(old, name)})
    options = recipe.model.get("mixers", {})
    alone = {
        "segment": {},
        "layers": [name],
        "mixers": {k: options[k] for k in options if k == name},
    }
    length = {"segment_length": old["segment_length"]} if "segment_length" in old else {}
    return replace(recipe, model=recipe.model | alone, train=length | recipe.train)


def _renamed(segment: Table, name: str) -> Table:
    """The options of a segment memory that another one has too, under its name."""
    from everlong.registry import memory_entry

    fields = memory_entry(name).fields
    return {key: value for key, value in segment.items() if key in fields} | {"name": name}


def check_kept(recipe: Recipe, changes: Iterable[str], memory: str) -> None:
    """`ValueError` for a change that choosing `memory` has made meaningless."""
    for change in changes:
        at, wanted = recipe.table(), parse_change(change)
        while isinstance(wanted, dict) and wanted:
            key, wanted = next(iter(wanted.items()))
            at = at.get(key) if isinstance(at, dict) else None
        if at != wanted:
            raise ValueError(f"--set {change} means nothing with --memory {memory}: drop one")


def _origin(source: str) -> str:
    return source if _is_path(source) else f"recipe {source!r}"


def _is_path(source: str) -> bool:
    return source.endswith(".toml") or "/" in source or "\\" in source


def _read(source: str, seen: tuple[str, ...]) -> Table:
    if source in seen:
        raise ValueError(f"{source}: `base` goes round in a circle: {' -> '.join([*seen, source])}")
    if _is_path(source):
        text = _read_file(Path(source))
    elif source in shipped():
        text = (files("everlong.recipes") / f"{source}.toml").read_text("utf-8")
    else:
        raise ValueError(
            f"no recipe {source!r}{suggest(source, shipped())} (shipped: {', '.join(shipped())}; "
            "a file of yours ends in .toml)"
        )
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a plain ValueError
        raise ValueError(f"{_origin(source)} is not valid TOML: {error}") from error
    _check(table, _origin(source))
    base = table.pop("base", None)
    if base is None:
        return table
    if _is_path(base):
        base = str(Path(source).parent / base)
    return _merge(_read(base, (*seen, source)), table)


def _read_file(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: a recipe is a TOML file") from error


def _merge(base: Table, top: Table) -> Table:
    """`top` over `base`, section by section; an empty section empties the base's.

    A segment memory of another name keeps the options that it shares with the base's.
    """
    merged = dict(base)
    for key, value in top.items():
        if key == "segment" and value and _name(merged.get(key)) != _name(value) is not None:
            merged[key] = _renamed(merged.get(key) or {}, value["name"])
        both = value and isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _name(segment: Any) -> str | None:
    name = segment.get("name") if isinstance(segment, dict) else None
    return name if isinstance(name, str) else None


def parse_change(change: str) -> Table:
    """`"a.b=c"` as tables; c is TOML, or a string where it is not."""
    path, sign, text = change.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise ValueError(f"--set {change}: write it as section.key=value")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()  # a bare word is a string: --set data.source=sotu
    for key in reversed(keys):
        value = {key: value}
    _check(value, f"--set {change}")
    return value


def _check(table: Table, origin: str) -> None:
    """Every key is known, and what the recipe itself reads has its type."""
    types = {"base": str, "twin": bool} | dict.fromkeys(_SECTIONS, dict)
    _check_keys(table, types, origin)
    _check_types(table, types, origin)
    for section in _SECTIONS:
        if section in table:
            _check_keys(table[section], list(_known_keys(section)), origin, f"[{section}] ")
    types = {"source": str, "validation": int | float, "tokenizer": str, "context": int}
    _check_types(table.get("data", {}), types, origin)


def _known_keys(section: str) -> Iterable[str]:
    # imported here: a list of the recipes needs neither torch nor transformers
    if section == "model":
        from transformers import PreTrainedConfig

        from everlong import EverlongConfig

        inherited = {each.name for each in fields(PreTrainedConfig)}
        ours = [each.name for each in fields(EverlongConfig) if each.name not in inherited]
        return [*ours, *EverlongConfig.attribute_map]
    if section == "train":
        from everlong.training.config import TrainConfig

        return [each.name for each in fields(TrainConfig)]
    if section == "task":
        from everlong.evaluation.recall import RecallRun
        from everlong.tasks.recall import RecallConfig

        both = [*fields(RecallConfig), *fields(RecallRun)]
        return ["name", "form", "seeds", *(each.name for each in both)]
    return [each.name for each in fields(Data)]


def _check_keys(table: Table, known: Iterable[str], origin: str, section: str = "") -> None:
    for key in table:
        if key not in known:
            hint = suggest(key, known) or f" (known: {', '.join(known)})"
            raise ValueError(f"{origin}: unknown key {section}{key}{hint}")


def _check_types(table: Table, types: Mapping[str, Any], origin: str) -> None:
    names = {str: "a string", bool: "true or false", dict: "a section", int: "a whole number"}
    for key, value in table.items():
        wrong_bool = isinstance(value, bool) and types[key] is not bool
        if wrong_bool or not isinstance(value, types[key]):
            raise ValueError(f"{origin}: {key} must be {names.get(types[key], 'a number')}")
