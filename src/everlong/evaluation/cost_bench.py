"""What a memory costs against stream length: time a token, and bytes of state.

Every memory alone, as `create_memory` makes it with default options, float32, one stream. It reads
one call of T tokens from a fresh state without gradients, decodes token by token from there, and
reads the same call again with a backward pass. A cache that is still filling makes the shortest
calls cheap. B batch (1), T time, D hidden_size.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everlong import state as states
from everlong.evaluation.cost import QUOTED_HEADS, QUOTED_WIDTH
from everlong.evaluation.recall import check_counts
from everlong.evaluation.report import plot_cost
from everlong.evaluation.timing import Spent, columns, interleaved, timed, torch_threads, trusted
from everlong.provenance import write_results
from everlong.registry import check_types, create_memory, list_memories, memory_entry
from everlong.state import State
from everlong.stateful import Stateful

FLAT = 1.2  # a token of the longest call over one of the shortest: up to here the cost is flat
READ = ("forward", "both")  # without gradients; forward and backward
_MICRO = 1e6
Row = dict[str, Any]


@dataclass(frozen=True)
class CostRun:
    """What is measured: calls of `lengths` tokens in `rounds` timed rounds, medians.

    Short calls are repeated until `least` tokens were read. A memory whose state grows costs more
    and more: its calls end at `unbounded_length`. `decoded` calls of one token follow. About half a
    minute of one core a memory.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    rounds: int = 3
    least: int = 2048
    unbounded_length: int = 4096
    decoded: int = 32
    hidden_size: int = QUOTED_WIDTH
    num_heads: int = QUOTED_HEADS
    threads: int = 1
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        plain = {name: value for name, value in vars(self).items() if name != "lengths"}
        check_types(type(self), plain, "cost")
        check_counts("lengths", self.lengths)
        if min(self.lengths) < 1:
            raise ValueError(f"lengths are {list(self.lengths)}: give tokens, 1 or more")
        for name in ("rounds", "least", "decoded", "hidden_size", "num_heads", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.unbounded_length < min(self.lengths):
            raise ValueError(
                f"unbounded_length is {self.unbounded_length}: give at least the shortest of "
                f"lengths, {min(self.lengths)}"
            )

    def lengths_of(self, name: str) -> list[int]:
        """The calls of this memory, the shortest first."""
        last = max(self.lengths) if memory_entry(name).bounded else self.unbounded_length
        return sorted({length for length in self.lengths if length <= last})


class Subject:
    """One memory, and the tokens it reads and decodes."""

    def __init__(self, name: str, config: CostRun) -> None:
        self.name, self.config = name, config
        torch.manual_seed(config.seed)
        memory = create_memory(name, hidden_size=config.hidden_size, num_heads=config.num_heads)
        self.memory: Stateful = memory.to(config.device)
        generator = torch.Generator().manual_seed(config.seed)
        longest = config.lengths_of(name)[-1]
        tokens = torch.randn(
            1, longest + config.decoded, config.hidden_size, generator=generator
        ).to(config.device)
        self.inputs = tokens[:, :longest].clone()  # [B, T, D]
        self.next = tokens[:, longest:].split(1, 1)  # each [B, 1, D]

    @torch.inference_mode()
    def read(self, length: int, calls: int) -> State:
        for _ in range(calls - 1):
            self.memory(self.inputs[:, :length])
        return self.memory(self.inputs[:, :length])[1]

    @torch.inference_mode()
    def decode(self, state: State) -> None:
        for token in self.next:
            _, state = self.memory(token, state)

    def train(self, x: Tensor, calls: int) -> None:
        for _ in range(calls):
            y, _ = self.memory(x)
            y.backward(torch.ones_like(y))

    def visit(self, length: int) -> tuple[int, dict[str, Spent]]:
        """Bytes of state after a call of `length` tokens, and microseconds a token: of the call
        without gradients, of what is decoded behind it, of the call forward and backward."""
        device, calls = self.config.device, -(-self.config.least // length)
        self.memory.eval()
        state, forward = timed(lambda: self.read(length, calls), device)
        _, decode = timed(lambda: self.decode(state), device)
        held = states.num_bytes(state)
        self.memory.train().zero_grad()
        x = self.inputs[:, :length].clone().requires_grad_()
        _, both = timed(lambda: self.train(x, calls), device)
        read = _MICRO / (calls * length)
        return held, {
            "forward": forward.times(read),
            "both": both.times(read),
            "decode": decode.times(_MICRO / self.config.decoded),
        }


def measure(
    config: CostRun, names: Sequence[str] = (), say: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """A row for every memory (of `names`, or all) and length; `say` is told of each round.

    Times are microseconds a token, medians over the rounds: `forward` without gradients, `both`
    forward and backward, `decode` a token by itself after the call, each `_wall` and `_cpu`. Before
    the first round every memory reads its shortest call once. Restores torch's generators and
    threads. `ValueError` for an unknown name.
    """
    wanted = list(dict.fromkeys(names)) or list_memories()
    entries = {name: memory_entry(name) for name in wanted}
    with torch.random.fork_rng(), torch_threads(config.threads):
        say(f"{len(wanted)} memories: warming up")
        subjects = {name: Subject(name, config) for name in wanted}
        for name, subject in subjects.items():
            subject.visit(config.lengths_of(name)[0])
        cells = [(name, length) for name in wanted for length in config.lengths_of(name)]
        times: dict[tuple[str, int], list[dict[str, Spent]]] = {cell: [] for cell in cells}
        held = {}
        for turn, order in interleaved(cells, config.rounds, config.seed):
            say(f"round {turn + 1} of {config.rounds}")
            for name, length in order:
                held[name, length], found = subjects[name].visit(length)
                times[name, length].append(found)
    rows = []
    for name, length in cells:
        rows.append(
            {
                "name": name,
                "room": entries[name].room,
                "bounded": entries[name].bounded,
                "period": subjects[name].memory.period,
                "length": length,
                "state_bytes": held[name, length],
                **columns(times[name, length]),
            }
        )
    return rows


def summary(rows: Sequence[Row], clock: str) -> list[Row]:
    """One row a memory: its state and decoding after the longest call, and what a token of that
    costs over one of the shortest, by `clock`; `flat` where neither ratio is above 1.2."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["length"])
        first, last = own[0], own[-1]
        ratios = {f"times_{key}": last[f"{key}_{clock}"] / first[f"{key}_{clock}"] for key in READ}
        found.append(
            {
                "name": name,
                "bounded": last["bounded"],
                "shortest": first["length"],
                "longest": last["length"],
                "state_bytes": last["state_bytes"],
                **ratios,
                "flat": max(ratios.values()) <= FLAT,
                "decode": last[f"decode_{clock}"],
            }
        )
    return found


def write(path: Path, config: CostRun, rows: Sequence[Row]) -> None:
    """Rows and summary as JSON with provenance, and the picture beside it."""
    clock = trusted(config.device, config.threads)
    write_results(
        path,
        "everlong bench cost",
        asdict(config),
        clock=clock,
        summary=summary(rows, clock),
        rows=list(rows),
    )
    plot_cost(rows, clock, path.with_suffix(".png"))
