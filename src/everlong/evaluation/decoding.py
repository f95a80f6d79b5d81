"""How fast a token is decoded: against the time its weights take to be read, against a long cache,
and against how much the stream has already been.

One token reads every weight once, so no decoder is faster than a matrix-vector product with as many
bytes: torch's own, timed in the same rounds, is the bound. The models have equal parameters. Every
bounded memory is timed alone, too, at several positions of its stream.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from everlong import state as states
from everlong.evaluation.cost import QUOTED_HEADS, QUOTED_WIDTH
from everlong.evaluation.recall import check_counts
from everlong.evaluation.timing import Spent, columns, interleaved, timed, torch_threads, trusted
from everlong.models.cache import EverlongCache
from everlong.models.config import EverlongConfig
from everlong.models.sizing import build, with_parameters
from everlong.provenance import write_results
from everlong.registry import check_choice, check_types, create_memory, list_memories
from everlong.state import State

CACHE = "transformer_xl"  # what the others are compared with
FLAT = 0.05  # a token costs as much at the last position as at the first: up to here it does
_ONCE = ("encoder", "encoder_norm", "writer")  # parts that are read once a segment, not a token
_ROWS = 1024  # of the bound's matrices
_MICRO = 1e6
Row = dict[str, Any]


@dataclass(frozen=True)
class DecodingRun:
    """Models of `parameters` in every shape (width, layers; heads of 64), which have read `read`
    tokens; `cache` tokens of the compared cache; `segment_length` of what has segments. Memories
    alone at `positions`, reached by reading `streamed` tokens, or all of them for those named in
    `whole`; from there the clocks are moved on. In each of `rounds` rounds `tokens` are decoded, or
    a segment, of memories `memory_tokens` in each of `memory_rounds`; every number of `threads` has
    its rows."""

    shapes: tuple[tuple[int, int], ...] = ((512, 8), (768, 4))
    parameters: int = 30_000_000
    read: int = 2048
    cache: int = 1600
    segment_length: int = 64
    tokens: int = 8
    rounds: int = 3
    threads: tuple[int, ...] = (1, 2)
    positions: tuple[int, ...] = (1024, 32_768, 1_048_576)
    streamed: int = 32_768
    whole: tuple[str, ...] = ("gated_deltanet",)
    memory_tokens: int = 64
    memory_rounds: int = 7
    hidden_size: int = QUOTED_WIDTH
    num_heads: int = QUOTED_HEADS
    seed: int = 0

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        kept = ("shapes", "threads", "positions", "whole")
        check_types(type(self), {k: v for k, v in vars(self).items() if k not in kept}, "decoding")
        for name in ("threads", "positions"):
            check_counts(name, getattr(self, name))
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} are {list(getattr(self, name))}: give numbers above 0")
        for name in ("parameters", "read", "cache", "segment_length", "tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")


def subjects(config: DecodingRun) -> dict[str, dict[str, Any]]:
    """The models, by name: what of `EverlongConfig` makes each. The encoder-decoder has as many
    layers on both sides together."""

    def segment(name: str, **options: Any) -> dict[str, Any]:
        return {"segment": {"name": name, "segment_length": config.segment_length, **options}}

    slots, window = {"num_slots": config.segment_length}, {"window": config.cache}
    long = {"memory_length": config.cache, "same_length": True}
    return {
        "memformer": segment("memformer", **slots),
        "memformer encoder-decoder": segment("memformer", **slots, encoder_layers=-1),
        "rmt": segment("rmt", num_slots=16),
        "gated_deltanet": {"layers": ["gated_deltanet"]},
        "hybrid": {"layers": ["gated_deltanet*3", "sliding_attention"]},
        "titans": {"layers": ["titans"]},
        "titans hybrid": {"layers": ["titans", "sliding_attention"]},
        "sliding_attention": {
            "layers": ["sliding_attention"],
            "mixers": {"sliding_attention": window},
        },
        CACHE: {"layers": [CACHE], "mixers": {CACHE: long}},
    }


def model_config(name: str, shape: tuple[int, int], config: DecodingRun) -> EverlongConfig:
    """Of the configured parameters; nothing it says ends its stream."""
    options, (width, layers) = subjects(config)[name], shape
    segment = options.get("segment")
    if segment is not None and segment.get("encoder_layers"):
        options["segment"] = {**segment, "encoder_layers": layers // 2}
        layers -= layers // 2
    sizes = {"hidden_size": width, "num_layers": layers, "num_heads": max(1, width // 64)}
    return with_parameters(EverlongConfig(**sizes, **options, eos_token_id=None), config.parameters)


class Subject:
    """A model behind the tokens it has read, and those it decodes."""

    def __init__(self, name: str, shape: tuple[int, int], config: DecodingRun) -> None:
        self.name = name
        self.model: Any = build(model_config(name, shape, config), config.seed).eval()
        self.tokens = max(config.tokens, self.model.period)
        generator = torch.Generator().manual_seed(config.seed)
        ids = torch.randint(256, (1, config.read + self.tokens), generator=generator)
        with torch.inference_mode():
            _, self.state = self.model.stream(ids[:, : config.read])
        self.next = ids[:, config.read :].split(1, 1)

    @torch.inference_mode()
    def stream(self) -> None:
        state = self.state
        for token in self.next:
            _, state = self.model.stream(token, state)

    def generate(self) -> None:
        self.model.generate(
            self.next[0],
            cache=EverlongCache(self.state),
            max_new_tokens=self.tokens,
            do_sample=False,
        )

    def visit(self, bound: "Bound") -> dict[str, Spent]:
        """Microseconds a token of `stream`, of `generate` (which prepares itself each time), and of
        the bound: reading the same bytes of weights, timed before `stream` and behind it."""
        each = _MICRO / self.tokens
        _, before = timed(bound.run, "cpu")
        _, stream = timed(self.stream, "cpu")
        _, behind = timed(bound.run, "cpu")
        _, generate = timed(self.generate, "cpu")
        share = weight_bytes(self.model) / bound.size
        return {
            "stream": stream.times(each),
            "generate": generate.times(each),
            "bound": (before + behind).times(share * _MICRO / 2),
        }


def weight_bytes(model: Any) -> float:
    """What one token reads of the weights, and its share of those that a segment reads once."""
    total = 0.0
    for name, parameter in model.named_parameters():
        once = any(part in _ONCE for part in name.split("."))
        size = parameter.numel() * parameter.element_size()
        total += size / model.period if once else size
    return total


class Bound:
    """A matrix-vector product with matrices of so many bytes together, each read once."""

    def __init__(self, size: int, width: int) -> None:
        count = max(1, size // (_ROWS * width * 4))
        self.matrices = [torch.randn(_ROWS, width) for _ in range(count)]
        self.size = count * _ROWS * width * 4
        self.vector = torch.randn(width)

    @torch.inference_mode()
    def run(self) -> None:
        for matrix in self.matrices:
            torch.mv(matrix, self.vector)


def measure_models(
    config: DecodingRun, names: Sequence[str] = (), say: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """A row for every shape, model (of `names`, or all) and number of threads.

    `stream`, `generate` and `bound` are microseconds a token, medians over the rounds; `fraction`
    is the bound over `stream`, by the trusted clock: the median, and all rounds; `speed` how many
    times as fast as the compared cache it is, where that is measured.
    """
    wanted = list(dict.fromkeys(names)) or list(subjects(config))
    for name in wanted:
        check_choice("model", name, subjects(config))
    return [
        row
        for shape in config.shapes
        for threads in config.threads
        for row in _models(config, wanted, shape, threads, say)
    ]


def _models(
    config: DecodingRun,
    names: Sequence[str],
    shape: tuple[int, int],
    threads: int,
    say: Callable[[str], None],
) -> Iterator[Row]:
    found: dict[str, list[dict[str, Spent]]] = {}
    with torch.random.fork_rng(devices=[]), torch_threads(threads):
        say(f"{shape[1]} layers of width {shape[0]}, threads: {threads}")
        made = {name: Subject(name, shape, config) for name in names}
        bound = Bound(config.parameters * 4, shape[0])
        for each in made.values():
            each.visit(bound)
        for turn, order in interleaved(list(made), config.rounds, config.seed):
            say(f"round {turn + 1} of {config.rounds}")
            for name in order:
                found.setdefault(name, []).append(made[name].visit(bound))
    clock = trusted("cpu", threads)
    key = f"stream_{clock}"
    cached = columns(found[CACHE])[key] if CACHE in found else None
    for name in names:
        model, row = made[name].model, columns(found[name])
        each = [getattr(r["bound"], clock) / getattr(r["stream"], clock) for r in found[name]]
        yield {
            "name": name,
            "shape": list(shape),
            "threads": threads,
            "clock": clock,
            "parameters": model.num_parameters(),
            "weight_bytes": weight_bytes(model),
            "state_bytes": states.num_bytes(made[name].state),
            "fraction": median(each),
            "all_fraction": [round(value, 3) for value in each],
            "speed": None if cached is None else cached / row[key],
            **row,
        }


class Alone:
    """A memory by itself behind so many tokens of a stream."""

    def __init__(self, name: str, config: DecodingRun) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.memory = create_memory(
            name, hidden_size=config.hidden_size, num_heads=config.num_heads
        ).eval()
        self.read = max(config.positions) if name in config.whole else config.streamed
        generator = torch.Generator().manual_seed(config.seed)
        self.block = torch.randn(1, 4096, config.hidden_size, generator=generator)
        shape = 1, config.memory_tokens, config.hidden_size
        self.next = torch.randn(shape, generator=generator).split(1, 1)
        self.held = self._states()

    @torch.inference_mode()
    def _states(self) -> dict[int, State]:
        state, read, found = None, 0, {}
        for position in sorted(self.config.positions):
            while read < min(position, self.read):
                step = min(self.block.shape[1], min(position, self.read) - read)
                _, state = self.memory(self.block[:, :step], state)
                read += step
            found[position] = moved(state, read, position - read)
        return found

    @torch.inference_mode()
    def visit(self, position: int) -> dict[str, Spent]:
        def decode() -> None:
            state = self.held[position]
            for token in self.next:
                _, state = self.memory(token, state)

        _, spent = timed(decode, "cpu")
        return {"decode": spent.times(_MICRO / len(self.next))}


def moved(state: State, position: int, by: int) -> State:
    """A state at `position` whose clocks stand `by` tokens later; what it holds is as it was.

    Clocks that stand elsewhere, inside a segment, stay.
    """
    if isinstance(state, tuple):
        return tuple(moved(part, position, by) for part in state)
    if not isinstance(state, dict):
        return state
    return {
        name: part + by
        if name == "position" and bool((part == position).all())
        else moved(part, position, by)
        for name, part in state.items()
    }


def measure_memories(
    config: DecodingRun, names: Sequence[str] = (), say: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """A row for every bounded memory: microseconds a token at every position (medians, one thread),
    the tokens that were really read to get there, and the last position's cost over the first's:
    the median over rounds of the ratio within a round; `flat` where it is 1 up to 5 %."""
    wanted = list(dict.fromkeys(names)) or list_memories(bounded=True)
    times: dict[tuple[str, int], list[dict[str, Spent]]] = {}
    with torch.random.fork_rng(devices=[]), torch_threads(1):
        made = {}
        for name in wanted:
            say(f"{name} reads its stream")
            made[name] = Alone(name, config)
            made[name].visit(min(config.positions))
        cells = [(name, position) for name in wanted for position in config.positions]
        for turn, order in interleaved(cells, config.memory_rounds, config.seed):
            say(f"round {turn + 1} of {config.memory_rounds}")
            for name, position in order:
                times.setdefault((name, position), []).append(made[name].visit(position))
    return [_flatness(name, made[name], config, times) for name in wanted]


def _flatness(name: str, memory: Alone, config: DecodingRun, times: Any) -> Row:
    first, last = min(config.positions), max(config.positions)
    held = {position: states.num_bytes(state) for position, state in memory.held.items()}
    pairs = zip(times[name, last], times[name, first], strict=True)
    ratio = median(late["decode"].cpu / early["decode"].cpu for late, early in pairs)
    return {
        "name": name,
        "read": memory.read,
        "state_bytes": held[last],
        "times_first": ratio,
        "flat": abs(ratio - 1) <= FLAT and held[first] == held[last],
        "positions": {str(p): columns(times[name, p]) for p in config.positions},
    }


def write(path: Path, config: DecodingRun, models: Sequence[Row], memories: Sequence[Row]) -> None:
    write_results(
        path,
        "everlong bench decoding",
        asdict(config),
        models=list(models),
        memories=list(memories),
    )
