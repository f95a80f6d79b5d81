"""`everlong bench bytes`: the mixture's items, scores, what is left out, JSON and picture."""

import json
from dataclasses import replace

import pytest
import torch

from everlong import state as states
from everlong.cli import main
from everlong.evaluation import recall_bytes as bench
from everlong.evaluation.recall import build, memory_subject
from everlong.tasks._shared import IGNORED

TINY = replace(bench.TIERS["smoke"], steps=2, length=64)


def model_of(name, run=TINY):
    mixture = bench.Mixture(run)
    return build(memory_subject(name, mixture, run), mixture, run, 0), mixture


@pytest.mark.parametrize("name", list(bench.Mixture(TINY).tasks))
def test_an_item_is_its_task_s_behind_a_token_of_its_own(name):
    mixture = bench.Mixture(TINY)
    scored, batch = mixture.make_batch(name, 3, range(5))
    assert scored.inputs.shape == (5, TINY.length + 1)
    assert scored.inputs[:, 1:].equal(batch.inputs)
    assert scored.targets[:, 1:].equal(batch.targets)
    mark = scored.inputs[0, 0].item()
    assert (scored.inputs[:, 0] == mark).all()
    assert (scored.inputs[:, 1:] < mixture.marks).all()
    assert mixture.marks <= mark < mixture.vocab_size
    assert (scored.targets[:, 0] == IGNORED).all()


def test_training_takes_every_task_in_turn_and_longer_items_by_stages():
    mixture = bench.Mixture(TINY)
    batches = list(bench.training(replace(TINY, steps=16), 0))
    marks = [int(batch.inputs[0, 0]) - mixture.marks for batch in batches]
    assert marks == [0, 1, 2, 3] * 4
    lengths = [batch.inputs.shape[1] - 1 for batch in batches]
    assert lengths == [16] * 8 + [32] * 4 + [64] * 4
    items = torch.cat([batch.inputs for batch in batches[-4:]])
    assert len(items.unique(dim=0)) == len(items)
    assert len(list(bench.training(replace(TINY, steps=7), 0))) == 7


def test_scores_are_shares_of_what_is_asked(monkeypatch):
    model, mixture = model_of("gated_deltanet")
    known = {}
    for name in mixture.tasks:
        scored, _ = mixture.make_batch(name, bench.HELD_OUT, range(6))
        known[int(scored.inputs[0, 0])] = scored.targets.clamp(min=0)

    def stream(inputs):
        guesses = known[int(inputs[0, 0])].clone()
        if int(inputs[0, 0]) == mixture.marks:  # of the pairs, only what was written once
            _, batch = mixture.make_batch("mqar", bench.HELD_OUT, range(6))
            guesses[:, 1:][batch.overwritten] = 0
        logits = torch.nn.functional.one_hot(guesses, mixture.vocab_size).float()
        return logits, {"kept": torch.zeros(len(inputs), 3)}

    monkeypatch.setattr(model, "stream", stream)
    found = bench.accuracy(model, mixture, 0, 6)
    assert found.pop("state_bytes") == 12
    assert found == {"mqar": 1, "overwritten": 0, "passkey": 1, "copy": 1, "updates": 1}


def test_bytes_are_those_of_one_stream():
    found = bench.measure_one("gated_deltanet", TINY, 0)
    model, _ = model_of("gated_deltanet")
    assert found["accuracy"]["state_bytes"] == states.num_bytes(model.init_state(1))
    assert found["parameters"] == model.num_parameters()


def test_a_model_that_diverged_is_said_so(monkeypatch):
    def broken(model, *args, **options):
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)

    monkeypatch.setattr(bench, "fit", broken)
    found = bench.measure_one("retnet", TINY, 0)
    assert found["diverged"]
    rows = [{"name": "retnet", "seed": 0, "state_bytes": 1, "asked": k, "accuracy": 0.0,
             "parameters": 1, "diverged": True} for k in bench.ASKED]  # fmt: skip
    assert bench.summary(rows)[0]["diverged"] == 1


def test_a_slow_step_is_left_out_and_named():
    found = bench.measure_one("gated_deltanet", replace(TINY, patience=1e-9), 0)
    assert found.keys() == {"left_out"}
    assert found["left_out"] > 1e-9


def test_the_command_writes_all_and_trains_nothing_twice(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.TIERS, "smoke", TINY)
    words = ["bench", "bytes", "retnet", "attention", "--tier", "smoke", "--seeds", "0", "--seeds"]
    for _ in range(2):
        assert main([*words, "1", "--out", str(tmp_path)]) == 0
        told = json.loads((tmp_path / "bytes.json").read_text())
        assert told["chance"] == pytest.approx(
            {"mqar": 1 / 16, "overwritten": 1 / 16, "passkey": 1 / 8, "copy": 1 / 8,
             "updates": 1 / 17}
        )  # fmt: skip
        assert {(row["name"], row["seed"], row["asked"]) for row in told["rows"]} == {
            (name, seed, asked)
            for name in ("retnet", "attention")
            for seed in (0, 1)
            for asked in bench.ASKED
        }
        assert (tmp_path / "bytes.png").stat().st_size > 10_000
        said = capsys.readouterr()
        assert "attention" in said.out
        assert "(grows)" in said.out
        monkeypatch.setattr(bench.torch.multiprocessing, "get_context", None)  # nothing to train
    assert main(["bench", "bytes", "retnett", "--out", str(tmp_path)]) == 2
    assert "retnet" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_the_gpu_tier_needs_one(capsys, tmp_path):
    assert main(["bench", "bytes", "--tier", "gpu", "--out", str(tmp_path)]) == 2
    assert "give --tier laptop" in capsys.readouterr().err
