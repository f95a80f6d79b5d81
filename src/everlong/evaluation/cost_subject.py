"""One memory under the meters of `everlong bench cost`: what can be timed of it, and its bytes.

Kinds of cells, each at a length of T tokens of one stream, float32:

- read: one call of T tokens from a fresh state, without gradients;
- train: one call of T tokens forward and backward ("one call");
- replay: T tokens in segments of the same size by memory replay, whose activations are those of one
  segment, whatever T is ("replay in segments"); bounded memories;
- stream: T tokens in calls, each from the state of the one before; bounded memories;
- decode: tokens by themselves behind T tokens: one whole period at least, so that what is done at a
  segment's end is in the mean;
- model train, model decode: the same of a language model of this memory.

B batch (1), T time, D hidden_size.
"""

from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong import state as states
from everlong.evaluation.meters import Flops, LiveBytes
from everlong.evaluation.timing import Spent, timed, trusted
from everlong.models.config import EverlongConfig
from everlong.models.hub import EverlongForCausalLM
from everlong.models.sizing import build, with_parameters
from everlong.registry import create_memory, memory_entry
from everlong.state import State
from everlong.stateful import Stateful
from everlong.training.replay import ReplayOptions, replay

if TYPE_CHECKING:
    from everlong.evaluation.cost_bench import CostRun

Row = dict[str, Any]


MODEL = ("model train", "model decode")


class Cell(NamedTuple):
    """What is timed: a kind, behind or over `length` tokens."""

    kind: str
    length: int


