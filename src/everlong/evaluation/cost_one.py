"""One memory of `everlong bench cost`: which cells are possible, their bytes, and their time."""

import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from everlong.evaluation.cost_subject import MODEL, Cell, Matmul, ModelSubject, Subject
from everlong.evaluation.timing import Spent, columns, interleaved, timed, trusted
from everlong.provenance import git_sha, memory_bytes
from everlong.registry import memory_entry
from everlong.state import num_bytes

if TYPE_CHECKING:
    from everlong.evaluation.cost_bench import CostRun

_MEMORY = 0.5  # the part of this machine's that one call may need
_MICRO = 1e6
Row = dict[str, Any]


def measure_one(name: str, config: "CostRun") -> Row:
    """Of one memory: `rows`, one a cell; `skipped`, what was left out and why; `pairs`, decoding
    near and far in turn; `matmul`, the machine; `git` and `cpu_seconds`, of which code, how long.

    A row's times are microseconds a token, medians over the rounds, all of them beside: `took_cpu`,
    `took_wall`. `flops` are those of a token; `live_bytes` the most alive at one time in tensors
    that were made (for decoding with the state), so without inputs and parameters;
    `peak_fraction` the share of the matrix products' speed that was timed just before.
    """
    began = time.process_time()
    bench = Bench(name, config)
    bench.prepare()
    bench.time()
    entry, subject = memory_entry(name), bench.subject
    return {
        "name": name,
        "room": entry.room,
        "bounded": entry.bounded,
        "period": subject.period,
        "parameters": sum(p.numel() for p in subject.memory.parameters()),
        "model": {
            "parameters": bench.model.model.num_parameters(),
            "intermediate_size": bench.model.intermediate_size,
            "length": config.model_length,
            "state_bytes": num_bytes(bench.model.state),
        },
        "rows": bench.rows(),
        "pairs": bench.pairs(),
        "skipped": bench.skipped,
        "matmul": {"flops_per_second": median(bench.rates), "all": bench.rates},
        "git": git_sha(),
        "cpu_seconds": time.process_time() - began,
    }


