"""Any cut, any mask, any reset: random calls of a batch against one call of each row's own stream.

Every registered memory at its test size, float64. An example is two to five calls of random
lengths; a row of a call is whole, empty, padded or full of holes, with NaN where it is masked, and
some rows start anew between calls. Each row must end as its own stream would, compacted and read
alone in one call: outputs and every leaf of the state, to 1e-9. B rows, T time, D width.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everlong import state as states
from everlong.errors import UserError
from everlong.registry import create_memory, list_memories, memory_entry
from everlong.state import State

ROWS, WIDTH, HEADS, TOLERANCE = 3, 24, 3, 1e-9


@dataclass(frozen=True)
class Call:
    """What a batch is given at once: rows that start anew, then the masked read."""

    reset: tuple[bool, ...]  # [B]
    mask: tuple[tuple[bool, ...], ...]  # [B, T]


@dataclass
class Count:
    """worst: the largest difference, |a - b| / (1 + |b|)."""

    examples: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)


def measure(
    examples: int,
    seed: int,
    folder: Path,
    say: Callable[[str], None],
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """A row for every memory (of `names`, or all): examples, failures, the worst difference.

    What hypothesis keeps for itself goes to `folder`.
    """
    _hypothesis()[0].configuration.set_hypothesis_home_dir(folder)
    rows = []
    for name in names or list_memories():
        memory = build(name)
        found = count(memory, WIDTH, memory_entry(name).bounded, examples, seed)
        row = {"name": name, "examples": found.examples, "worst": found.worst}
        row |= {"failed": len(found.failures), "failures": found.failures[:3]}
        row["refuses_empty"] = refuses_empty(memory, WIDTH)
        say(f"{name}: {found.examples} examples, {len(found.failures)} failed, {found.worst:.1e}")
        rows.append(row)
    worst = max(rows, key=lambda row: row["worst"])
    return {
        "tried": sum(row["examples"] for row in rows),
        "failed": sum(row["failed"] + (not row["refuses_empty"]) for row in rows),
        "note": f"{len(rows)} memories; worst difference {worst['worst']:.1e} ({worst['name']})",
        "rows": rows,
    }


def build(name: str) -> Any:
    """In eval mode, with no parameter at its initial value: a closed gate would hide a leak."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        memory = create_memory(name, size="small", hidden_size=WIDTH, num_heads=HEADS)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return memory.double().eval()


def count(memory: Any, width: int, bounded: bool, examples: int, seed: int) -> Count:
    """`examples` of hypothesis; what fails is counted, and the next one goes on."""
    hypothesis, st = _hypothesis()
    found = Count()
    calls = st.lists(_calls(st, max(memory.period, 8) + 1), min_size=2, max_size=5)

    def example(given: list[Call], number: int) -> None:
        found.examples += 1
        try:
            worst = difference(memory, width, bounded, given, number)
        except Exception as error:  # noqa: BLE001 (to be counted is what this is for)
            found.failures.append(f"{type(error).__name__}: {error}; inputs {number}, {given}")
            return
        found.worst = max(found.worst, worst)
        if not worst <= TOLERANCE:
            found.failures.append(f"off by {worst:.1e}; inputs {number}, {given}")

    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    drawn = hypothesis.given(calls, st.integers(0, 2**32 - 1))(example)
    hypothesis.seed(seed)(settings(drawn))()
    return found


def _hypothesis() -> tuple[Any, Any]:
    try:
        return tuple(map(importlib.import_module, ("hypothesis", "hypothesis.strategies")))
    except ImportError as error:
        raise UserError(
            "random cuts are drawn by hypothesis: pip install 'everlong[dev]'"
        ) from error


def _calls(st: Any, longest: int) -> Any:
    def of_length(length: int) -> Any:
        whole, padding = (True,) * length, st.integers(0, length)
        row = st.one_of(
            st.just(whole),
            st.just((False,) * length),
            padding.map(lambda n: (False,) * n + whole[n:]),
            padding.map(lambda n: whole[n:] + (False,) * n),
            st.tuples(*[st.booleans()] * length),
        )
        reset = st.tuples(*[st.sampled_from((False, False, False, True))] * ROWS)
        mask = st.one_of(st.just((whole,) * ROWS), st.tuples(*[row] * ROWS))
        return st.builds(Call, reset, mask)

    return st.one_of(st.just(1), st.integers(1, longest)).flatmap(of_length)


@torch.no_grad()
def difference(memory: Any, width: int, bounded: bool, calls: Sequence[Call], number: int) -> float:
    """The largest difference of any row's outputs and final state from its own stream's."""
    generator = torch.Generator().manual_seed(number)
    state, worst = memory.init_state(ROWS), 0.0
    streams: list[list[Tensor]] = [[] for _ in range(ROWS)]
    outputs: list[list[Tensor]] = [[] for _ in range(ROWS)]
    for call in calls:
        reset, mask = torch.tensor(call.reset), torch.tensor(call.mask)
        state = memory.reset(state, reset)
        x = torch.randn(*mask.shape, width, generator=generator, dtype=torch.float64)
        x = torch.where(mask[..., None], x, torch.nan)
        y, state = memory(x, state, mask)
        worst = max(worst, _apart(y[~mask], torch.zeros_like(y[~mask])))
        for row in range(ROWS):
            if call.reset[row]:
                streams[row], outputs[row] = [], []
            streams[row].append(x[row, mask[row]])
            outputs[row].append(y[row, mask[row]])
    for row in range(ROWS):
        stream = torch.cat(streams[row])[None]  # [1, T', D]
        alone = memory.init_state(1)
        if stream.shape[1]:
            y, alone = memory(stream)
            worst = max(worst, _apart(torch.cat(outputs[row]), y[0]))
        worst = max(worst, _states_apart(states.select(state, torch.tensor([row])), alone, bounded))
    return worst


def _states_apart(got: State, wanted: State, bounded: bool) -> float:
    found, expected = states.flatten(got), states.flatten(wanted)
    if list(found) != list(expected):
        return float("inf")
    worst = 0.0
    for path, a in found.items():
        b = expected[path]
        if not bounded and a.dim() > 1:  # theirs may differ by zeros behind dimension 1
            a, b = (states.pad_length(leaf, max(a.shape[1], b.shape[1])) for leaf in (a, b))
        worst = max(worst, _apart(a, b))
    return worst


def _apart(a: Tensor, b: Tensor) -> float:
    """|a - b| / (1 + |b|) at its largest; infinite for other shapes or kinds, whole numbers that
    differ, and NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    if not a.numel():
        return 0.0
    worst = ((a - b).abs() / (1 + b.abs())).max().item()
    return worst if worst == worst else float("inf")


def refuses_empty(memory: Any, width: int) -> bool:
    """A call of no tokens at all is a `ValueError`, as the docstring of Stateful says."""
    try:
        memory(torch.zeros(1, 0, width, dtype=torch.float64))
    except ValueError:
        return True
    return False
