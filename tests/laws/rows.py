"""Law 4: rows do not meet, masked positions do not exist, a row starts again when told to.

B batch, T time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from everlong import state as states
from laws.cases import (
    Case,
    assert_close,
    assert_same,
    assert_states,
    by_hypothesis,
    cuts_of,
    gradients,
    named_parameters,
    read_in_calls,
    row_of,
    seeds,
    weigh,
    weigh_state,
)

ROWS = 3


def spoil(case: Case, x: Tensor, mask: Tensor) -> Tensor:
    """What stands in masked places must not matter: NaN, or some other token."""
    if case.tokens:
        return torch.where(mask, x, (x + 3) % case.width)
    return torch.where(mask[..., None], x, torch.nan)


@st.composite
def masks(draw: st.DrawFn, length: int) -> list[list[bool]]:
    """One mask a row: whole, empty, padded left or right, or with holes."""
    rows = []
    for _ in range(ROWS):
        kind = draw(st.sampled_from(["holes", "left", "whole", "right", "empty"]))
        padding = draw(st.integers(0, length))
        if kind == "holes":
            rows.append(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        elif kind in ("whole", "empty"):
            rows.append([kind == "whole"] * length)
        else:
            row = [False] * padding + [True] * (length - padding)
            rows.append(row if kind == "left" else row[::-1])
    return rows


def check_row_alone(case: Case) -> None:
    """A row in a batch equals the row alone."""
    memory = case.build()
    span = case.span(memory)

    @torch.no_grad()
    def compare(lengths: list[int], seed: int) -> None:
        x = case.inputs(ROWS, sum(lengths), seed)
        y, state = read_in_calls(memory, x, lengths)
        for row in range(ROWS):
            alone, alone_state = read_in_calls(memory, x[row : row + 1], lengths)
            assert_close(y[row : row + 1], alone, f"outputs of row {row}, calls {lengths}")
            what = f"state of row {row}, calls {lengths}"
            assert_states(row_of(state, row), alone_state, what, case.bounded)

    by_hypothesis(st.integers(1, 2 * span + 2).flatmap(cuts_of), seeds, examples=8)(compare)


def check_mask(case: Case) -> None:
    """One masked call: outputs, states and gradients are those of the compacted rows, alone."""
    memory = case.build()
    span = case.span(memory)
    names, parameters = named_parameters(memory)

    def compare(mask: Tensor, seed: int) -> None:
        x = spoil(case, case.inputs(*mask.shape, seed), mask)
        floats = [] if case.tokens else [x.requires_grad_()]
        y, state = memory(x, None, mask)
        assert not y[~mask].any(), "outputs at masked positions must be 0"
        loss = weigh_state(state) + weigh(y)
        alone_loss = torch.zeros((), dtype=torch.float64)
        alone_y, alone_states = torch.zeros_like(y), []
        for row in range(ROWS):
            real = mask[row].nonzero()[:, 0]
            if len(real):
                alone, row_state = memory(x[row : row + 1, real])
                alone_y = alone_y.index_put((torch.tensor(row), real), alone[0])
            else:
                row_state = memory.init_state(1)
            alone_states.append(row_state)
        alone_state = states.cat(alone_states)
        alone_loss = alone_loss + weigh_state(alone_state) + weigh(alone_y)
        assert_close(y, alone_y, "outputs of masked rows against compacted ones")
        assert_states(state, alone_state, "state of masked rows", case.bounded)
        found = gradients(loss, floats + parameters)
        wanted = gradients(alone_loss, floats + parameters)
        for name, a, b in zip(["x"] * len(floats) + names, found, wanted, strict=True):
            assert_close(a, b, f"gradient of {name} under a mask")

    long = torch.rand(ROWS, 20 * span, generator=torch.Generator().manual_seed(1)) < 0.7
    long[0, : 9 * span] = False  # a row that begins where others are in their middle
    compare(long, 0)

    def drawn(rows: list[list[bool]], seed: int) -> None:
        compare(torch.tensor(rows), seed)

    by_hypothesis(st.integers(1, 2 * span + 1).flatmap(masks), seeds, examples=15)(drawn)


def check_mask_kinds(case: Case) -> None:
    """0/1 masks of any dtype mean what Bool means; a mask of ones is no mask."""
    memory = case.build()
    x = case.inputs(2, case.span(memory) + 1)
    whole = torch.ones(x.shape[:2], dtype=torch.bool)
    y, state = memory(x)
    for mask in (whole, whole.long(), whole.double()):
        other, other_state = memory(x, None, mask)
        assert_same(other, y, f"outputs under a {mask.dtype} mask of ones")
        assert_states(other_state, state, "state under a mask of ones", case.bounded, exact=True)
    whole[0, :3], whole[1, 4] = False, False
    y, state = memory(x, None, whole)
    for mask in (whole.long(), whole.double()):
        other, other_state = memory(x, None, mask)
        assert_same(other, y, f"outputs under a 0/1 mask, {mask.dtype}")
        assert_states(other_state, state, "state under a 0/1 mask", case.bounded, exact=True)


def check_masked_row(case: Case) -> None:
    """A row masked for a whole call keeps its state bit for bit, whoever else goes on."""
    memory = case.build()
    span = case.span(memory)

    @torch.no_grad()
    def compare(before: int, length: int, still: list[bool], seed: int) -> None:
        _, state = memory(case.inputs(ROWS, before, seed))
        mask = ~torch.tensor(still)[:, None].expand(-1, length)
        x = spoil(case, case.inputs(ROWS, length, seed + 1), mask)
        y, after = memory(x, state, mask)
        assert not y[~mask].any(), "outputs of a masked row must be 0"
        for row in range(ROWS):
            if still[row]:
                what = f"state of row {row}, masked for {length} positions after {before}"
                kept = row_of(after, row), row_of(state, row)
                assert_states(*kept, what, case.bounded, exact=True)

    rows = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)
    lengths = st.integers(1, span + 2)
    by_hypothesis(lengths, lengths, rows, seeds, examples=12)(compare)


def check_reset(case: Case) -> None:
    """A reset row has a fresh row's state, bit for bit, and goes on so; others keep theirs."""
    memory = case.build()
    x = case.inputs(ROWS, case.span(memory) + 1)
    with torch.no_grad():
        _, state = memory(x)
        rows = torch.tensor([False, True, False])
        after = memory.reset(state, rows)
        fresh = memory.init_state(ROWS)
        for row in range(ROWS):
            wanted = row_of(fresh if rows[row] else state, row)
            what = f"state of row {row} after reset({rows.tolist()})"
            assert_states(row_of(after, row), wanted, what, case.bounded, exact=True)
        y, _ = memory(x, after)
        new, _ = memory(x[1:2])
        assert_close(y[1:2], new, "outputs of a reset row")
        nothing = memory.reset(state, torch.zeros(ROWS, dtype=torch.bool))
        assert_states(nothing, state, "state after resetting no row", case.bounded, exact=True)


