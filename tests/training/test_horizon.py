"""Four methods behind one signature: equal losses, gradients, states and random numbers."""

import pytest
import torch

import everlong
from everlong import Horizon, ReplayOptions
from training.replay_toys import Case, bptt, difference

METHODS = ("full", "checkpoint", "replay")


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_methods_agree(count, dtype, tolerance, upstream):
    outcomes = [Case(count, dtype, upstream=upstream).outcome(Horizon(m)) for m in METHODS]
    for other in outcomes[1:]:
        assert difference(outcomes[0], other) <= tolerance
    assert torch.equal(outcomes[0]["draw"], outcomes[2]["draw"])


@pytest.mark.parametrize("truncate", [1, 3, 8])
@pytest.mark.parametrize("upstream", [False, True])
def test_truncated_methods_agree(truncate, upstream):
    outcomes = [
        Case(8, torch.float64, upstream=upstream).outcome(Horizon(method, truncate=truncate))
        for method in (*METHODS, "truncated")
    ]
    for other in outcomes[1:]:
        assert difference(outcomes[0], other) <= 1e-12


def test_full_is_bptt_where_nothing_is_drawn():
    expected = Case(6, torch.float64, dropout=0.0).outcome(bptt)
    found = Case(6, torch.float64, dropout=0.0).outcome(Horizon("full"))
    assert (
        difference(expected | {"draw": expected["loss"]}, found | {"draw": found["loss"]}) <= 1e-12
    )


def test_replay_equals_checkpoint_with_its_own_random_numbers():
    """torch.utils.checkpoint by hand against plain replay, without any of our seeding."""

    def by_hand(step, segments, state):
        total = 0.0
        for segment in segments:
            loss, state = torch.utils.checkpoint.checkpoint(
                step, segment, state, use_reentrant=False
            )
            total = total + loss / len(segments)
        total.backward()
        return total, state

    expected, found = Case(6).outcome(by_hand), Case(6).outcome(everlong.replay)
    assert difference(expected, found) <= 1e-6


def test_seeds_differ_from_rollout_to_rollout_and_segment_to_segment():
    draws = []

    def step(x, state):
        draws.append(torch.rand(()).item())
        return weight.square().sum(), state

    weight = torch.ones(1, requires_grad=True)
    torch.manual_seed(0)
    for _ in range(2):
        Horizon("full")(step, [0, 1, 2])
    assert len(set(draws)) == 6
    first, draws[:] = draws[:3], []
    torch.manual_seed(0)
    Horizon("replay")(step, [0, 1, 2])
    assert draws == [first[0], first[1], first[2], first[1], first[0]]


def test_advance_weights_and_scale_by_method():
    weights, case = torch.tensor([0.1, 0.2, 0.3, 0.4]), Case(4, torch.float64)
    options = ReplayOptions(advance=case.toy.advance, scale=4.0)
    expected = Case(4, torch.float64).outcome(
        Horizon("full", options=ReplayOptions(scale=4.0)), weights=weights
    )
    found = case.outcome(Horizon("replay", options=options), weights=weights)
    assert difference(expected, found) <= 1e-12
    assert case.toy.calls == 4


def test_the_pieces_of_a_truncated_horizon_are_freed():
    from everlong.evaluation.meters import SavedBytes

    def peak(count, truncate):
        case = Case(count)
        with SavedBytes([*case.toy.parameters(), *case.inputs]) as meter:
            case.outcome(Horizon("truncated", truncate=truncate))
        return meter.peak

    assert peak(16, 2) == peak(8, 2) < peak(8, 4) < peak(8, 8)


def test_no_sync_covers_all_but_the_last_piece():
    import contextlib

    entered = []

    @contextlib.contextmanager
    def no_sync():
        entered.append(len(case.toy_calls))
        yield

    for method, expected in (("full", 0), ("checkpoint", 0), ("truncated", 3), ("replay", 7)):
        case = Case(8)
        case.toy_calls = []
        entered.clear()
        options = ReplayOptions(no_sync=no_sync, truncate=2 if method == "truncated" else None)
        case.outcome(Horizon(method, options=options))
        assert len(entered) == expected, method


def test_refusals():
    with pytest.raises(ValueError, match="unknown horizon 'reply'; did you mean 'replay'"):
        Horizon("reply")
    with pytest.raises(ValueError, match="needs truncate=k"):
        Horizon("truncated")
    with pytest.raises(ValueError, match="truncate is 0"):
        Horizon("full", truncate=0)
    with pytest.raises(ValueError, match="no segment has a loss"):
        Horizon("full")(lambda x, m: (None, m), [1])
