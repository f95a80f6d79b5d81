"""Every memory by name: `@register` on its class is all the wiring a new memory needs."""

import dataclasses
import difflib
import fnmatch
import importlib
import math
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

ROOMS = ("mixers", "segments")
LARGEST = 2**31 - 1  # size of anything: products of two are numbers that torch can take


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the registry knows of a memory; tables, tests and the command line read it."""

    name: str
    room: str
    cls: type
    config: type
    paper: str
    bounded: bool
    small: Mapping[str, Any]
    keeps: str  # one line: what is written, kept and forgotten

    @property
    def fields(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self.config)]


_ENTRIES: dict[str, Entry] = {}


def register(
    name: str,
    *,
    room: str,
    config: type,
    paper: str,
    keeps: str,
    bounded: bool = True,
    small: Mapping[str, Any] | None = None,
) -> Callable[[type], type]:
    """Give a memory class its public name.

    `config` is its frozen dataclass of options, `paper` a reference such as "arXiv 2010.06891",
    `keeps` one line on what is written, kept and forgotten, `small` the options that make it small
    enough to test (segment, chunk and window <= 8). `bounded=False` marks a state that grows.
    """

    def add(cls: type) -> type:
        if room not in ROOMS:
            raise ValueError(f"unknown room {room!r} for {name!r}: use one of {', '.join(ROOMS)}")
        if name in _ENTRIES and _ENTRIES[name].cls.__qualname__ != cls.__qualname__:
            raise ValueError(f"the name {name!r} is taken by {_ENTRIES[name].cls.__name__}")
        if not dataclasses.is_dataclass(config):
            raise ValueError(f"config of {name!r} must be a dataclass")
        _ENTRIES[name] = Entry(name, room, cls, config, paper, bounded, dict(small or {}), keeps)
        return cls

    return add


def _discover() -> None:
    for room in ROOMS:
        package = importlib.import_module(f"everlong.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"everlong.{room}.{module.name}")


def suggest(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for a near miss, else nothing."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_choice(name: str, value: Any, known: Collection[str]) -> None:
    """`ValueError` that says what was meant, unless the option's value is a known one."""
    if value not in known:
        raise ValueError(
            f"{name} is {value!r}: use one of {', '.join(known)}{suggest(str(value), known)}"
        )


def memory_entry(name: str) -> Entry:
    """What is registered under `name`; `ValueError` with a suggestion for an unknown one."""
    _discover()
    if name not in _ENTRIES:
        raise ValueError(
            f"unknown memory {name!r}{suggest(name, _ENTRIES)} (`everlong list` shows all)"
        )
    return _ENTRIES[name]


def list_memories(
    pattern: str = "*", *, room: str | None = None, bounded: bool | None = None
) -> list[str]:
    """Registered names that match a shell pattern, sorted."""
    _discover()
    return sorted(
        name
        for name, entry in _ENTRIES.items()
        if fnmatch.fnmatch(name, pattern)
        and room in (None, entry.room)
        and bounded in (None, entry.bounded)
    )


def build_config(entry: Entry, options: Mapping[str, Any]) -> Any:
    """The memory's validated config; `ValueError` names an unknown option and what was meant."""
    for key in options:
        if key not in entry.fields:
            raise ValueError(
                f"{entry.name} has no option {key!r}{suggest(key, entry.fields)} "
                f"(options: {', '.join(entry.fields)})"
            )
    missing = [
        field.name
        for field in dataclasses.fields(entry.config)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in options
    ]
    if missing:
        raise ValueError(f"{entry.name} needs {', '.join(missing)}")
    options = {key: _spelled(entry.config, key, value) for key, value in options.items()}
    check_types(entry.config, options, entry.name)
    for key, value in options.items():
        if type(value) is int and abs(value) > LARGEST and key != "seed":  # no size
            raise ValueError(f"{entry.name}: {key} is {value}: give at most {LARGEST}")
    return entry.config(**options)


def _spelled(config: type, key: str, value: Any) -> Any:
    """None for "none", as files and command lines must spell it, where an option may be None."""
    kinds = set(get_args(get_type_hints(config)[key]))
    return None if value == "none" and type(None) in kinds and str not in kinds else value


def check_types(config: type, options: Mapping[str, Any], origin: str) -> None:
    """`ValueError` that names the first option whose value is not of its field's type.

    Numbers may be ints where floats are meant, and are finite. Fields annotated otherwise than by
    int, float, bool, str or a union of these with None are left to the config itself.
    """
    hints = get_type_hints(config)
    for key, value in options.items():
        union = get_origin(hints[key]) in (Union, UnionType)
        kinds = set(get_args(hints[key])) if union else {hints[key]}
        if not kinds <= {int, float, bool, str, type(None)}:
            continue
        allowed = kinds | ({int} if float in kinds else set())
        infinite = isinstance(value, float) and not math.isfinite(value)
        if type(value) not in allowed or infinite:
            words = " or ".join(sorted(_WORDS[kind] for kind in kinds))
            raise ValueError(f"{origin}: {key} must be {words}, got {value!r}")


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "None",
}


def create_memory(name: str, size: str | None = None, **options: Any) -> Any:
    """A Stateful [B, T, D] -> [B, T, D] by name.

    `size="small"` starts from its test-sized options. A segment memory takes `core=`, the stack it
    carries its memory around; without one it wraps a single causal attention block.
    """
    entry = memory_entry(name)
    if size not in (None, "small"):
        raise ValueError(f"unknown size {size!r}: use 'small' or leave it out")
    core = options.pop("core", None)
    if core is not None and entry.room != "segments":
        raise ValueError(f"{name} lives in {entry.room}/ and takes no core")
    config = build_config(entry, {**(entry.small if size else {}), **options})
    return entry.cls(config) if core is None else entry.cls(config, core)
