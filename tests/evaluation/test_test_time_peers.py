"""`everlong bench cost --peers`, its second part: our Titans beside titans-pytorch's."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from everlong.cli import cost
from everlong.evaluation import cost_peers, test_time_peers
from everlong.evaluation.test_time_peers import (
    COARSE,
    FORMS,
    GATES,
    ONE_CALL,
    OURS,
    LearnersRun,
    left_out,
    make,
    measure,
    their_bytes,
    titans_pytorch,
    write,
)
from everlong.registry import create_memory

TINY = LearnersRun(length=16, width=8, heads=2, refreshes=(2, 4), rounds=2, threads=(1,))
installed = pytest.mark.skipif(
    importlib.util.find_spec("titans_pytorch") is None, reason="the extra `peers` is not installed"
)


class FakeState(NamedTuple):
    seq_index: int
    weights: dict[str, torch.Tensor]
    cache_store_segment: torch.Tensor | None
    states: tuple[Any, Any]
    updates: Any


class FakeMemory(nn.Module):
    """The signature of NeuralMemory: weights that are one sum, and a template without gradient."""

    def __init__(self, dim, heads, dim_head, model, chunk_size, batch_size, **options):
        super().__init__()
        assert heads * dim_head == dim
        assert batch_size % chunk_size == 0
        self.memory_model = model
        self.memory_model_parameters = nn.ParameterList([torch.ones(dim)])
        self.calls = []

    def forward(self, x, state=None):
        self.calls.append(x.shape[1])
        last = 0 * self.memory_model_parameters[0] if state is None else state.weights["w"]
        y = x * self.memory_model_parameters[0] + last
        weights = {"w": last + x.sum((0, 1))}
        past = (weights, {"w": torch.zeros_like(weights["w"])})
        return y, FakeState(0, weights, x[:, :0], past, {"w": y})


def FakeMLP(size, depth, expansion_factor):
    return nn.Linear(size, int(size * expansion_factor))


FAKE = SimpleNamespace(NeuralMemory=FakeMemory, MemoryMLP=FakeMLP)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    """What is timed is tested elsewhere: a quick memory, and no extra."""

    def stand_in(name, hidden_size, num_heads, **options):
        assert name == "titans"
        return create_memory("gated_deltanet", hidden_size=hidden_size, num_heads=num_heads)

    monkeypatch.setattr(test_time_peers, "create_memory", stand_in)
    monkeypatch.setattr(test_time_peers, "titans_pytorch", lambda: FAKE)


def test_a_row_for_every_number_of_threads_refresh_and_form():
    before, seen = torch.get_num_threads(), []
    config = replace(TINY, threads=(1, 2))
    rows = measure(config, finished=lambda now: seen.append(len(now)))
    expected = [(n, c, form) for n in (1, 2) for c in (2, 4) for form in FORMS]
    assert [(row["threads"], row["refresh"], row["form"]) for row in rows] == expected
    assert seen == [len(rows) // 2, len(rows)]  # what is finished can be kept
    assert torch.get_num_threads() == before
    for row in rows:
        clock = row["clock"]
        assert clock == {1: "cpu", 2: "wall"}[row["threads"]]
        for key in ("forward", "backward", "both"):
            assert row[f"{key}_{clock}"] > 0
            assert len(row[f"all_{key}_wall"]) == (1 if row["form"] == GATES else TINY.rounds)
        assert row["tokens_per_second"] == pytest.approx(1000 * 16 / row[f"both_{clock}"])
        assert (row["times_ours"] == 1) or row["form"] != OURS
        assert row["live_bytes"] > 0
        assert row["live_tokens"] == 8


@pytest.mark.parametrize(
    ("form", "call", "chunk"), [(GATES, 4, 1), (ONE_CALL, 16, 1), (COARSE, 4, 4)]
)
def test_theirs_is_called_as_its_row_says(form, call, chunk, monkeypatch):
    made = []

    def remembered(*args, **options):
        made.append(FakeMemory(*args, **options))
        return made[-1]

    monkeypatch.setattr(FAKE, "NeuralMemory", remembered)
    learner = make(form, 4, TINY)
    y, _ = learner.read(torch.randn(1, 16, 8))
    assert y.shape == (1, 16, 8)
    assert made[0].calls == [call] * (16 // call)
    assert learner.options["call"] == call
    assert learner.options["chunk_size"] == chunk
    assert learner.options["batch_size"] == 4
    assert list(learner.trained) == ["memory_model_parameters.0"]  # not the template


def test_bytes_of_a_state_are_what_the_next_call_reads_each_tensor_once():
    w, m, waiting = torch.zeros(2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 5, 4)
    state = FakeState(0, {"w": w}, waiting, ({"w": w}, {"w": m}), {"w": torch.zeros(100)})
    assert their_bytes(state) == 4 * (6 + 6 + 20)
    assert their_bytes(state._replace(weights={"w": w.clone()})) == 4 * (12 + 6 + 20)


def test_what_has_no_gradient_is_no_comparison(monkeypatch):
    class Frozen(FakeMemory):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.unused = nn.Parameter(torch.ones(1))

    monkeypatch.setattr(FAKE, "NeuralMemory", Frozen)
    with pytest.raises(AssertionError, match="unused has no gradient"):
        measure(TINY)


def test_what_leaves_float32_is_no_comparison(monkeypatch):
    class Wild(FakeMemory):
        def forward(self, x, state=None):
            y, state = super().forward(x, state)
            return y * float("inf"), state

    monkeypatch.setattr(FAKE, "NeuralMemory", Wild)
    with pytest.raises(AssertionError, match="not finite"):
        measure(TINY)


def test_a_form_that_needs_more_memory_than_there_is_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(test_time_peers, "memory_bytes", lambda: 0)
    told = []
    rows = measure(TINY, told.append)
    assert [row["form"] for row in rows] == [OURS, OURS]
    assert left_out(TINY, rows) == [(form, c) for c in (2, 4) for form in FORMS[1:]]
    assert sum(line.startswith("left out") for line in told) == 4


def test_written_with_provenance(tmp_path):
    rows = measure(TINY)
    write(tmp_path / "test-time-peers.json", TINY, rows)
    read = json.loads((tmp_path / "test-time-peers.json").read_text())
    assert read["command"] == "everlong bench cost --peers"
    assert read["rows"] == rows
    assert read["left_out"] == []
    assert read["peer"].startswith("titans-pytorch ")
    assert read["config"]["refreshes"] == [2, 4]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"threads": (0,)}, "threads are"),
        ({"refreshes": ()}, "refreshes is"),
        ({"refreshes": (16, 24)}, "length is 2048: give a multiple of 24"),
        ({"heads": 3}, "width is 256"),
        ({"rounds": 0}, "rounds is 0"),
        ({"length": 8.0}, "length must be a whole number"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        LearnersRun(**options)


def test_a_missing_extra_is_one_line_that_names_it(monkeypatch):
    monkeypatch.setattr(test_time_peers, "titans_pytorch", titans_pytorch)
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    with pytest.raises(ValueError, match=r'pip install "everlong\[peers\]"') as refused:
        measure(TINY)
    assert "\n" not in str(refused.value)


def _command(monkeypatch, out: Path) -> None:
    """`bench cost --peers` without the scans and the whole models."""
    monkeypatch.setattr(cost, "_bench_models", lambda *words: None)
    monkeypatch.setattr(cost_peers, "measure", lambda *args: [])
    monkeypatch.setattr(test_time_peers, "LearnersRun", lambda: TINY)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: True)
    cost.bench_peers("cpu", out, lambda line: None)


def test_the_command_prints_a_table_and_writes_the_rows(monkeypatch, tmp_path, capsys):
    _command(monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for form in FORMS:
        own = [line for line in lines if line.startswith(f"{form}  ")]
        assert [line.split(" tokens ")[0].split()[-1] for line in own] == ["2", "4"]
    rows = json.loads((tmp_path / "test-time-peers.json").read_text())["rows"]
    assert len(rows) == 2 * len(FORMS)


def test_the_command_says_what_it_leaves_out(monkeypatch, tmp_path, capsys):
    def missing():
        raise ValueError('titans-pytorch cannot be imported: pip install "everlong[peers]"')

    monkeypatch.setattr(test_time_peers, "titans_pytorch", missing)
    _command(monkeypatch, tmp_path)
    assert 'not timed: titans-pytorch cannot be imported: pip install "everlong[peers]"' in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "test-time-peers.json").exists()


@installed
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_theirs_refreshes_its_weights_and_trains_all_that_is_called_trained(monkeypatch):
    monkeypatch.setattr(test_time_peers, "titans_pytorch", titans_pytorch)
    learner, whole = make(GATES, 4, TINY), make(ONE_CALL, 4, TINY)
    torch.testing.assert_close(list(learner.trained.values()), list(whole.trained.values()))
    x = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    y, state = learner.read(x)
    torch.testing.assert_close(y, whole.read(x)[0])  # calls of a refresh compute the same
    y.square().sum().backward()
    for name, leaf in learner.trained.items():
        assert leaf.grad is not None, name
        assert leaf.grad.abs().max() > 0, name
    network = sum(p.numel() for k, p in learner.trained.items() if "memory_model_p" in k)
    assert their_bytes(state) == 4 * 2 * network  # the weights and their momentum
    memory = titans_pytorch().NeuralMemory(dim=8, heads=2, dim_head=4, batch_size=4)
    _, _, (loss, _) = memory(x[:, :1].expand(1, 16, 8), return_surprises=True)
    told = loss[0, 0].detach().view(4, 4)  # one token again and again: its surprise, by refresh
    torch.testing.assert_close(told, told[:, :1].expand(4, 4))
    assert told[0, 0] != told[1, 0]


@installed
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_both_are_measured(monkeypatch):
    monkeypatch.setattr(test_time_peers, "titans_pytorch", titans_pytorch)
    monkeypatch.setattr(test_time_peers, "create_memory", create_memory)
    rows = measure(replace(TINY, rounds=1))
    assert [row["form"] for row in rows] == [*FORMS, *FORMS]
    for row in rows:
        if row["form"] == OURS:
            assert len({held for _, held in row["state_bytes"]}) == 1