class Subject:
    """One memory alone, its stream, and the states it was in at marked positions of it."""

    def __init__(self, name: str, config: "CostRun") -> None:
        self.name, self.config = name, config
        torch.manual_seed(config.seed)
        widths = {"hidden_size": config.hidden_size, "num_heads": config.num_heads}
        memory = create_memory(name, size=config.size, **widths)
        self.memory: Stateful = memory.to(config.device)
        # Stands for all that lies below: the gradient goes on to it, and no memory is spent there.
        self.below = nn.Parameter(torch.zeros(config.hidden_size, device=config.device))
        self.period = memory.period
        generator = torch.Generator().manual_seed(config.seed)
        longest = config.lengths_of(name)[-1]
        count = _whole(config.decoded, self.period)
        tokens = torch.randn(1, longest + count, config.hidden_size, generator=generator)
        tokens = tokens.to(config.device)
        self.inputs = tokens[:, :longest].clone()  # [B, T, D]
        self.next = tokens[:, longest:].clone().split(1, 1)  # each [B, 1, D]
        self.states: dict[int, State] = {}

    @property
    def segment(self) -> int:
        """Tokens of a replayed segment: whole periods."""
        return _whole(self.config.segment, self.period)

    def read(self, length: int) -> State:
        return self.memory(self.inputs[:, :length])[1]

    def decode(self, state: State) -> State:
        for token in self.next:
            _, state = self.memory(token, state)
        return state

    def train(self, length: int) -> None:
        y, _ = self.memory(self.inputs[:, :length] + self.below)
        y.square().sum().backward()

    def replay(self, length: int) -> None:
        def step(x: Tensor, state: Any) -> tuple[Tensor, State]:
            y, state = self.memory(x + self.below, state)
            return y.square().sum(), state

        def advance(x: Tensor, state: Any) -> State:
            return self.memory.advance(x + self.below, state)

        segments = list(self.calls(length, self.segment))
        replay(
            step,
            segments,
            self.memory.init_state(1),
            weights=[1.0] * len(segments),
            options=ReplayOptions(advance=advance),
        )

    def calls(self, length: int, size: int, start: int = 0) -> Iterator[Tensor]:
        """Positions `start` to `length` in calls of `size`: the same few inputs again and again."""
        longest = self.inputs.shape[1]
        size = min(size, longest)
        parts = cycle(part for part in self.inputs.split(size, 1) if part.shape[1] == size)
        whole, rest = divmod(length - start, size)
        yield from islice(parts, whole)
        if rest:
            yield self.inputs[:, :rest]

    def forget(self) -> None:
        """No gradients from before: they are part of what training holds."""
        self.memory.zero_grad()
        self.below.grad = None

    def run(self, cell: Cell) -> int:
        """What the cell says, once or so often that it can be timed; returns the tokens."""
        kind, length = cell
        times = 1 if kind == "decode" else -(-self.config.least // length)
        self.memory.train(kind in ("train", "replay"))
        if kind == "decode":
            with torch.inference_mode():
                self.decode(self.states[length])
            return len(self.next)
        for _ in range(times):
            if kind == "read":
                with torch.inference_mode():
                    self.read(length)
            else:
                self.train(length) if kind == "train" else self.replay(length)
        return times * length

    def meter(self, cell: Cell) -> Row:
        """Peak bytes alive and FLOPs a token of a cell. Reading keeps the state it ends in;
        decoding starts from a copy of it, whose bytes are counted, too."""
        kind, length = cell
        self.forget()
        self.memory.train(kind in ("train", "replay"))
        if kind in ("train", "replay"):
            run = self.train if kind == "train" else self.replay
            found = metered(lambda: run(length), length)
            grads = [p.grad for p in (*self.memory.parameters(), self.below) if p.grad is not None]
            found["finite"] = all(bool(grad.isfinite().all()) for grad in grads)
            self.forget()
            return found
        with torch.no_grad():
            if kind == "read":
                held: list[State] = []
                found = metered(lambda: held.append(self.read(length)), length)
                self.states[length] = held[0]
            else:
                state = self.states[length]
                found = metered(lambda: self.decode(_copy(state)), len(self.next))
        return found | {"state_bytes": states.num_bytes(self.states[length])}

    @torch.no_grad()
    def stream(self, marks: list[int], patience: float) -> tuple[int, dict[int, list[Spent]]]:
        """Read on from the longest call to the last of `marks`, or until `patience` seconds are
        over; returns the position reached, and the last calls before each mark, in microseconds a
        token. The states at the marks, and at the position reached, are kept."""
        self.memory.eval()
        clock = trusted(self.config.device, self.config.threads)
        position, spent, call = max(self.states), 0.0, self.inputs.shape[1]
        state, recent, found = self.states[position], [], {}
        for mark in marks:
            for x in self.calls(mark, call, position):
                if spent > patience:
                    break
                (_, state), took = timed(lambda x=x, s=state: self.memory(x, s), self.config.device)
                position, spent = position + x.shape[1], spent + getattr(took, clock)
                if x.shape[1] == call:
                    recent = [*recent, took.times(1e6 / call)][-self.config.rounds :]
            self.states[position], found[position] = state, recent
            if position < mark:
                break
        return position, found


class ModelSubject:
    """A language model of this memory, of as many parameters as every other."""

    def __init__(self, name: str, config: "CostRun") -> None:
        shape = with_parameters(model_config(name, config), config.parameters)
        self.intermediate_size = shape.intermediate_size
        model: Any = build(shape, config.seed)
        self.model: EverlongForCausalLM = model.to(config.device)
        self.length = config.model_length
        self.count = _whole(config.decoded, self.model.period)  # of tokens decoded
        generator = torch.Generator().manual_seed(config.seed)
        ids = torch.randint(256, (1, self.length + 1 + self.count), generator=generator)
        self.ids = ids.to(config.device)
        with torch.no_grad():
            self.state = self.model.eval().stream(self.ids[:, : self.length])[1]

    def train(self) -> None:
        logits, _ = self.model.stream(self.ids[:, : self.length])
        F.cross_entropy(logits[0], self.ids[0, 1 : self.length + 1]).backward()

    def decode(self, state: State) -> None:
        for token in self.ids[:, self.length + 1 :].split(1, 1):
            _, state = self.model.stream(token, state)

    def forget(self) -> None:
        self.model.zero_grad()

    def run(self, cell: Cell) -> int:
        """As `Subject.run`."""
        self.model.train(cell.kind == "model train")
        if cell.kind == "model train":
            self.train()
            return self.length
        with torch.inference_mode():
            self.decode(self.state)
        return self.count

    def meter(self, cell: Cell) -> Row:
        """As `Subject.meter`."""
        self.forget()
        self.model.train(cell.kind == "model train")
        if cell.kind == "model train":
            found = metered(self.train, self.length)
            self.forget()
            return found
        with torch.no_grad():
            found = metered(lambda: self.decode(_copy(self.state)), self.count)
        return found | {"state_bytes": states.num_bytes(self.state)}


def model_config(name: str, config: "CostRun") -> EverlongConfig:
    """The model of a memory with default options, `intermediate_size` not yet chosen."""
    entry = memory_entry(name)
    around, options = entry.room == "segments", entry.small if config.size else {}
    return EverlongConfig(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_layers=config.model_layers,
        layers=["attention"] if around else [name],
        mixers={} if around else {name: dict(options)},
        segment={"name": name, **options} if around else None,
    )


def metered(run: Callable[[], Any], tokens: int) -> Row:
    """The most bytes alive in tensors that `run` makes, and FLOPs of matrix products a token."""
    with LiveBytes() as live, Flops() as flops:
        run()
    return {"live_bytes": live.peak, "flops": flops.total / tokens}


def _copy(state: State) -> State:
    return states.tree_map(torch.clone, state)


class Matmul:
    """The machine's matrix products: of two square matrices, in the same float32 and threads."""

    def __init__(self, config: "CostRun") -> None:
        self.config, size = config, config.matmul
        generator = torch.Generator().manual_seed(config.seed)
        left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
        self.left, self.right = left.to(config.device), right.to(config.device)
        self.out = torch.empty_like(self.left)
        self.rate()

    @torch.inference_mode()
    def rate(self) -> float:
        """FLOP/s by the trusted clock, the faster of two."""
        clock = trusted(self.config.device, self.config.threads)
        runs = [
            timed(lambda: torch.mm(self.left, self.right, out=self.out), self.config.device)[1]
            for _ in range(2)
        ]
        return 2 * self.config.matmul**3 / min(getattr(took, clock) for took in runs)


def _whole(tokens: int, period: int) -> int:
    """At least so many tokens, in whole periods."""
    return -(-tokens // period) * period
