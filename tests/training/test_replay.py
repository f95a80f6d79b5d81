"""Replay equals back-propagation through time: gradients, losses, states, random numbers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import everlong
from everlong.training import scene
from training.replay_toys import Case, bptt, difference

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
CASES = [(count, dropout) for count in (1, 2, 4, 8, 16) for dropout in (0.1, 0.2)] + [(64, 0.1)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("count", "dropout"), CASES)
def test_gradients_equal_bptt(count, dropout, dtype):
    case = Case(count, dtype, dropout)
    expected = case.outcome(bptt)
    found = Case(count, dtype, dropout).outcome(everlong.replay)
    assert difference(expected, found) <= TOLERANCE[dtype]
    # The comparison is not one of zeros.
    names = ["d first", "d head.weight", "d x[0]"] + ["d writer.weight"] * (count > 1)
    assert min(expected[name].abs().max() for name in names) > 1e-4


def test_without_the_random_numbers_it_is_not_exact(monkeypatch):
    expected = Case(4).outcome(bptt)
    monkeypatch.setattr(scene, "write_generators", lambda states: None)
    found = Case(4).outcome(everlong.replay)
    assert difference({"d": expected["d head.weight"]}, {"d": found["d head.weight"]}) > 1e-3


def test_the_outer_generator_ends_where_bptt_leaves_it():
    expected, found = Case(4).outcome(bptt), Case(4).outcome(everlong.replay)
    assert torch.equal(expected["draw"], found["draw"])
    undrawn = Case(4, dropout=0.0).outcome(bptt)
    assert not torch.equal(expected["draw"], undrawn["draw"])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_segments_that_come_from_one_graph(count):
    """Shared by all segments, it is walked once: its input and parameters get the gradient."""
    expected = Case(count, torch.float64, upstream=True).outcome(bptt)
    found = Case(count, torch.float64, upstream=True).outcome(everlong.replay)
    assert difference(expected, found) <= 1e-12
    assert expected["d x"].abs().max() > 1e-4


def test_first_state_and_segments_from_the_same_graph():
    """One tensor is root and ancestor of the last backward at once."""

    def gradients(method):
        source = torch.full((), 0.3, dtype=torch.float64, requires_grad=True)
        shared = source.sin()
        segments = [shared * 1, shared, shared.cos()]
        method(lambda x, m: ((x * m).sin(), m * x + m), segments, shared)
        return source.grad

    assert torch.allclose(gradients(bptt), gradients(everlong.replay), rtol=0, atol=1e-15)


def test_a_first_state_that_requires_grad_itself():
    def gradients(method):
        first = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)
        method(lambda x, m: ((x * m).sum().sin(), m * x), [1.5, 2.5, 3.5], first)
        return first.grad

    assert torch.allclose(gradients(bptt), gradients(everlong.replay), rtol=0, atol=1e-15)


def test_no_first_state():
    def step(x, state):
        state = weight * x if state is None else state * weight + x
        return state.square(), state

    def run(method):
        weight.grad = None
        loss, state = method(step, [1.0, 2.0, 3.0], None)
        return torch.stack([loss, state.detach(), weight.grad])

    weight = torch.full((), 0.7, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(run(bptt), run(everlong.replay), rtol=0, atol=1e-14)


def test_gradients_are_added():
    case = Case(3, torch.float64, dropout=0.0)
    once = case.outcome(everlong.replay)["d head.weight"].clone()
    twice = case.outcome(everlong.replay)["d head.weight"]
    assert torch.allclose(twice, 2 * once, rtol=0, atol=1e-12)


def test_results_are_detached_and_hold_no_larger_storage():
    case = Case(3)
    loss, state = everlong.replay(case.toy, case.segments, case.toy.init_state())
    trail = state["pair"][0]
    assert not any(leaf.requires_grad for leaf in (loss, state["slots"], trail, state["anchor"]))
    assert trail.untyped_storage().nbytes() == trail.numel() * trail.element_size()


def test_two_forwards_a_segment_but_the_last_and_one_backward(monkeypatch):
    backward, calls = torch.autograd.backward, []

    def counted(*args, **kwargs):
        calls.append(1)
        return backward(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", counted)
    for count in (1, 2, 4, 16):
        case = Case(count)
        calls.clear()
        everlong.replay(case.toy, case.segments, case.toy.init_state())
        assert (case.toy.calls, len(calls)) == (2 * count - 1, count)


@pytest.mark.parametrize("truncate", [1, 2, 3, 4, 9])
def test_truncation_equals_detaching(truncate):
    def truncated(step, segments, state):
        total = 0.0
        for t, segment in enumerate(segments):
            if t and t % truncate == 0:
                state = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, state)
            loss, state = step(segment, state)
            total = total + loss / len(segments)
        total.backward()
        return total, state

    options = everlong.ReplayOptions(truncate=truncate)
    expected = Case(8, torch.float64).outcome(truncated)
    found = Case(8, torch.float64).outcome(everlong.replay, options=options)
    assert difference(expected, found) <= 1e-12


def test_truncated_at_one_segment_the_writer_gets_nothing():
    case = Case(4)
    options = everlong.ReplayOptions(truncate=1)
    case.outcome(everlong.replay, options=options)
    gradient = case.toy.writer.weight.grad
    assert gradient is None or not gradient.any()
    case.outcome(everlong.replay, options=replace(options, truncate=2))
    assert case.toy.writer.weight.grad.any()


def test_advance_runs_the_state_alone_first():
    """Equal to BPTT with the same seeds, which the full horizon is."""
    case = Case(5, torch.float64)
    options = everlong.ReplayOptions(advance=case.toy.advance, check=True)
    found = case.outcome(everlong.replay, options=options)
    assert case.toy.calls == 5
    assert difference(Case(5, torch.float64).outcome(everlong.Horizon("full")), found) <= 1e-12


def test_weights_by_valid_tokens_equal_one_loss_over_the_concatenation():
    """Segments of different lengths, weighted by their share of the tokens."""
    torch.manual_seed(0)
    net, lengths = nn.Linear(4, 4).double(), (3, 7, 1, 5)
    whole = torch.randn(sum(lengths), 4, dtype=torch.float64)
    memory = torch.zeros(4, dtype=torch.float64)

    def step(x, state):
        y = torch.tanh(net(x) + state)
        return y.square().sum(-1).mean(), y.mean(0)

    weights = torch.tensor(lengths, dtype=torch.float64) / sum(lengths)
    loss, _ = everlong.replay(step, whole.split(lengths), memory, weights=weights)
    found, net.weight.grad = net.weight.grad, None
    outputs, state = [], memory
    for x in whole.split(lengths):
        outputs.append(torch.tanh(net(x) + state))
        state = outputs[-1].mean(0)
    expected = torch.cat(outputs).square().sum(-1).mean()
    expected.backward()
    assert torch.allclose(loss, expected, rtol=0, atol=1e-12)
    assert torch.allclose(found, net.weight.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("silent", [(0, 1, 2), (3,), (0, 3), (1,)])
def test_segments_without_a_loss(silent):
    def run(method):
        case = Case(4, torch.float64)
        for t in silent:
            del case.segments[t]["target"]
        return case.outcome(method)

    expected, found = run(bptt), run(everlong.replay)
    assert difference(expected, found) <= 1e-12
    assert expected["d first"].abs().max() > 1e-4
