"""What a memory costs: numbers are measured, the estimate is near what training holds."""

import pytest
import torch

from everlong import EverlongConfig, EverlongForCausalLM
from everlong import state as states
from everlong.evaluation.cost import estimate_training, memory_row, stream_bytes
from everlong.evaluation.meters import LiveBytes
from everlong.registry import list_memories
from everlong.training.horizon import Horizon

S = 16


def model(**options):
    torch.manual_seed(0)
    segment = {"name": "memformer", "segment_length": S, "num_slots": 4}
    shape = {"hidden_size": 32, "num_heads": 2, "num_layers": 2, "segment": segment}
    return EverlongForCausalLM(EverlongConfig(**shape | options))


@pytest.mark.parametrize("name", list_memories())
def test_a_row_of_the_table_is_measured(name):
    row = memory_row(name)
    assert row["name"] == name
    assert row["bytes"] > 0


def blocks():
    while True:
        yield torch.zeros(1, S, dtype=torch.long)


def test_bytes_of_a_stream_are_those_of_its_state_where_asked():
    bounded = model()
    found = stream_bytes(bounded, blocks(), [30, 2, 1])
    assert found == dict.fromkeys((1, 2, 30), states.num_bytes(bounded.init_state(1)))
    growing = stream_bytes(model(segment=None), blocks(), [1, 10])
    assert growing[10] > growing[1]


def test_a_stream_that_ends_too_early_says_so():
    with pytest.raises(ValueError, match="after 3 segments of 4"):
        stream_bytes(model(), [torch.zeros(1, S, dtype=torch.long)] * 3, [4])


@pytest.mark.parametrize(("method", "alive"), [("replay", 1), ("full", 4)])
def test_the_estimate_is_near_what_a_training_step_holds(method, alive):
    net, rows, count = model(), 8, 4

    def segment(size):
        return torch.arange(size * S).view(size, S) % 256

    def step(ids, state):
        logits, state = net.stream(ids, state)
        return logits.float().logsumexp(-1).sum(), state

    buffered = count + 1 if method == "replay" else 1
    found = estimate_training(net, segment, step, rows=rows, buffered=buffered, alive=alive)
    assert found.parameters == sum(p.numel() * 4 for p in net.parameters())
    assert (found.gradients, found.optimizer) == (found.parameters, 2 * found.parameters)
    assert all(p.grad is None for p in net.parameters())
    with LiveBytes() as live:
        Horizon(method)(step, [segment(rows)] * count, net.init_state(rows))
    estimated = found.gradients + found.states + found.activations
    assert estimated == pytest.approx(live.peak, rel=0.25)
    assert found.total == estimated + found.parameters + found.optimizer
