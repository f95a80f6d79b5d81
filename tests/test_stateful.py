"""The door every memory stands behind: what it lets in, and what `run` is given."""

import pytest
import torch

import everlong
from everlong import state as states
from everlong.stateful import Stateful, Trace
from laws.toys import SegmentMean


class Echo(Stateful):
    """Returns its input doubled, counts positions, and shows what `run` was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def init_state(self, batch_size, *, device=None, dtype=None):
        return {"position": torch.zeros(batch_size, dtype=torch.long, device=device)}

    def run(self, x, state, lengths, trace, **inputs):
        self.calls.append((x, lengths, trace, inputs))
        moved = x.shape[1] if lengths is None else lengths
        return 2 * x, {"position": state["position"] + moved}


X = torch.arange(12.0).view(2, 3, 2)


def test_without_a_state_streams_are_fresh():
    y, state = Echo()(X)
    assert torch.equal(y, 2 * X)
    assert state["position"].tolist() == [3, 3]


def test_without_holes_run_gets_the_input_itself():
    echo, trace = Echo(), Trace()
    for mask in (None, torch.ones(2, 3).bool(), torch.ones(2, 3)):
        echo(X, None, mask, trace, memory="slots")
        x, lengths, seen, inputs = echo.calls.pop()
        assert x is X
        assert lengths is None
        assert seen is trace
        assert inputs == {"memory": "slots"}


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32, torch.uint8])
def test_holes_are_packed_at_the_door_and_outputs_put_back(dtype):
    echo = Echo()
    mask = torch.tensor([[0, 1, 1], [0, 0, 0]], dtype=dtype)
    x = torch.where(mask[..., None] == 1, X, torch.nan)
    y, state = echo(x, None, mask)
    packed, lengths, _, _ = echo.calls.pop()
    assert lengths.tolist() == [2, 0]
    assert torch.equal(packed, torch.stack([X[0, 1:], torch.zeros(2, 2)]))
    assert torch.equal(y, 2 * X * mask[..., None])
    assert state["position"].tolist() == [2, 0]


def test_lengths_say_the_same_of_packed_rows():
    memory = SegmentMean().double()
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[5], [7]])
    _, masked = memory(x, None, mask)
    _, packed = memory(x, lengths=torch.tensor([5, 7]))
    for path, leaf in states.flatten(masked).items():
        assert torch.equal(states.flatten(packed)[path], leaf)


def test_advance_is_the_state_alone():
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    assert Echo().advance(X, None, mask)["position"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0, 0],), "T >= 1"),
        ((X[:, :0],), "T >= 1"),
        ((X, None, torch.ones(2, 4)), r"mask must be \[2, 3\]"),
        ((X, None, torch.ones(3)), r"mask must be \[2, 3\]"),
        ((X[:1], {"position": torch.zeros(2).long()}), "holds 2 rows and x 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Echo()(*arguments)


def test_reset_starts_the_named_rows_anew():
    echo, state = Echo(), {"position": torch.tensor([5, 6])}
    assert echo.reset(state, torch.tensor([True, False]))["position"].tolist() == [0, 6]
    assert echo.reset(state, torch.tensor([False, False])) is state
    assert state["position"].tolist() == [5, 6]


@pytest.mark.parametrize("rows", [torch.tensor([1, 0]), torch.tensor([True]), torch.tensor(True)])
def test_reset_wants_one_bool_a_row(rows):
    with pytest.raises(ValueError, match=r"Bool \[2\]"):
        Echo().reset({"position": torch.tensor([5, 6])}, rows)


def test_a_learned_start_gets_gradients_through_reset():
    memory = SegmentMean()
    state = states.detach(memory(torch.ones(2, 3, 6))[1])
    memory.reset(state, torch.tensor([True, False]))["mean"].sum().backward()
    assert memory.start.grad.tolist() == [1.0] * 6


def test_trace_collects_what_memories_append():
    trace, value = Trace(), torch.ones(2, requires_grad=True)
    trace.loss("balance", value.sum())
    trace.loss("balance", 2 * value.sum())
    trace.record("kept", value * 3)
    assert [loss.item() for loss in trace.losses["balance"]] == [2.0, 4.0]
    assert all(loss.requires_grad for loss in trace.losses["balance"])
    assert not trace.records["kept"][0].requires_grad


def test_defaults_follow_the_parameters():
    memory = SegmentMean().to(torch.bfloat16)
    state = memory.init_state(2)
    assert state["last"].dtype == torch.bfloat16
    assert state["mean"].dtype == torch.float32
    assert memory.init_state(2, dtype=torch.float64)["last"].dtype == torch.float64


def test_what_a_memory_must_write():
    with pytest.raises(NotImplementedError):
        Stateful().init_state(1)
    with pytest.raises(NotImplementedError):
        Stateful().run(X, {}, None, None)


def test_reset_keeps_the_dtypes_of_the_state():
    memory = everlong.create_memory("attention", size="small", hidden_size=24, num_heads=3)
    state = memory.init_state(2, dtype=torch.bfloat16)
    again = memory.reset(state, torch.tensor([True, False]))
    assert [a.dtype for a in states.leaves(again)] == [a.dtype for a in states.leaves(state)]
    y, state = memory(torch.randn(2, 3, 24), again)
    assert (y.dtype, state["keys"].dtype) == (torch.float32, torch.bfloat16)


def test_mask_and_lengths_together_are_refused():
    memory = everlong.create_memory("attention", size="small", hidden_size=24, num_heads=3)
    mask, lengths = torch.tensor([[True, False]]), torch.tensor([1])
    with pytest.raises(ValueError, match="mask or lengths"):
        memory(torch.randn(1, 2, 24), mask=mask, lengths=lengths)
