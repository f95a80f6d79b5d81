"""What a mixture gains: room at equal cost, none at equal bytes; rows and JSON of the toy."""

import json

import pytest
import torch

from everlong.evaluation import mixture
from everlong.evaluation.mixture import MixtureRun, measure_room, measure_streams
from everlong.evaluation.recall import summary

TINY = MixtureRun(
    trials=3, room_pairs=(4,), steps=2, batch_size=4, hidden_size=8, test_items=4, asked=(1, 3)
)


def test_told_memories_hold_what_one_of_equal_bytes_does():
    """The numbers of the spec, signs read right: 32 pairs and 128."""
    rows = measure_room(MixtureRun(), (0, 1))
    found = {(row["name"], row["pairs"]): row["mean"] for row in summary(rows, "pairs")}
    one, several, wide = dict.fromkeys(name for name, _ in found)
    for name, wanted in ((one, (0.721, 0.551)), (several, (0.925, 0.705)), (wide, (0.923, 0.707))):
        for pairs, value in zip((32, 128), wanted, strict=True):
            assert found[name, pairs] == pytest.approx(value, abs=0.02), (name, pairs)
    numbers = {row["name"]: row["numbers"] for row in rows}
    assert numbers[several] == numbers[wide] == 4 * numbers[one]


def test_few_orthogonal_pairs_are_read_without_error():
    found = mixture.room(1, 2, 4, TINY, 0)
    assert found["accuracy"] == 1
    assert found["cosine"] == pytest.approx(1)


def test_every_subject_over_the_seeds_as_rows_and_as_json(tmp_path):
    told = []
    rows = measure_streams(TINY, (0, 1), told.append)
    names = list(mixture.subjects(TINY))
    assert [(row["name"], row["seed"], row["pairs"]) for row in rows] == [
        (name, seed, pairs) for name in names for seed in (0, 1) for pairs in (1, 3)
    ]
    assert len(told) == 2 * len(names)
    sizes = {row["name"]: row["state_bytes"] for row in rows}
    assert [size // sizes["one memory"] for size in sizes.values()] == [1, 2, 2, 2, 4, 4]
    room = measure_room(TINY, (0, 1))
    mixture.write(tmp_path / "mixture.json", TINY, room, rows)
    found = json.loads((tmp_path / "mixture.json").read_text())
    assert found["command"] == "everlong bench mixture"
    assert found["rows"] == {"room": room, "streams": rows}
    assert {row["name"] for row in found["summary"]["streams"]} == set(names)


def test_a_training_repeats():
    first, again = (mixture.train("MoM, 2 of 4", TINY, 3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_told_router_keeps_the_streams_apart_from_the_start():
    found = mixture.test(mixture.train("MoM, 1 of 2, told the streams", TINY, 0), TINY, 3, 0)
    assert found["separation"] == 1
    found = mixture.test(mixture.train("one memory", TINY, 0), TINY, 3, 0)
    assert found["separation"] == 0.5


def test_separation_is_the_share_of_each_memory_s_main_stream():
    chosen = torch.tensor([[[0], [0], [1], [1], [1], [0]]])
    stream = torch.tensor([[0, 0, 1, 1, 0, 1]])
    assert mixture.separation(chosen, stream, 2) == pytest.approx(4 / 6)
    assert mixture.separation(stream[..., None], stream, 2) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key_size": 0}, "key_size is 0"),
        ({"steps": -1}, "at least 0"),
        ({"steps": 1.5}, "whole number"),
        ({"asked": ()}, "asked is"),
        ({"asked": (9,)}, "8 pairs"),
        ({"room_pairs": (0,)}, "room_pairs is"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        MixtureRun(**options)
