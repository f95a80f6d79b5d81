"""What `everlong bench replay` runs: its rows on a tiny model, and its targets in full size."""

import json

import pytest

from everlong.evaluation.replay_cost import FORMS, METHODS, ReplayCost, measure, write

TINY = ReplayCost((2, 4), 3, batch_size=1, segment_length=4, hidden_size=16, num_heads=2)


@pytest.fixture(scope="module")
def rows():
    return measure(TINY)


def test_counts_and_gradients(rows):
    assert len(rows) == len(FORMS) * len(METHODS) * 2
    for row in rows:
        count = row["segments"]
        forwards = {"full": count, "checkpoint": 2 * count, "replay": 2 * count - 1}
        assert row["forwards"] == forwards[row["method"]]
        assert row["backwards"] == count
        assert row["gradient_difference"] <= 1e-6 < row["largest_gradient"]


@pytest.mark.parametrize("form", FORMS)
def test_bytes(rows, form):
    def column(method, key):
        return [row[key] for row in rows if (row["form"], row["method"]) == (form, method)]

    assert len(set(column("replay", "saved_bytes"))) == 1
    two, four = column("full", "saved_bytes")
    assert four > 1.8 * two
    one, three = column("replay", "buffer_bytes")
    assert three == 3 * one > 0
    assert all(row["seconds"] > 0 < row["times_bptt"] for row in rows)


def test_written_as_data_and_as_a_picture(rows, tmp_path):
    results, figure = tmp_path / "a" / "replay.json", tmp_path / "b" / "replay.png"
    write(TINY, rows, results, figure, "everlong bench replay")
    found = json.loads(results.read_text())
    assert found["rows"] == rows
    assert found["config"]["seed"] == 0
    assert found["environment"]["torch"]
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.benchmark
def test_time_targets_at_sixteen_segments():
    """The processor's time: other programs of the machine are not in it."""
    rows = measure(ReplayCost(counts=(16,)))
    found = {row["form"]: row["cpu_times_bptt"] for row in rows if row["method"] == "replay"}
    assert found["whole"] <= 1.4
    assert found["quarter"] <= 1.2
