"""Recipes: every shipped one is read, built and run; mistakes are named where they stand."""

import json

import pytest

import everlong
from cli.tiny import TINY, sets, small_memory
from everlong import recipes
from everlong.cli.families import _contender
from everlong.cli.prepare import build, load_texts, model_config, twin_config
from everlong.evaluation.recall import FAMILIES
from everlong.registry import memory_entry
from everlong.training.config import TrainConfig

TEXTS = [name for name in recipes.shipped() if not recipes.load(name).task]


def test_the_shipped_recipes_are_those_promised():
    assert {"default", "demo", "smoke", "sotu", "encoder_decoder", "recall"} <= {*recipes.shipped()}


@pytest.mark.parametrize("name", TEXTS)
def test_a_shipped_recipe_makes_its_model_and_its_training(name):
    recipe = recipes.load(name)
    texts = load_texts(recipe.data)
    model = build(model_config(recipe, texts), seed=0)
    TrainConfig(**recipe.train).for_model(model)
    if recipe.twin:
        config = recipe.model["segment"]["segment_length"]
        twin = build(twin_config(model.config, config), seed=0)
        assert twin.config.segment["name"] == "no_memory"
        assert twin.num_parameters() == pytest.approx(model.num_parameters(), rel=0.01)


def test_the_default_is_a_memformer_of_about_a_million_parameters_trained_by_replay():
    recipe = recipes.load("default")
    model = build(model_config(recipe, load_texts(recipe.data)), seed=0)
    assert 0.8e6 < model.num_parameters() < 1.5e6
    assert (model.config.segment["name"], model.config.vocab_size) == ("memformer", 259)
    assert recipe.train["horizon"] == "replay"
    assert 4 <= recipe.train["segments"] <= 8
    assert not recipe.twin
    assert recipes.load("demo").twin
    assert recipes.load("demo").model == recipe.model


@pytest.mark.parametrize("name", TEXTS)
def test_a_shipped_recipe_trains_and_is_measured(name, call, briefly, tmp_path):
    memory = small_memory(recipes.load(name).model)
    changes = sets(*TINY, *memory, "data.source=moby_dick")
    code, out, err = call("train", name, "--out", tmp_path / "run", *changes)
    assert code == 0, err
    assert "bits per byte" in out
    assert str(tmp_path / "run") in out
    assert ("twin" in out) == recipes.load(name).twin


def test_the_recall_recipe_trains_and_is_measured(call, tmp_path):
    changes = sets("task.steps=2", "task.test_items=8", "task.distractors=[0, 2]")
    code, out, err = call("train", "recall", "--out", tmp_path / "run", *changes)
    assert code == 0, err
    assert "memory wiped" in out
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_the_recall_benchmark_compares_both_forms_with_their_controls(call, tmp_path):
    changes = ("task.steps=1", "task.test_items=4", "task.distractors=[1]", "task.seeds=[0]")
    code, out, err = call("bench", "recall", "--out", tmp_path, *sets(*changes))
    assert code == 0, err
    for name in ("encoder-decoder", "causal", "horizon 1", "sliding window", "memory wiped"):
        assert name in out
    assert (tmp_path / "recall.json").exists()


def test_a_family_is_compared_on_the_recall_task_and_what_is_finished_is_kept(call, tmp_path):
    changes = ("task.steps=1", "task.test_items=4", "task.distractors=[1]", "task.seeds=[0]")
    words = ("bench", "recall", "--family", "recurrence", "--out", tmp_path)
    code, _, err = call(*words, *sets(*changes))
    assert code == 0, err
    found = json.loads((tmp_path / "recall-recurrence.json").read_text())
    names = {row["name"] for row in found["summary"]}
    assert set(FAMILIES["recurrence"]) <= names
    assert any("looks ahead" in name for name in names)
    assert all(row["state_bytes"] > 0 for row in found["rows"])
    assert (tmp_path / "recall-recurrence.png").read_bytes().startswith(b"\x89PNG")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "recall-recurrence").iterdir()}
    assert len(times) == len(names)
    assert call(*words, *sets(*changes))[0] == 0
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    code, _, err = call(*words, *sets(*changes, "task.steps=2"))
    assert code == 2
    assert "other options" in err
    code, _, err = call("bench", "recall", "--family", "recurrrence")
    assert code == 2
    assert "'recurrence'" in err


def test_memories_are_compared_on_a_text_at_equal_parameters(call, tmp_path):
    changes = [change for change in TINY if not change.startswith("model.num_layers")]
    words = ("bench", "language", "memformer", "no_memory", "sliding_attention")
    words = (*words, "--seeds", "0", "--seeds", "1")
    code, _, err = call(*words, "--out", tmp_path, *sets(*changes))
    assert code == 0, err
    found = json.loads((tmp_path / "language.json").read_text())
    assert [row["seed"] for row in found["rows"]] == [0, 0, 0, 1, 1, 1]
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {"memformer", "no_memory", "sliding_attention"}
    sizes = [row["parameters"] for row in rows.values()]
    assert max(sizes) <= 1.01 * min(sizes) * 1.01
    assert len({row["tokens"] for row in rows.values()}) == 1
    alone = rows["no_memory"]
    assert alone["wiped_bits_per_byte"] == pytest.approx(alone["bits_per_byte"], abs=1e-5)
    assert rows["memformer"]["wiped_bits_per_byte"] != rows["memformer"]["bits_per_byte"]
    assert (tmp_path / "language.png").exists()
    bits = [row["bits_per_byte"] for row in found["summary"]]
    assert bits == sorted(bits)
    cell = tmp_path / "language" / "memformer-0" / "cell.json"
    before = cell.stat().st_mtime_ns
    assert call(*words, "--out", tmp_path, *sets(*changes))[0] == 0
    assert cell.stat().st_mtime_ns == before
    for change in ("train.learning_rate=1e-4", "data.validation=0.003"):
        code, _, err = call(*words, "--out", tmp_path, *sets(*changes, change))
        assert code == 2
        assert "other options" in err


