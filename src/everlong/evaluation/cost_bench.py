"""What a memory costs against stream length: time, peak memory, FLOPs, and bytes of state.

Every memory alone, as `create_memory` makes it with default options, float32, one stream, at equal
width (its parameters are said); then as a language model of default options, where all have equal
parameters: the feed-forward layers take up the difference. `cost_subject` says what is timed. The
memories are measured one after the other, each into a file of its own, so that a run that was
stopped goes on; the cells of one memory are interleaved, and before each of them the machine's
matrix products are timed, which `peak_fraction` is a fraction of.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from everlong.evaluation.cells import cell as resumed
from everlong.evaluation.cost import QUOTED_HEADS, QUOTED_WIDTH
from everlong.evaluation.cost_one import measure_one, ratio
from everlong.evaluation.recall import check_counts
from everlong.evaluation.report import plot_cost
from everlong.evaluation.timing import torch_threads, trusted
from everlong.provenance import write_results
from everlong.registry import check_types, list_memories, memory_entry

FLAT = 1.2  # a token of the longest call over one of the shortest: up to here the cost is flat
EVEN = 0.05  # decoding far into a stream over decoding near its start: within this it is flat
_LISTS = ("lengths", "replayed", "positions")
_MODEL = ("flops", "live_bytes", "peak_fraction")
Row = dict[str, Any]


@dataclass(frozen=True)
class CostRun:
    """What is measured, in `rounds` interleaved rounds.

    `lengths` are calls, read and trained; a memory whose state grows ends at `unbounded_length`.
    A bounded one is trained over `replayed` tokens in segments of `segment`, reads on to
    `positions` in calls, and decodes at all of them: `decoded` tokens, in whole periods. The last
    of its positions against `near` is timed in `pairs` pairs. Short calls are repeated until
    `least` tokens were read. Every language model has `parameters` in `model_layers` layers.

    A memory reads on for `patience` seconds, and decodes where it has come by then; a call that is
    expected to take more than `longest` seconds or half of the machine's memory is left out; one
    that takes more than `once` is timed once. What is left out is said.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    replayed: tuple[int, ...] = (16384, 65536)
    positions: tuple[int, ...] = (32768, 65536, 1_000_000)
    segment: int = 2048
    unbounded_length: int = 16384
    decoded: int = 32
    near: int = 1024
    pairs: int = 9
    rounds: int = 3
    least: int = 2048
    patience: float = 90.0
    longest: float = 60.0
    once: float = 2.0
    size: str | None = None  # "small": the memories' test-sized options
    hidden_size: int = QUOTED_WIDTH
    num_heads: int = QUOTED_HEADS
    parameters: int = 5_000_000
    model_layers: int = 2
    model_length: int = 1024
    matmul: int = 1024
    threads: int = 1
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        plain = {name: value for name, value in vars(self).items() if name not in _LISTS}
        check_types(type(self), plain, "cost")
        for name in _LISTS:
            values = getattr(self, name)
            check_counts(name, values)
            if min(values) < 1:
                raise ValueError(f"{name} are {list(values)}: give tokens, 1 or more")
        for name, value in plain.items():
            least = 0 if isinstance(value, float) else 1
            if name not in ("seed", "device", "size") and value < least:
                raise ValueError(f"{name} is {value}: give {least} or more")
        if self.unbounded_length < min(self.lengths):
            raise ValueError(
                f"unbounded_length is {self.unbounded_length}: give at least the shortest of "
                f"lengths, {min(self.lengths)}"
            )
        if min(self.positions) <= max(self.lengths):
            raise ValueError(
                f"positions are {list(self.positions)}: give more than the longest of lengths, "
                f"{max(self.lengths)}"
            )

    def lengths_of(self, name: str) -> list[int]:
        """The calls of this memory, the shortest first."""
        last = max(self.lengths) if memory_entry(name).bounded else self.unbounded_length
        return sorted({length for length in self.lengths if length <= last})


