"""What the laws are checked on: a Case; and how two results are compared.

A Case is anything with a stateful face: a memory [B, T, D] -> [B, T, D], or a language model
through `Face` (ids [B, T] -> logits [B, T, V]). The checks know no more of it than this.

B batch, T time, D width.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import everlong
from everlong import state as states
from everlong.registry import memory_entry

TOLERANCE = 1e-9  # float64


@dataclass(frozen=True)
class Case:
    """`make(dropout)` builds it afresh, the same every time; `create(**options)` is the user's way
    to build one (law 9), None where that is tested elsewhere."""

    name: str
    make: Callable[[float], Any]
    width: int  # of x, or the size of the vocabulary
    tokens: bool = False
    bounded: bool = True
    create: Callable[..., Any] | None = None

    def build(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Any:
        """In eval mode, with no parameter at its initial value: a closed gate would hide a leak."""
        with torch.random.fork_rng():
            torch.manual_seed(11)
            memory = self.make(dropout)
        generator = torch.Generator().manual_seed(12)
        with torch.no_grad():
            for parameter in memory.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise.to(parameter.dtype))
        return memory.to(dtype).eval()

    def inputs(self, batch: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + seed)
        if self.tokens:
            return torch.randint(self.width, (batch, length), generator=generator)
        return torch.randn(batch, length, self.width, generator=generator, dtype=torch.float64)

    def span(self, memory: Any) -> int:
        """A length that reaches past every small segment, chunk and window (all <= 8)."""
        return max(memory.period, 8)


class Face(nn.Module):
    """The stateful face of a language model: what `.stream` does, under a memory's names."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.period = model.period
        self.init_state, self.reset, self.advance = model.init_state, model.reset, model.advance

    def forward(
        self, x: Tensor, state: Any = None, mask: Tensor | None = None, trace: Any = None
    ) -> Any:
        return self.model.stream(x, state, mask, trace)


def memory_case(name: str, **chosen: Any) -> Case:
    """A registered memory at its test size, with the options of a variant where some are chosen."""
    entry = memory_entry(name)

    def create(**options: Any) -> Any:
        sizes = {"size": "small", "hidden_size": 24, "num_heads": 3}
        return everlong.create_memory(name, **{**sizes, **chosen, **options})

    def make(dropout: float) -> Any:
        return create(**({"dropout": dropout} if "dropout" in entry.fields else {}))

    return Case(name, make, 24, bounded=entry.bounded, create=create)


def by_hypothesis(*strategies: Any, examples: int) -> Callable:
    """Run the decorated function now, on examples that are the same on every machine."""

    def run(function: Callable) -> None:
        settings(max_examples=examples)(given(*strategies)(function))()

    return run


seeds = st.integers(0, 3)


def cuts_of(length: int) -> st.SearchStrategy[list[int]]:
    """Lengths of the calls that a stream of `length` is cut into."""

    def to_lengths(places: set[int]) -> list[int]:
        edges = [0, *sorted(places), length]
        return [b - a for a, b in itertools.pairwise(edges)]

    return st.sets(st.integers(1, max(1, length - 1)), max_size=6).map(
        lambda places: to_lengths({p for p in places if p < length})
    )


def weigh(value: Tensor) -> Tensor:
    """A scalar to differentiate: each entry has its own weight, which depends on its index only, so
    that the same entries weigh the same in a longer (zero-padded) tensor."""
    value = value.double()
    total = value
    for dim, size in enumerate(value.shape):
        phase = torch.arange(size, dtype=torch.float64) * (0.7 + 0.61 * dim) + dim
        total = total * (1.2 + torch.cos(phase)).view(-1, *[1] * (value.dim() - dim - 1))
    return total.sum()


def weigh_state(state: Any) -> Tensor:
    """The same for a state: floating leaves only."""
    floats = [leaf for leaf in states.leaves(state) if leaf.is_floating_point()]
    return sum((weigh(leaf) for leaf in floats), torch.zeros((), dtype=torch.float64))


def gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Gradients, zero where the loss does not depend on a tensor."""
    if not loss.requires_grad:
        return [torch.zeros_like(w) for w in wanted]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def named_parameters(memory: nn.Module) -> tuple[list[str], list[Tensor]]:
    found = dict(memory.named_parameters())
    return list(found), list(found.values())


def assert_close(got: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(
        got, wanted, rtol=tolerance, atol=tolerance, msg=lambda message: f"{what}: {message}"
    )


def assert_same(got: Tensor, wanted: Tensor, what: str) -> None:
    """Bit for bit."""
    assert got.dtype == wanted.dtype, f"{what}: {got.dtype} and {wanted.dtype}"
    assert got.shape == wanted.shape, f"{what}: {list(got.shape)} and {list(wanted.shape)}"
    assert torch.equal(got, wanted), f"{what}: bits differ"


def assert_states(got: Any, wanted: Any, what: str, bounded: bool, exact: bool = False) -> None:
    """Equal states. Those of unbounded memories may differ by zeros behind dimension 1."""
    got, wanted = states.flatten(got), states.flatten(wanted)
    assert list(got) == list(wanted), f"{what}: leaves {list(got)} and {list(wanted)}"
    for path, a in got.items():
        b = wanted[path]
        if not bounded and a.dim() > 1:
            a, b = (states.pad_length(leaf, max(a.shape[1], b.shape[1])) for leaf in (a, b))
        if exact or not a.is_floating_point():
            assert_same(a, b, f"{what}, leaf {path!r}")
        else:
            assert_close(a, b, f"{what}, leaf {path!r}")


def row_of(state: Any, row: int) -> Any:
    return states.select(state, torch.tensor([row]))


def read_in_calls(
    memory: Any, x: Tensor, lengths: list[int], state: Any = None
) -> tuple[Tensor, Any]:
    """Read x [B, T] in calls of these lengths, each given the state of the one before."""
    outputs = []
    for piece in x.split(lengths, 1):
        y, state = memory(piece, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def float_leaves(state: Any) -> tuple[Any, list[Tensor]]:
    """The state with its floating leaves made leaves of a graph, and those."""
    fresh = states.tree_map(
        lambda leaf: leaf.detach().clone().requires_grad_(leaf.is_floating_point()), state
    )
    return fresh, [leaf for leaf in states.leaves(fresh) if leaf.requires_grad]


def snapshot(state: Any) -> Any:
    return copy.deepcopy(states.detach(state))
