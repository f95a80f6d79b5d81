"""The dual form of `everlong.ops.dual`, block by block, with its gradients written out.

N blocks, X = B * H networks, G chunks of a block, K pairs of a block (those of a chunk side by
side), Q positions it is read at, I and O widths into and out of a layer. A layer's state holds its
weights over its momentum, [X, I or 2 I, O].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everlong.ops.first_order import first_order

TINY = 1e-12  # inside the norm of a gradient


@dataclass(frozen=True)
class Inner:
    """What a network is trained on.

    cotangent(o, *extras): from the network's output o [..., V] for the pairs of a chunk to the
    gradient of the inner loss by it; extras [..., K or 1, V or 1] are the caller's, of which the
    first is the target. None: o - target, of half the squared error. limit: a pair's gradient over
    all layers is shortened to this length if it is longer, never lengthened.
    """

    cotangent: Callable[..., Tensor] | None = None
    limit: float | None = None

    def error(self, o: Tensor, extras: Sequence[Tensor]) -> Tensor:
        return o - extras[0] if self.cotangent is None else self.cotangent(o, *extras)


class Parts(NamedTuple):
    """Of all blocks [N, X, ...] or of one: what is computed with besides extras and states. `early`
    is where errors are taken, the start of each pair's chunk (None where G = 1: the block's)."""

    probe: Any  # keys that errors are taken of; where G > 1 [early_into, early_drift] of them
    early: Any  # (probe key^T) * early_pairs
    query: Any  # [into, drift] of the queries
    first: Any  # (query key^T) * pairs
    key: Any  # [end_pairs, end_push] of the keys
    reach: Any  # |key|^2
    into: Any
    drift: Any
    pairs: Any
    early_into: Any
    early_drift: Any
    early_pairs: Any
    end_into: Any
    end_drift: Any
    end_slow: Any
    end_pairs: Any
    end_push: Any


_FIXED = len(Parts._fields)


def stacked(x: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    """Rows that meet weights over momenta: [first * x, second * x]."""
    if second is None:
        return first * x
    if torch.is_grad_enabled():
        return torch.cat([first * x, second * x], -1)
    found = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    for half, part in zip(found.chunk(2, -1), (first, second), strict=True):
        torch.mul(x, part, out=half)
    return found


def fit_blocks(
    inner: Inner,
    live: int,
    groups: int,
    parts: Parts,
    extras: Sequence[Tensor],
    starts: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """What is read, [N, X, Q, V], and each layer's last state; the first `live` blocks move it."""
    tensors = *parts, *extras, *starts
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    plan = Plan(inner, groups, len(starts), wanted)
    found: Any = _Blocks.apply(plan, live, len(extras), *tensors)
    return found[0], list(found[1:])


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: "Plan", live: int, count: int, *tensors: Any) -> Any:
        fixed, states = tensors[: _FIXED + count], list(tensors[_FIXED + count :])
        outputs, kept, passed = [], [], [*states]
        for n, each in enumerate(_unbound(fixed)):
            block = Block(plan, each, states)
            block.learn()
            outputs.append(block.read())
            if n < live:
                states = [block.moved(i) for i in range(plan.depth)]
            if plan.wanted:
                kept += block.saved()
                passed += states if n < live else ()
        if plan.wanted:
            ctx.save_for_backward(*fixed, *passed, *kept)
        ctx.plan, ctx.live, ctx.count = plan, live, count
        return torch.stack(outputs), *(w.clone() for w in states)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> Any:
        plan, live = ctx.plan, ctx.live
        tensors = list(ctx.saved_tensors)
        fixed, tensors = tensors[: _FIXED + ctx.count], tensors[_FIXED + ctx.count :]
        cut = plan.depth * (live + 1)
        states, kept = tensors[:cut], tensors[cut:]
        each = list(_unbound(fixed))
        size, by_states = len(kept) // len(each), list(grads[1:])
        found: list[list[Any]] = []
        for n in reversed(range(len(each))):
            first = plan.depth * min(n, live)
            block = Block(plan, each[n], states[first : first + plan.depth])
            block.restore(kept[n * size : (n + 1) * size])
            by_parts, by_states = block.backward(grads[0][n], by_states, n < live)
            found.append(by_parts)
        by_fixed = []
        for t, by in zip(fixed, zip(*reversed(found), strict=True), strict=True):
            if t is None or all(x is None for x in by):
                by_fixed.append(None)
                continue
            by_fixed.append(torch.stack([torch.zeros_like(t[0]) if x is None else x for x in by]))
        return None, None, None, *by_fixed, *by_states


