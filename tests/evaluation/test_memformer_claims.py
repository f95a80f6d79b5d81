"""The Memformer paper's claims: ablations are what they say, costs are counted, tables are data."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from everlong.cli import memformer_claims as command
from everlong.errors import UserError
from everlong.evaluation import memformer_length as length
from everlong.evaluation import memformer_pixels as pixels
from everlong.evaluation import memformer_roles as roles
from everlong.evaluation import memformer_text as text
from everlong.evaluation.memformer_ablations import Discarding, Unforgetting, one_head, rewrite
from everlong.models.config import EverlongConfig
from everlong.models.sizing import build
from everlong.segments.memformer import MemformerConfig, SlotWriter
from everlong.stateful import Trace
from everlong.tasks import pixels as task

ROOT = Path(__file__).parents[2]


@pytest.fixture
def drawn(monkeypatch):
    """Twenty-four digits of noise in the real ones' place."""
    images = np.random.default_rng(0).integers(0, 4, (24, 64))
    monkeypatch.setattr(task, "digits", lambda levels: images)


@pytest.fixture
def writer():
    torch.manual_seed(0)
    return SlotWriter(MemformerConfig(8, 2, segment_length=4, num_slots=3))


def written(writer, trace=None):
    generator = torch.Generator().manual_seed(1)
    slots = torch.nn.functional.normalize(torch.randn(2, 3, 8, generator=generator), dim=-1)
    return slots, writer(slots, torch.randn(2, 4, 8, generator=generator), trace=trace)


def test_a_discarded_write_leaves_the_first_slots(writer):
    first = writer.fresh(2)
    assert torch.equal(written(Discarding(writer))[1], first)
    assert not torch.allclose(written(writer)[1], first)


def test_without_forgetting_only_the_first_slots_know_v(writer):
    before, plain = writer.fresh(2), written(writer)[1]
    other = Unforgetting(writer)
    assert torch.equal(other.fresh(2), before)
    with torch.no_grad():
        writer.bias.zero_()
    torch.testing.assert_close(written(other)[1], written(writer)[1])
    assert not torch.allclose(plain, written(other)[1])
    assert {name for name, _ in other.named_parameters()} >= {"start"}
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in writer.parameters())


def test_one_head_writes_all_of_a_slot_with_one_weight(writer):
    def taken(writer):
        trace = Trace()
        _, after = written(writer, trace)
        own = trace.records["kept"][0]
        return own, after

    (own, after), (single, alone) = taken(writer), taken(one_head(writer))
    assert not torch.allclose(own, single)
    assert not torch.allclose(after, alone)
    assert writer.config.num_heads == 1


TINY = pixels.PixelsRun(
    steps=1, batch_size=4, hidden_size=16, num_heads=2, slots=(2, 3, 1), caches=(8,),
    task=task.PixelsConfig(test=5),
)  # fmt: skip


def test_every_subject_on_pixels_is_trained_once(drawn, tmp_path, monkeypatch):
    told = []
    rows = pixels.measure(TINY, (0,), tmp_path, told.append)
    names = list(pixels.sized(TINY))
    assert [row["name"] for row in rows] == names
    assert len(told) == len(names) == 11
    sizes = [row["parameters"] for row in rows]
    assert max(sizes) <= 1.02 * min(sizes)
    by_name = {row["name"]: row for row in rows}
    discarded = by_name["memformer, no slots"]
    assert discarded["slots_wiped"] == pytest.approx(discarded["perplexity"])
    assert discarded["roles"] is None
    middle = by_name["memformer, 2 slots"]["roles"]["middle"]
    assert middle["keep"] + middle["mix"] + middle["fed"] == pytest.approx(1)
    monkeypatch.setattr(pixels, "train", None)  # nothing is trained again
    assert rows == pixels.measure(TINY, (0,), tmp_path, told.append)


def test_pixels_are_summed_up_seed_by_seed():
    rows = [
        {"name": name, "seed": seed, "perplexity": value, "state_bytes": 1, "parameters": 2}
        for name, values in {"a": (1.0, 2.0, 3.0), "b": (1.5, 2.5, 3.5)}.items()
        for seed, value in enumerate(values)
    ]
    a, b = pixels.summary(rows, "a")
    assert (a["perplexity"], a["gap"], a["slots_wiped"]) == (2.0, 0.0, None)
    assert (b["gap"], b["gap_interval"]) == (0.5, 0.0)
    assert b["interval"] == pytest.approx(4.30 / 3**0.5)


