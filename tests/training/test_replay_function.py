"""The autograd Function composes with what is before it and after it."""

import pytest
import torch
from torch import nn

import everlong
from training.replay_toys import Case, bptt, difference


def by_function(step, segments, state):
    losses, state = everlong.replay_function(step, segments, state, step.parameters())
    total = losses.mean()
    total.backward()
    return total.detach(), state


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_gradients_equal_bptt(count, dtype, tolerance, upstream):
    expected = Case(count, dtype, upstream=upstream).outcome(bptt)
    found = Case(count, dtype, upstream=upstream).outcome(by_function)
    # The last state is attached: parts of it that reach no loss get zeros, not nothing.
    assert difference(expected, found) <= tolerance


class Cell(nn.Module):
    """One recurrent layer: from a sequence of segments to a sequence of states."""

    def __init__(self, width=4):
        super().__init__()
        self.inner, self.drop = nn.Linear(2 * width, width), nn.Dropout(0.2)
        self.double()

    def forward(self, x, state):
        state = self.drop(torch.tanh(self.inner(torch.cat([x, state], -1))))
        return state.square().mean(), state


def in_series(run):
    """The state of one model feeds the segments and the first state of a second one."""
    torch.manual_seed(0)
    embed, one, two = nn.Linear(4, 4).double(), Cell(), Cell()
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = embed(x).unbind()
    losses, middle = run(one, inputs[:3], inputs[0] * 0.1)
    more, last = run(two, [middle * xs for xs in inputs[3:]], middle)
    ((losses.sum() + more.square().sum()) * last.sum()).backward()
    modules = nn.ModuleList([embed, one, two])
    found = {name: parameter.grad for name, parameter in modules.named_parameters()}
    return found | {"x": x.grad, "draw": torch.rand(2)}


def unrolled(step, segments, state):
    losses = []
    for segment in segments:
        loss, state = step(segment, state)
        losses.append(loss)
    return torch.stack(losses), state


def test_two_models_in_series():
    expected = in_series(unrolled)
    found = in_series(
        lambda step, segments, state: everlong.replay_function(
            step, segments, state, step.parameters()
        )
    )
    assert difference(expected, found) <= 1e-12
    assert all(value.abs().max() > 1e-4 for value in found.values())


def test_backward_leaves_the_generator_alone():
    case = Case(3)
    losses, _ = everlong.replay_function(
        case.toy, case.segments, case.toy.init_state(), case.toy.parameters()
    )
    torch.manual_seed(9)
    losses.sum().backward()
    after = torch.rand(1)
    torch.manual_seed(9)
    assert torch.equal(after, torch.rand(1))


def test_backward_twice_over_a_retained_graph():
    case = Case(4, torch.float64)
    losses, _ = everlong.replay_function(
        case.toy, case.segments, case.toy.init_state(), case.toy.parameters()
    )
    losses.sum().backward(retain_graph=True)
    once = case.toy.head.weight.grad.clone()
    losses.sum().backward()
    assert torch.allclose(case.toy.head.weight.grad, 2 * once, rtol=0, atol=1e-12)


def test_scaler_and_gradient_of_the_last_state_alone():
    def gradient(run):
        torch.manual_seed(1)
        cell, x = Cell(), torch.ones(3, 2, 4, dtype=torch.float64)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        _, last = run(cell, list(x), torch.zeros(2, 4, dtype=torch.float64))
        scaler.scale(last.sum()).backward()
        return cell.inner.weight.grad

    def ours(step, segments, state):
        return everlong.replay_function(step, segments, state, step.parameters())

    assert torch.allclose(gradient(unrolled), gradient(ours), rtol=0, atol=1e-12)
    assert gradient(ours).abs().max() > 1e-3


def test_segments_without_loss_and_frozen_parameters():
    case = Case(3, torch.float64)
    case.toy.head.weight.requires_grad_(False)
    for segment in case.segments[:2]:
        del segment["target"]
    losses, state = everlong.replay_function(
        case.toy, case.segments, case.toy.init_state(), case.toy.parameters()
    )
    assert losses[:2].tolist() == [0, 0]
    assert state["clock"].tolist() == [15, 15]
    assert not state["clock"].requires_grad
    assert state["pair"][1:] == (3, None)
    losses.sum().backward()
    assert case.toy.head.weight.grad is None
    assert case.toy.writer.weight.grad.any()


def test_parameters_edited_before_backward_are_noticed():
    case = Case(3)
    losses, _ = everlong.replay_function(
        case.toy, case.segments, case.toy.init_state(), case.toy.parameters()
    )
    with torch.no_grad():
        case.toy.head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_nothing_is_left_alive():
    """No cycle ties the results to the buffer: dropping them frees it without the collector."""
    import gc
    import weakref

    class Probe(Case):
        pass

    case = Probe(3)
    losses, state = everlong.replay_function(
        case.toy, case.segments, case.toy.init_state(), case.toy.parameters()
    )
    rollout = weakref.ref(losses.grad_fn.rollout)
    gc.disable()
    try:
        del losses, state
        assert rollout() is None
    finally:
        gc.enable()
