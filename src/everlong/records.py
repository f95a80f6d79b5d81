"""The names under which memories record on a `Trace`: what they mean, and their shapes.

A report (`everlong inspect`) reads this table and nothing of the memories themselves: a memory that
records under these names is in it. B batch, T positions that a module has read in a call, N places
(slots, memory tokens, entries), S tokens of a segment, H units (heads), K channels of a unit.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """each: "position", where dimension 1 runs over what the module has read in the call, or
    "write": one tensor for each time that a memory is written or looked up; unit: what the last
    dimension (of a decay H) counts; ahead: whether a position's values belong to the prediction of
    the next token, not to its own."""

    each: str
    shape: str
    unit: str
    means: str
    ahead: bool = False


RECORDS = {
    "kept": Record(
        "write",
        "[B, N] or [B, L, N]",
        "slot",
        "how much of a place's old content stays at a write; the rest is overwritten",
    ),
    "faded": Record(
        "write",
        "[B, N] or [B, L, N]",
        "slot",
        "how much of a place's new content is its resting value: forgotten, with nothing written",
    ),
    "took": Record(
        "write", "[B, N, S]", "slot", "the weight that a slot gave to a token when it was written"
    ),
    "recall": Record(
        "write", "[B, N] or [B, Q, N]", "slot", "the weight of each place in what was looked up"
    ),
    "read": Record(
        "position",
        "[B, T, N]",
        "slot",
        "attention to each slot when a token was predicted",
        ahead=True,
    ),
    "encoded": Record(
        "position", "[B, T, N]", "slot", "attention to each slot when a token was encoded"
    ),
    "looked": Record(
        "position",
        "[B, T, S]",
        "place",
        "attention to each place of the encoded last segment when a token was predicted",
        ahead=True,
    ),
    "decay": Record(
        "position",
        "[B, T, H] or [B, T, H, K]",
        "head",
        "how much of all that a head holds is left after a token",
    ),
    "strength": Record(
        "position",
        "[B, T, H]",
        "head",
        "how much of what a head held under a token's key is replaced (above 1: reversed)",
    ),
    "surprise": Record(
        "position",
        "[B, T, H]",
        "head",
        "how far a head's memory was from a token's value before it learned it",
    ),
    "routed": Record("position", "Int [B, T, k]", "memory", "which memories a token was sent to"),
    "log_calibration": Record(
        "position",
        "[B, T]",
        "matrix",
        "mean logarithm of what a matrix's cells were multiplied by (below 0: they fade)",
    ),
}