def test_training_on_pixels_teaches_them(drawn, monkeypatch):
    same = np.tile(np.arange(64) % 4, (24, 1))
    monkeypatch.setattr(task, "digits", lambda levels: same)
    run = pixels.PixelsRun(
        steps=60, learning_rate=0.03, batch_size=4, hidden_size=16, num_heads=2, slots=(2,),
        task=TINY.task,
    )  # fmt: skip
    model = pixels.model_of(pixels.LSTM, pixels.sized(run)[pixels.LSTM], run, 0)
    before = pixels.perplexity(model, run, 0)
    pixels.train(model, run, 0)
    assert pixels.perplexity(model, run, 0) < 0.5 * before


def test_the_lstm_is_a_function_of_input_and_state():
    torch.manual_seed(0)
    model = pixels.LongShortTerm(5, 4, 6, 2)
    ids = torch.randint(5, (3, 7))
    whole, after = model.stream(ids)
    first, state = model.stream(ids[:, :3])
    second, state = model.stream(ids[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, after)


SHORT = length.LengthRun(
    lengths=(8, 16, 32), sizes=(4, 8), num_slots=3, cache=4, rounds=1, rows=2, segment_length=4,
    hidden_size=8, num_heads=2, num_layers=2,
)  # fmt: skip


def test_a_constant_memory_costs_the_same_after_any_length(tmp_path):
    found = length.measure(SHORT, tmp_path, lambda line: None)
    rows = {(row["name"], row["length"]): row for row in found["length"]["rows"]}
    for name in (length.CAUSAL, length.PUBLISHED, length.XL):
        assert rows[name, 8]["state_bytes"] == rows[name, 32]["state_bytes"]
        assert rows[name, 16]["peak_bytes"] == rows[name, 32]["peak_bytes"]
    assert rows[length.CAUSAL, 8]["flops"] == rows[length.CAUSAL, 32]["flops"]
    vanilla = [rows[length.VANILLA, count] for count in SHORT.lengths]
    assert vanilla[0]["state_bytes"] < vanilla[1]["state_bytes"] < vanilla[2]["state_bytes"]
    # 4 operations a unit and pair of tokens: of a segment all pairs, of the first those before
    pairs = {count: sum(4 * end for end in range(4, count + 1, 4)) - 6 for count in (16, 32)}
    grown = 4 * 8 * SHORT.num_layers * (pairs[32] / 32 - pairs[16] / 16)
    assert vanilla[2]["flops"] - vanilla[1]["flops"] == grown
    sizes = {(row["name"], row["places"]): row for row in found["size"]["rows"]}
    assert (
        sizes[length.XL, 8]["state_bytes"] - sizes[length.XL, 4]["state_bytes"]
        == 4 * 4 * 8 * SHORT.num_layers
    )
    assert (
        sizes[length.PUBLISHED, 8]["state_bytes"] - sizes[length.PUBLISHED, 4]["state_bytes"]
        == 4 * 4 * 8
    )
    assert all(row["train_bytes"] > row["read_bytes"] for row in sizes.values())
    length.plot(found, tmp_path / "length.png")
    assert (tmp_path / "length.png").stat().st_size > 10_000


def test_lengths_are_whole_segments():
    with pytest.raises(ValueError, match="multiples of segment_length"):
        length.LengthRun(lengths=(100,))


def scored(**bits):
    return [
        {"name": name.replace("_of_", ", cache "), "seed": seed, "bits_per_byte": value}
        for name, values in bits.items()
        for seed, value in enumerate(values)
    ]


def test_the_cheapest_that_is_as_good_is_compared(monkeypatch):
    monkeypatch.setattr(text, "MEMFORMER", "memformer")
    trained = scored(
        memformer=(2.0, 2.2), transformer_xl_of_1=(2.1, 2.2), transformer_xl_of_2=(2.2, 2.0),
        transformer_xl_of_3=(1.0, 1.0), compressive_of_1=(2.5, 2.5), compressive_of_2=(2.4, 2.5),
    )  # fmt: skip
    names = list(dict.fromkeys(row["name"] for row in trained))
    costs = [
        {"name": name, **dict.fromkeys(text._COSTS, float(index + 1))}
        for index, name in enumerate(names)
    ]
    found = text.equal_quality(trained, costs)
    xl, compressive = found["transformer_xl"], found["compressive"]
    assert xl["equal"] == ["transformer_xl, cache 2", "transformer_xl, cache 3"]
    assert xl["compared"] == "transformer_xl, cache 2"
    assert xl["ratios"]["peak_bytes"] == 3.0
    assert compressive["equal"] == []
    assert compressive["compared"] == "compressive, cache 2"


def test_slots_have_roles_by_their_weight_on_themselves(writer):
    weights = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.2, 0.05]])
    found = roles.shares(weights)
    assert (found["keep"], found["mix"], found["fed"]) == pytest.approx((2 / 6, 1 / 6, 3 / 6))
    with torch.no_grad():
        writer.bias.copy_(torch.eye(3, 8) * torch.tensor([1.0, 2.0, 5.0])[:, None])
    found = roles.speeds(weights, writer)
    assert found["speed"] == pytest.approx(8 / 3)
    assert found["fed_speed"] == pytest.approx((2 * 2 + 5) / 3)
    assert roles.speeds(torch.ones(2, 3), writer)["fed_speed"] is None


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The command on a folder of small texts, with two contenders."""
    (tmp_path / "texts").mkdir()
    for index in range(4):
        words = f"Speech {index}: what is kept, and what is forgotten? " * 30
        (tmp_path / "texts" / f"{index}.txt").write_text(words)
    changes = (
        f"data.source={tmp_path / 'texts'}", "data.validation=0.25", "model.hidden_size=16",
        "model.num_layers=4", "model.num_heads=2", "train.steps=1", "train.warmup_steps=1",
        "train.batch_size=2", "train.segment_length=16", "train.segments=2",
    )  # fmt: skip
    monkeypatch.setattr(text, "CHANGES", changes)
    monkeypatch.setattr(text, "ROLES_STEPS", 2)
    monkeypatch.setattr(text, "CACHES", (8,))
    monkeypatch.setattr(text, "HELD_OUT_BYTES", 400)
    monkeypatch.setattr(roles, "MIDDLE", (5, 20))
    monkeypatch.setattr(command, "_ROUNDS", 1)
    monkeypatch.setattr(length, "LengthRun", lambda: SHORT)
    every = text.contenders
    chosen = (text.MEMFORMER, "transformer_xl, cache 8", "compressive, 16 + 16")
    monkeypatch.setattr(
        text, "contenders", lambda recipe: {name: every(recipe)[name] for name in chosen}
    )

    def call(*parts):
        command.bench_memformer(parts, (0, 1), tmp_path / "out", lambda line: None)
        return json.loads((tmp_path / "out" / "memformer.json").read_text())

    return call


def test_the_command_writes_part_by_part_and_keeps_what_is_there(tiny, monkeypatch, tmp_path):
    found = tiny("roles", "language")
    assert found["config"]["parts"] == ["language", "roles"]
    assert [(row["model"], row["where"]) for row in found["roles"]["summary"]] == [
        (model, where) for model in ("fresh", "trained") for where in ("start", "middle")
    ]
    assert len(found["language"]["rows"]) == 6
    trained = found["roles"]["rows"][0]
    assert trained["tokens"] == 2 * 2 * 2 * 16
    assert trained["trained"]["count"] == 1
    monkeypatch.setattr("everlong.evaluation.families.train", None)  # nothing is trained again
    again = tiny("equal")
    assert again["config"]["parts"] == ["language", "equal", "roles"]
    assert again["roles"] == found["roles"]
    cost = {row["name"]: row["carried_bytes"] for row in again["equal"]["costs"]}
    assert cost[text.MEMFORMER] == 4 * 16 * (32 + 16)  # slots, and the encoding of a segment
    assert cost["transformer_xl, cache 8"] == 4 * 16 * 8 * 4
    assert cost["compressive, 16 + 16"] == 4 * 16 * 32 * 4
    assert {row["name"] for row in again["equal"]["costs"]} == set(
        found["language"]["config"]["models"]
    )
    with pytest.raises(UserError, match="did you mean"):
        tiny("rolse")
    (tmp_path / "out" / "memformer.json").write_text("{}")
    with pytest.raises(UserError, match="give --out another"):
        tiny("equal")


def test_contenders_have_equal_parameters():
    from everlong import recipes

    found = text.contenders(recipes.load("families", text.CHANGES))
    with torch.device("meta"):
        sizes = [build(config, 0).num_parameters() for config in found.values()]
    assert max(sizes) <= 1.01 * min(sizes)
    assert len(found) == 6 + len(text.CACHES)


def test_the_slots_of_a_trained_model_can_be_taken_away():
    memory = {"name": "memformer", "segment_length": 4, "num_slots": 2, "encoder_layers": 1}
    model = build(EverlongConfig(hidden_size=8, num_heads=2, num_layers=1, segment=memory), 0)
    ids = torch.randint(256, (1, 16))
    with torch.no_grad():
        before = model.eval().stream(ids)[0]
        rewrite(model, Discarding)
        after = model.stream(ids)[0]
    torch.testing.assert_close(before[:, :7], after[:, :7])  # the first write is read by its third
    assert not torch.allclose(before[:, 8:], after[:, 8:])
