"""What the copy measurement trains: stages that end when they are learnt, and what is in reach."""

import json
from dataclasses import replace

import pytest
import torch

from everlong.evaluation import copying
from everlong.evaluation.copying import CopyRun, batches, measure, subject, write
from everlong.evaluation.recall import build, fit
from everlong.tasks.copying import FIRST_SYMBOL, make_batch
from everlong.tasks.recall import IGNORED

TINY = CopyRun(steps=3, batch_size=4, hidden_size=8, num_heads=2, test_items=4, watch_items=2)


def model(name, run=TINY, seed=0):
    return build(subject(name, run), run.task(1, run.source_segments), run, seed)


def lengths_read(monkeypatch, run, curriculum, scores):
    """Segments of each batch's longest and shortest source; `scores` are what is watched."""
    asked = iter(scores)
    monkeypatch.setattr(copying, "_accuracy", lambda *_: next(asked))
    found = list(batches(model("rmt"), run, 0, curriculum))
    size = 2 * run.segment_length
    return [(int(b.lengths.min()) // size, int(b.lengths.max()) // size) for b in found]


def test_a_stage_ends_when_it_is_learnt_and_training_when_full_sources_are_copied(monkeypatch):
    run = CopyRun(steps=20, batch_size=16, source_segments=3, watch_every=2)
    scores = [0.5, 0.9, 0.8, 1.0, 0.997, 0.998]
    read = lengths_read(monkeypatch, run, True, scores)
    assert read == [(1, 1)] * 4 + [(1, 2)] * 4 + [(1, 3)] * 4


def test_without_a_curriculum_sources_are_full_from_the_start(monkeypatch):
    run = CopyRun(steps=20, source_segments=3, watch_every=5)
    assert lengths_read(monkeypatch, run, False, [0.95, 0.998]) == [(3, 3)] * 10
    assert lengths_read(monkeypatch, run, False, [0.0] * 9) == [(3, 3)] * 20


def reads_its_source(name, run, segments):
    """Whether the answer to a symbol depends on that symbol of the source, by symbol."""
    torch.manual_seed(0)
    own = model(name, run).double().eval()
    with torch.no_grad():
        for parameter in own.parameters():  # no map that starts at zero hides a path
            parameter.add_(0.1 * torch.randn_like(parameter))
    size = segments * run.segment_length
    batch = make_batch(run.task(segments, segments), 0, [0])
    inputs = batch.inputs.repeat(size + 1, 1)
    every = torch.arange(size)
    inputs[every, every] = (inputs[every, every] - FIRST_SYMBOL + 1) % run.num_symbols
    inputs[every, every] += FIRST_SYMBOL  # row i has another symbol i, the last row none
    logits, state = [], own.init_state(size + 1, dtype=torch.float64)
    with torch.no_grad():
        for segment in inputs.split(run.segment_length, 1):
            found, state = own.stream(segment, state)
            logits.append(found)
    logits = torch.cat(logits, 1)
    at_query = logits[every, size + every] - logits[-1, size + every]
    return (at_query.abs().amax(-1) > 1e-9).tolist()


@pytest.mark.parametrize("layers", [1, 2])
def test_transformer_xl_cannot_reach_past_its_layers_and_rmt_can(layers):
    run = replace(TINY, num_layers=layers, source_segments=layers + 1)
    near, far = layers * run.segment_length, (layers + 1) * run.segment_length
    assert reads_its_source("transformer_xl", run, layers) == [True] * near
    assert reads_its_source("transformer_xl", run, layers + 1) == [False] * far
    assert reads_its_source("rmt", run, layers + 1) == [True] * far


def test_a_short_source_is_learnt_by_replay():
    run = CopyRun(steps=60, segment_length=2, num_symbols=2, num_slots=2, source_segments=1)
    losses = []
    own = model("rmt", run)
    made = (make_batch(run.task(1, 1), 0, range(32 * i, 32 * i + 32)) for i in range(run.steps))
    fit(own, made, 2, 1e-2, on_step=lambda _, loss: losses.append(loss))
    assert losses[0] > 0.6
    assert sum(losses[-5:]) / 5 < 0.2


def test_rows_are_of_the_seed_alone_and_written_with_their_means(tmp_path):
    said = []
    rows = measure(TINY, [0, 1], said.append)
    assert rows[8:] == measure(TINY, [1], said.append)
    names = ["rmt", "rmt, curriculum", "transformer_xl", "transformer_xl, curriculum"]
    assert [row["name"] for row in rows[:8:2]] == names
    assert [row["symbols"] for row in rows[:2]] == [4, 8]
    assert {row["steps"] for row in rows} == {3}
    assert len(said) == 12
    file = tmp_path / "copy.json"
    write(file, TINY, rows)
    found = json.loads(file.read_text())
    assert found["command"] == "everlong bench copy"
    assert found["rows"] == rows
    first = found["summary"][0]
    assert (first["name"], first["symbols"]) == ("rmt", 4)
    assert first["mean"] == (rows[0]["accuracy"] + rows[8]["accuracy"]) / 2
    assert CopyRun(**found["config"]) == TINY


def test_half_of_a_source_that_is_copied_counts_half():
    batch = make_batch(TINY.task(2, 2), 0, range(3))
    guesses = batch.targets.clamp(min=0)
    guesses[:, :-4] = 0
    logits = torch.nn.functional.one_hot(guesses, 10).float()
    assert batch.correct(logits).tolist() == [0.5] * 3
    assert int((batch.targets != IGNORED).sum()) == 3 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate above 0"),
        ({"num_slots": 0}, "num_slots is 0: give 1 or more"),
        ({"source_segments": 0}, "source_segments is 0"),
        ({"num_symbols": 1}, "num_symbols is 1: give 2 or more"),
        ({"steps": "600"}, "steps must be a whole number"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CopyRun(**options)
