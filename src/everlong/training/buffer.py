"""The replay buffer: the states between segments, and the rule which of them are held."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everlong.training.trees import Flat, detach, versions


def _to_host(leaf: Any) -> Any:
    """To pinned memory, without waiting: the copy is ordered with the stream that made `leaf`."""
    if not isinstance(leaf, Tensor) or leaf.device.type == "cpu":
        return leaf
    if leaf.device.type == "mps":  # unified memory: nothing to pin, and reading must wait
        return leaf.cpu()
    return torch.empty_like(leaf, device="cpu", pin_memory=True).copy_(leaf, non_blocking=True)


def _to_device(leaf: Any, device: torch.device | None) -> Any:
    return leaf if device is None else leaf.to(device, non_blocking=True)


@dataclass(frozen=True)
class Held:
    """A state, where its leaves came from, and their `versions` when it was put."""

    flat: Flat
    devices: list[torch.device | None]
    versions: list[int]


class Buffer:
    """States by segment: `self[t]` is what segment t starts from, its leaves detached.

    A state that was edited in place since it was put raises `RuntimeError` when it is read.

    The first state is held as it came, attached. With `every` > 1 only every such state stays when
    a later one of them arrives; the others are for the caller to recompute from `before(t)`.
    """

    def __init__(self, first: Any, every: int, offload: bool) -> None:
        self.every, self.offload = every, offload
        flat = Flat.of_state(first)
        self.states = {0: Held(flat, [None] * len(flat.leaves), versions(flat.leaves))}

    def __contains__(self, t: int) -> bool:
        return t in self.states

    def __getitem__(self, t: int) -> Flat:
        held = self.states[t]
        if versions(held.flat.leaves) != held.versions:
            raise RuntimeError(
                f"the state before segment {t} was edited in place after it was handed over, so"
                " that it cannot be replayed: return new tensors instead of reused ones"
            )
        pairs = zip(held.flat.leaves, held.devices, strict=True)
        return Flat([_to_device(*pair) for pair in pairs], held.flat.spec)

    def spec(self, t: int) -> Any:
        return self.states[t].flat.spec

    def put(self, t: int, state: Any) -> Flat:
        """Hold `state` as that of segment t; returned detached, as every run shall see it."""
        if self.every > 1 and t % self.every == 0:
            self.states = {s: held for s, held in self.states.items() if s % self.every == 0}
        flat = Flat.of_state(state).map(detach)
        devices = [leaf.device if isinstance(leaf, Tensor) else None for leaf in flat.leaves]
        kept = flat.map(_to_host) if self.offload else flat
        self.states[t] = Held(kept, devices, versions(kept.leaves))
        return flat

    def before(self, t: int) -> int:
        """The latest held segment number that is <= t."""
        return max(s for s in self.states if s <= t)

    def drop(self, t: int) -> None:
        self.states.pop(t, None)

    def num_bytes(self) -> int:
        """Bytes held, the first state (the caller's) not counted; shared storage counts once."""
        held = [leaf for t, s in self.states.items() if t > 0 for leaf in s.flat.leaves]
        storages = [leaf.untyped_storage() for leaf in held if isinstance(leaf, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
