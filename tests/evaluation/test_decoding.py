"""`everlong bench decoding`: equal models, what a token reads, moved clocks, ratios, JSON."""

import json

import pytest
import torch

from everlong import state as states
from everlong.evaluation import decoding
from everlong.evaluation.decoding import DecodingRun, Subject, moved, weight_bytes

TINY = DecodingRun(
    shapes=((64, 2),),
    parameters=300_000,
    read=12,
    cache=8,
    segment_length=4,
    tokens=2,
    rounds=2,
    threads=(1,),
    positions=(512, 1024),
    streamed=512,
    whole=("gla",),
    memory_tokens=2,
    memory_rounds=2,
    hidden_size=24,
    num_heads=3,
)


@pytest.fixture(scope="module")
def models():
    return decoding.measure_models(
        TINY, ["memformer", "memformer encoder-decoder", "transformer_xl"]
    )


@pytest.fixture(scope="module")
def memories():
    return decoding.measure_memories(TINY, ["gla", "sliding_attention"])


def test_models_have_equal_parameters_and_their_own_rows(models):
    assert len(models) == 3
    for row in models:
        assert row["parameters"] == pytest.approx(TINY.parameters, rel=0.01)
        assert row["clock"] == "cpu"
        assert row["stream_cpu"] > 0
        assert row["generate_cpu"] > 0
        each = zip(row["all_bound_cpu"], row["all_stream_cpu"], strict=True)
        assert row["all_fraction"] == pytest.approx([b / s for b, s in each], abs=0.02)
        assert row["speed"] == pytest.approx(models[-1]["stream_cpu"] / row["stream_cpu"])


def test_what_a_segment_reads_once_is_shared_by_its_tokens(models):
    own, twin = (row["weight_bytes"] for row in models[:2])
    writer = 3 * 64 * 64 + 4 * 64  # its maps, and v of each slot
    assert own == 4 * (models[0]["parameters"] - writer * 3 / 4)
    assert twin < own  # half of its layers encode
    assert models[2]["weight_bytes"] == 4 * models[2]["parameters"]


def test_generate_makes_the_tokens_that_are_timed():
    subject = Subject("gated_deltanet", (64, 2), TINY)
    told = []
    subject.model.register_forward_hook(lambda *_: told.append(1))
    subject.generate()
    assert len(told) == subject.tokens == len(subject.next)
    assert weight_bytes(subject.model) == 4 * subject.model.num_parameters()


def test_a_moved_clock_is_the_only_thing_that_moves():
    subject = Subject("sliding_attention", (64, 2), TINY)
    before = states.flatten(subject.state)
    after = states.flatten(moved(subject.state, TINY.read, 5))
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        shift = 5 if path.endswith("position") else 0
        assert torch.equal(after[path], leaf + shift)


def test_a_clock_inside_a_segment_stays():
    subject = Subject("memformer", (64, 2), TINY)
    layers = moved(subject.state, TINY.read, 4)["layers"]
    assert [layer["position"].item() for layer in layers] == [0, 0]
    assert moved(subject.state, TINY.read, 4)["position"].item() == TINY.read + 4


def test_memories_say_how_much_they_read_and_keep_their_size(memories):
    assert [(row["name"], row["read"]) for row in memories] == [
        ("gla", 1024),
        ("sliding_attention", 512),
    ]
    for row in memories:
        assert list(row["positions"]) == ["512", "1024"]
        assert row["times_first"] > 0
        assert len(row["positions"]["512"]["all_decode_cpu"]) == 2


def test_flat_is_the_ratio_of_the_last_position_to_the_first(memories):
    memory = decoding.Alone("gla", TINY)
    spent = {512: [2.0, 4.0, 2.0], 1024: [2.08, 4.4, 2.0]}
    times = {
        ("gla", place): [{"decode": decoding.Spent(wall=1.0, cpu=each)} for each in own]
        for place, own in spent.items()
    }
    row = decoding._flatness("gla", memory, TINY, times)
    assert row["times_first"] == pytest.approx(1.04)
    assert row["flat"]
    times["gla", 1024][0] = {"decode": decoding.Spent(wall=1.0, cpu=2.2)}
    assert not decoding._flatness("gla", memory, TINY, times)["flat"]


def test_written_as_data(models, memories, tmp_path):
    decoding.write(tmp_path / "a" / "decoding.json", TINY, models, memories)
    found = json.loads((tmp_path / "a" / "decoding.json").read_text())
    assert found["command"] == "everlong bench decoding"
    assert (found["models"], found["memories"]) == (models, memories)
    assert found["config"]["parameters"] == TINY.parameters


def test_unknown_models_and_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="memformer"):
        decoding.measure_models(TINY, ["memformr"])
    with pytest.raises(ValueError, match="tokens"):
        DecodingRun(tokens=0)
    for name in ("threads", "positions"):
        with pytest.raises(ValueError, match=f"{name} are .0.: give numbers above 0"):
            DecodingRun(**{name: (0,)})
