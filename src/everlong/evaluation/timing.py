"""Time by two clocks, in rounds that are interleaved and drawn anew."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

CLOCKS = ("wall", "cpu")
Cell = TypeVar("Cell")


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock on the wall, and of the processor, all threads of this process added."""

    wall: float
    cpu: float

    def times(self, scale: float) -> "Spent":
        """In another unit, or for each of several."""
        return Spent(self.wall * scale, self.cpu * scale)

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.wall + other.wall, self.cpu + other.cpu)


def timed(run: Callable[[], Any], device: torch.device | str) -> tuple[Any, Spent]:
    """What `run` returns and what it took; an accelerator has finished its work on both sides."""
    synchronised = torch.device(device).type != "cpu"
    if synchronised:
        torch.accelerator.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    if synchronised:
        torch.accelerator.synchronize(device)
    return result, Spent(time.perf_counter() - wall, time.process_time() - cpu)


def trusted(device: torch.device | str, threads: int) -> str:
    """The clock to believe. Processor time is that of one thread whatever else the machine does;
    of several it adds up what they wait for each other, and it does not see an accelerator."""
    return "cpu" if torch.device(device).type == "cpu" and threads == 1 else "wall"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads inside, and with as many as before behind it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(cells: Sequence[Cell], rounds: int, seed: int) -> Iterator[tuple[int, list[Cell]]]:
    """(round, all cells in an order of its own), drawn under `seed`."""
    generator = random.Random(seed)
    for turn in range(rounds):
        yield turn, generator.sample(cells, len(cells))


def columns(found: Sequence[Mapping[str, Spent]]) -> dict[str, Any]:
    """Over the rounds, of every key and clock the median, and beside it all rounds.

    {"forward": Spent} a round -> {"forward_wall", "forward_cpu", "all_forward_wall", ...}.
    """
    row: dict[str, Any] = {}
    for key in found[0]:
        for clock in CLOCKS:
            each = [getattr(one[key], clock) for one in found]
            row[f"{key}_{clock}"] = median(each)
            row[f"all_{key}_{clock}"] = [round(value, 3) for value in each]
    return row
