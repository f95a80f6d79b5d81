"""The hybrid bench: stages that end when they are learnt, two forms of one stack, equal sizes."""

import json
from dataclasses import replace

import pytest
import torch

from everlong.cli import families as command
from everlong.errors import Diverged, UserError
from everlong.evaluation import families, hybrid
from everlong.evaluation.curriculum import until_learnt
from everlong.models.config import EverlongConfig
from everlong.models.sizing import build
from everlong.registry import memory_entry

TINY = hybrid.HybridRun(
    steps=2, batch_size=4, hidden_size=8, num_heads=2, key_size=1, vocab_size=16, test_items=6
)


def staged(scores, **options):
    """The stages of 12 steps, looked at after every second one, as `scores` has it."""
    found = iter(scores)
    return list(
        until_learnt([2, 4, 8], 12, 2, lambda stage, step: stage, lambda _: next(found), **options)
    )


def test_a_stage_ends_when_it_is_learnt_and_the_last_one_when_it_is_solved():
    assert staged([0.95, 0.5, 0.9, 0.9, 0.998]) == [2] * 2 + [4] * 4 + [8] * 4
    assert staged([0.0] * 5) == [2] * 12


def test_in_a_hurry_a_stage_takes_half_of_what_is_left():
    assert staged([0.0] * 5, hurry=True) == [2] * 6 + [4] * 4 + [8] * 2
    assert staged([1.0, 0.0, 0.0, 0.0, 0.0], hurry=True) == [2] * 2 + [4] * 6 + [8] * 4


@pytest.mark.parametrize("kind", hybrid.KINDS)
def test_the_forms_differ_in_their_last_layer(kind):
    run = replace(TINY, hidden_size=16, key_size=4, vocab_size=32)
    pure, mixed = (hybrid.model_of(kind, form, run, 0) for form in hybrid.FORMS)
    names = [
        [type(block.mixer).__name__ for block in model.body.core.blocks] for model in (pure, mixed)
    ]
    assert names[0][0] == names[1][0] == "Convolution"
    assert names[0][:4] == names[1][:4]
    assert len(set(names[0][1:])) == 1
    assert names[1][4] == "Attention"
    if "key_size" in memory_entry(kind).fields:
        memory = pure.init_state(1)["layers"][1]["memory"]
        assert memory.shape[:3] == (1, 2, 4)
        assert run.pairs == 16


def test_the_convolution_is_a_layer_that_can_be_cut_anywhere():
    torch.manual_seed(0)
    layer = hybrid.Convolution(6)
    x = torch.randn(2, 9, 6)
    whole, after = layer(x)
    first, state = layer(x[:, :4])
    second, state = layer(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state["tail"], after["tail"])
    moved = x.clone()
    moved[:, 5] += 1
    changed = (layer(moved)[0] != whole).any(-1).any(0)
    assert changed.tolist() == [False] * 5 + [True] * 4  # a position, and the three behind it


def test_every_kind_over_the_seeds_is_measured_once(tmp_path, monkeypatch):
    told = []
    rows = hybrid.recall(TINY, ("gla", "hgrn"), (0, 1), tmp_path, told.append)
    assert [(row["seed"], row["name"], row["form"]) for row in rows] == [
        (seed, kind, form) for seed in (0, 1) for kind in ("gla", "hgrn") for form in hybrid.FORMS
    ]
    assert {row["steps"] for row in rows} == {2}
    assert len(told) == len(list(tmp_path.iterdir())) == 8
    assert rows[1]["state_bytes"] > rows[0]["state_bytes"]
    monkeypatch.setattr(hybrid, "fit", None)  # nothing is trained again
    assert rows == hybrid.recall(TINY, ("gla", "hgrn"), (0, 1), tmp_path, told.append)
    assert {(row["name"], row["form"]) for row in hybrid.recall_summary(rows)} == {
        (kind, form) for kind in ("gla", "hgrn") for form in hybrid.FORMS
    }
    with pytest.raises(UserError, match="other options"):
        hybrid.recall(replace(TINY, steps=3), ("gla",), (0,), tmp_path, told.append)


