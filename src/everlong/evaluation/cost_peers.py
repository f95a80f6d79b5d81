"""The linear-time scans side by side: our chunk forms, their step forms, and transformers' own.

One run, interleaved: forward and backward of T positions, 4 heads of 64, from a state that is
carried in and out and has a gradient. Before anything is timed, outputs, last state and gradients
of every form are compared with those of the definition, position by position.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everlong.evaluation.meters import SavedBytes
from everlong.evaluation.recall import check_counts
from everlong.evaluation.scan_forms import OURS, Form, Rule, all_rules, draw, transformers_functions
from everlong.evaluation.timing import Spent, columns, interleaved, timed, torch_threads, trusted
from everlong.provenance import write_results
from everlong.registry import check_types

_CLOSE = 1e-3  # a difference over the largest number of the definition; in float32, over all T
_MILLI = 1e3
Row = dict[str, Any]
Cell = tuple[str, str]  # rule and form


@dataclass(frozen=True)
class PeersRun:
    """What is timed: `rounds` rounds after one that warms up, on each number of `threads`.

    A form that takes more than `patience` seconds of the processor is timed once a number of
    threads, in the last round. Some minutes on one core, and as many on two.
    """

    length: int = 4096
    num_heads: int = 4
    head_size: int = 64
    rounds: int = 3
    threads: tuple[int, ...] = (1, 2)
    patience: float = 10.0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        plain = {name: value for name, value in vars(self).items() if name != "threads"}
        check_types(type(self), plain, "cost")
        check_counts("threads", self.threads)
        if min(self.threads) < 1:
            raise ValueError(f"threads are {list(self.threads)}: give 1 or more")
        for name in ("length", "num_heads", "head_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")


def measure(
    config: PeersRun,
    say: Callable[[str], None] = lambda line: None,
    finished: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """A row for every number of threads, rule and form; `finished` gets those there are after each
    number of threads.

    Times are milliseconds, medians over the rounds: `forward`, `backward` and `both`, each `_wall`
    and `_cpu`; `times_ours` is `both` over that of our form by the trusted clock. Restores torch's
    threads.
    """
    shape = config.length, config.num_heads, config.head_size
    found = all_rules(draw(*shape, config.seed, config.device))
    about: dict[Cell, Row] = {}
    slow = set()
    with torch_threads(config.threads[0]):
        for rule in found:
            say(f"{rule.name}: comparing {', '.join(rule.forms)}")
            for form, row in _compare(rule, config.device).items():
                about[rule.name, form] = row
                if row["compared_s"] > config.patience:
                    slow.add((rule.name, form))
    cells = {(rule.name, form): rule for rule in found for form in rule.forms}
    rows = []
    for threads in config.threads:
        with torch_threads(threads):
            times = _time(cells, slow, config, lambda line, n=threads: say(f"threads: {n}, {line}"))
        rows += _rows(about, times, threads, trusted(config.device, threads))
        finished(rows)
    return rows


def lacking() -> list[str]:
    """The forms that the installed transformers does not have."""
    return [form for form, function in transformers_functions().items() if function is None]


def _time(
    cells: dict[Cell, Rule], slow: set[Cell], config: PeersRun, say: Callable[[str], None]
) -> dict[Cell, list[dict[str, Spent]]]:
    times: dict[Cell, list[dict[str, Spent]]] = {cell: [] for cell in cells}
    for turn, order in interleaved(list(cells), config.rounds + 1, config.seed):
        say(f"round {turn} of {config.rounds}" if turn else "warming up")
        for cell in order:
            if cell in slow and turn < config.rounds:
                continue
            _, seconds = _run(cells[cell].forms[cell[1]], cells[cell].leaves, config.device)
            if turn:
                times[cell].append({key: took.times(_MILLI) for key, took in seconds.items()})
    return times


def _run(
    form: Form, leaves: Sequence[Tensor], device: str
) -> tuple[tuple[Tensor, Tensor], dict[str, Spent]]:
    """Outputs and last state, and what they took; gradients are left in the leaves."""
    for leaf in leaves:
        leaf.grad = None
    outputs, forward = timed(form, device)
    ones = [torch.ones_like(y) for y in outputs]
    _, backward = timed(lambda: torch.autograd.backward(outputs, ones), device)
    return outputs, {"forward": forward, "backward": backward, "both": forward + backward}


def _compare(rule: Rule, device: str) -> dict[str, Row]:
    """Of every form the largest differences to the definition, relative to its largest number, and
    the bytes kept for the gradient. A form that does not agree is no peer: an assertion says so."""
    found: dict[str, Row] = {}
    exact: tuple[list[Tensor], list[Tensor]] | None = None
    for form in reversed(list(rule.forms)):
        with SavedBytes(rule.leaves) as saved:
            outputs, seconds = _run(rule.forms[form], rule.leaves, device)
        values = [y.detach() for y in outputs]
        grads = [leaf.grad.clone() for leaf in rule.leaves if leaf.grad is not None]
        assert len(grads) == len(rule.leaves), f"{rule.name}, {form}: an input has no gradient"
        exact = exact or (values, grads)
        found[form] = {
            "rule": rule.name,
            "form": form,
            "value_difference": _difference(values, exact[0]),
            "gradient_difference": _difference(grads, exact[1]),
            "kept_bytes": saved.peak,
            "compared_s": seconds["both"].cpu,
        }
        worst = max(found[form]["value_difference"], found[form]["gradient_difference"])
        assert worst < _CLOSE, f"{rule.name}, {form}: differs by {worst:.1e} from the definition"
    return {form: found[form] for form in rule.forms}


def _difference(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)
    )


def _rows(
    about: dict[Cell, Row],
    times: dict[Cell, list[dict[str, Spent]]],
    threads: int,
    clock: str,
) -> list[Row]:
    rows = [
        {**about[cell], "threads": threads, "clock": clock, **columns(found)}
        for cell, found in times.items()
    ]
    ours = {row["rule"]: row[f"both_{clock}"] for row in rows if row["form"] == OURS}
    for row in rows:
        row["times_ours"] = row[f"both_{clock}"] / ours[row["rule"]]
    return rows


def write(path: Path, config: PeersRun, rows: Sequence[Row]) -> None:
    """The rows as JSON with provenance."""
    command = "everlong bench cost --peers"
    write_results(path, command, asdict(config), rows=list(rows), lacking=lacking())
