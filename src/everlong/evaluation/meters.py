"""Bytes that a computation holds at its peak, counted tensor by tensor on any device."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
    """`peak`: the most bytes alive at one time in tensors made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
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
