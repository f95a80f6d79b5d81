"""`everlong bench training`: what is counted, what is divided by what, rows and JSON."""

import json

import pytest

from everlong.errors import UserError
from everlong.evaluation import training_speed
from everlong.evaluation.training_speed import METHODS, Peak, Subject, TrainingSpeed, measure, write

TINY = TrainingSpeed(
    rounds=1,
    threads=(1,),
    batch_size=2,
    segments=3,
    segment_length=8,
    hidden_size=16,
    num_heads=2,
    num_slots=4,
    sizes=(16, 32),
)


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_speed, "_PROBE", 1e6)
        return [row for found in measure(TINY, ("memformer",)) for row in found]


def test_a_row_for_every_model_and_method(rows):
    assert [(row["memory"], row["method"]) for row in rows] == [
        ("memformer", method) for method in METHODS
    ]
    for row in rows:
        assert row["clock"] == "cpu"
        assert len(row["all_seconds"]) == len(row["all_fraction"]) == TINY.rounds


def test_fractions_are_of_what_is_needed_and_of_what_is_done(rows):
    full, checkpoint, replay = rows
    assert full["done_gflop"] == full["needed_gflop"] == replay["needed_gflop"] > 0
    # every segment's forward again; of replay's the last one's not, and no head
    assert 1.3 < checkpoint["done_gflop"] / full["needed_gflop"] < 1.4
    assert 1.1 < replay["done_gflop"] / full["needed_gflop"] < 1.25
    for row in rows:
        more = row["done_gflop"] / row["needed_gflop"]
        assert row["fraction_done"] == pytest.approx(more * row["fraction"])
        each = zip(row["all_seconds"], row["all_peak_gflops"], row["all_fraction"], strict=True)
        for seconds, peak, fraction in each:
            assert fraction == pytest.approx(row["needed_gflop"] / seconds / peak, rel=0.2)


def test_what_attention_needs_is_known():
    """Six operations a weight and token; four a pair of positions and channel, and ten back."""
    subject = Subject("attention", TINY)
    weights = sum(p.numel() for p in subject.learner.parameters if p.ndim == 2)
    pairs = TINY.batch_size * 4 * TINY.hidden_size
    seen = [8 * 9 // 2, 8 * 16, 8 * 24]  # causal in the first segment, masked later
    attention = sum((4 + 10) * pairs * each for each in seen)
    norms = 9 * 4 * TINY.hidden_size * TINY.tokens  # two products with a vector each, backward
    assert subject.flops("full") == 6 * weights * TINY.tokens + attention + norms


def test_the_peak_is_the_best_size(monkeypatch):
    speeds = {16: 1.0, 32: 3.0, 64: 2.0}
    monkeypatch.setattr(Peak, "measure", lambda peak: speeds[len(peak.matrices[0])])
    peak = Peak(tuple(speeds))
    assert peak.size == len(peak.matrices[0]) == 32


def test_written_as_data(rows, tmp_path):
    path = tmp_path / "a" / "training-speed.json"
    write(path, TINY, rows)
    found = json.loads(path.read_text())
    assert found["rows"] == rows
    assert found["config"]["hidden_size"] == 16
    assert [each["memory"] for each in found["reached"]] == ["memformer"]
    for each in found["reached"]:
        assert each["reached"] == (each["fraction"] >= found["target"])


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="hybrid"):
        next(measure(TINY, ("hybrd",)))
    with pytest.raises(ValueError, match="rounds"):
        TrainingSpeed(rounds=0)
    with pytest.raises(ValueError, match="threads"):
        TrainingSpeed(threads=(0,))
