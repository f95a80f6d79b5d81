"""Whole language models of other packages beside our nearest ones, in one interleaved run.

Float32 on the processor, byte vocabulary, equal width, depth and parameters: the feed-forward
layers of ours take up the difference. Timed are a training step of T tokens (cross-entropy, forward
and backward, through time where there are segments), and tokens decoded one by one behind positions
of a stream, a whole segment of them, each package in the way of its own `generate`. What a model
holds there is counted: all tensors that its next call is given. `model_contests` says how each is
built, `model_forms` how it is asked.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.evaluation.cost_one import ratio
from everlong.evaluation.model_contests import Missing, contests
from everlong.evaluation.model_forms import Language
from everlong.evaluation.recall import check_counts
from everlong.evaluation.timing import Spent, columns, interleaved, timed, torch_threads, trusted
from everlong.provenance import write_results
from everlong.registry import check_types

_MICRO = 1e6
_CLOSE = 1e-3
Row = dict[str, Any]
Cell = tuple[int, str, int]  # which model, what is timed, at which length


@dataclass(frozen=True)
class ModelsRun:
    """What is timed, in `rounds` rounds after one that warms up: training on `length` tokens, and
    `segment` tokens decoded behind each of `positions`. What takes more than `patience` seconds is
    timed once. Some minutes of one core."""

    width: int = 256
    heads: int = 4
    layers: int = 4
    segment: int = 128
    slots: int = 16
    length: int = 1024
    positions: tuple[int, ...] = (512, 2048, 8192)
    rounds: int = 5
    patience: float = 5.0
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        plain = {name: value for name, value in vars(self).items() if name != "positions"}
        check_types(type(self), plain, "cost")
        check_counts("positions", self.positions)
        for name, value in plain.items():
            if name != "seed" and value <= 0:
                raise ValueError(f"{name} is {value}: give more than 0")
        for name, value in (("length", self.length), *(("positions", p) for p in self.positions)):
            if value < 1 or value % self.segment:
                raise ValueError(f"{name}: {value} is no multiple of segment, {self.segment}")
        if self.layers % 4:
            raise ValueError(f"layers is {self.layers}: give a multiple of 4")


def measure(
    config: ModelsRun, say: Callable[[str], None] = lambda line: None
) -> tuple[list[Row], list[str]]:
    """A row for every model, and what is timed of it at which length; and a line for every package
    that is not installed, with the remedy.

    Times are microseconds a token, medians over the rounds, all of them beside; `state_bytes` of
    decoding is what is held there. `beside` is the peer that one of ours is paired with, and
    `times_theirs` how often ours has done the same by the time theirs is ready: {"times", "range"
    over the rounds}. Before anything is timed every model decodes what it says of the whole text:
    an assertion says if it does not. Restores torch's generators and threads.
    """
    models: list[tuple[Language, str]] = []  # and beside whom
    missing = []
    with torch.random.fork_rng(), torch_threads(config.threads):
        for contest in contests(config):
            try:
                theirs, *ours = contest()
            except Missing as error:
                missing.append(str(error))
                continue
            models += [(model, theirs.form) for model in (theirs, *ours)]
        states, about = [], []
        for model, beside in models:
            say(f"{model.form}: {model.parameters:,} parameters")
            states.append(_states(model, config))
            about.append(
                {
                    "form": model.form,
                    "beside": beside,
                    "package": model.package,
                    "options": model.options,
                    "parameters": model.parameters,
                    "decode_difference": _difference(model, states[-1][0], config),
                }
            )
        languages = [model for model, _ in models]
        times = _time(languages, states, config, say)
    rows = []
    for (index, kind, length), took in times.items():
        row = {**about[index], "kind": kind, "length": length, **columns(took)}
        if kind == "decode":
            state = states[index][config.positions.index(length)]
            row["state_bytes"] = languages[index].held(state)
        rows.append(row)
    return _compared(rows, config), missing


def _compared(rows: list[Row], config: ModelsRun) -> list[Row]:
    """With tokens a second, and ours over theirs."""
    clock = trusted("cpu", config.threads)
    cells = {(row["form"], row["beside"], row["kind"], row["length"]): row for row in rows}
    for row in rows:
        row["tokens_per_second"] = _MICRO / row[f"took_{clock}"]
        theirs = cells[row["beside"], row["beside"], row["kind"], row["length"]]
        if theirs is not row:
            key = f"all_took_{clock}"
            row["times_theirs"] = ratio(theirs[key], row[key])
    return rows


@torch.no_grad()
def _difference(model: Language, state: Any, config: ModelsRun) -> float:
    """Of decoding behind the first position to the whole text, over its largest logit."""
    start, end = config.positions[0], config.positions[0] + config.segment
    ids, state = _ids(config)[:, :end], copy.deepcopy(state)
    whole, found = model.logits(ids)[:, start:], []
    for token in ids[:, start:].split(1, 1):
        logits, state = model.step(token, state)
        found.append(logits)
    difference = float((torch.stack(found, 1) - whole).abs().max() / whole.abs().max())
    assert difference < _CLOSE, f"{model.form}: decoding differs by {difference:.1e} from reading"
    return difference


def _ids(config: ModelsRun) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed)
    most = max(config.length + 1, max(config.positions) + config.segment)
    return torch.randint(256, (1, most), generator=generator)


@torch.no_grad()
def _states(model: Language, config: ModelsRun) -> list[Any]:
    """Behind each of the positions."""
    model.net.eval()
    return [model.read(_ids(config)[:, :position]) for position in config.positions]


def _time(
    models: Sequence[Language],
    states: Sequence[Sequence[Any]],
    config: ModelsRun,
    say: Callable[[str], None],
) -> dict[Cell, list[dict[str, Spent]]]:
    cells: list[Cell] = [(i, "train", config.length) for i in range(len(models))]
    cells += [(i, "decode", at) for i in range(len(models)) for at in config.positions]
    times: dict[Cell, list[dict[str, Spent]]] = {cell: [] for cell in cells}
    ids, slow, clock = _ids(config), set(), trusted("cpu", config.threads)
    for turn, order in interleaved(cells, config.rounds + 1, config.seed):
        say(f"round {turn} of {config.rounds}" if turn else "warming up")
        for cell in order:
            if cell in slow and turn > 1:
                continue
            model, (index, kind, length) = models[cell[0]], cell
            if kind == "train":
                spent = _train(model, ids[:, : length + 1])
            else:
                state = copy.deepcopy(states[index][config.positions.index(length)])
                spent = _decode(model, ids[:, length : length + config.segment], state)
            if getattr(spent, clock) > config.patience:
                slow.add(cell)
            if turn:
                count = length if kind == "train" else config.segment
                times[cell].append({"took": spent.times(_MICRO / count)})
    return times


def _train(model: Language, ids: Tensor) -> Spent:
    """One step on ids [1, T + 1], to gradients."""
    model.net.train()
    model.net.zero_grad()

    def step() -> None:
        logits = model.logits(ids[:, :-1])
        F.cross_entropy(logits[0], ids[0, 1:]).backward()

    return timed(step, "cpu")[1]


@torch.no_grad()
def _decode(model: Language, ids: Tensor, state: Any) -> Spent:
    """The tokens of ids [1, N] one by one."""
    model.net.eval()

    def run(state: Any) -> None:
        for token in ids.split(1, 1):
            _, state = model.step(token, state)

    return timed(lambda: run(state), "cpu")[1]


def write(path: Path, config: ModelsRun, rows: Sequence[Row], missing: Sequence[str]) -> None:
    """The rows as JSON with provenance, and what was not installed."""
    write_results(
        path,
        "everlong bench cost --peers",
        asdict(config),
        clock=trusted("cpu", config.threads),
        rows=list(rows),
        missing=list(missing),
    )
