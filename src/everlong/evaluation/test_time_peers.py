"""Memories that learn at test time: our Titans beside titans-pytorch's, on the same stream.

One run, interleaved, in float32 on the processor: forward and backward of T tokens, with gradients
to the input and to everything that is trained. Every head writes into a network of two layers, by
gradients that are taken at weights refreshed every C tokens, with momentum and decay. The two are
not one function (theirs normalises what the network returns, ours convolves its inputs), so costs
are compared and values are not.

In titans-pytorch C is `batch_size` (left out, the weights are never refreshed), and `chunk_size` is
the tokens that share one gradient and one set of gates, and that read nothing of each other. Only
`chunk_size=1`, their default, does what ours does: gates for every token, and a read behind every
write. It keeps the weights of every token, and puts them together anew at every refresh of a call:
calls of C tokens with the state carried compute the same and cost least, and are what is timed.
`chunk_size=C` is their fastest setting with refreshes, and another memory: one step every C tokens.
"""

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from everlong import state as states
from everlong.evaluation.meters import LiveBytes
from everlong.evaluation.recall import check_counts
from everlong.evaluation.timing import Spent, columns, interleaved, timed, torch_threads, trusted
from everlong.provenance import memory_bytes, write_results
from everlong.registry import check_types, create_memory

OURS = "ours"
GATES = "titans-pytorch, gates for every token"
ONE_CALL = "titans-pytorch, gates for every token, one call"
COARSE = "titans-pytorch, one gate and one step a refresh"
FORMS = (OURS, GATES, COARSE)
DEPTH, EXPANSION = 2, 4  # layers of the memory network, and its hidden width over that of a head
# By default theirs forgets half of itself every token and steps by up to 1, and within 2,048 tokens
# its gradients leave float32. With less decay and the smaller step of its own
# `default_adaptive_step_transform` they stay; the work is the same.
FINITE = {"init_decay_bias": -8.0, "default_step_transform_max_lr": 0.01}
_MEMORY = 0.8  # the part of this machine's that a form may need
_MILLI = 1e3
Row = dict[str, Any]
Cell = tuple[str, int]  # form and refresh
Sample = tuple[dict[str, Spent], float]  # milliseconds; those of the operating system


@dataclass(frozen=True)
class LearnersRun:
    """What is timed: `rounds` rounds after one that warms up, on each number of `threads`.

    Theirs with gates for every token, by far the slowest, is timed once a number of threads, in the
    last round. Some minutes, and 15 GB: a form that needs more memory than there is is left out.
    """

    length: int = 2048
    width: int = 256
    heads: int = 4
    refreshes: tuple[int, ...] = (16, 64)
    rounds: int = 3
    threads: tuple[int, ...] = (1, 2)
    seed: int = 0

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        plain = {k: v for k, v in vars(self).items() if k not in ("refreshes", "threads")}
        check_types(type(self), plain, "cost")
        for name in ("refreshes", "threads"):
            values = getattr(self, name)
            check_counts(name, values)
            if min(values) < 1:
                raise ValueError(f"{name} are {list(values)}: give 1 or more")
        for name in ("length", "width", "heads", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}: give a multiple of heads, {self.heads}")
        for refresh in self.refreshes:
            if self.length % refresh:
                raise ValueError(f"length is {self.length}: give a multiple of {refresh}")

    @property
    def probe(self) -> int:
        """Tokens of the short stream that is read before anything is timed."""
        return min(self.length, 2 * max(self.refreshes))


@dataclass(frozen=True)
class Learner:
    """One memory: how it reads a stream [B, T, D] from the start, and what its state holds."""

    form: str
    options: dict[str, Any]
    read: Callable[[Tensor], tuple[Tensor, Any]]  # outputs and state
    held: Callable[[Any], int]  # bytes that the next call needs
    fresh: int  # bytes before the first token
    trained: dict[str, nn.Parameter]