def _unbound(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """For every block its own of each."""
    parts = [t if t is None else t.unbind() for t in tensors]
    for n in range(len(parts[0] or ())):
        yield [part if part is None else part[n] for part in parts]


def gelu(z: Tensor, order: int) -> list[Tensor]:
    """gelu(z) and its first `order` derivatives, of two."""
    below = torch.erf(z * 0.5**0.5).add_(1).mul_(0.5)
    found = [z * below]
    if order:
        square = z * z
        density = torch.exp(square * -0.5).mul_((2 * math.pi) ** -0.5)
        found.append(below.addcmul_(z, density))
    if order > 1:
        found.append(density.mul_(square.neg_().add_(2)))
    return found


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def _add(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a.add_(b)


@dataclass(frozen=True)
class Plan:
    """What all blocks of a call share; `wanted`: gradients."""

    inner: Inner
    groups: int
    depth: int
    wanted: bool


class Block:
    """One block. For the pairs: a what enters each layer (none for the first: probe), d and dd the
    first two derivatives of gelu there, s what comes back to it behind gelu, g what comes back to
    each layer, factor what that is shortened by and w what is left of it: written. For the reads, x
    what enters each layer, dx the derivative of gelu there, raw = x a^T."""

    _NAMES = ("a", "d", "dd", "s", "g", "x", "dx", "raw")

    def __init__(self, plan: Plan, fixed: Sequence[Any], states: Sequence[Tensor]):
        self.plan, self.states = plan, states
        self.parts, self.extras = Parts(*fixed[:_FIXED]), fixed[_FIXED:]
        self.tops = list(states)
        if self.parts.drift is not None:
            self.tops = [w[:, : w.shape[1] // 2] for w in states]
        self.pairs = self.parts.key.shape[1]
        self.each = self.pairs // plan.groups
        empty: list[Any] = [None] * plan.depth
        self.a, self.d, self.dd, self.s, self.g = ([*empty] for _ in range(5))
        self.x, self.dx, self.raw = [*empty], [*empty], [*empty]
        self.factor: Any = None
        self.w: list[Any] = [*empty]

    def saved(self) -> list[Tensor]:
        lists = [t for name in self._NAMES for t in getattr(self, name) if t is not None]
        return lists if self.factor is None else [*lists, self.factor]

    def restore(self, saved: Sequence[Tensor]) -> None:
        found = iter(saved)
        for name in self._NAMES:
            first = 0 if name == "g" else 1  # nothing else is kept of the first layer
            setattr(
                self, name, [None] * first + [next(found) for _ in range(first, self.plan.depth)]
            )
        self.factor = next(found, None)
        self.w = [g if self.factor is None else g * self.factor for g in self.g]

    # forward

    def learn(self) -> None:
        """The gradients of the pairs, chunk by chunk."""
        for c in range(self.plan.groups):
            here = slice(c * self.each, (c + 1) * self.each)
            x, own, deep = None, [], range(1, self.plan.depth)
            for i in range(self.plan.depth):
                z = self._through(i, x, here)
                if i + 1 < self.plan.depth:
                    x, *slopes = gelu(z, 1 + self.plan.wanted)
                    kept = (self.a, self.d, self.dd)
                    for each, value in zip(kept, (x, *slopes), strict=False):
                        self._keep(each, i + 1, here, value)
                else:
                    own = [self.plan.inner.error(z, [extra[:, here] for extra in self.extras])]
            for i in reversed(deep):
                s = self._back(i, own[0], here)
                self._keep(self.s, i, here, s)
                own.insert(0, s * self.d[i][:, here])
            self._shorten(own, here)

    def _keep(self, kept: list[Any], i: int, here: slice, value: Tensor) -> None:
        if self.plan.groups == 1:
            kept[i] = value
            return
        if kept[i] is None:
            kept[i] = value.new_empty(len(value), self.pairs, value.shape[-1])
        kept[i][:, here] = value

    def _shorten(self, own: list[Tensor], here: slice) -> None:
        for i, g in enumerate(own):
            self._keep(self.g, i, here, g)
        if self.parts.reach is None:
            self.w = self.g
            return
        assert self.plan.inner.limit is not None
        factor = (self.plan.inner.limit / self._squares(here).sqrt()).clamp(max=1)
        kept = [self.factor]
        self._keep(kept, 0, here, factor)
        self.factor = kept[0]
        for i, g in enumerate(own):
            self._keep(self.w, i, here, g * factor)

    def _squares(self, here: slice) -> Tensor:
        """|u|^2 of every pair: over the layers, |what enters|^2 |what comes back|^2."""
        square = self.parts.reach[:, here] * _square(self.g[0][:, here]) + TINY
        for a, g in zip(self.a[1:], self.g[1:], strict=True):
            square = square + _square(a[:, here]) * _square(g[:, here])
        return square

    def _through(self, i: int, x: Tensor | None, here: slice) -> Tensor:
        """What layer i makes of x, for pairs `here`, at the start of their chunk."""
        part, behind = self.parts, slice(0, here.start)
        if here.start == 0:
            enters = part.probe[:, here, : self.tops[0].shape[1]] if x is None else x
            return enters @ self.tops[i]
        if x is None:
            q, p = part.probe[:, here], part.early[:, here, behind]
        else:
            drift = None if part.drift is None else part.early_drift[:, here]
            q = stacked(x, part.early_into[:, here], drift)
            p = (x @ self.a[i][:, behind].mT).mul_(part.early_pairs[:, here, behind])
        return (q @ self.states[i]).baddbmm_(p, self.w[i][:, behind])

    def _back(self, i: int, g: Tensor, here: slice) -> Tensor:
        """What comes back through layer i of g, for pairs `here`."""
        part, behind = self.parts, slice(0, here.start)
        if here.start == 0:
            return g @ self.tops[i].mT
        s = _weighed(g @ self.states[i].mT, part.early_into[:, here], _at(part.early_drift, here))
        p = (g @ self.w[i][:, behind].mT).mul_(part.early_pairs[:, here, behind])
        return s.baddbmm_(p, self.a[i][:, behind])

    def read(self) -> Tensor:
        part = self.parts
        y = (part.query @ self.states[0]).baddbmm_(part.first, self.w[0])
        for i in range(1, self.plan.depth):
            x, *slopes = gelu(y, int(self.plan.wanted))
            raw = x @ self.a[i].mT
            q = stacked(x, part.into, part.drift)
            y = (q @ self.states[i]).baddbmm_(raw * part.pairs, self.w[i])
            if self.plan.wanted:
                self.x[i], self.dx[i], self.raw[i] = x, slopes[0], raw
        return y

    def _key(self, i: int) -> Tensor:
        part = self.parts
        return part.key if i == 0 else stacked(self.a[i], part.end_pairs, part.end_push)

    def moved(self, i: int) -> Tensor:
        """Layer i's state behind the block."""
        part, state = self.parts, self.states[i]
        if part.end_drift is None:
            after = state * part.end_into
        else:
            (weights, momenta), after = state.chunk(2, 1), torch.empty_like(state)
            top, bottom = after.chunk(2, 1)
            torch.mul(weights, part.end_into, out=top).addcmul_(momenta, part.end_drift)
            torch.mul(momenta, part.end_slow, out=bottom)
        return after.baddbmm_(self._key(i).mT, self.w[i])

    # backward: by_t is the gradient by t

    def backward(
        self, by_y: Tensor, by_after: Sequence[Tensor], live: bool
    ) -> tuple[list[Any], list[Tensor]]:
        """Gradients by parts and extras, and by the states before the block."""
        depth = self.plan.depth
        self.by: dict[str, Any] = dict.fromkeys(Parts._fields)
        self.by_extras: list[Any] = [None] * len(self.extras)
        self.by_a: list[Any] = [None] * depth
        self.by_w: list[Any] = [None] * depth
        if live:
            self.by_states = [self._moved_back(i, by) for i, by in enumerate(by_after)]
        else:
            self.by_states = [by.clone() for by in by_after]
        for i in reversed(range(depth)):
            by_y = self._read_back(i, by_y)
        if self.plan.groups > 1:
            for name in ("probe", "early", "early_into", "early_drift", "early_pairs", "reach"):
                part = getattr(self.parts, name)
                self.by[name] = None if part is None else torch.zeros_like(part)
            if self.parts.early_drift is None:
                self.by["early_drift"] = None
        self.by_z: list[Any] = [None] * depth
        self.by_s: list[Any] = [None] * depth
        for c in reversed(range(self.plan.groups)):
            self._learn_back(slice(c * self.each, (c + 1) * self.each))
        self._learned_from()
        return [self.by[name] for name in Parts._fields] + self.by_extras, self.by_states

    def _sum(self, name: str, grad: Tensor) -> None:
        self.by[name] = _add(self.by[name], grad)

    def _unstack(self, by_q: Tensor, x: Tensor, first: str, second: str) -> Tensor:
        """Through `stacked` of x with two parts: the gradient by x."""
        one, two = getattr(self.parts, first), getattr(self.parts, second)
        if two is None:
            self._sum(first, (by_q * x).sum(-1, keepdim=True))
            return by_q * one
        top, bottom = by_q.chunk(2, -1)
        self._sum(first, (top * x).sum(-1, keepdim=True))
        self._sum(second, (bottom * x).sum(-1, keepdim=True))
        return (top * one).addcmul_(bottom, two)

    def _moved_back(self, i: int, by_after: Tensor) -> Tensor:
        part, state = self.parts, self.states[i]
        by_key = self.w[i] @ by_after.mT
        self.by_w[i] = self._key(i) @ by_after
        if i == 0:
            self.by["key"] = by_key
        else:
            self.by_a[i] = self._unstack(by_key, self.a[i], "end_pairs", "end_push")
        flat = (len(state), 1 if part.end_drift is None else 2, -1)
        products = by_after.reshape(flat) @ state.reshape(flat).mT  # of each half with each
        self._sum("end_into", products[:, :1, :1])
        if part.end_drift is None:
            return by_after * part.end_into
        self._sum("end_drift", products[:, :1, 1:])
        self._sum("end_slow", products[:, 1:, 1:])
        by_state, (top, bottom) = torch.empty_like(state), by_after.chunk(2, 1)
        weights, momenta = by_state.chunk(2, 1)
        torch.mul(top, part.end_into, out=weights)
        torch.mul(top, part.end_drift, out=momenta).addcmul_(bottom, part.end_slow)
        return by_state

    def _to(self, sums: list[Any], i: int, at: slice, left: Tensor, right: Tensor) -> None:
        """sums[i][:, at] += left @ right."""
        if sums[i] is None:
            like = self.w[i] if sums is self.by_w else self.a[i]
            if at == slice(0, self.pairs):
                sums[i] = left @ right
                return
            sums[i] = torch.zeros_like(like)
        sums[i][:, at].baddbmm_(left, right)

    def _read_back(self, i: int, by_y: Tensor) -> Tensor:
        """Through layer i of the reads: the gradient by what left the layer below."""
        part, every = self.parts, slice(0, self.pairs)
        by_q, by_p = by_y @ self.states[i].mT, by_y @ self.w[i].mT
        if i == 0:
            self.by_states[0].baddbmm_(part.query.mT, by_y)
            self._to(self.by_w, 0, every, part.first.mT, by_y)
            self.by["query"], self.by["first"] = by_q, by_p
            return by_y
        self.by_states[i].baddbmm_(stacked(self.x[i], part.into, part.drift).mT, by_y)
        self._to(self.by_w, i, every, (self.raw[i] * part.pairs).mT, by_y)
        self._sum("pairs", by_p * self.raw[i])
        by_raw = by_p.mul_(part.pairs)
        self._to(self.by_a, i, every, by_raw.mT, self.x[i])
        by_x = self._unstack(by_q, self.x[i], "into", "drift").baddbmm_(by_raw, self.a[i])
        return by_x.mul_(self.dx[i])

    def _learn_back(self, here: slice) -> None:
        """Through the gradients of pairs `here` and what they were taken of."""
        depth = self.plan.depth
        by_g = [by[:, here] for by in self.by_w]
        if self.parts.reach is not None:
            by_g = self._shorten_back(by_g, here)
        by_z: list[Any] = [None] * depth
        for i in range(1, depth):
            d, dd, s = (part[i][:, here] for part in (self.d, self.dd, self.s))
            by_z[i] = (by_g[i - 1] * s).mul_(dd)
            by_s = by_g[i - 1] * d
            self._keep(self.by_s, i, here, by_s)
            by_g[i] = by_g[i] + self._back_back(i, by_s, here)
        by_o = self._error_back(by_g[-1], here)
        for i in reversed(range(depth)):
            self._keep(self.by_z, i, here, by_o)
            by_a = self._through_back(i, by_o, here)
            if by_a is not None:
                by_o = by_z[i].addcmul_(by_a, self.d[i][:, here])

    def _learned_from(self) -> None:
        """Through `_through` and `_back` of all pairs: by the block's states."""
        part, grouped = self.parts, self.plan.groups > 1
        for i, top in enumerate(self.tops):
            ways = [(self.a[i] if i else part.probe, self.by_z[i])]
            if i > 0:
                ways.append((self.by_s[i], self.g[i]))
            for left, right in ways:
                if i > 0 and grouped:
                    left = stacked(left, part.early_into, part.early_drift)
                at = self.by_states[i] if grouped else self.by_states[i][:, : top.shape[1]]
                at.baddbmm_(left.mT, right)

    def _shorten_back(self, by_w: list[Tensor], here: slice) -> list[Tensor]:
        factor, g = self.factor[:, here], [g[:, here] for g in self.g]
        by_factor = sum((by * x).sum(-1, keepdim=True) for by, x in zip(by_w, g, strict=True))
        by_square = torch.where(factor < 1, by_factor * factor / self._squares(here) * -0.5, 0.0)
        self._put("reach", here, by_square * _square(g[0]))
        found = []
        for i, x in enumerate(g):
            reach = self.parts.reach[:, here] if i == 0 else _square(self.a[i][:, here])
            found.append((by_w[i] * factor).addcmul_(x, 2 * by_square * reach))
            if i > 0:
                self.by_a[i][:, here] += 2 * by_square * _square(x) * self.a[i][:, here]
        return found

    def _put(self, name: str, here: slice, value: Tensor) -> None:
        if self.plan.groups == 1:
            self.by[name] = value
        else:
            self.by[name][:, here] = value

    def _back_back(self, i: int, by_s: Tensor, here: slice) -> Tensor:
        """Through `_back`: the gradient by g."""
        part, state, g = self.parts, self.states[i], self.g[i][:, here]
        top = state.shape[1] // 2 if part.drift is not None else state.shape[1]
        behind = slice(0, here.start)
        if here.start == 0:
            return by_s @ state[:, :top]
        into, drift = part.early_into[:, here], _at(part.early_drift, here)
        by_g = by_s @ state[:, :top]
        self.by["early_into"][:, here] += (by_g * g).sum(-1, keepdim=True)
        by_g.mul_(into)
        if drift is not None:
            more = by_s @ state[:, top:]
            self.by["early_drift"][:, here] += (more * g).sum(-1, keepdim=True)
            by_g.addcmul_(more, drift)
        early, a, w = part.early_pairs[:, here, behind], self.a[i][:, behind], self.w[i][:, behind]
        raw, by_p = g @ w.mT, by_s @ a.mT
        self.by["early_pairs"][:, here, behind] += raw * by_p
        self._to(self.by_a, i, behind, raw.mul_(early).mT, by_s)
        by_raw = by_p.mul_(early)
        self._to(self.by_w, i, behind, by_raw.mT, g)
        return by_g.baddbmm_(by_raw, w)

    def _error_back(self, by_g: Tensor, here: slice) -> Tensor:
        """Through `Inner.error`: the gradient by the network's output."""
        inner, extras = self.plan.inner, [extra[:, here] for extra in self.extras]
        by_extras: Sequence[Any] = [-by_g]
        by_o: Any = by_g
        if inner.cotangent is not None:
            x = self.a[-1][:, here] if self.plan.depth > 1 else None
            o = self._through(self.plan.depth - 1, x, here)
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in (o, *extras)]
                found = inner.error(inputs[0], inputs[1:])
                by_o, *by_extras = torch.autograd.grad(found, inputs, by_g, allow_unused=True)
            by_o = torch.zeros_like(o) if by_o is None else by_o
        for n, by in enumerate(by_extras):
            if by is not None:
                self._keep_extra(n, here, by)
        return by_o

    def _keep_extra(self, n: int, here: slice, by: Tensor) -> None:
        if self.plan.groups == 1:
            self.by_extras[n] = by
            return
        if self.by_extras[n] is None:
            self.by_extras[n] = torch.zeros_like(self.extras[n])
        self.by_extras[n][:, here] = by

    def _through_back(self, i: int, by_z: Tensor, here: slice) -> Tensor | None:
        """Through `_through`: the gradient by x, all of it; None for the first layer."""
        part, state, behind = self.parts, self.states[i], slice(0, here.start)
        width = self.tops[i].shape[1]
        x = self.a[i][:, here] if i else None
        if here.start == 0:
            by_x = by_z @ self.tops[i].mT
            if i > 0:
                return by_x.add_(self.by_a[i][:, here])
            if self.plan.groups == 1:
                self.by["probe"] = by_x
            else:
                self.by["probe"][:, here, :width] = by_x
            return None
        by_q, w = by_z @ state.mT, self.w[i][:, behind]
        by_p = by_z @ w.mT
        if x is None:
            self.by["probe"][:, here], self.by["early"][:, here, behind] = by_q, by_p
            self._to(self.by_w, 0, behind, part.early[:, here, behind].mT, by_z)
            return None
        into, drift = part.early_into[:, here], _at(part.early_drift, here)
        self.by["early_into"][:, here] += (by_q[..., :width] * x).sum(-1, keepdim=True)
        if drift is not None:
            self.by["early_drift"][:, here] += (by_q[..., width:] * x).sum(-1, keepdim=True)
        by_x = _weighed(by_q, into, drift).add_(self.by_a[i][:, here])
        early, a = part.early_pairs[:, here, behind], self.a[i][:, behind]
        raw = x @ a.mT
        self.by["early_pairs"][:, here, behind] += raw * by_p
        by_raw = by_p.mul_(early)
        self._to(self.by_w, i, behind, raw.mul_(early).mT, by_z)
        self._to(self.by_a, i, behind, by_raw.mT, x)
        return by_x.baddbmm_(by_raw, a)


def _at(x: Tensor | None, here: slice) -> Tensor | None:
    return None if x is None else x[:, here]


def _weighed(x: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    """The transpose of `stacked`: the halves of x, weighed and added."""
    if second is None:
        return x * first
    top, bottom = x.chunk(2, -1)
    return (top * first).addcmul_(bottom, second)
