"""What a computation holds at its peak and how much it multiplies, counted on any device."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class _Held:
    """One tensor saved by autograd; forgetting it takes its bytes off the meter."""

    def __init__(self, tensor: Tensor, meter: "SavedBytes") -> None:
        # Detached: an operation that saves its own output would keep itself alive.
        self.tensor, self.meter = tensor.detach(), meter
        self.key = tensor.untyped_storage().data_ptr()
        meter.add(self.key, tensor.untyped_storage().nbytes())

    def __del__(self) -> None:
        self.meter.remove(self.key, self.tensor.untyped_storage().nbytes())


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """`peak`: the most bytes saved for backward at one time, each storage once.

    `without` (parameters, inputs) is not counted. What torch.utils.checkpoint recomputes stays
    unseen, since it brings its own hooks: `LiveBytes` sees it.
    """

    def __init__(self, without: Iterable[Tensor] = ()) -> None:
        super().__init__(lambda tensor: _Held(tensor, self), lambda held: held.tensor)
        self.without = {tensor.untyped_storage().data_ptr() for tensor in without}
        self.holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def __enter__(self) -> "SavedBytes":
        super().__enter__()
        return self

    def add(self, key: int, size: int) -> None:
        if key in self.without:
            return
        self.now += 0 if self.holders[key] else size
        self.holders[key] += 1
        self.peak = max(self.peak, self.now)

    def remove(self, key: int, size: int) -> None:
        if key in self.without:
            return
        self.holders[key] -= 1
        self.now -= 0 if self.holders[key] else size


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes alive at one time in tensors made while it is entered, each storage
    once. What was there before (parameters, inputs) is not counted, and no view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):  # made in here, or there before
                self.seen.add(leaf.untyped_storage())
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.now -= size


class Flops(TorchDispatchMode):
    """`total`: floating point operations of the matrix products while it is entered, two a product
    and sum. In-place products are counted, and of causal attention on a processor only the pairs
    that are seen; what works element by element is not. Not for inference mode, which hides the
    products inside an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = formulas().get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


@cache
def formulas() -> dict[Any, Callable[..., int]]:
    """By operation: torch's own, and those it does not know of."""
    aten, found = torch.ops.aten, dict(flop_registry)
    for name in ("addmm", "baddbmm"):
        found[getattr(aten, f"{name}_")] = found[getattr(aten, name)]
    found[aten.addbmm] = found[aten.addbmm_] = found[aten.baddbmm]
    found[aten.mv] = lambda a, b, out_val: 2 * a.numel()
    found[aten.addmv] = found[aten.addmv_] = lambda c, a, b, out_val, **_: 2 * a.numel()
    found[aten.dot] = found[aten.vdot] = lambda a, b, out_val: 2 * a.numel()
    found[aten._scaled_dot_product_flash_attention_for_cpu] = _attention
    found[aten._scaled_dot_product_flash_attention_for_cpu_backward] = _attention_backward
    return found


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout=0.0, causal=False, **_: Any) -> int:
    """q [B, H, T, K], k [B, H, U, K], v [B, H, U, V]; causal: query t sees keys 0 to t."""
    rows, new, old = prod(q.shape[:2]), q.shape[2], k.shape[2]
    few = min(new, old)
    pairs = few * (few + 1) // 2 + (new - few) * old if causal else new * old
    return 2 * rows * pairs * (q.shape[3] + v.shape[3])


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, *args: Any, **_: Any
) -> int:
    """The scores again, and four products for the three gradients."""
    forward = _attention(q, k, v, *args[:2])
    return forward * 5 // 2
