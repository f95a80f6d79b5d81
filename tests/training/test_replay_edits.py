"""In-place edits of what a replay must read again are refused, not replayed wrongly."""

import pytest
import torch

import everlong
from everlong import ReplayOptions


@pytest.mark.parametrize("leaf", [torch.zeros(2), torch.zeros(2, dtype=torch.long)])
def test_a_state_edited_in_place_is_refused(leaf):
    weight = torch.ones(2, requires_grad=True)

    def step(x, state):
        return (weight * state.add_(1)).sum(), state

    for count in (1, 2):
        with pytest.raises(RuntimeError, match="segment 0 edits its incoming state in place"):
            everlong.replay(step, [0] * count, leaf)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("edited", [0, -1])
def test_a_segment_edited_in_place_is_refused(count, edited):
    weight = torch.ones(2, requires_grad=True)
    segments = [{"x": torch.ones(2), "edit": False} for _ in range(count)]
    segments[edited]["edit"] = True

    def step(segment, state):
        x = segment["x"].mul_(2.0) if segment["edit"] else segment["x"]
        state = state + weight * x
        return state.sum(), state

    t = range(count)[edited]
    with pytest.raises(RuntimeError, match=f"segment {t} edits itself in place"):
        everlong.replay(step, segments, torch.zeros(2))


@pytest.mark.parametrize("options", [ReplayOptions(), ReplayOptions(keep="sqrt")])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_state_in_reused_buffers_is_refused(options, offset):
    """Two buffers by turns: the state that came in is whole, the one before it is not."""
    weight, buffers = torch.ones(2, requires_grad=True), [torch.zeros(2), torch.zeros(2)]

    def step(x, state):
        new = weight * state + x
        loss = new.sum()
        if torch.is_grad_enabled():
            return loss, new
        return loss, buffers[(x + offset) % 2].copy_(new)

    with pytest.raises(RuntimeError, match="was edited in place after it was handed over"):
        everlong.replay(step, list(range(5)), torch.ones(2), options=options)


def test_a_first_state_edited_between_forward_and_backward_is_refused():
    weight, first = torch.ones(2, requires_grad=True), torch.ones(2)
    step = lambda x, m: ((weight * m).sum(), weight * m)  # noqa: E731
    losses, _ = everlong.replay_function(step, [0, 1], first, [weight])
    first.mul_(2.0)
    with pytest.raises(RuntimeError, match="the state before segment 0 was edited in place"):
        losses.sum().backward()


def test_segments_made_in_inference_mode_are_read():
    weight = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        segments = [torch.ones(2, dtype=torch.long) for _ in range(2)]
    step = lambda x, m: ((weight * m * x.clone()).sum(), m + 1)  # noqa: E731
    everlong.replay(step, segments, torch.ones(2))
    assert torch.equal(weight.grad, torch.full((2,), 1.5))
