"""What memories that learn at test time do without training: the orders that are claimed."""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from everlong.cli import main
from everlong.evaluation import behaviour
from everlong.evaluation.behaviour import BehaviourRun, Rule, learn

RUN = BehaviourRun(seeds=20)


def draw(count=12, seeds=3, width=5):
    g = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(seeds, count, width, generator=g, dtype=torch.float64), dim=-1)
    return keys, torch.randn(seeds, count, 4, generator=g, dtype=torch.float64)


def means(rows, by):
    return {(row["name"], row[by]): row["mean"] for row in rows}


def rising(found, names, at):
    values = [found[name, at] for name in names]
    return all(low < high for low, high in pairwise(values))


def test_what_is_learned_is_the_rule_written_out():
    keys, values = draw()
    rule = Rule(None, keep=0.9, momentum=0.5, window=3)
    read, found = learn(keys, values, rule)
    for seed, (k, v) in enumerate(zip(keys, values, strict=True)):
        weights, moving = torch.zeros(2, 5, 4, dtype=torch.float64)
        for t in range(len(k)):
            last, wanted = k[max(0, t - 2) : t + 1], v[max(0, t - 2) : t + 1]
            step = 1 / torch.linalg.eigvalsh(last.mT @ last)[-1]
            moving = 0.5 * moving + step * last.mT @ (last @ weights - wanted)
            weights = 0.9 * weights - moving
            torch.testing.assert_close(read[seed, t], k[t] @ weights)
        torch.testing.assert_close(found[seed], weights)


def test_a_limit_on_the_gradient_of_a_unit_key_is_the_vector_huber_loss():
    keys, values = draw()
    limited = learn(keys, values, Rule(0.3, limit=0.5))[1]
    torch.testing.assert_close(limited, learn(keys, values, Rule(0.3, bias="huber", level=0.5))[1])
    assert not torch.allclose(limited, learn(keys, values, Rule(0.3))[1])


def test_correcting_writes_overwrite_better_and_keep_less():
    found = means(behaviour.overwriting(RUN), "asked")
    rules = list(behaviour.OVERWRITING)
    assert rising(found, rules, "rewritten")
    sums, decayed, corrected, moving = (found[name, "kept"] for name in rules)
    assert sums > decayed > moving > corrected


def test_momentum_follows_a_map_faster_because_its_steps_add_up():
    found = means(behaviour.momentum(RUN), "reach")
    plain, half, most = (f"momentum {slow or 0}" for slow in behaviour.MOMENTA)
    # at one step, 0.1, each is far better than the one before
    assert found[plain, 0.1] > 5 * found[half, 0.2] > 50 * found[most, 1.0]
    # where steps add up to the same, they are alike, and at large ones momentum is worse
    assert found[half, 0.1] == pytest.approx(found[plain, 0.1], rel=0.05)
    assert found[most, 0.1] == pytest.approx(found[plain, 0.1], rel=0.1)
    assert found[most, 1.0] > 10 * found[plain, 1.0]


def test_bounded_gradients_forget_outliers_and_cubic_errors_diverge_without_a_limit():
    rows = behaviour.outliers(RUN)
    found = means(rows, "outliers")
    huber = [name for name in behaviour.OUTLIERS if name.startswith("Huber")]
    assert len(huber) == 3
    for name in huber:
        assert found[name, "10 %"] < 0.01 * found["l2", "10 %"]
        assert found[name, "10 %"] < found["l1", "10 %"]
    for name in ("l2", *huber):
        assert found[name, "none"] < 1e-6
    assert 0.01 < found["l1", "none"] < 0.02
    lost = {row["name"]: row["diverged"] for row in rows if row["outliers"] == "10 %"}
    assert {name for name, count in lost.items() if count} == {"l3"}
    assert found["l3", "10 %"] is None
    assert found["l3, limit 4", "10 %"] < 0.05


def test_a_window_and_features_hold_more_pairs_and_both_together_most():
    found = means(behaviour.capacity(RUN), "pairs")
    plain, window, features, both = behaviour.capacity_rules(RUN.window)
    for count in RUN.pairs[1:]:
        assert rising(found, (plain, window, both), count)
        assert found[features, count] < found[both, count]
    assert (
        found[plain, 8] < found[both, 8] < found[window, 8]
    )  # below capacity the window is enough
    assert found[plain, 16] > found[features, 16]
    assert found[plain, 64] < found[features, 64]


def test_the_command_writes_tables_and_a_picture(tmp_path, capsys, monkeypatch):
    small = partial(BehaviourRun, seeds=2, stream=12, late=4, writes=60, pairs=(8, 16))
    monkeypatch.setattr(behaviour, "BehaviourRun", small)
    assert main(["bench", "recall", "--family", "test-time", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for words in (
        "written twice",
        "step / (1 - momentum)",
        "outliers",
        "pairs written",
        "diverges",
    ):
        assert words in out
    found = json.loads((tmp_path / "recall-test-time.json").read_text())
    assert found["command"] == "everlong bench recall --family test-time"
    assert found["config"]["run"]["seeds"] == 2
    assert found["config"]["rules"]["outliers"]["Huber, vector"]["level"] == 4
    for name in behaviour.TABLES:
        assert all(row["diverged"] or row["least"] <= row["mean"] for row in found[name])
    assert (tmp_path / "recall-test-time.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["hmt", "--family", "test-time"], "leave out the recipe 'hmt'"),
        (["--family", "test-time", "--set", "task.steps=1"], "leave out --set"),
        (["--family", "test-tme"], "'test-time'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(words, named, tmp_path, capsys):
    assert main(["bench", "recall", *words, "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"seeds": 1}, "interval"), ({"keys": 17}, "width"), ({"late": 300}, "stream")],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        BehaviourRun(**options)


def test_the_help_names_the_family(capsys):
    assert main(["bench", "recall", "--help"]) == 0
    assert "test-time" in capsys.readouterr().out
