"""Laws 1 to 3: any cut is one cut, the fast form is the reference, nothing looks ahead."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from everlong import state as states
from laws.cases import (
    Case,
    assert_close,
    assert_states,
    by_hypothesis,
    cuts_of,
    gradients,
    named_parameters,
    read_in_calls,
    seeds,
    weigh,
    weigh_state,
)


def _everything(memory: Any, x: Tensor, lengths: list[int]) -> tuple[Tensor, Any, list, list]:
    """Outputs, final state, and the gradients of a loss on both, from a fresh start."""
    wanted = [x.requires_grad_()] if x.is_floating_point() else []
    names, parameters = named_parameters(memory)
    y, state = read_in_calls(memory, x, lengths)
    grads = gradients(weigh(y) + weigh_state(state), wanted + parameters)
    names = ["x"] * len(wanted) + names
    return y.detach(), states.detach(state), names, grads


def _assert_equal_reads(case: Case, got: tuple, wanted: tuple, what: str) -> None:
    assert_close(got[0], wanted[0], f"outputs, {what}")
    assert_states(got[1], wanted[1], f"final state, {what}", case.bounded)
    for name, a, b in zip(wanted[2], got[3], wanted[3], strict=True):
        assert_close(a, b, f"gradient of {name}, {what}")


def check_any_cut(case: Case) -> None:
    """Law 1: outputs, loss, gradients and final state do not depend on how a stream is cut."""
    memory = case.build()
    span = case.span(memory)

    def compare(lengths: list[int], seed: int) -> None:
        x = case.inputs(2, sum(lengths), seed)
        whole = _everything(memory, x.clone(), [x.shape[1]])
        cut = _everything(memory, x.clone(), lengths)
        _assert_equal_reads(case, cut, whole, f"cut into {lengths}")

    compare([1] * (2 * span + 3), 0)
    compare([memory.period] * 3, 0)
    compare([span - 1, 1, 1, 2 * span + 1, 1], 0)
    compare([9 * span + 1, 1, 12 * span], 0)
    streams = st.integers(2, 3 * span + 3).flatmap(cuts_of)
    by_hypothesis(streams, seeds, examples=20)(compare)


def check_reference(case: Case) -> None:
    """Law 2: `forward` equals the class's own step-by-step `reference(x, state, mask)`.

    Values and all gradients, at lengths around the period, from a fresh and from a carried state,
    in a long stream of strong inputs, and under a mask.
    """
    memory = case.build()
    if not hasattr(memory, "reference"):
        pytest.skip("it has one form")
    names, parameters = named_parameters(memory)
    period = memory.period

    def compare(before: int, length: int, strength: float, masked: bool) -> None:
        start = memory(case.inputs(2, before) * strength)[1] if before else memory.init_state(2)
        x = (case.inputs(2, length, 1) * strength).requires_grad_()
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[0, : length // 2], mask[1, -1] = not masked, not masked
        found = []
        for form in (memory, memory.reference):
            y, state = form(x, start, mask)
            leaves = [leaf for leaf in states.leaves(start) if leaf.requires_grad]
            loss = weigh(y) + weigh_state(state)
            grads = torch.autograd.grad(
                loss, [x, *leaves, *parameters], allow_unused=True, retain_graph=True
            )
            grads = [torch.zeros(()) if grad is None else grad for grad in grads]
            labels = ["x"] + [f"state leaf {i}" for i in range(len(leaves))] + names
            found.append((y.detach(), states.detach(state), labels, grads))
        what = f"length {length} after {before}, inputs times {strength}, masked {masked}"
        _assert_equal_reads(case, found[0], found[1], what)

    around = {1, max(1, period - 1), period, period + 1}
    for before, length, masked in itertools.product((0, 3), sorted(around), (False, True)):
        compare(before, length, 1.0, masked)
    compare(0, 8 * max(period, 4) + 1, 5.0, False)


def check_causal(case: Case) -> None:
    """Law 3: in eval and in train mode, output t is the same whatever comes after t, and its
    gradient there is exactly zero."""

    def later(x: Tensor, t: int) -> Tensor:
        changed = x.clone()
        if case.tokens:
            changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % case.width
        else:
            changed[:, t + 1 :] = 100.0 * changed[:, t + 1 :].roll(1, -1) + 10.0
        return changed

    for training in (False, True):
        memory = case.build().train(training)
        span = case.span(memory)

        def compare(before: int, length: int, t: int, seed: int) -> None:
            t = min(t, length - 2)
            with torch.no_grad():
                state = memory(case.inputs(2, before, 9))[1] if before else None  # noqa: B023
            x = case.inputs(2, length, seed)
            if not case.tokens:
                x.requires_grad_()
            y, _ = memory(x, state)  # noqa: B023
            with torch.no_grad():
                other, _ = memory(later(x, t), state)  # noqa: B023
            what = f"train mode {training}, {before} tokens before, t = {t} of {length}"  # noqa: B023
            assert_close(other[:, : t + 1], y[:, : t + 1], f"outputs up to t, {what}", 1e-12)
            if not case.tokens:
                (grad,) = torch.autograd.grad(weigh(y[:, : t + 1]), x)
                assert not grad[:, t + 1 :].any(), f"output t has a gradient behind t, {what}"

        by_hypothesis(
            st.integers(0, span + 1),
            st.integers(2, 2 * span + 2),
            st.integers(0, 2 * span),
            seeds,
            examples=12,
        )(compare)


def check_gradient(case: Case) -> None:
    """Law 1, the gradient: nothing that crosses positions is detached.

    Over several periods, the directional derivative by automatic differentiation equals the one by
    central differences; for float inputs the direction lies in the first period alone and the loss
    behind the second. A memory whose equations hold a stop-gradient says so in its class:
    `stop_gradient = "where, and why"`.
    """
    memory = case.build()
    for module in memory.modules():
        if why := getattr(type(module), "stop_gradient", ""):
            pytest.skip(f"a stop-gradient on purpose: {why}")
    period = max(memory.period, 3)
    x = case.inputs(2, 3 * period + 1)
    names, parameters = named_parameters(memory)
    generator = torch.Generator().manual_seed(5)

    def loss(x: Tensor) -> Tensor:
        y, state = read_in_calls(memory, x, [period + 1, 2 * period])
        return weigh(y[:, 2 * period :]) + weigh_state(state)

    def compare(value: Tensor, direction: Tensor, what: str) -> None:
        """`value` is moved along `direction` under the loss, then put back."""
        (grad,) = gradients(loss(x), [value])
        step, original = 1e-6, value.detach().clone()
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                value.copy_(original + sign * step * direction)
                ends.append(loss(x))
            value.copy_(original)
        numeric = (ends[0] - ends[1]) / (2 * step)
        exact = (grad * direction).sum()
        torch.testing.assert_close(
            exact, numeric, rtol=1e-5, atol=1e-5, msg=lambda m: f"derivative by {what}: {m}"
        )

    for name, parameter in zip(names, parameters, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        compare(parameter, direction, name)
    if not case.tokens:
        direction = case.inputs(2, x.shape[1], 7)
        direction[:, period:] = 0
        x.requires_grad_()
        compare(x, direction, "the first period's input")
