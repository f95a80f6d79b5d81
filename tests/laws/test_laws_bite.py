"""Each law bites: an honest memory passes every check, a liar fails the check of its law."""

import re
import socket

import pytest
from hypothesis import settings

from laws import toys
from laws.checks import LAWS, check

LIARS = {  # law: {liar: what the check says of it}
    "1 any cut": {
        toys.ForgetsPartialSegment: "outputs, cut into",
        toys.CountsCalls: "outputs, cut into",
        toys.DetachesAtCalls: "gradient of x, cut into",
    },
    "1 gradient": {
        toys.DetachesAtBoundaries: "derivative by",
        toys.DetachesAtCalls: "derivative by",
    },
    "2 reference": {toys.FastFormDiffers: "gradient of state leaf"},
    "3 causal": {
        toys.LeaksTheSegment: "outputs up to t, train mode False",
        toys.LeaksInTraining: "outputs up to t, train mode True",
    },
    "4 row alone": {toys.MixesRows: "outputs of row"},
    "4 mask": {
        toys.LetsPaddingIn: "masked rows",
        toys.MultipliesByMask: "masked rows",
        toys.ReadsPaddingAsZeros: "masked rows",
        toys.CountsMaskedPositions: "leaf 'position'",
    },
    "4 mask kinds": {toys.ReadsMaskDtype: "0/1 mask"},
    "4 masked row": {
        toys.DecaysWhileMasked: "leaf 'mean'",
        toys.ReadsPaddingAsZeros: "state of row",
        toys.CountsMaskedPositions: "leaf 'position'",
    },
    "4 reset": {
        toys.IgnoresReset: "state of row 1 after reset",
        toys.ResetsEveryRow: "state of row 0 after reset",
        toys.ResetsToZero: "state of row 1 after reset",
    },
    "4 served": {
        toys.SharesClock: "served in a batch",
        toys.IgnoresReset: "served in a batch",
        toys.DecaysWhileMasked: "served in a batch",
    },
    "5 form": {toys.NotBatchFirst: "not batch first", toys.HoldsNothing: "size zero"},
    "5 bounded": {toys.Grows: "leaves changed", toys.GrowsOnce: "leaves changed within 1 "},
    "5 detached": {toys.KeepsGraph: "a gradient passed a detached state"},
    "5 pure": {
        toys.HidesState: "the same call, later",
        toys.EditsInPlace: "the state passed in",
        toys.CountsInBuffer: "seen after reading",
    },
    "5 owned": {
        toys.KeepsViews: "bytes reachable",
        toys.KeepsTheInput: "shares memory with the input",
        toys.SharesParameter: "shares memory with a parameter",
    },
    "5 quiet": {toys.TraceRounds: "under a trace", toys.DrawsInEval: "global generator"},
    "6 replay": {toys.DropsTheGenerator: "segments of", toys.HidesState: "segments of"},
    "6 checkpoint": {
        toys.DropsTheGenerator: "of checkpointed segments",
        toys.HidesState: "of checkpointed segments",
    },
    "6 advance": {toys.AdvancesOtherwise: "state of advance"},
    "6 truncation": {toys.DetachesAtCalls: "no gradient reaches"},
    "7 saved": {toys.KeepsMapOutside: "outputs after loading"},
    "7 precision": {toys.Overflows: "not finite", toys.ChangesDtype: "leaf 'part' is"},
    "7 accumulators": {toys.LowAccumulator: "leaf 'part'", toys.LowDecay: "leaf 'mean'"},
    "7 far": {toys.RoundsFarPositions: "at position 10,000,000"},
    "9 options": {toys.SwallowsOptions: "was accepted"},
    "9 shapes": {toys.AcceptsAnyWidth: "width 7", toys.BroadcastsMask: "a mask"},
}


@pytest.fixture(autouse=True)
def _unshrunk():
    """Any failing example will do here: the shortest one takes seconds to find."""
    settings.load_profile("unshrunk")
    yield
    settings.load_profile("everlong")


@pytest.mark.parametrize("law", LAWS)
def test_honest_memory_passes(law, tmp_path):
    check(law, toys.toy_case(), tmp_path)


@pytest.mark.parametrize(("law", "liar"), [(law, liar) for law in LAWS for liar in LIARS[law]])
def test_liar_is_caught(law, liar, tmp_path):
    with pytest.raises(AssertionError, match=re.escape(LIARS[law][liar])):
        check(law, toys.toy_case(liar), tmp_path)


def test_state_of_something_else_than_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tensors only"):
        check("5 form", toys.toy_case(toys.HoldsNone), tmp_path)


def test_mark_of_unbounded_memories_is_checked(tmp_path):
    check("5 bounded", toys.toy_case(toys.Grows, bounded=False), tmp_path)
    with pytest.raises(AssertionError, match="does not grow"):
        check("5 bounded", toys.toy_case(bounded=False), tmp_path)


def test_a_test_cannot_reach_the_network():
    with (
        socket.socket() as connection,
        pytest.raises(AssertionError, match="opened a connection"),
    ):
        connection.connect(("192.0.2.1", 9))  # an address kept for documentation
