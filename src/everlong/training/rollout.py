"""One rollout: the gradient-free sweep, the sweep back, and what both must agree on."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everlong.registry import suggest
from everlong.training.buffer import Buffer
from everlong.training.scene import Scene, no_autocast
from everlong.training.trees import (
    Flat,
    detach,
    is_float,
    leaf_name,
    needs_grad,
    same_bits,
    stand_in,
    tree_map,
    versions,
)

Step = Callable[[Any, Any], tuple[Tensor | None, Any]]
Seed = Callable[[int, Tensor], Tensor | None]
Pull = Callable[[list[Tensor], list[Tensor], list[Tensor]], Sequence[Tensor | None]]


@dataclass(frozen=True)
class ReplayOptions:
    """How a rollout is replayed. Only `truncate` and `scale` change the gradient.

    advance:  `advance(segment, state) -> state`, the state's part of `step` alone, for a cheaper
              first sweep. Its random draws must be the first that `step` makes; each segment then
              runs under its own seed.
    truncate: no gradient crosses the boundary before segments k, 2k, ...; None: none is cut.
    keep:     "all" states, or "sqrt": every sqrt(T)-th, the others recomputed block by block.
    offload:  hold the states in pinned host memory.
    scale:    a factor on every loss root, or an object with `scale(tensor)` such as GradScaler:
              .grad carries it, the returned loss does not.
    no_sync:  a context-manager factory (`ddp.no_sync`) for all backwards but the last, which must
              reach every parameter (or DDP be told find_unused_parameters).
    check:    compare each recomputed state with the stored one, bit for bit.
    """

    advance: Callable[[Any, Any], Any] | None = None
    truncate: int | None = None
    keep: str = "all"
    offload: bool = False
    scale: Any = None
    no_sync: Callable[[], AbstractContextManager] | None = None
    check: bool = False

    def __post_init__(self) -> None:
        if self.truncate is not None and self.truncate < 1:
            raise ValueError(f"truncate is {self.truncate}: give a number >= 1, or None")
        if self.keep not in ("all", "sqrt"):
            hint = suggest(self.keep, ("all", "sqrt"))
            raise ValueError(f"keep is {self.keep!r}: use 'all' or 'sqrt'{hint}")


class Upstream:
    """Graphs from before the rollout that several backwards reach: walked once, by the last one.

    `cut` gives each tensor with a graph a stand-in that gathers its gradient; `roots` are what the
    last backward adds to its own.
    """

    def __init__(self) -> None:
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def cut(self, tree: Any, last: bool) -> Any:
        """For one backward's input: stand-ins, unless it is the last, which runs attached."""
        if last:
            return tree

        def swap(leaf: Any) -> Any:
            if not needs_grad(leaf) or leaf.is_leaf:
                return leaf
            return self.pairs.setdefault(id(leaf), (leaf, stand_in(leaf)))[1]

        return tree_map(swap, tree)

    def roots(self) -> list[tuple[Tensor, Tensor]]:
        return [(source, s.grad) for source, s in self.pairs.values() if s.grad is not None]


@contextmanager
def unedited(t: int, segment: Any, state: Any) -> Iterator[None]:
    """Around a run of segment t: `RuntimeError` if it edits what it is given."""
    given = {"its incoming state": state, "itself": segment}
    before = {what: versions(tree) for what, tree in given.items()}
    yield
    for what, tree in given.items():
        if versions(tree) != before[what]:
            raise RuntimeError(
                f"segment {t} edits {what} in place, so that it cannot be replayed:"
                " make new tensors instead"
            )


