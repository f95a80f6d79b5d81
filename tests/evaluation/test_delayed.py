"""The comparison of delayed recall: equal state, one baseline, rows and JSON."""

import json

import pytest
import torch

from everlong import state as states
from everlong.evaluation.delayed import (
    SUBJECTS,
    DelayedRun,
    GatedRecurrence,
    accuracy,
    build,
    fresh_state,
    measure,
    train,
    write,
)
from everlong.evaluation.recall import summary
from everlong.tasks.copy_first import CopyFirstConfig

TINY = DelayedRun(
    steps=2, batch_size=4, hidden_size=8, memory_size=3, train_delay=4, test_items=6, delays=(2, 9)
)


def test_every_subject_over_the_seeds_as_rows_and_as_json(tmp_path):
    told = []
    rows = measure(TINY, (0, 1), told.append)
    assert [(row["name"], row["seed"], row["delay"]) for row in rows] == [
        (name, seed, delay) for name in SUBJECTS for seed in (0, 1) for delay in (2, 9)
    ]
    assert len(told) == 2 * len(SUBJECTS)
    write(tmp_path / "delayed.json", TINY, rows)
    found = json.loads((tmp_path / "delayed.json").read_text())
    assert found["command"] == "everlong bench delayed"
    assert found["rows"] == rows
    assert found["config"]["task"]["max_delay"] == TINY.train_delay
    first = summary(rows, "delay")[0]
    assert (first["name"], first["delay"]) == (SUBJECTS[0], 2)
    assert first["mean"] == pytest.approx((rows[0]["accuracy"] + rows[2]["accuracy"]) / 2)
    assert rows == measure(TINY, (0, 1), told.append)  # it repeats


def test_states_hold_equally_many_numbers():
    task = CopyFirstConfig(max_delay=4)
    for name in SUBJECTS:
        layers = build(name, task, TINY, 0).init_state(1)["layers"]
        numbers = [leaf for leaf in states.leaves(layers) if leaf.is_floating_point()]
        assert [leaf.numel() for leaf in numbers] == [9, 9], name


def test_rows_of_a_batch_draw_under_seeds_of_their_own():
    model = build("random theta", CopyFirstConfig(), TINY, 0)
    state = fresh_state(model, 5, 3)
    for layer in state["layers"]:
        assert layer["seed"].tolist() == [5, 6, 7]
    gru = build("GRU", CopyFirstConfig(), TINY, 0)
    assert all(set(layer) == {"hidden"} for layer in fresh_state(gru, 5, 3)["layers"])


def test_the_gru_is_a_function_of_input_and_state():
    torch.manual_seed(0)
    memory = GatedRecurrence(4, 5)
    x = torch.randn(3, 7, 4)
    y, state = memory(x)
    first, carried = memory(x[:, :3])
    second, after = memory(x[:, 3:], carried)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(after, state)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 2], mask[1] = False, False
    masked, ragged = memory(x, carried, mask)
    alone, alone_state = memory(x[:1, mask[0]], states.select(carried, torch.tensor([0])))
    torch.testing.assert_close(masked[:1, mask[0]], alone)
    torch.testing.assert_close(ragged["hidden"][:1], alone_state["hidden"])
    assert torch.equal(ragged["hidden"][1], carried["hidden"][1])


def test_training_teaches_a_delay_of_nothing():
    options = {"hidden_size": 16, "memory_size": 8, "num_layers": 1, "train_delay": 0}
    run = DelayedRun(steps=60, learning_rate=0.01, **options)
    model = train("GRU", CopyFirstConfig(max_delay=0), run, 0)
    answered, finite = accuracy(model, 0, run, 0)
    assert answered > 0.95
    assert finite == 1
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert accuracy(model, 0, run, 0) == (0, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_size": 0}, "memory_size is 0"),
        ({"steps": -1}, "at least 0"),
        ({"steps": 1.5}, "whole number"),
        ({"delays": ()}, "delays is"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DelayedRun(**options)