def measure(
    config: LearnersRun,
    say: Callable[[str], None] = lambda line: None,
    finished: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """A row for every number of threads, refresh and form; `finished` gets those there are after
    each number of threads, `say` is told of each round and of what is left out.

    Times are milliseconds, medians over the rounds: `forward`, `backward` and `both`, each `_wall`
    and `_cpu`; `tokens_per_second` and `times_ours`, over our own time, are `both` by the trusted
    clock. `kernel` is the operating system's part of `both_cpu`: what fetching memory costs, which
    depends on the machine. `state_bytes` holds [tokens, bytes], `live_bytes` the most that was
    alive at one time in forward and backward of `live_tokens`. Restores torch's generators and
    threads. `ValueError` without titans-pytorch.
    """
    titans_pytorch()
    cells = [(form, refresh) for refresh in config.refreshes for form in FORMS]
    with torch.random.fork_rng(), torch_threads(config.threads[0]):
        learners, about = {}, {}
        for cell in cells:
            say(f"refreshed every {cell[1]}, {cell[0]}: counting bytes")
            learners[cell] = make(*cell, config)
            about[cell] = _probe(learners[cell], cell[1], config)
            needed = about[cell]["live_bytes"] * config.length / config.probe
            if cell[0] != OURS and needed > _MEMORY * memory_bytes():
                say(f"left out: it needs {needed / 1e9:.0f} GB, and more memory than there is here")
                del learners[cell]
    rows: list[Row] = []
    for threads in config.threads:
        with torch_threads(threads):
            times = _time(learners, config, lambda line, n=threads: say(f"threads: {n}, {line}"))
        rows += _rows(about, times, threads, config)
        finished(rows)
    return rows


def titans_pytorch() -> Any:
    """The package, an extra; `ValueError` that names it where it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its scan uses torch.jit.script
            return importlib.import_module("titans_pytorch")
    except ImportError as error:
        remedy = 'pip install "everlong[peers]"'
        raise ValueError(f"titans-pytorch cannot be imported ({error}): {remedy}") from error


def make(form: str, refresh: int, config: LearnersRun) -> Learner:
    """The memory of that form, drawn under the seed by torch's generator."""
    torch.manual_seed(config.seed)
    if form == OURS:
        return _ours(refresh, config)
    return _theirs(form, refresh, config)


def _ours(refresh: int, config: LearnersRun) -> Learner:
    options: dict[str, Any] = {"chunk_size": refresh, "depth": DEPTH, "expansion": EXPANSION}
    memory = create_memory("titans", hidden_size=config.width, num_heads=config.heads, **options)
    fresh = states.num_bytes(memory.init_state(1))
    trained = dict(memory.named_parameters())
    return Learner(OURS, options, memory, states.num_bytes, fresh, trained)


def _theirs(form: str, refresh: int, config: LearnersRun) -> Learner:
    package, size = titans_pytorch(), config.width // config.heads
    chunk = refresh if form == COARSE else 1
    call = config.length if form == ONE_CALL else refresh
    options = {"chunk_size": chunk, "batch_size": refresh, **FINITE}
    memory = package.NeuralMemory(
        dim=config.width,
        heads=config.heads,
        dim_head=size,
        model=package.MemoryMLP(size, depth=DEPTH, expansion_factor=float(EXPANSION)),
        **options,
    )

    def read(x: Tensor) -> tuple[Tensor, Any]:
        state, outputs = None, []
        for part in x.split(call, 1):
            y, state = memory(part, state=state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    # `memory_model` is only the form of the network: what is learned are its copies, one a head.
    trained = {k: p for k, p in memory.named_parameters() if not k.startswith("memory_model.")}
    return Learner(form, {**options, "call": call}, read, their_bytes, 0, trained)


def their_bytes(state: Any) -> int:
    """Of a NeuralMemState what the next call reads: weights, their momentum, and tokens that wait.

    Not its `updates`, the weights after every token of the call: a call ignores what came in.
    """
    last, momentum = state.states
    waiting = () if state.cache_store_segment is None else (state.cache_store_segment,)
    held: Iterable[Tensor] = (*state.weights.values(), *last.values(), *momentum.values(), *waiting)
    once = {id(tensor): tensor for tensor in held}  # weights that were just refreshed are the last
    return sum(tensor.numel() * tensor.element_size() for tensor in once.values())


def _probe(learner: Learner, refresh: int, config: LearnersRun) -> Row:
    """Bytes, of a short stream; that everything trained has a gradient is asserted."""
    x, dy = _draw(config.probe, config)
    with LiveBytes() as live:
        _run(learner, x, dy)
    for name, leaf in {"the input": x, **learner.trained}.items():
        assert leaf.grad is not None, f"{learner.form}: {name} has no gradient"
    held = [[0, learner.fresh]]
    for tokens in (refresh, refresh + refresh // 2, 4 * refresh):
        with torch.no_grad():
            _, state = learner.read(_draw(tokens, config)[0])
        held.append([tokens, learner.held(state)])
    return {
        "form": learner.form,
        "refresh": refresh,
        "options": learner.options,
        "parameters": sum(leaf.numel() for leaf in learner.trained.values()),
        "state_bytes": held,
        "live_bytes": live.peak,
        "live_tokens": config.probe,
    }


def _time(
    learners: dict[Cell, Learner], config: LearnersRun, say: Callable[[str], None]
) -> dict[Cell, list[Sample]]:
    times: dict[Cell, list[Sample]] = {cell: [] for cell in learners}
    x, dy = _draw(config.length, config)
    for turn, order in interleaved(list(learners), config.rounds + 1, config.seed):
        say(f"round {turn} of {config.rounds}" if turn else "warming up")
        for cell in order:
            if cell[0] == GATES and turn < config.rounds:
                continue
            sample = _run(learners[cell], x, dy)
            if turn:
                times[cell].append(sample)
    return times


def _draw(length: int, config: LearnersRun) -> tuple[Tensor, Tensor]:
    """The stream, a leaf, and the gradient of what is read, both [1, T, D]."""
    generator = torch.Generator().manual_seed(config.seed)
    x, dy = (torch.randn(1, length, config.width, generator=generator) for _ in range(2))
    return x.requires_grad_(), dy


def _run(learner: Learner, x: Tensor, dy: Tensor) -> Sample:
    """What it took; gradients are left in the leaves."""
    for leaf in (x, *learner.trained.values()):
        leaf.grad = None
    before = os.times().system
    (y, _), forward = timed(lambda: learner.read(x), "cpu")
    _, backward = timed(lambda: y.backward(dy), "cpu")
    kernel = os.times().system - before
    finite = x.grad is not None and bool(x.grad.isfinite().all())
    assert finite, f"{learner.form}: the input's gradient is not finite: this is no comparison"
    took = {"forward": forward, "backward": backward, "both": forward + backward}
    return {key: spent.times(_MILLI) for key, spent in took.items()}, kernel * _MILLI


def _rows(
    about: dict[Cell, Row],
    times: dict[Cell, list[Sample]],
    threads: int,
    config: LearnersRun,
) -> list[Row]:
    clock = trusted("cpu", threads)
    rows = [
        {
            **about[cell],
            "threads": threads,
            "clock": clock,
            **columns([took for took, _ in found]),
            "kernel": median(kernel for _, kernel in found),
        }
        for cell, found in times.items()
    ]
    ours = {row["refresh"]: row[f"both_{clock}"] for row in rows if row["form"] == OURS}
    for row in rows:
        took = row[f"both_{clock}"]
        row["tokens_per_second"] = _MILLI * config.length / took
        row["times_ours"] = took / ours[row["refresh"]]
    return rows


def left_out(config: LearnersRun, rows: Sequence[Row]) -> list[Cell]:
    """The forms, and their refreshes, that have no row: they need too much memory."""
    timed_ones = {(row["form"], row["refresh"]) for row in rows}
    cells = [(form, refresh) for refresh in config.refreshes for form in FORMS]
    return [cell for cell in cells if cell not in timed_ones]


def write(path: Path, config: LearnersRun, rows: Sequence[Row]) -> None:
    """The rows as JSON with provenance, that of the peer too."""
    try:
        peer = version("titans-pytorch")
    except PackageNotFoundError:
        peer = "not installed"
    write_results(
        path,
        "everlong bench cost --peers",
        asdict(config),
        peer=f"titans-pytorch {peer}",
        rows=list(rows),
        left_out=left_out(config, rows),
    )