@pytest.mark.parametrize("name", everlong.list_memories())
def test_a_memory_is_compared_with_segments_of_the_training(name):
    base = recipes.load(
        "families", ["train.segment_length=32", "model.segment.num_slots=8", "model.hidden_size=64"]
    )
    model = _contender(base, name).model
    options = {**model.get("segment", {}), **model.get("mixers", {}).get(name, {})}
    fields = memory_entry(name).fields
    assert model["hidden_size"] == 64
    assert options.get("segment_length") == (32 if "segment_length" in fields else None)
    assert options.get("num_slots") == (8 if "num_slots" in fields else None)


def test_seeds_are_whole_numbers_from_zero(call):
    for bench in ("copy", "delayed", "mixture", "language"):
        code, _, err = call("bench", bench, "--seeds", "-1")
        assert code == 2
        assert "seeds" in err


def test_a_recipe_of_ones_own_starts_from_a_shipped_one(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('base = "default"\n[model.segment]\nnum_slots = 5\n')
    recipe = recipes.load(str(file), ["train.steps=7", "data.source=sotu", "model.dropout = 0.1"])
    base = recipes.load("default")
    assert recipe.model["segment"] == {**base.model["segment"], "num_slots": 5}
    assert (recipe.train["steps"], recipe.data.source, recipe.model["dropout"]) == (7, "sotu", 0.1)
    assert recipe.train["batch_size"] == base.train["batch_size"]


def test_another_segment_memory_keeps_only_the_options_it_shares(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('base = "default"\n[model.segment]\nname = "no_memory"\n')
    length = recipes.load("default").model["segment"]["segment_length"]
    wanted = {"name": "no_memory", "segment_length": length}
    assert recipes.load(str(file)).model["segment"] == wanted
    changed = recipes.load("default", ["model.segment.name=no_memory"])
    assert changed.model["segment"] == wanted
    file.write_text('base = "default"\n[model.segment]\nname = "no_memori"\n')
    with pytest.raises(ValueError, match="'no_memory'"):
        recipes.load(str(file))


def test_a_base_is_found_beside_the_file_that_names_it(tmp_path):
    (tmp_path / "a.toml").write_text('base = "./b.toml"\ntwin = true\n')
    (tmp_path / "b.toml").write_text("[train]\nsteps = 3\n")
    recipe = recipes.load(str(tmp_path / "a.toml"))
    assert recipe.twin
    assert recipe.train == {"steps": 3}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nstep = 3\n", ["[train] step", "'steps'"]),
        ("[model]\nhiden_size = 3\n", ["[model] hiden_size", "'hidden_size'"]),
        ("[data]\nsorce = 'x'\n", ["[data] sorce", "'source'"]),
        ("[trian]\n", ["trian", "'train'"]),
        ("twin = 3\n", ["twin must be true or false"]),
        ("train = 3\n", ["train must be a section"]),
        ("[data]\nsource = 3\n", ["source must be a string"]),
        ("base = 'defualt'\n", ["'defualt'", "'default'"]),
        ("base = 'mine.toml'\n", ["circle"]),
        ("a = [\n", ["not valid TOML"]),
    ],
)
def test_a_mistake_in_a_recipe_names_the_file_and_what_was_meant(
    text, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=r"mine\.toml|defualt") as caught:
        recipes.load("mine.toml")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "change", ["steps", "=3", "train..steps=3", "train.step=3", "data.source.x=1"]
)
def test_a_wrong_change_is_refused_by_its_own_name(change):
    with pytest.raises(ValueError, match="--set"):
        recipes.load("default", [change])


def test_a_recipe_that_is_missing_or_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'smoke'"):
        recipes.load("smok")
    with pytest.raises(ValueError, match=r"gone\.toml cannot be read"):
        recipes.load(str(tmp_path / "gone.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        recipes.load(str(tmp_path / "bytes.toml"))


def test_another_segment_memory_takes_the_old_ones_place_and_keeps_what_they_share():
    base = recipes.load("default")
    recipe = recipes.with_memory(base, "no_memory")
    length = base.model["segment"]["segment_length"]
    assert recipe.model["segment"] == {"name": "no_memory", "segment_length": length}
    assert recipe.model["layers"] == base.model["layers"]


def test_a_mixer_becomes_every_layer_and_reads_as_much_at_once_as_a_segment():
    base = recipes.load("default", ["model.mixers.sliding_attention.window=9"])
    recipe = recipes.with_memory(base, "sliding_attention")
    assert not recipe.model["segment"]
    assert recipe.model["layers"] == ["sliding_attention"]
    assert recipe.model["mixers"] == {"sliding_attention": {"window": 9}}
    assert recipe.train["segment_length"] == base.model["segment"]["segment_length"]
    config = model_config(recipe, load_texts(recipe.data))
    assert config.segment is None
    assert set(config.layer_names) == {"sliding_attention"}


def test_a_recipe_survives_being_written_into_a_run():
    recipe = recipes.load("demo")
    assert recipes.Recipe.from_table(recipe.table(), recipe.origin) == recipe


def test_an_empty_section_takes_the_base_s_away(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('base = "default"\n[model]\nlayers = ["sliding_attention"]\nsegment = {}\n')
    recipe = recipes.load(str(file))
    assert recipe.model["segment"] == {}
    assert recipe.model["hidden_size"] == recipes.load("default").model["hidden_size"]