def measure(
    config: CostRun,
    folder: Path,
    names: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """What `measure_one` finds of every memory (of `names`, or all): from its file in `folder`, or
    measured now and written there. Restores torch's generators and threads. `ValueError` for an
    unknown name."""
    wanted = list(dict.fromkeys(names)) or list_memories()
    for name in wanted:
        memory_entry(name)
    found = []
    with torch.random.fork_rng(), torch_threads(config.threads):
        for count, name in enumerate(wanted, 1):
            say(f"{name}, {count} of {len(wanted)}, is measured")
            found.append(
                resumed(
                    folder / f"{name}.json",
                    {"memory": name, **asdict(config)},
                    lambda name=name: measure_one(name, config),
                )
            )
    return found


def summary(found: Sequence[Row], clock: str) -> list[Row]:
    """One row a memory, times by `clock`; ratios are of medians, with their range over the rounds.

    `read` and `train`, of the longest call: microseconds and FLOPs a token, `peak_fraction` and
    peak `live_bytes`; `times` is a token of it over one of the shortest call (`flat` up to 1.2 for
    both), `doubled` the whole call over one of half the length: 2 is linear, 4 quadratic. `replay`:
    the same of the longest rollout over the shortest, in time a token and in bytes.
    `state_doubled`: bytes of state at twice the length. `decode`: at the last position, and in
    `pairs` far over near, `even` within 5 %. `model`: the language model.
    """
    return [_summary_of(memory, clock) for memory in found]


def _summary_of(memory: Row, clock: str) -> Row:
    cells: dict[str, list[Row]] = {}
    for row in memory["rows"]:
        cells.setdefault(row["kind"], []).append(row)
    read, train = (_calls(cells[kind], clock) for kind in ("read", "train"))
    replay = _calls(cells["replay"], clock) if "replay" in cells else None
    decode, pairs = cells["decode"][-1], memory["pairs"]
    sizes = [row["state_bytes"] for row in cells["read"]]
    return {
        "name": memory["name"],
        "bounded": memory["bounded"],
        "parameters": memory["parameters"],
        "state_bytes": decode["state_bytes"],
        "state_doubled": sizes[-1] / sizes[-2] if len(sizes) > 1 else None,
        "read": read,
        "train": train,
        "replay": replay,
        "flat": max(read["times"], train["times"]) <= FLAT,
        "decode": {
            "length": decode["length"],
            "took": decode[f"took_{clock}"],
            "live_bytes": decode["live_bytes"],
            "pairs": pairs and {**pairs, "even": abs(pairs["times"] - 1) <= EVEN},
        },
        "model": memory["model"]
        | {
            kind: {key: cells[f"model {kind}"][0][key] for key in (f"took_{clock}", *_MODEL)}
            for kind in ("train", "decode")
        },
        "skipped": memory["skipped"],
    }


def _calls(rows: Sequence[Row], clock: str) -> Row:
    """Of one kind's cells, the shortest first: the longest, and how it compares."""
    first, last = rows[0], rows[-1]
    key = f"all_took_{clock}"
    half = next((row for row in rows if 2 * row["length"] == last["length"]), None)
    doubled = None
    if half is not None:
        one = ratio(last[key], half[key])
        doubled = {"times": 2 * one["times"], "range": [2 * end for end in one["range"]]}
    return {
        "shortest": first["length"],
        "length": last["length"],
        "took_shortest": first[f"took_{clock}"],
        "took": last[f"took_{clock}"],
        **ratio(last[key], first[key]),
        "doubled": doubled,
        "live_bytes": last["live_bytes"],
        "times_bytes": last["live_bytes"] / first["live_bytes"],
        "flops": last["flops"],
        "peak_fraction": last["peak_fraction"],
    }


def write(path: Path, config: CostRun, found: Sequence[Row]) -> None:
    """What was found and its summary as JSON with provenance, and the picture beside it."""
    clock = trusted(config.device, config.threads)
    write_results(
        path,
        "everlong bench cost",
        asdict(config),
        clock=clock,
        summary=summary(found, clock),
        memories=list(found),
    )
    plot_cost(found, clock, path.with_suffix(".png"))
