"""Memory replay back-propagation: BPTT's gradient at the activation cost of one segment.

For any `step(segment, state) -> (loss or None, state)`. Sweep 1, gradient-free, keeps only the
states M_t that link the segments; sweep 2, last segment first, runs each segment again with
gradients and hands d objective / d state back one segment:

    g_T = nothing
    t = T-1 .. 0:   loss_t, M_{t+1} = step(x_t, M_t)
                    one backward from both roots (loss_t, M_{t+1}), seeded with (w_t, g_{t+1})
                    g_t = the gradient with respect to M_t

Each backward evaluates the bracket of dJ/dP = sum_t [w_t dloss_t/dP + (dM_{t+1}/dP)^T g_{t+1}] at
the stored M_t, so the result is exact: only the order of floating point sums differs from BPTT.

`step` must depend on nothing but parameters, segment, state and torch's random numbers. What it
keeps elsewhere (running statistics, Python's random) happens twice. An in-place edit of a segment
or a state, at once or later (a state returned in buffers that are reused), is refused as far as
torch counts it: not one through `.data`, nor of inference tensors. A tensor with a graph of its own
must come in through segments or state: one that `step` closes over would be walked by every
backward, which torch refuses.

Memformer, arXiv 2010.06891, section 2.4 and Algorithm 1. Deviations: one joint backward a segment
instead of two; dropout, autocast and whatever the first state came from are handled.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from everlong.training.rollout import Objective, ReplayOptions, Rollout, Step
from everlong.training.scene import draw_seeds, read_generators, write_generators
from everlong.training.trees import Flat, is_float, needs_grad, stand_in

__all__ = ["ReplayOptions", "replay", "replay_function"]

PLAIN = ReplayOptions()


def replay(
    step: Step,
    segments: Iterable[Any],
    state: Any = None,
    *,
    weights: Sequence[float] | Tensor | None = None,
    options: ReplayOptions = PLAIN,
) -> tuple[Tensor, Any]:
    """Back-propagate sum_t weights[t] * loss_t through T segments; returns that sum and the state.

    `step(segment, state) -> (loss or None, state)`: a scalar loss, any pytree as segment and state.
    `weights` default to 1/T; for the mean over all tokens give valid_tokens_t / valid_tokens.

    The gradient is added to `.grad` of every parameter, of float tensors in `segments` that require
    it, and of whatever these and the first state came from. Both results are detached. 2T-1
    forwards and T backwards; held are T-1 states and one segment's activations. torch's generators
    end where back-propagation through time leaves them (with `options.advance`: one draw further).

    Raises `ValueError` if there is nothing to back-propagate or a loss is no scalar; `RuntimeError`
    if a replayed segment does not do what it did first or edits what it is given. After any
    exception `.grad` may hold a part of the gradient, that of the segments already replayed: zero
    it before going on.
    """
    segments = list(segments)
    seeds = draw_seeds(len(segments)) if options.advance is not None else None
    return replay_rollout(Rollout(step, segments, state, options, seeds), weights)


def replay_rollout(
    rollout: Rollout, weights: Sequence[float] | Tensor | None
) -> tuple[Tensor, Any]:
    """Both sweeps, gradients accumulated; returns the weighted loss and the last state."""
    objective = Objective(weights, len(rollout), rollout.options.scale)
    try:
        # The last segment runs once, with gradients: its state is not needed before.
        rollout.sweep(0, len(rollout) - 1)
        last = rollout.sweep_back(objective.seed, {}, _accumulate)
    finally:
        rollout.scene.leave()
    return rollout.total(objective), last.tree()


def _accumulate(
    roots: list[Tensor], seeds: list[Tensor], leaves: list[Tensor]
) -> list[Tensor | None]:
    torch.autograd.backward(roots, seeds)
    return [leaf.grad for leaf in leaves]


def replay_function(
    step: Step, segments: Iterable[Any], state: Any, params: Iterable[Tensor]
) -> tuple[Tensor, Any]:
    """Memory replay as one differentiable function, for use inside a larger graph.

    Returns the losses of the T segments, [T] (0 where `step` gave None), and the last state, both
    attached: back-propagate anything made of them. Gradients go to `params` (all that `step` uses:
    one that is left out gets none), to float tensors in `segments` and to the first state, and
    further to what these came from. Forward is the gradient-free sweep, backward the sweep back: 2T
    forwards. Not differentiable twice. Under DistributedDataParallel use `replay`.
    """
    segments = list(segments)
    outer = Flat.of((segments, state))
    inner = outer.map(lambda leaf: stand_in(leaf) if needs_grad(leaf) else leaf)
    sources = [leaf for leaf in outer.leaves if needs_grad(leaf)]
    params = [parameter for parameter in params if parameter.requires_grad]
    inner_segments, inner_state = inner.tree()
    rollout = Rollout(step, inner_segments, inner_state, PLAIN)
    wrt = [leaf for leaf in inner.leaves if needs_grad(leaf)] + params
    end: list[Flat] = []
    losses, *tensors = _Replay.apply(rollout, wrt, end, *sources, *params)
    found = iter(tensors)
    return losses, end[0].map(lambda leaf: next(found) if isinstance(leaf, Tensor) else leaf).tree()


class _Replay(torch.autograd.Function):
    """Inputs: the tensors behind `wrt`, the leaves that the rollout runs on. Fills `end`."""

    @staticmethod
    def forward(ctx: Any, rollout: Rollout, wrt: list[Tensor], end: list[Flat], *inputs: Tensor):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.rollout, ctx.wrt = rollout, wrt
        last = rollout.sweep(0, len(rollout))
        rollout.buffer.drop(len(rollout))
        end.append(last)
        ctx.places = [i for i, leaf in enumerate(last.leaves) if isinstance(leaf, Tensor)]
        tensors = [last.leaves[i] for i in ctx.places]
        ctx.mark_non_differentiable(*[tensor for tensor in tensors if not is_float(tensor)])
        zero = torch.zeros_like(next((x for x in rollout.losses if x is not None), torch.zeros(())))
        losses = torch.stack([zero if loss is None else loss for loss in rollout.losses])
        return losses, *tensors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor | None, *grad_state: Tensor | None):
        _ = ctx.saved_tensors  # torch raises here if a parameter was edited since the forward
        totals: list[Tensor | None] = [None] * len(ctx.wrt)

        def pull(roots: list[Tensor], seeds: list[Tensor], leaves: list[Tensor]):
            grads = torch.autograd.grad(roots, [*leaves, *ctx.wrt], seeds, allow_unused=True)
            for i, grad in enumerate(grads[len(leaves) :]):
                if grad is not None:
                    before = totals[i]
                    totals[i] = grad if before is None else before + grad
            return grads[: len(leaves)]

        def seed(t: int, _: Tensor) -> Tensor | None:
            return None if grad_losses is None else grad_losses[t]

        pairs = zip(ctx.places, grad_state, strict=True)
        outside = read_generators()
        try:
            ctx.rollout.sweep_back(seed, {i: g for i, g in pairs if g is not None}, pull)
        finally:
            write_generators(outside)
        return None, None, None, *totals
