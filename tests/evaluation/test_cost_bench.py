"""`everlong bench cost`: cells, bytes and FLOPs of every memory; ratios, patience, resuming."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch

from everlong import state as states
from everlong.errors import UserError
from everlong.evaluation import cost_one
from everlong.evaluation.cost_bench import FLAT, CostRun, measure, summary, write
from everlong.evaluation.cost_one import Bench, measure_one, ratio
from everlong.evaluation.cost_subject import Cell, Subject, model_config
from everlong.evaluation.meters import Flops, LiveBytes, formulas
from everlong.evaluation.timing import interleaved, torch_threads, trusted
from everlong.registry import list_memories

TINY = CostRun(
    lengths=(4, 8),
    replayed=(16, 32),
    positions=(16, 40),
    segment=8,
    unbounded_length=8,
    decoded=2,
    near=4,
    pairs=2,
    rounds=2,
    least=1,
    size="small",
    hidden_size=24,
    num_heads=3,
    parameters=100_000,
    model_layers=1,
    model_length=8,
    matmul=32,
)
NAMES = ("attention", "gated_deltanet", "rmt")
PRODUCT = re.compile(r"mm|mv|matmul|dot|conv|attention|einsum|linear|addr|outer")
NOT_ONE = ("_softmax", "convert", "unsafe_view")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cost")


@pytest.fixture(scope="module")
def found(folder):
    return measure(TINY, folder, NAMES)


def test_cells_of_bounded_and_of_growing_memories(found):
    calls = [("read", 4), ("read", 8), ("train", 4), ("train", 8)]
    model = [("model train", 8), ("model decode", 8)]
    more = [("replay", 16), ("replay", 32), ("stream", 16), ("stream", 40)]
    for memory in found:
        bounded = memory["name"] != "attention"
        decode = [("decode", at) for at in ((4, 8, 16, 40) if bounded else (4, 8))]
        expected = [*calls, *(more if bounded else []), *decode, *model]
        assert [(row["kind"], row["length"]) for row in memory["rows"]] == expected
        assert memory["skipped"] == []
        pairs = memory["pairs"]
        assert (pairs["near"], pairs["far"]) == (4, 40 if bounded else 8)
        for row in memory["rows"]:
            assert row["took_cpu"] > 0
            if row["kind"] != "stream":
                assert len(row["all_took_cpu"]) == len(row["all_peak_fraction"]) == TINY.rounds
                assert row["live_bytes"] > 0 < row["flops"]
                assert row.get("finite", True)
        assert memory["model"]["parameters"] == pytest.approx(100_000, rel=0.01)
        held = {row["state_bytes"] for row in memory["rows"] if row["kind"] in ("read", "decode")}
        assert (len(held) == 1) == bounded


@pytest.mark.parametrize("name", list_memories())
def test_every_memory_can_be_measured_and_no_product_goes_uncounted(name):
    """Reading, training and decoding; its model can be built. What multiplies has a formula."""

    class Names(Flops):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket)
            return super().__torch_dispatch__(func, types, args, kwargs)

    called = set()
    subject = Subject(name, TINY)
    with Names():
        for cell in (Cell("read", 4), Cell("decode", 4), Cell("train", 4)):
            assert subject.meter(cell)["flops"] > 0
    assert model_config(name, TINY).num_layers == 1
    lost = {
        packet.__name__
        for packet in called
        if PRODUCT.search(packet.__name__) and packet not in formulas()
    }
    assert {name for name in lost if not name.endswith(NOT_ONE)} == set()


def test_flops_of_products_in_place_of_attention_and_of_their_gradients():
    def count(run):
        with Flops() as flops:
            run()
        return flops.total

    a, b, c = torch.randn(3, 4, 5), torch.randn(3, 5, 6), torch.randn(3, 4, 6)
    product = 2 * 3 * 4 * 5 * 6
    assert count(lambda: a @ b) == count(lambda: c.baddbmm_(a, b)) == product
    assert count(lambda: torch.einsum("bij,bjk->bik", a, b)) == product
    assert count(lambda: c[0].addmm_(a[0], b[0])) == 2 * 4 * 5 * 6
    assert count(lambda: a[0] @ b[0, :, 0]) == 2 * 4 * 5
    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    pairs = 8 * 9 // 2
    assert count(lambda: attend(q, k, v)) == 4 * 2 * 8 * 8 * 4
    assert count(lambda: attend(q, k, v, is_causal=True)) == 4 * 2 * pairs * 4
    y = attend(q, k, v, is_causal=True)
    assert count(lambda: y.sum().backward()) == 5 * (2 * 2 * pairs * 4)


def test_peaks_leave_out_what_was_there():
    held = torch.randn(100, 100)
    with LiveBytes() as live:
        y = held.t() + 1
    assert live.peak == 4 * 100 * 100
    del y
    subject = Subject("gated_deltanet", TINY)
    state = states.num_bytes(subject.read(4))
    subject.meter(Cell("read", 4))
    found = subject.meter(Cell("decode", 4))
    assert found["state_bytes"] == state < found["live_bytes"] < 100 * state


def test_training_by_replay_holds_one_segment_and_gives_the_gradient_of_one_call():
    sizes = {"lengths": (64,), "replayed": (64,), "positions": (65,), "unbounded_length": 64}
    config = replace(TINY, segment=16, **sizes)
    subject = Subject("gated_deltanet", config)
    peaks = [subject.meter(Cell(kind, 64))["live_bytes"] for kind in ("train", "replay")]
    assert peaks[1] < 0.5 * peaks[0]
    assert all(p.grad is None for p in subject.memory.parameters())
    grads = []
    for run in (subject.train, subject.replay):
        subject.forget()
        run(64)
        grads.append([p.grad for p in (*subject.memory.parameters(), subject.below)])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_short_calls_are_repeated_and_decoding_takes_whole_periods():
    subject = Subject("rmt", replace(TINY, least=20))
    subject.meter(Cell("read", 8))
    assert subject.run(Cell("read", 8)) == 24
    assert subject.run(Cell("decode", 8)) == subject.period > TINY.decoded
    assert [x.shape[1] for x in subject.calls(21, 8)] == [8, 8, 5]
    assert [x.shape[1] for x in subject.calls(21, 8, 8)] == [8, 5]


def test_a_stream_is_read_on_from_the_longest_call():
    subject = Subject("gated_deltanet", TINY)
    subject.meter(Cell("read", 8))
    reached, _ = subject.stream([16, 20], 60.0)
    x = torch.cat([subject.inputs, subject.inputs, subject.inputs[:, :4]], 1)
    with torch.no_grad():
        expected = subject.memory.eval()(x)[1]
    assert reached == 20
    for a, b in zip(states.leaves(subject.states[20]), states.leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


def test_what_takes_too_long_is_left_out_and_said(monkeypatch):
    bench = Bench("gated_deltanet", replace(TINY, patience=0.0, longest=1e-9, rounds=1))
    bench.prepare()
    left = [(row["kind"], row["length"]) for row in bench.skipped]
    replays = [("replay", 16), ("replay", 32)]
    assert left == [("read", 8), ("train", 8), *replays, ("decode", 16), ("decode", 40)]
    assert "longest is" in bench.skipped[0]["why"]
    assert bench.skipped[-1]["why"] == "patience of 0.0 s was over after 12 tokens: decoded there"
    assert Cell("decode", 12) in bench.about
    monkeypatch.setattr(cost_one, "memory_bytes", lambda: 1)
    bench = Bench("gated_deltanet", TINY)
    bench.prepare()
    assert bench.skipped[0]["why"].endswith("GB are expected, and 0 allowed")


def test_what_is_slow_is_timed_once():
    found = measure_one("sliding_attention", replace(TINY, once=0.0, rounds=3))
    assert {len(row["all_took_cpu"]) for row in found["rows"] if row["kind"] == "train"} == {1}


def test_a_measured_memory_is_read_from_its_file(found, folder, monkeypatch):
    monkeypatch.setattr("everlong.evaluation.cost_bench.measure_one", None)
    assert measure(TINY, folder, NAMES) == found
    with pytest.raises(UserError, match="other options"):
        measure(replace(TINY, rounds=3), folder, NAMES[:1])


def test_ratios_are_of_medians_with_the_range_of_the_rounds():
    assert ratio([4.0, 6.0, 9.0], [2.0, 2.0, 3.0]) == {"times": 3.0, "range": [2.0, 3.0]}
    assert ratio([4.0], [2.0, 1.0, 5.0]) == {"times": 2.0, "range": [2.0, 2.0]}
    assert ratio([2.0, 1.0, 5.0], [4.0]) == {"times": 0.5, "range": [0.5, 0.5]}


def made(read, train, far):
    """A memory with cells at 4, 8 and 16 tokens."""
    rows = [
        {"kind": kind, "length": length, "took_cpu": cost, "all_took_cpu": [cost]}
        | {"live_bytes": 10 * length, "flops": 7, "peak_fraction": 0.5, "state_bytes": length}
        for kind, costs in (("read", read), ("train", train), ("replay", train), ("decode", read))
        for length, cost in zip((4, 8, 16), costs, strict=True)
    ]
    rows += [{**rows[0], "kind": f"model {kind}"} for kind in ("train", "decode")]
    pairs = {"near": 4, "far": 16, "times": far, "range": [far, far]}
    about = {"name": "x", "bounded": True, "parameters": 1, "model": {}, "skipped": []}
    return {**about, "rows": rows, "pairs": pairs}


def test_the_summary_compares_the_longest_with_the_shortest_and_with_half():
    (one,) = summary([made((10.0, 10.0, 11.0), (20.0, 20.0, 23.0), 1.04)], "cpu")
    assert one["flat"]
    assert one["read"]["times"] == pytest.approx(1.1)
    assert one["read"]["doubled"]["times"] == pytest.approx(2.2)
    assert one["train"]["times"] == pytest.approx(1.15)
    assert one["replay"]["times_bytes"] == 4
    assert (one["state_bytes"], one["state_doubled"]) == (16, 2)
    assert one["decode"]["pairs"]["even"]
    assert one["model"]["train"]["flops"] == 7
    (one,) = summary([made((10.0, 10.0, 11.0), (20.0, 20.0, 25.0), 1.06)], "cpu")
    assert not one["flat"]
    assert not one["decode"]["pairs"]["even"]


def test_written_as_data_and_as_a_picture(found, tmp_path):
    write(tmp_path / "a" / "cost.json", TINY, found)
    read = json.loads((tmp_path / "a" / "cost.json").read_text())
    assert read["command"] == "everlong bench cost"
    assert read["memories"] == found
    assert read["clock"] == "cpu"
    assert [row["name"] for row in read["summary"]] == list(NAMES)
    assert read["config"] == json.loads(json.dumps(asdict(TINY)))
    assert read["environment"]["torch"]
    assert (tmp_path / "a" / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"rounds": "two"}, "rounds must be a whole number"),
        ({"lengths": ()}, "lengths is"),
        ({"lengths": (0, 4)}, "lengths are"),
        ({"lengths": (512,), "unbounded_length": 8}, "unbounded_length is 8"),
        ({"positions": (16384,)}, "positions are [16384]"),
        ({"patience": -1.0}, "patience is -1.0"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        CostRun(**options)


def test_rounds_hold_every_cell_in_orders_that_repeat_under_a_seed():
    cells = list("abcdefgh")
    found = list(interleaved(cells, 3, 0))
    assert [turn for turn, _ in found] == [0, 1, 2]
    assert all(sorted(order) == cells for _, order in found)
    assert found[0][1] != found[1][1]
    assert found == list(interleaved(cells, 3, 0)) != list(interleaved(cells, 3, 1))


def test_threads_are_put_back_and_say_which_clock_is_believed():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    clocks = [trusted(*case) for case in (("cpu", 1), ("cpu", 2), ("cuda", 1))]
    assert clocks == ["cpu", "wall", "wall"]


@pytest.mark.benchmark
def test_a_token_of_a_long_call_costs_what_one_of_a_short_call_costs(tmp_path):
    """The processor's time, for a memory whose caches are full from the first call on."""
    config = CostRun(lengths=(512, 16384), replayed=(16384,), positions=(32768,), rounds=5)
    (found,) = summary(measure(config, tmp_path, ["rmt"]), "cpu")
    assert found["read"]["times"] <= FLAT
    assert found["train"]["times"] <= FLAT