@dataclass(frozen=True)
class Call:
    """One call of a served batch: rows are reordered, some start anew, then the masked read."""

    order: list[int]
    reset: list[bool]
    mask: list[list[bool]]


@st.composite
def _calls(draw: st.DrawFn, longest: int) -> Call:
    order = draw(st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
    reset = draw(st.lists(st.sampled_from([False, False, True]), min_size=ROWS, max_size=ROWS))
    return Call(order, reset, draw(masks(draw(st.integers(1, longest)))))


def check_served(case: Case) -> None:
    """Rows at different places go on together: masks, `select` with repeats, and resets, call
    after call. Each row ends as its own stream would, read alone in one call."""
    memory = case.build()
    span = case.span(memory)

    @torch.no_grad()
    def compare(calls: list[Call], seed: int) -> None:
        state = memory.init_state(ROWS)
        nothing = case.inputs(1, 1)[0][:0]
        streams, outputs = [nothing] * ROWS, [[] for _ in range(ROWS)]
        for number, call in enumerate(calls):
            state = states.select(state, torch.tensor(call.order))
            streams = [streams[row] for row in call.order]
            outputs = [list(outputs[row]) for row in call.order]
            state = memory.reset(state, torch.tensor(call.reset))
            mask = torch.tensor(call.mask)
            x = spoil(case, case.inputs(*mask.shape, seed + 10 * number), mask)
            y, state = memory(x, state, mask)
            for row in range(ROWS):
                if call.reset[row]:
                    streams[row], outputs[row] = nothing, []
                streams[row] = torch.cat([streams[row], x[row, mask[row]]])
                outputs[row].append(y[row, mask[row]])
        for row, stream in enumerate(streams):
            _assert_row(memory, case, row_of(state, row), stream, outputs[row])

    by_hypothesis(st.lists(_calls(span + 1), min_size=2, max_size=4), seeds, examples=25)(compare)


def _assert_row(memory: Any, case: Case, state: Any, stream: Tensor, outputs: list) -> None:
    if len(stream):
        y, alone = memory(stream[None])
        assert_close(torch.cat(outputs), y[0], "outputs of a row served in a batch")
    else:
        alone = memory.init_state(1)
    assert_states(state, alone, "state of a row served in a batch", case.bounded)
