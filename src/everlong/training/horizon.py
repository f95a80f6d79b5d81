"""How far gradients go, and how they get there: four methods behind one signature."""

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from everlong.registry import suggest
from everlong.training.replay import PLAIN, replay_rollout
from everlong.training.rollout import Objective, ReplayOptions, Rollout, Step, Upstream
from everlong.training.scene import draw_seeds, no_autocast
from everlong.training.trees import detach, tree_map

METHODS = ("full", "truncated", "checkpoint", "replay")
# The random numbers are the scene's business.
_CHECKPOINT: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


@dataclass(frozen=True)
class Horizon:
    """`loss, state = horizon(step, segments, state)`: back-propagates, returns both detached.

    method:   "full": back-propagation through time, holds every segment's activations;
              "truncated": the same in pieces of `truncate` segments, with no gradient between them;
              "checkpoint": full, each segment recomputed by torch.utils.checkpoint;
              "replay": memory replay, see `everlong.replay`.
    truncate: no gradient crosses the boundary before segments k, 2k, ...; None: none is cut.
    options:  `scale` and `no_sync` serve all methods; the rest say how a replay is done.

    Segment t draws its random numbers from its own seed, one draw for all up front, so that equal
    arguments give equal losses and gradients whatever the method (only float sums are reordered).
    """

    method: str
    _: KW_ONLY
    truncate: int | None = None
    options: ReplayOptions = PLAIN

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"unknown horizon {self.method!r}{suggest(self.method, METHODS)}"
                f" (there are {', '.join(METHODS)})"
            )
        if self.truncate is not None:
            object.__setattr__(self, "options", replace(self.options, truncate=self.truncate))
        if self.method == "truncated" and self.options.truncate is None:
            raise ValueError("a truncated horizon needs truncate=k, a number of segments >= 1")

    def __call__(
        self,
        step: Step,
        segments: Iterable[Any],
        state: Any = None,
        weights: Sequence[float] | Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """As `everlong.replay`, by this method."""
        segments = list(segments)
        rollout = Rollout(step, segments, state, self.options, draw_seeds(len(segments)))
        if self.method == "replay":
            return replay_rollout(rollout, weights)
        return _through_time(rollout, weights, recompute=self.method == "checkpoint")


def _through_time(
    rollout: Rollout, weights: Sequence[float] | Tensor | None, recompute: bool
) -> tuple[Tensor, Any]:
    """Forward over the segments, one backward for every piece between two cuts."""
    count = len(rollout)
    objective = Objective(weights, count, rollout.options.scale)
    piece = rollout.options.truncate or count
    upstream, state = Upstream(), rollout.buffer[0].tree()
    try:
        for start in range(0, count, piece):
            last = start + piece >= count
            with rollout.sync(last), torch.enable_grad():
                state = tree_map(detach, state) if start else upstream.cut(state, last)
                roots = []
                for t in range(start, min(start + piece, count)):
                    inputs = (t, upstream.cut(rollout.segments[t], last), state)
                    if recompute:
                        loss, state = checkpoint(rollout.run, *inputs, **_CHECKPOINT)
                    else:
                        loss, state = rollout.run(*inputs)
                    roots += [] if loss is None else [(loss, objective.seed(t, loss))]
                roots = rollout.roots(roots, upstream, last)
                if roots:
                    with no_autocast():
                        torch.autograd.backward([r for r, _ in roots], [g for _, g in roots])
    finally:
        rollout.scene.leave()
    return rollout.total(objective), tree_map(detach, state)