class Bench:
    """The cells of one memory, as far as they are found possible."""

    def __init__(self, name: str, config: "CostRun") -> None:
        self.name, self.config = name, config
        self.bounded = memory_entry(name).bounded
        self.clock = trusted(config.device, config.threads)
        self.model = ModelSubject(name, config)
        self.subject = Subject(name, config)
        self.matmul = Matmul(config)
        self.about: dict[Cell, Row] = {}
        self.times: dict[Cell, list[dict[str, Spent]]] = {}
        self.fractions: dict[Cell, list[float]] = {}
        self.last: dict[str, tuple[int, float, int]] = {}  # length, seconds, bytes of each kind
        self.skipped: list[Row] = []
        self.rates: list[float] = []

    def prepare(self) -> None:
        """Count bytes and FLOPs of every cell that is possible, the shortest first, which says what
        the next will take; then read on, to decode there."""
        for kind in ("read", "train"):
            for length in self.config.lengths_of(self.name):
                self._meter(Cell(kind, length))
        if self.bounded:
            for length in sorted(set(self.config.replayed)):
                self._meter(Cell("replay", length))
            self._stream()
        for length in sorted(self.subject.states):
            self.about[Cell("decode", length)] = self.subject.meter(Cell("decode", length))
        for kind in MODEL:
            cell = Cell(kind, self.config.model_length)
            self.about[cell] = self.model.meter(cell)

    def _meter(self, cell: Cell) -> None:
        seconds, size = self._expected(cell)
        limit = _MEMORY * memory_bytes()
        if seconds > self.config.longest:
            self._skip(cell, f"{seconds:.0f} s are expected, and longest is {self.config.longest}")
        elif size > limit:
            self._skip(cell, f"{size / 1e9:.0f} GB are expected, and {limit / 1e9:.0f} allowed")
        else:
            found, took = timed(lambda: self.subject.meter(cell), self.config.device)
            self.about[cell] = found
            self.last[cell.kind] = cell.length, getattr(took, self.clock), found["live_bytes"]

    def _expected(self, cell: Cell) -> tuple[float, float]:
        """Seconds and bytes, from the cell before."""
        if cell.kind in self.last:
            length, seconds, size = self.last[cell.kind]
            times = cell.length / length
            return seconds * (times if self.bounded else times**2), size * times
        if cell.kind != "replay":
            return 0.0, 0.0
        length, seconds, _ = self.last["train"]
        return 4 / 3 * seconds * cell.length / length, 0.0  # forward once more; one segment alive

    def _skip(self, cell: Cell, why: str) -> None:
        self.skipped.append({"kind": cell.kind, "length": cell.length, "why": why})

    def _stream(self) -> None:
        marks, patience = sorted(set(self.config.positions)), self.config.patience
        reached, calls = self.subject.stream(marks, patience)
        for mark in marks:
            if mark > reached:
                why = f"patience of {patience} s was over after {reached} tokens: decoded there"
                self._skip(Cell("decode", mark), why)
        for position, took in calls.items():
            if took:
                cell = Cell("stream", position)
                self.about[cell] = {}
                self.times[cell] = [{"took": spent} for spent in took]

    def time(self) -> None:
        """Every round visits all cells in an order of its own, behind the machine's products; what
        takes more than `once` seconds is visited in the first round alone."""
        cells = [cell for cell in self.about if cell.kind != "stream"]
        self.times |= {cell: [] for cell in cells}
        self.fractions = {cell: [] for cell in cells}
        slow: set[Cell] = set()
        for _, order in interleaved(cells, self.config.rounds, self.config.seed):
            for cell in order:
                if cell in slow:
                    continue
                spent, tokens = self._visit(cell)
                seconds = getattr(spent, self.clock)
                if seconds > self.config.once:
                    slow.add(cell)
                done = self.about[cell]["flops"] * tokens / seconds
                self.fractions[cell].append(done / self.rates[-1])
                self.times[cell].append({"took": spent.times(_MICRO / tokens)})

    def _visit(self, cell: Cell) -> tuple[Spent, int]:
        subject = self.model if cell.kind in MODEL else self.subject
        subject.forget()
        self.rates.append(self.matmul.rate())
        tokens, spent = timed(lambda: subject.run(cell), self.config.device)
        return spent, tokens

    def pairs(self) -> Row | None:
        """Decoding behind `near` tokens and behind the most there are, in turn: microseconds a
        token of both, and far over near. None where there is only one position."""
        held = sorted(self.subject.states)
        near = next((at for at in held if at >= self.config.near), held[-1])
        far = held[-1]
        if near == far:
            return None
        took: dict[int, list[float]] = {near: [], far: []}
        for _, order in interleaved([near, far], self.config.pairs, self.config.seed):
            for at in order:
                spent, tokens = self._visit(Cell("decode", at))
                took[at].append(getattr(spent, self.clock) * _MICRO / tokens)
        return {"near": near, "far": far, **ratio(took[far], took[near])}

    def rows(self) -> list[Row]:
        rows = []
        for cell, found in self.about.items():
            row = {"name": self.name, **cell._asdict(), **found, **columns(self.times[cell])}
            if cell in self.fractions:
                row["peak_fraction"] = median(self.fractions[cell])
                row["all_peak_fraction"] = [round(part, 4) for part in self.fractions[cell]]
            rows.append(row)
        return rows


def ratio(over: Sequence[float], under: Sequence[float]) -> Row:
    """{"times": of the medians, "range": [least, most]}, of the rounds that both have: the first,
    where one was timed more often."""
    both = list(zip(over, under, strict=False))
    each = [a / b for a, b in both]
    times = median(a for a, _ in both) / median(b for _, b in both)
    return {"times": times, "range": [min(each), max(each)]}