def test_attention_alone_learns_what_the_bench_asks(tmp_path):
    """Trained long enough on few pairs, the hybrid answers held-out items: the task can be done."""
    run = hybrid.HybridRun(
        steps=400, hidden_size=16, num_heads=2, key_size=1, vocab_size=12, test_items=128
    )
    (row,) = [
        row
        for row in hybrid.recall(run, ("gla",), (0,), tmp_path, lambda _: None)
        if row["form"] == hybrid.HYBRID
    ]
    assert row["accuracy"] >= 0.9


def test_ratios_have_equal_parameters_and_the_attention_they_name():
    options = {"gla": {"gate_rank": 3}}
    config = EverlongConfig(
        hidden_size=32, num_layers=8, num_heads=2, layers=["gla"], mixers=options, dropout=0.1
    )
    sizes = {}
    for ratio, attention in hybrid.RATIOS.items():
        model = hybrid.language_config(config, ratio)
        assert (model.mixers, model.dropout) == (options, 0.1)
        assert model.layer_names.count("attention") == attention
        assert len(model.layer_names) == 8
        sizes[ratio] = build(model, 0).num_parameters()
    assert max(sizes.values()) <= 1.01 * min(sizes.values())


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The command with so many changes of its recipe more."""
    from everlong import recipes

    text = tmp_path / "text.txt"
    text.write_text("What is kept, and what is forgotten? " * 40)
    monkeypatch.setattr(hybrid, "HybridRun", lambda: TINY)
    changes = (
        f"data.source={text}", "data.context=64", "model.hidden_size=32", "train.steps=1",
        "train.segment_length=16", "train.warmup_steps=1", "train.batch_size=2",
        "train.checkpoint_every=0",
    )  # fmt: skip

    def call(*more, say=lambda _: None):
        recipe = recipes.load("hybrid_language", (*changes, *more))
        command.bench_hybrid(recipe, ("gla",), (0,), tmp_path / "out", say)
        return json.loads((tmp_path / "out" / "hybrid.json").read_text())

    return call


def test_the_command_writes_both_parts_and_a_picture(tiny, tmp_path, capsys):
    found = tiny()
    assert [row["form"] for row in found["summary"]["recall"]] == list(hybrid.FORMS)
    assert [row["name"] for row in found["summary"]["language"]] == list(hybrid.RATIOS)
    growing = [row["state_bytes"] for row in found["summary"]["language"]]
    assert growing[-1] > growing[0]
    assert list(found["config"]["language"]["models"]) == list(hybrid.RATIOS)
    assert (tmp_path / "out" / "hybrid.png").stat().st_size > 10_000
    assert "one attention layer in four" in capsys.readouterr().out
    with pytest.raises(UserError, match="other options"):
        tiny("model.dropout=0.5")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ('model.layers=["attention"]', "one linear kind"),
        ('model.layers=["gla*3", "attention"]', "one linear kind"),
        ("model.num_layers=6", "num_layers is 6"),
        ("model.hidden_size=4", "hidden_size 4"),
        ("train.device=cuda", "cuda"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(tiny, change, word):
    told = []
    with pytest.raises(ValueError, match=word):
        tiny(change, say=told.append)
    assert not told


def test_a_training_that_diverges_leaves_the_rest(tiny, monkeypatch, capsys):
    measure = families.measure

    def sometimes(name, *rest):
        if name == "3:1":
            raise Diverged("step 2 diverged; lower the rate")
        return measure(name, *rest)

    monkeypatch.setattr(families, "measure", sometimes)
    found = tiny()
    assert found["diverged"] == [{"name": "3:1", "seed": 0, "error": "step 2 diverged"}]
    assert len(found["rows"]["language"]) == len(hybrid.RATIOS) - 1
    assert "3:1, seed 0: step 2 diverged" in capsys.readouterr().out


def test_a_cell_that_was_begun_with_other_options_is_not_gone_on_with(tiny, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    streamed = families._streamed_bytes
    monkeypatch.setattr(families, "_streamed_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny()
    monkeypatch.setattr(families, "_streamed_bytes", streamed)
    with pytest.raises(UserError, match="begun with other options"):
        tiny("train.learning_rate=1e-5")
    assert len(tiny()["rows"]["language"]) == len(hybrid.RATIOS)
