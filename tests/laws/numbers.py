"""Law 7: what is saved continues identically; every precision stays finite and close; a window far
down the stream is the window at its start."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from everlong import state as states
from laws.cases import Case, assert_same, assert_states, float_leaves

FAR = 10_000_000
STRIDE = 5040  # a multiple of every ring and segment of a small memory (all of 1-10, 12, 14, ...)


def check_saved(case: Case, folder: Path) -> None:
    """A saved state, and a saved model, continue to the same bits."""
    memory, length = case.build(), case.build().period + 2
    x = case.inputs(2, length, 1)
    with torch.no_grad():
        _, state = memory(case.inputs(2, length))
        y, after = memory(x, state)
        states.save(state, folder / "state.safetensors", case.name)
        loaded = states.load(folder / "state.safetensors", case.name)
        assert_states(loaded, state, "the loaded state", case.bounded, exact=True)
        save_model(memory, str(folder / "memory.safetensors"))
        with torch.random.fork_rng():
            torch.manual_seed(99)  # other parameters than those that are loaded
            other = case.make(0.0).double().eval()
        load_model(other, folder / "memory.safetensors")
        again, after_again = other(x, loaded)
    assert_same(again, y, "outputs after loading")
    assert_states(after_again, after, "state after loading", case.bounded, exact=True)


def _read(case: Case, memory: Any, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Three calls that cross boundaries, with the dtypes of the state checked on the way."""
    outputs, state = [], memory.init_state(2)
    dtypes = {path: leaf.dtype for path, leaf in states.flatten(state).items()}
    period = memory.period
    for i, length in enumerate((period + 1, 1, 2 * period + 3)):
        x = case.inputs(2, length, i)
        y, state = memory(x if case.tokens else x.to(dtype), state)
        outputs.append(y)
        for path, leaf in states.flatten(state).items():
            assert leaf.dtype == dtypes[path], (
                f"leaf {path!r} is {leaf.dtype} after {dtypes[path]} at the start"
            )
            assert leaf.isfinite().all(), f"leaf {path!r} is not finite"
    return torch.cat(outputs, 1), state


def _assert_near(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    assert got.isfinite().all(), f"{what}: not finite"
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error < tolerance, f"{what}: relative error {error:.2e}, at most {tolerance:.0e}"


def check_precision(case: Case) -> None:
    """float32, bfloat16 and autocast: finite, close to float64 on the same parameters, gradients
    too; dtypes of the state do not change on the way, nor under autocast."""
    for dtype, autocast, tolerance in (
        (torch.float32, False, 1e-4),
        (torch.float32, True, 5e-2),
        (torch.bfloat16, False, 5e-2),
    ):
        check_dtype(case, dtype, autocast, tolerance)


def check_dtype(case: Case, dtype: torch.dtype, autocast: bool, tolerance: float) -> None:
    """What `check_precision` asks, of one dtype."""
    what = f"{dtype}{' under autocast' * autocast}"
    memory = case.build(dtype=dtype)
    exact = case.build()
    exact.load_state_dict(memory.state_dict())
    with torch.no_grad():
        wanted, _ = _read(case, exact, torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = _read(case, memory, dtype)
    plain = states.flatten(memory.init_state(2))
    for path, leaf in states.flatten(state).items():
        assert leaf.dtype == plain[path].dtype, f"{what} changed the dtype of leaf {path!r}"
    _assert_near(y, wanted, tolerance, what)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # as a user's own loop may
        y.float().square().mean().backward()
    for name, parameter in memory.named_parameters():
        grad = parameter.grad
        assert grad is None or grad.isfinite().all(), f"gradient of {name} in {what}"


def check_accumulators(case: Case) -> None:
    """Of a bfloat16 memory, a leaf below float32 is a cache: its entries are written once, then
    moved or dropped, never built upon, for that would round again at every step.

    Shown in float64, where a leaf after one more position is differentiated by the same leaf before
    it, at every place of a period: an entry that is copied has its copy's weight for a gradient,
    and its value stands in the new leaf.
    """
    cast = states.flatten(case.build(dtype=torch.bfloat16).init_state(2))
    low = [p for p, leaf in cast.items() if leaf.dtype in (torch.bfloat16, torch.float16)]
    memory = case.build()
    _, state = memory(case.inputs(2, 2 * memory.period + 5))
    for place in range(memory.period):
        state, _ = float_leaves(state)
        before = states.flatten(state)
        _, state = memory(case.inputs(2, 1, place), state)
        after = states.flatten(state)
        for path in low:
            assert _only_copies(before[path], after[path]), (
                f"leaf {path!r} is built upon, yet {cast[path].dtype} in a bfloat16 memory: "
                "accumulators are float32 at least"
            )


def _only_copies(before: Tensor, after: Tensor) -> bool:
    """Whether `after` depends on `before` through entries that it holds unchanged, if at all."""
    if not after.requires_grad:
        return True
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(after.shape, generator=generator, dtype=torch.float64) + 0.5
    loss = (after * weights).sum()
    (grad,) = torch.autograd.grad(loss, before, allow_unused=True, retain_graph=True)
    if grad is None:
        return True
    used = grad != 0
    values = torch.isin(before[used].detach(), after.detach())
    return bool((torch.isin(grad[used], weights) & values).all())


def _clocks(case: Case, memory: Any) -> list[str]:
    """Leaves that count a row's stream positions: integers that are n after n positions, for ever.

    Found by what they do, not by name: the clock of a core that is wiped at each segment is not
    among them, and never goes far.
    """
    fresh = states.flatten(memory.init_state(1))
    paths = [path for path, leaf in fresh.items() if leaf.dim() == 1 and leaf.dtype == torch.long]
    for length in (1, 2 * memory.period + 1, 30):
        _, state = memory(case.inputs(1, length))
        found = states.flatten(state)
        paths = [path for path in paths if int(found[path]) == length]
    return paths


def _with_clocks(state: Any, paths: list[str], value: int) -> Any:
    """The state with the leaves at `paths` set to `value`."""
    leaves = states.flatten(state)
    chosen = iter(path in paths for path in leaves)
    return states.tree_map(
        lambda leaf: torch.full_like(leaf, value) if next(chosen) else leaf, state
    )


def check_far(case: Case) -> None:
    """In float32, a stream read at position 10,000,000 gives what it gives at position 5,040.

    A fresh state's clocks are set to both places. They are multiples of 5,040 and of the period:
    the same place of every ring and segment, and the unused places of a cache hold zeros in both
    (from position 0 they would be known to be unused), so that the two runs differ in nothing but
    how far they are. Not asked of unbounded memories, whose state would have to be as long, nor of
    those whose randomness is keyed by the position (a leaf `seed`), where places differ on purpose.
    """
    clocks = _clocks(case, case.build()) if case.bounded else []
    memory = case.build(dtype=torch.float32)
    fresh = memory.init_state(2)
    if not clocks:
        pytest.skip("it counts no positions" if case.bounded else "its state grows")
    if any(path.split(".")[-1] == "seed" for path in states.flatten(fresh)):
        pytest.skip("what it draws depends on the position, on purpose")
    x = case.inputs(2, 10 * memory.period + 50)
    x = x if case.tokens else x.float()
    stride = STRIDE * memory.period
    with torch.no_grad():
        far, near = (
            memory(x, _with_clocks(fresh, clocks, place))[0]
            for place in (stride * round(FAR / stride), stride)
        )
    torch.testing.assert_close(
        far, near, rtol=1e-4, atol=1e-4, msg=lambda m: f"at position 10,000,000: {m}"
    )
