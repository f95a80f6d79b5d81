"""`everlong bench cost`: rows of every memory and length, the ratio, JSON, picture; flatness."""

import json

import pytest
import torch

from everlong import state as states
from everlong.evaluation.cost_bench import FLAT, CostRun, Subject, measure, summary, write
from everlong.evaluation.timing import interleaved, torch_threads, trusted
from everlong.registry import list_memories, memory_entry

TINY = CostRun(
    lengths=(4, 16),
    rounds=2,
    least=1,
    unbounded_length=8,
    decoded=2,
    hidden_size=24,
    num_heads=3,
)
TIMES = [f"{key}_{clock}" for key in ("forward", "both", "decode") for clock in ("wall", "cpu")]


@pytest.fixture(scope="module")
def rows():
    return measure(TINY)


def test_a_row_for_every_memory_and_length(rows):
    expected = [
        (name, length)
        for name in list_memories()
        for length in ((4, 16) if memory_entry(name).bounded else (4,))
    ]
    assert [(row["name"], row["length"]) for row in rows] == expected
    for row in rows:
        assert all(row[key] > 0 for key in TIMES)
        assert all(len(row[f"all_{key}"]) == TINY.rounds for key in TIMES)
    for name in list_memories(bounded=True):
        assert len({row["state_bytes"] for row in rows if row["name"] == name}) == 1


def test_bytes_are_those_of_the_state_after_the_call():
    subject = Subject("attention", TINY)
    held, _ = subject.visit(4)
    assert held == states.num_bytes(subject.read(4, 1)) > states.num_bytes(subject.read(2, 1))


def test_a_memory_is_trained_as_often_as_it_reads():
    once, thrice = Subject("sliding_attention", TINY), Subject("sliding_attention", TINY)
    for subject, calls in ((once, 1), (thrice, 3)):
        subject.train(subject.inputs, calls)
    for one, three in zip(once.memory.parameters(), thrice.memory.parameters(), strict=True):
        torch.testing.assert_close(3 * one.grad, three.grad)


def test_the_ratio_is_that_of_the_longest_call_to_the_shortest():
    made = [
        {"name": "x", "bounded": True, "length": n, "state_bytes": 3, "decode_cpu": 9.0}
        | {"forward_cpu": cost, "both_cpu": 2 * cost + (n > 4)}
        for n, cost in ((4, 10.0), (16, 11.0))
    ]
    (found,) = summary(made, "cpu")
    assert found["times_forward"] == pytest.approx(1.1)
    assert found["times_both"] == pytest.approx(1.15)
    assert (found["shortest"], found["longest"], found["flat"]) == (4, 16, True)
    made[1]["both_cpu"] *= 1.1
    assert not summary(made, "cpu")[0]["flat"]


def test_written_as_data_and_as_a_picture(rows, tmp_path):
    write(tmp_path / "a" / "cost.json", TINY, rows)
    found = json.loads((tmp_path / "a" / "cost.json").read_text())
    assert found["command"] == "everlong bench cost"
    assert found["rows"] == rows
    assert found["clock"] == "cpu"
    assert [row["name"] for row in found["summary"]] == list_memories()
    assert found["config"]["lengths"] == [4, 16]
    assert found["environment"]["torch"]
    assert (tmp_path / "a" / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"rounds": "two"}, "rounds must be a whole number"),
        ({"lengths": ()}, "lengths is"),
        ({"lengths": (0, 4)}, "lengths are"),
        ({"lengths": (512,), "unbounded_length": 8}, "unbounded_length is 8"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, named):
    with pytest.raises(ValueError, match=named.replace("(", r"\(")):
        CostRun(**options)


def test_rounds_hold_every_cell_in_orders_that_repeat_under_a_seed():
    cells = list("abcdefgh")
    found = list(interleaved(cells, 3, 0))
    assert [turn for turn, _ in found] == [0, 1, 2]
    assert all(sorted(order) == cells for _, order in found)
    assert found[0][1] != found[1][1]
    assert found == list(interleaved(cells, 3, 0)) != list(interleaved(cells, 3, 1))


def test_threads_are_put_back_and_say_which_clock_is_believed():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    clocks = [trusted(*case) for case in (("cpu", 1), ("cpu", 2), ("cuda", 1))]
    assert clocks == ["cpu", "wall", "wall"]


@pytest.mark.benchmark
def test_a_token_of_a_long_call_costs_what_one_of_a_short_call_costs():
    """The processor's time, for a memory whose caches are full from the first call on."""
    config = CostRun(lengths=(512, 16384), rounds=5)
    (found,) = summary(measure(config, ["rmt"]), "cpu")
    assert found["times_forward"] <= FLAT
    assert found["times_both"] <= FLAT
