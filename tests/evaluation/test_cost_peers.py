"""`everlong bench cost --peers`: all forms of a recurrence agree before they are timed."""

import json
from dataclasses import replace

import pytest
import torch

from everlong.evaluation import cost_peers, scan_forms
from everlong.evaluation.cost_peers import PeersRun, lacking, measure, write
from everlong.evaluation.scan_forms import OURS, STEP, THEIRS, Rule, all_rules, draw

TINY = PeersRun(length=70, num_heads=2, head_size=8, rounds=2, threads=(1,))


@pytest.fixture(scope="module")
def rows():
    return measure(TINY)


def test_every_form_agrees_with_the_definition(rows):
    for row in rows:
        assert row["value_difference"] < 1e-5
        assert row["gradient_difference"] < 1e-5
    forms = [row["form"] for row in rows]
    assert {*forms} | {*lacking()} == {OURS, STEP, "torch conv1d", *THEIRS}
    assert "transformers qwen3_next, chunks" in forms  # every transformers we work with has it
    for rule in {row["rule"] for row in rows}:
        own = [row for row in rows if row["rule"] == rule]
        assert own[0]["form"] == OURS
        assert own[0]["times_ours"] == 1
        assert own[-1]["value_difference"] == 0
        assert len(own) > 1


def test_times_are_medians_of_all_rounds(rows):
    for row in rows:
        assert row["clock"] == "cpu"
        for key in ("forward", "backward", "both"):
            for clock in ("wall", "cpu"):
                assert row[f"{key}_{clock}"] > 0
                assert len(row[f"all_{key}_{clock}"]) == TINY.rounds
        assert row["kept_bytes"] > 0


def test_a_slow_form_is_timed_once_on_each_number_of_threads():
    before = torch.get_num_threads()
    seen = []
    config = replace(TINY, length=8, patience=0.0, threads=(1, 2))
    rows = measure(config, finished=lambda now: seen.append(len(now)))
    assert seen == [len(rows) // 2, len(rows)]  # what is finished can be kept
    assert torch.get_num_threads() == before
    assert [row["threads"] for row in rows] == sorted(row["threads"] for row in rows)
    assert {(row["threads"], row["clock"]) for row in rows} == {(1, "cpu"), (2, "wall")}
    assert all(len(row["all_both_cpu"]) == 1 for row in rows)


def test_a_form_that_differs_is_not_timed(monkeypatch):
    (rule,) = [one for one in all_rules(draw(8, 1, 4, 0, "cpu")) if "scan" in one.name]

    def wrong():
        h, last = rule.forms[OURS]()
        return 1.01 * h, last

    other = Rule(rule.name, {OURS: wrong, STEP: rule.forms[STEP]}, rule.leaves)
    monkeypatch.setattr(cost_peers, "all_rules", lambda inputs: [other])
    with pytest.raises(AssertionError, match="differs by"):
        measure(TINY)


def test_what_this_transformers_lacks_is_named_and_left_out(monkeypatch):
    theirs = {"transformers mamba2, chunks of 64": ("mamba2", "gone"), "y": ("no_model", "z")}
    monkeypatch.setattr(
        scan_forms, "THEIRS", {**dict.fromkeys(THEIRS, ("mamba2", "gone")), **theirs}
    )
    rows = measure(replace(TINY, length=8, rounds=1))
    assert lacking() == [*THEIRS, "y"]
    assert {row["form"] for row in rows} == {OURS, STEP, "torch conv1d"}


def test_written_with_provenance(rows, tmp_path):
    write(tmp_path / "cost-peers.json", TINY, rows)
    read = json.loads((tmp_path / "cost-peers.json").read_text())
    assert read["command"] == "everlong bench cost --peers"
    assert read["rows"] == rows
    assert read["config"]["threads"] == [1]
    assert read["environment"]["transformers"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"threads": (0,)}, "threads are"),
        ({"threads": 2}, "threads is 2"),
        ({"length": 0}, "length is 0"),
        ({"patience": "long"}, "patience must be a number"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        PeersRun(**options)


@pytest.mark.benchmark
def test_chunks_are_faster_than_steps_and_than_transformers():
    """The processor's time of one thread at T = 4,096."""
    for row in measure(PeersRun(threads=(1,))):
        label = f"{row['rule']}, {row['form']}"
        if row["form"] == STEP:
            assert row["times_ours"] >= 10, label
        elif row["form"] != OURS:
            assert row["times_ours"] > 1, label
