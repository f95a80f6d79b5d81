"""Every memory by name, and what a misspelt name or option is answered."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch

import everlong
from everlong import registry
from everlong.stateful import Stateful

NAMES = everlong.list_memories()


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    hidden_size: int
    window: int = 3


@pytest.fixture
def toy():
    """A memory registered for one test."""
    registry.list_memories()  # what is shipped is there first

    class Toy(Stateful):
        def __init__(self, config, core=None):
            super().__init__()
            self.config, self.core = config, core

    details = {"config": ToyConfig, "paper": "arXiv 0000.00000", "keeps": "nothing"}
    registry.register("toy", room="segments", small={"window": 2}, **details)(Toy)
    yield Toy, details
    del registry._ENTRIES["toy"]


def test_the_first_tenants_are_there():
    assert {"attention", "sliding_attention", "memformer"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_whole(name):
    entry = registry.memory_entry(name)
    assert entry.name == name
    assert issubclass(entry.cls, Stateful)
    assert entry.room in registry.ROOMS
    assert entry.paper, "a paper, or where it comes from"
    assert entry.keeps, "one line on what is written, kept and forgotten"
    assert "\n" not in entry.keeps
    assert inspect.getdoc(entry.cls), "the class says what it does"
    assert inspect.getdoc(entry.config), "the options are explained"
    assert entry.config.__dataclass_params__.frozen
    assert {"hidden_size", "num_heads"} <= set(entry.fields)
    assert set(entry.small) <= set(entry.fields)
    lengths = {k: v for k, v in entry.small.items() if k.endswith(("length", "size", "window"))}
    assert all(value <= 8 for value in lengths.values()), "small enough for the laws"


@pytest.mark.parametrize("name", NAMES)
def test_every_memory_is_created_at_both_sizes(name):
    small = everlong.create_memory(name, size="small", hidden_size=24, num_heads=3)
    y, _ = small(torch.zeros(2, 3, 24))
    assert y.shape == (2, 3, 24)
    full = everlong.create_memory(name, hidden_size=24, num_heads=3)
    assert full.period >= small.period
    assert small.period <= 8


def test_filters(toy):
    assert everlong.list_memories() == sorted(everlong.list_memories())
    assert everlong.list_memories("*att*") == [n for n in NAMES if "att" in n]
    assert "toy" in everlong.list_memories(room="segments")
    assert "toy" not in everlong.list_memories(room="mixers")
    assert "attention" in everlong.list_memories(bounded=False)
    assert "attention" not in everlong.list_memories(bounded=True)
    both = everlong.list_memories(bounded=True) + everlong.list_memories(bounded=False)
    assert sorted(both) == everlong.list_memories()
    assert everlong.list_memories("no such*") == []


def test_small_options_give_way_to_chosen_ones(toy):
    assert everlong.create_memory("toy", hidden_size=4).config.window == 3
    assert everlong.create_memory("toy", size="small", hidden_size=4).config.window == 2
    assert everlong.create_memory("toy", "small", hidden_size=4, window=7).config.window == 7


def test_a_segment_memory_takes_a_core_and_a_mixer_does_not(toy):
    core = everlong.create_memory("attention", hidden_size=4, num_heads=1)
    assert everlong.create_memory("toy", hidden_size=4, core=core).core is core
    assert everlong.create_memory("toy", hidden_size=4).core is None
    with pytest.raises(ValueError, match="takes no core"):
        everlong.create_memory("attention", hidden_size=4, num_heads=1, core=core)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("memformr",), {}, "did you mean 'memformer'"),
        (("zzz",), {}, "unknown memory 'zzz'"),
        (("attention", "tiny"), {"hidden_size": 4, "num_heads": 1}, "unknown size 'tiny'"),
        (("attention",), {"hiden_size": 4, "num_heads": 1}, "did you mean 'hidden_size'"),
        (("attention",), {"num_heads": 1}, "attention needs hidden_size"),
        (("attention",), {}, "attention needs hidden_size, num_heads"),
    ],
)
def test_a_misspelt_wish_is_answered(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        everlong.create_memory(*arguments, **options)


def test_unknown_options_list_the_known_ones():
    with pytest.raises(ValueError, match=r"options: hidden_size, num_heads"):
        everlong.create_memory("attention", hidden_size=4, num_heads=1, qqqqqq=1)


def test_register_refuses_what_would_confuse(toy):
    cls, details = toy
    with pytest.raises(ValueError, match="unknown room 'attic'"):
        registry.register("other", room="attic", **details)(cls)
    with pytest.raises(ValueError, match="must be a dataclass"):
        registry.register("other", room="mixers", **{**details, "config": dict})(cls)
    with pytest.raises(ValueError, match="'toy' is taken"):
        registry.register("toy", room="mixers", **details)(type("Another", (Stateful,), {}))
    assert "other" not in everlong.list_memories()


def test_suggest():
    assert registry.suggest("sliding_atention", NAMES) == "; did you mean 'sliding_attention'?"
    assert registry.suggest("qqqqqq", NAMES) == ""


def test_finding_the_memories_does_no_work():
    """Imports draw nothing, warn of nothing, and open no connection."""
    code = """
import socket, torch
def refuse(*_): raise AssertionError("a connection at import")
socket.socket.connect = refuse
before, threads = torch.get_rng_state(), torch.get_num_threads()
import everlong
assert everlong.list_memories()
assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
assert torch.get_num_threads() == threads and torch.get_default_dtype() == torch.float32
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 2.5}, "memformer: num_slots must be a whole number, got 2.5"),
        ({"num_slots": True}, "num_slots must be a whole number"),
        ({"forgetting": float("inf")}, "forgetting must be a number, got inf"),
        ({"gate": 7}, "gate must be true or false"),
        ({"temperature": "cold"}, "temperature must be a number"),
    ],
)
def test_an_option_of_the_wrong_type_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        everlong.create_memory("memformer", hidden_size=24, num_heads=3, **options)


def test_a_union_with_none_takes_both():
    for capacity in (None, 4):
        everlong.create_memory("attention", hidden_size=24, num_heads=3, capacity=capacity)
    with pytest.raises(ValueError, match="capacity must be None or a whole number"):
        everlong.create_memory("attention", hidden_size=24, num_heads=3, capacity=2.5)
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
        everlong.create_memory("attention", hidden_size=24, num_heads=3, dropout=2)


def test_only_plain_types_and_their_unions_are_checked():
    @dataclasses.dataclass
    class Options:
        betas: tuple[float, float] = (0.9, 0.95)
        rate: float | None = None

    registry.check_types(Options, {"betas": (1, 2), "rate": 1}, "these")
    with pytest.raises(ValueError, match="these: rate must be None or a number"):
        registry.check_types(Options, {"rate": "fast"}, "these")


def test_none_is_spelled_in_files_and_on_command_lines():
    memory = everlong.create_memory("titans", hidden_size=8, num_heads=1, max_surprise="none")
    assert memory.config.max_surprise is None
    with pytest.raises(ValueError, match="chunk_size must be a whole number"):
        everlong.create_memory("titans", hidden_size=8, num_heads=1, chunk_size="none")
