"""Law 5: the state keeps its shapes for ever, and it is all there is."""

from collections.abc import Iterable
from typing import Any

import torch

from everlong import state as states
from everlong.stateful import Trace
from laws.cases import (
    Case,
    assert_close,
    assert_same,
    assert_states,
    gradients,
    snapshot,
    weigh,
)


def _shapes(state: Any) -> dict[str, tuple]:
    return {path: (*leaf.shape, leaf.dtype) for path, leaf in states.flatten(state).items()}


def check_form(case: Case) -> None:
    """Tensors only (`flatten` refuses the rest), batch first in every leaf, none of size zero."""
    memory = case.build()
    fresh = memory.init_state(5)
    _, read = memory(case.inputs(5, case.span(memory) + 1))
    other = states.flatten(memory.init_state(3))
    for state in (fresh, read):
        for path, leaf in states.flatten(state).items():
            assert leaf.dim() >= 1, f"leaf {path!r} has no batch dimension"
            assert leaf.shape[0] == 5, f"leaf {path!r} is not batch first: {list(leaf.shape)}"
            assert leaf.numel() > 0, f"leaf {path!r} has size zero"
    for path, leaf in states.flatten(fresh).items():
        assert leaf.shape[1:] == other[path].shape[1:], f"leaf {path!r} depends on the batch size"


def check_bounded(case: Case) -> None:
    """`num_bytes`, shapes and dtypes are equal after 0, 1, 10 and 1,000 segments and in between.

    A memory marked unbounded does grow: else its mark would be wrong.
    """
    memory = case.build(dtype=torch.float32)
    period = memory.period
    with torch.no_grad():
        state = memory.init_state(1)
        size, shapes, read = states.num_bytes(state), _shapes(state), 0
        aims = [1, 3, period, period + 1, 2 * period, 10 * period + 1, 13 * period]
        aims += [100 * period] if not case.bounded else [500 * period, 1000 * period]
        for aim in sorted(set(aims)):
            if aim == read:
                continue
            x = case.inputs(1, aim - read, aim)
            _, state = memory(x if case.tokens else x.float(), state)
            read = aim
            if case.bounded:
                assert _shapes(state) == shapes, f"leaves changed within {read} positions"
                assert states.num_bytes(state) == size, f"bytes changed within {read} positions"
    for path, leaf in states.flatten(state).items():
        assert leaf.isfinite().all(), f"leaf {path!r} is not finite after {read} positions"
    if not case.bounded:
        assert states.num_bytes(state) > size, "marked unbounded, but its state does not grow"


def check_detached(case: Case) -> None:
    """A detached state holds no graph, and nothing beside it does."""
    memory = case.build()
    length = memory.period + 2
    x = case.inputs(2, length)
    if not case.tokens:
        x.requires_grad_()
    _, state = memory(x)
    state = states.detach(state)
    for path, leaf in states.flatten(state).items():
        assert not leaf.requires_grad, f"detached leaf {path!r} still requires a gradient"
    y, _ = memory(case.inputs(2, length, 1), state)
    loss = weigh(y)
    if not case.tokens:
        (grad,) = gradients(loss, [x])
        assert not grad.any(), "a gradient passed a detached state"
        (grad,) = gradients(weigh(memory(x, state)[0]), [x])
        assert grad.any(), "no gradient reaches the input"
    loss.backward()
    memory(case.inputs(2, length, 2), state)[0].sum().backward()  # a kept graph would be freed


def check_pure(case: Case) -> None:
    """No state outside the state: calls on other data in between change nothing, arguments are not
    edited in place, and neither are parameters and buffers."""
    for training in (False, True):
        memory = case.build().train(training)
        before = {key: value.clone() for key, value in memory.state_dict().items()}
        x, mask = case.inputs(2, memory.period + 3), torch.ones(2, memory.period + 3).bool()
        mask[0, 1] = False
        for ahead in (1, memory.period + 1):
            with torch.no_grad():
                _, state = memory(case.inputs(2, ahead, 4))
            kept, kept_x, kept_mask = snapshot(state), x.clone(), mask.clone()
            y, after = memory(x, state, mask)
            assert_states(state, kept, "the state passed in", case.bounded, exact=True)
            assert_same(x, kept_x, "the input passed in")
            assert_same(mask, kept_mask, "the mask passed in")
            memory(case.inputs(3, 2 * memory.period + 1, 5))
            memory.reset(after, torch.tensor([True, False]))
            with torch.no_grad():
                memory(case.inputs(2, 1, 6), after)
            again, after_again = memory(x, state, mask)
            assert_close(again, y, f"the same call, later, train mode {training}", 1e-12)
            what = f"state of the same call, later, train mode {training}"
            assert_states(after_again, after, what, case.bounded)
        for key, value in memory.state_dict().items():
            assert_same(value, before[key], f"{key} after reading, train mode {training}")


def check_owned(case: Case) -> None:
    """A state holds its bytes and no more: no leaf pins a larger buffer, and none is a view of a
    parameter, of what was read or of what came out, which their owners may edit."""
    memory = case.build()
    theirs = dict.fromkeys(_storages([*memory.parameters(), *memory.buffers()]), "a parameter")
    _owned(memory.init_state(2), theirs, "a fresh state")
    for length in (1, memory.period, 2 * case.span(memory), 10 * case.span(memory) + 1):
        x, mask = case.inputs(2, length), torch.ones(2, length).bool()
        mask[1, length // 2 :] = False
        state = None
        for given in (None, mask, None):
            with torch.no_grad():
                y, state = memory(x, state, given)
            beside = {**theirs, **dict.fromkeys(_storages([x]), "the input")}
            beside |= dict.fromkeys(_storages([y]), "the outputs")
            _owned(state, beside, f"the state behind a call of {length}")


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes by place."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def _owned(state: Any, theirs: dict[int, str], what: str) -> None:
    for path, leaf in states.flatten(state).items():
        shared = theirs.get(leaf.untyped_storage().data_ptr())
        assert shared is None, f"{what}: leaf {path!r} shares memory with {shared}"
    reached, held = sum(_storages(states.leaves(state)).values()), states.num_bytes(state)
    assert reached <= held, f"{what}: {reached} bytes reachable from {held}"


def check_quiet(case: Case) -> None:
    """A trace is told and changes nothing; nothing is drawn from the global generator in eval,
    whatever the dropout."""
    memory = case.build(dropout=0.3)
    x, trace = case.inputs(2, 2 * memory.period + 1), Trace()
    drawn = torch.get_rng_state()
    y, state = memory(x)
    assert_same(torch.get_rng_state(), drawn, "the global generator after a call in eval mode")
    traced, traced_state = memory(x, None, None, trace)
    assert_close(traced, y, "outputs under a trace", 1e-12)
    assert_states(traced_state, state, "state under a trace", case.bounded)
    for name, record in [(k, v) for k, found in trace.records.items() for v in found]:
        assert not record.requires_grad, f"trace record {name!r} holds a graph"
    for name, loss in [(k, v) for k, found in trace.losses.items() for v in found]:
        assert loss.dim() == 0, f"trace loss {name!r} is no scalar"
