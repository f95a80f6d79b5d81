"""Law 6: memory replay gives the gradient of back-propagation through time."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import everlong
from everlong import state as states
from laws.cases import (
    Case,
    assert_close,
    assert_states,
    by_hypothesis,
    float_leaves,
    named_parameters,
    seeds,
    weigh,
    weigh_state,
)

DROPOUT = 0.3


class Run:
    """One rollout on its own copies: its segments, the leaves of its first state, its step."""

    def __init__(self, case: Case, memory: Any, lengths: list[int], seed: int):
        self.memory, self.parameters = memory, named_parameters(memory)
        self.segments = [case.inputs(2, n, seed + i) for i, n in enumerate(lengths)]
        if not case.tokens:
            self.segments = [segment.requires_grad_() for segment in self.segments]
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            _, state = memory(case.inputs(2, memory.period + 1, 8))
        self.state, self.state_leaves = float_leaves(state)
        memory.zero_grad()

    def step(self, segment: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.memory(segment, state)
        return (y.square() * 0.1).mean() + 0.01 * weigh(y), state

    def gradients(self) -> dict[str, Tensor]:
        """Every gradient that reached a leaf; zero is what None means."""
        found = dict(zip(*self.parameters, strict=True))
        found |= {f"segment {i}": segment for i, segment in enumerate(self.segments)}
        found |= {f"state leaf {i}": leaf for i, leaf in enumerate(self.state_leaves)}
        return {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
            for name, leaf in found.items()
            if leaf.requires_grad
        }


def through_time(run: Run, weights: list[float], truncate: int | None) -> tuple[Tensor, Any]:
    """Back-propagation through time, the definition; `truncate`: detach before segments k, 2k..."""
    state, total = run.state, torch.zeros((), dtype=torch.float64)
    for t, (weight, segment) in enumerate(zip(weights, run.segments, strict=True)):
        if truncate is not None and t and t % truncate == 0:
            state = states.detach(state)
        loss, state = run.step(segment, state)
        total = total + weight * loss
    total.backward()
    return total.detach(), states.detach(state)


def check_replay(case: Case) -> None:
    """Loss, last state, generator, and the gradients of parameters, float inputs and the first
    state: with dropout on, at lengths that are no multiples of the period, truncated and not."""
    memory = case.build(DROPOUT).train()

    def compare(lengths: list[int], truncate: int | None, seed: int) -> None:
        weights = [0.5 + t / 4 for t in range(len(lengths))]
        found = []
        for method in ("replay", "through time"):
            run = Run(case, memory, lengths, seed)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                if method == "replay":
                    options = everlong.ReplayOptions(truncate=truncate)
                    loss, state = everlong.replay(
                        run.step, run.segments, run.state, weights=weights, options=options
                    )
                else:
                    loss, state = through_time(run, weights, truncate)
                draw = torch.rand(())
            found.append((loss, state, run.gradients(), draw))
        replayed, exact = found
        what = f"segments of {lengths}, truncated at {truncate}"
        assert_close(replayed[0], exact[0], f"loss, {what}")
        assert_states(replayed[1], exact[1], f"last state, {what}", case.bounded)
        assert_close(replayed[3], exact[3], f"the generator's next draw, {what}", 0.0)
        for name, wanted in exact[2].items():
            assert_close(replayed[2][name], wanted, f"gradient of {name}, {what}")

    period = memory.period
    lengths = st.lists(st.integers(1, period + 2), min_size=2, max_size=5)
    by_hypothesis(lengths, st.sampled_from([None, 1, 2]), seeds, examples=8)(compare)


def check_checkpoint(case: Case) -> None:
    """Gradient checkpointing over segments gives the gradient of back-propagation through time,
    with dropout on."""
    memory, found = case.build(DROPOUT).train(), []
    for method in ("checkpoint", "full"):
        run = Run(case, memory, [memory.period + 1, 2, memory.period], 0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss, _ = everlong.Horizon(method)(run.step, run.segments, run.state)
        found.append((loss, run.gradients()))
    (loss, got), (wanted_loss, wanted) = found
    assert_close(loss, wanted_loss, "loss of checkpointed segments")
    for name, grad in wanted.items():
        assert_close(got[name], grad, f"gradient of {name} of checkpointed segments")


def check_truncation(case: Case) -> None:
    """A loss at the end has exactly zero gradient beyond the last boundary that was cut, and one
    that is not zero before it: else the zero would say nothing."""
    memory = case.build(DROPOUT).train()
    period = memory.period
    # the last call begins inside a segment: even what is wiped at boundaries reaches into it
    lengths = [period + 1, period + 1, period if 3 % period else period + 1, period + 1]

    def reached(truncate: int | None) -> dict[str, Tensor]:
        run = Run(case, memory, lengths, 0)

        def step(segment: Tensor, state: Any) -> tuple[Tensor | None, Any]:
            loss, state = run.step(segment, state)
            last = torch.equal(segment, run.segments[-1])
            return loss + weigh_state(state) if last else None, state

        options = everlong.ReplayOptions(truncate=truncate)
        everlong.replay(step, run.segments, run.state, options=options)
        return {
            name: grad
            for name, grad in run.gradients().items()
            if name.startswith(("segment", "state leaf"))
        }

    cut = reached(2)
    for name, grad in cut.items():
        if name not in ("segment 2", "segment 3"):
            assert not grad.any(), f"a gradient reached {name} beyond the truncation"
    whole = reached(None)
    if not case.tokens:
        assert whole["segment 2"].any(), "no gradient reaches the segment before the last"
        assert cut["segment 2"].any(), "truncation at 2 cut between segments 2 and 3"


def check_advance(case: Case) -> None:
    """`advance` gives the state of a call with outputs, under a mask and with dropout on too: its
    random draws are the first that such a call makes, or replay's two sweeps would differ."""
    memory = case.build(DROPOUT).train()

    @torch.no_grad()
    def compare(before: int, length: int, masked: bool, seed: int) -> None:
        found = []
        x = case.inputs(2, length, seed)
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[0, : length // 2] = not masked
        for alone in (True, False):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                _, state = memory(case.inputs(2, before, 8))
                if alone:
                    found.append(memory.advance(x, state, mask))
                else:
                    found.append(memory(x, state, mask)[1])
        what = f"state of advance, {length} positions after {before}, masked {masked}"
        assert_states(*found, what, case.bounded)

    period = memory.period
    before, length = st.integers(1, period + 1), st.integers(1, 2 * period + 1)
    for ahead in range(1, period + 1):
        compare(ahead, period - ahead + 1, False, 0)
    by_hypothesis(before, length, st.booleans(), seeds, examples=10)(compare)