class Rollout:
    """Segments, the states between them, and how a segment runs: the same way every time.

    `losses[t]` is the detached loss of segment t's latest run, None if it had none.
    """

    def __init__(
        self,
        step: Step,
        segments: Iterable[Any],
        state: Any,
        options: ReplayOptions,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.step, self.segments, self.options = step, list(segments), options
        if not self.segments:
            raise ValueError("there are no segments: give at least one")
        every = 1 if options.keep == "all" else round(math.sqrt(len(self)))
        self.buffer = Buffer(state, every, options.offload)
        self.scene = Scene(seeds)
        self.losses: list[Tensor | None] = [None] * len(self)
        self.pulled = False

    def __len__(self) -> int:
        return len(self.segments)

    def run(self, t: int, segment: Any, state: Any) -> tuple[Tensor | None, Any]:
        """`step` on segment t, under its own random numbers and a fresh autocast."""
        with self.scene.segment(t):
            result = self.step(segment, state)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError("step must return a pair (loss or None, state)")
        loss, state = result
        if loss is not None and not (isinstance(loss, Tensor) and loss.ndim == 0):
            kind = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"the loss of segment {t} is {kind}: return a scalar tensor (.mean()) or None"
            )
        self.losses[t] = None if loss is None else loss.detach()
        return loss, state

    def sweep(self, start: int, stop: int) -> Flat:
        """Gradient-free, from the held state of segment `start` to that of `stop`, holding each."""
        flat = self.buffer[start]
        for t in range(start, stop):
            state = flat.tree()
            with torch.no_grad(), unedited(t, self.segments[t], state):
                after = self._next_state(t, state)
            flat = self.buffer.put(t + 1, after)
        return flat

    def _next_state(self, t: int, state: Any) -> Any:
        if self.options.advance is None:
            return self.run(t, self.segments[t], state)[1]
        with self.scene.segment(t):
            return self.options.advance(self.segments[t], state)

    def sweep_back(self, seed: Seed, gradient: dict[int, Tensor], pull: Pull) -> Flat:
        """Each segment again with gradients, last first; returns the last state, detached.

        `seed(t, loss)` is the gradient of the objective with respect to a loss, `gradient` that
        with respect to the last state's leaves, by index; `pull(roots, seeds, leaves)` does one
        backward and returns the gradients of `leaves`.
        """
        upstream, last = Upstream(), Flat.of(None)
        with no_autocast():
            for t in reversed(range(len(self))):
                with self.sync(last=t == 0):
                    end, gradient = self._back(t, gradient, seed, pull, upstream)
                last = last if end is None else end
        return last

    def _back(
        self, t: int, gradient: dict[int, Tensor], seed: Seed, pull: Pull, upstream: Upstream
    ) -> tuple[Flat | None, dict[int, Tensor]]:
        """Replay segment t; returns the state after the last segment, and the gradient before t."""
        if t not in self.buffer:
            self.sweep(self.buffer.before(t), t)
        last = t == 0  # the last backward runs on what the caller gave, attached
        segment, state = upstream.cut(self.segments[t], last), self.buffer[t]
        leaves = state.leaves
        if not last and (self.options.truncate is None or t % self.options.truncate != 0):
            leaves = [stand_in(leaf) if is_float(leaf) else leaf for leaf in leaves]
        own = [] if last else [i for i, leaf in enumerate(leaves) if needs_grad(leaf)]
        with torch.enable_grad(), unedited(t, segment, leaves):
            loss, after = self.run(t, segment, state.tree(leaves))
        end = Flat.of_state(after)
        self._compare(t, end)

        pairs = [(end.leaves[i], g) for i, g in gradient.items()]
        if loss is not None and (g := seed(t, loss)) is not None:
            pairs.append((loss, g))
        gradient = {}
        if roots := self.roots(pairs, upstream, last):
            grads = pull([r for r, _ in roots], [g for _, g in roots], [leaves[i] for i in own])
            gradient = {i: g for i, g in zip(own, grads, strict=True) if g is not None}
        self.buffer.drop(t + 1)
        return (end.map(detach) if t + 1 == len(self) else None), gradient

    def roots(
        self, pairs: list[tuple[Tensor, Tensor]], upstream: Upstream, last: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """What one backward starts from: those of `pairs` that need it, and at last the rest."""
        pairs = [(root, seed) for root, seed in pairs if needs_grad(root)]
        if last:
            pairs += upstream.roots()
            if self.options.no_sync is not None and self.pulled and not pairs:
                raise RuntimeError(
                    "the last backward has nothing to do, so that no_sync leaves the gradients"
                    " of the others unshared: give its segments a loss"
                )
        self.pulled = self.pulled or bool(pairs)
        return pairs

    def total(self, objective: "Objective") -> Tensor:
        """The weighted sum of the losses; `ValueError` if nothing was back-propagated."""
        loss = objective.total(self.losses)
        if not self.pulled:
            raise ValueError("no loss depends on a tensor that requires grad")
        return loss

    def _compare(self, t: int, end: Flat) -> None:
        """A replayed segment must end in the state that the first sweep stored."""
        if t + 1 not in self.buffer:
            return
        spec = self.buffer.spec(t + 1)
        if end.spec != spec:
            raise RuntimeError(
                f"replaying segment {t} gave a state of another structure than the first sweep:"
                f" {end.spec} instead of {spec}"
            )
        if not self.options.check:
            return
        pairs = zip(end.leaves, self.buffer[t + 1].leaves, strict=True)
        for index, (new, old) in enumerate(pairs):
            if not same_bits(new, old):
                raise RuntimeError(
                    f"replaying segment {t} gave another {leaf_name(end.tree(), index)!r} than the"
                    " first sweep: step (and advance) must depend on nothing but parameters,"
                    " segment, state and torch's random numbers"
                )

    def sync(self, last: bool) -> AbstractContextManager:
        no_sync = self.options.no_sync
        return nullcontext() if last or no_sync is None else no_sync()


class Objective:
    """sum_t weights[t] * loss_t, and its gradient with respect to each loss, scaled."""

    def __init__(self, weights: Sequence[float] | Tensor | None, count: int, scale: Any) -> None:
        if weights is None:
            weights = [1 / count] * count
        self.weights = list(weights.detach() if isinstance(weights, Tensor) else weights)
        if len(self.weights) != count:
            raise ValueError(f"{len(self.weights)} weights for {count} segments: give one for each")
        self.scale = scale

    def seed(self, t: int, loss: Tensor) -> Tensor:
        one = torch.ones_like(loss)
        if self.scale is not None:
            one = self.scale.scale(one) if hasattr(self.scale, "scale") else one * self.scale
        return (one * self.weights[t]).to(loss.dtype)

    def total(self, losses: Sequence[Tensor | None]) -> Tensor:
        terms = [w * loss for w, loss in zip(self.weights, losses, strict=True) if loss is not None]
        if not terms:
            raise ValueError("no segment has a loss: let step return one for at least one segment")
        return sum(terms[1:], terms[0])  # in order, as one adds them by hand
