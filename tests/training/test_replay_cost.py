"""What replay holds: one segment's activations whatever T, and |M| bytes a segment."""

import pytest
import torch

import everlong
from everlong.evaluation.meters import LiveBytes, SavedBytes
from everlong.training.rollout import Rollout
from training.replay_toys import Case, bptt

COUNTS = (2, 4, 8, 16)


def saved(count, how, **kwargs):
    case = Case(count)
    with SavedBytes([*case.toy.parameters(), *case.inputs]) as meter:
        case.outcome(how, **kwargs)
    assert meter.now == 0
    return meter.peak


def test_saved_activations_are_flat_in_the_horizon():
    replay = [saved(count, everlong.replay) for count in COUNTS]
    assert replay[0] > 0
    assert len(set(replay)) == 1


def test_saved_activations_of_bptt_grow_with_it():
    full = [saved(count, bptt) for count in COUNTS]
    assert full == [full[0] * count // 2 for count in COUNTS]


def state_bytes(state):
    changed = (state["slots"], state["clock"], state["pair"][0])  # the anchor is passed on
    return sum(leaf.numel() * leaf.element_size() for leaf in changed)


def held(count, **options):
    case = Case(count)
    first = case.toy.init_state()
    rollout = Rollout(case.toy, case.segments, first, everlong.ReplayOptions(**options))
    rollout.sweep(0, count - 1)
    return rollout.buffer.num_bytes(), state_bytes(first)


def test_the_buffer_grows_by_one_state_a_segment_exactly():
    for count in COUNTS:
        size, state = held(count)
        shared = 2 * 3 * 8 * 4  # the anchor, once, is the caller's
        assert size == (count - 1) * state + shared


def test_every_kept_leaf_owns_no_more_than_itself():
    case = Case(3)
    rollout = Rollout(case.toy, case.segments, case.toy.init_state(), everlong.ReplayOptions())
    rollout.sweep(0, 2)
    trail = rollout.buffer[2].tree()["pair"][0]
    assert trail.untyped_storage().nbytes() == trail.numel() * trail.element_size()


def test_a_root_of_the_states_is_kept():
    """After the first sweep: M_4, M_8, M_12, and the block that the sweep back enters first."""
    all_states, state = held(16)
    some, _ = held(16, keep="sqrt")
    assert all_states - some == (15 - 6) * state


@pytest.mark.parametrize("options", [{"keep": "sqrt"}, {"offload": True}, {"check": True}])
@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_bit_for_bit(count, options):
    plain = Case(count).outcome(everlong.replay)
    other = Case(count).outcome(everlong.replay, options=everlong.ReplayOptions(**options))
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_recomputed_states_cost_at_most_one_more_sweep():
    case = Case(16)
    options = everlong.ReplayOptions(keep="sqrt")
    everlong.replay(case.toy, case.segments, case.toy.init_state(), options=options)
    assert case.toy.calls == 2 * 16 - 1 + 3 * 3  # three blocks, three states between their ends


def test_all_live_bytes_grow_by_the_state():
    """And by no gradient of the input, which takes the place of a state that is done with."""

    def peak(count):
        case = Case(count)
        with LiveBytes() as meter:
            case.outcome(everlong.replay)
        return meter.peak

    growth = state_bytes(Case(2).toy.init_state()) + 4  # and the loss
    assert peak(16) - peak(8) == 8 * growth
