"""The comparison of update rules: one layer, of which each rule leaves out its own parts."""

import json

import pytest
import torch

from everlong.evaluation.overwriting import (
    RULES,
    OverwritingRun,
    Rule,
    accuracy,
    measure,
    model_of,
    train,
    write,
)
from everlong.evaluation.recall import summary
from everlong.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig

TINY = OverwritingRun(
    steps=2,
    batch_size=4,
    hidden_size=8,
    test_items=6,
    length=16,
    num_pairs=3,
    num_overwritten=1,
    vocab_size=16,
)


def test_every_rule_over_the_seeds_as_rows_and_as_json(tmp_path):
    told = []
    rows = measure(TINY, (0, 1), tmp_path / "cells", told.append)
    assert [(row["name"], row["seed"], row["asked"]) for row in rows] == [
        (name, seed, asked) for seed in (0, 1) for name in RULES for asked in ("all", "overwritten")
    ]
    assert len(told) == 2 * len(RULES) == len(list((tmp_path / "cells").iterdir()))
    write(tmp_path / "overwriting.json", TINY, rows)
    found = json.loads((tmp_path / "overwriting.json").read_text())
    assert found["rows"] == rows
    assert found["command"] == "everlong bench overwriting"
    assert {row["asked"] for row in summary(rows, "asked")} == {"all", "overwritten"}
    assert rows == measure(TINY, (0, 1), tmp_path / "cells", told.append)  # read back


def test_the_full_rule_is_the_registered_layer_and_the_others_are_parts_of_it():
    config = GatedDeltaNetConfig(8, 1, key_size=8, value_size=8)
    layers = {}
    for name, rule in RULES.items():
        torch.manual_seed(0)
        layers[name] = Rule(config, *rule)
    torch.manual_seed(0)
    whole = GatedDeltaNet(config)
    decay = layers["decay and correction (GatedDeltaNet)"].forget
    torch.testing.assert_close(decay(torch.zeros(1)).exp(), torch.tensor([1 - 2.0**-5]))
    whole.forget.load_state_dict(decay.state_dict())
    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))
    outputs = {name: layer(x)[0] for name, layer in layers.items()}
    assert torch.equal(outputs["decay and correction (GatedDeltaNet)"], whole(x)[0])
    assert len({round(float(y.detach().sum()), 5) for y in outputs.values()}) == len(RULES)
    shared = {name for name, _ in layers["sums (linear attention)"].named_parameters()}
    assert all(
        shared <= {name for name, _ in layer.named_parameters()} for layer in layers.values()
    )


def test_training_changes_a_model_whose_answers_are_shares():
    model = model_of("correction (DeltaNet)", TINY, 0)
    before = model.lm_head.weight.detach().clone()
    train(model, TINY.task(), TINY, 0)
    assert not torch.equal(before, model.lm_head.weight)
    assert 0 <= accuracy(model, TINY.task(), 0, 6)["overwritten"] <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [({"steps": 0}, "steps"), ({"learning_rate": 0.0}, "learning_rate"), ({"length": 3}, "length")],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        OverwritingRun(**options)
