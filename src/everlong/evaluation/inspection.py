"""A stream read with everything its memory tells, as plain data: what `everlong inspect` shows.

T positions of the stream, N places of a memory (slots, tokens, entries), H units. Every array has
one row: streams are inspected one at a time. What is read of the memory is its records alone
(`everlong.records`).
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong import state as states
from everlong.records import RECORDS
from everlong.stateful import Trace

Array = np.ndarray
_BY_LAYER = ("kept", "faded")  # [L, N]: of L layers, N places each


@dataclass
class Segment:
    """start and stop (stream positions), the bits that its tokens cost, and the bytes of the state
    behind it."""

    start: int
    stop: int
    bits: float
    num_bytes: int


@dataclass
class Writes:
    """What one part of the memory told of its writes: for each name its arrays, each with the index
    of the segment in whose reading it was made."""

    label: str
    unit: str
    found: dict[str, list[tuple[int, Array]]] = field(default_factory=dict)

    def add(self, name: str, segment: int, value: Array) -> None:
        self.found.setdefault(name, []).append((segment, value))

    def table(self, name: str, segments: int) -> Array | None:
        """[N, segments], of several queries the mean, of several writes in a segment the last; NaN
        where nothing was told. Of fewer places than there are at most, they are the last."""
        told = [
            (segment, array if array.ndim == 1 else array.mean(0))
            for segment, array in self.found.get(name, [])
            if segment < segments
        ]
        if not told:
            return None
        table = np.full((max(len(array) for _, array in told), segments), np.nan)
        for segment, array in told:
            table[len(table) - len(array) :, segment] = array
        return table


@dataclass
class Positions:
    """What one part of the memory told of every position: values [T, N or H]."""

    name: str
    label: str
    values: Array


@dataclass
class Inspection:
    """ids Int [T] and bits [T] (NaN where nothing predicts a token) of the whole stream, its
    segments; of the first `detailed` positions what was recorded at each; of the first `written`
    segments what was recorded of their writes. `left_out`: one line for each thing that is not here
    and why."""

    ids: Array
    bits: Array
    segments: list[Segment]
    detailed: int
    written: int
    positions: list[Positions]
    writes: list[Writes]
    left_out: list[str]


def inspect_stream(
    model: Any, ids: Array, segment_length: int, tokens: int, segments: int
) -> Inspection:
    """Read ids Int [T] (a bos first) as one stream from a fresh state.

    `tokens`: positions whose records are kept; `segments`: segments whose writes are. A segment
    ends at the multiples of `segment_length`. The state is not held: memory is that of what is
    told.
    """
    reading = _Reading(model, len(ids), tokens)
    bits, found = np.full(len(ids), np.nan), []
    state, last = model.init_state(1), None
    device = next(model.parameters()).device
    for index, start in enumerate(range(0, len(ids), segment_length)):
        block = ids[start : start + segment_length].astype(np.int64)
        inputs = torch.from_numpy(block).to(device)
        told = index < segments or start < tokens
        with torch.no_grad(), reading.listen(index, start, len(block), told) as trace:
            logits, state = model.stream(inputs[None], state, None, trace)
        before = logits[0, :-1] if last is None else torch.cat([last, logits[0, :-1]])
        predicted = inputs[len(inputs) - len(before) :]
        costs = F.cross_entropy(before.float(), predicted, reduction="none")
        costs = costs.double().cpu().numpy() / math.log(2)
        last, stop = logits[0, -1:], start + len(block)
        bits[stop - len(costs) : stop] = costs
        found.append(Segment(start, stop, float(costs.sum()), states.num_bytes(state)))
    return Inspection(
        ids,
        bits,
        found,
        min(tokens, len(ids)),
        min(segments, len(found)),
        reading.positions(),
        reading.writes(),
        reading.left_out(),
    )


class _Listener(Trace):
    """A trace that knows which module speaks: the innermost one that is being called."""

    def __init__(self, speaking: list[str]):
        super().__init__()
        self.speaking, self.told = speaking, []

    def record(self, name: str, value: Tensor) -> None:
        self.told.append((self.speaking[-1] if self.speaking else "", name, value.detach()))


class _Reading:
    """Collects what is told, call by call."""

    def __init__(self, model: nn.Module, length: int, tokens: int):
        self.model, self.tokens = model, min(tokens, length)
        self.by_position: dict[tuple[str, str], list[Array]] = {}
        self.by_write: dict[tuple[str, int | None], Writes] = {}
        self.unaligned: set[tuple[str, str]] = set()
        self.unknown: set[str] = set()

    @contextmanager
    def listen(self, index: int, start: int, length: int, told: bool) -> Iterator[Trace | None]:
        """A trace for the call that reads the segment `index`; None where nothing is to be told."""
        if not told:
            yield None
            return
        speaking: list[str] = []
        handles = []
        for path, module in self.model.named_modules():
            enter, leave = _hooks(path, speaking)
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        trace = _Listener(speaking)
        try:
            yield trace
        finally:
            for handle in handles:
                handle.remove()
        self._collect(trace, index, start, length)

    def _collect(self, trace: _Listener, index: int, start: int, length: int) -> None:
        here: dict[tuple[str, str], list[Array]] = {}
        for path, name, value in trace.told:
            if name not in RECORDS:
                self.unknown.add(name)
                continue
            array = value[0].cpu().numpy() if not value.is_floating_point() else _numbers(value)
            if RECORDS[name].each == "position":
                here.setdefault((path, name), []).append(array)
            elif name in _BY_LAYER and array.ndim > 1:
                for layer, part in enumerate(array):
                    self._write(path, layer).add(name, index, part)
            else:
                self._write(path, None).add(name, index, array)
        for (path, name), parts in here.items():
            whole = np.concatenate(parts)
            if name == "decay":  # what of a head is left after all positions of the call
                left = whole.prod(0)
                left = left if left.ndim == 1 else left.mean(-1)
                writes = self._write(path, None, RECORDS[name].unit)
                writes.add("kept", index, np.ones_like(left))
                writes.add("faded", index, 1 - left)
            if start < self.tokens:
                whole = whole.mean(-1) if whole.ndim == 3 else whole.reshape(len(whole), -1)
                self._position(path, name, whole, length)

    def _position(self, path: str, name: str, values: Array, length: int) -> None:
        if len(values) == length:
            self.by_position.setdefault((path, name), []).append(values)
        else:
            self.unaligned.add((path, name))

    def _write(self, path: str, layer: int | None, unit: str = "slot") -> Writes:
        return self.by_write.setdefault((path, layer), Writes("", unit))

    def positions(self) -> list[Positions]:
        """What was told of every position, in the order of the memory's parts."""
        labels, found = _labels([path for path, _ in self.by_position]), []
        for (path, name), parts in self.by_position.items():
            widths = {part.shape[1] for part in parts}
            if len(widths) > 1 or sum(map(len, parts)) < self.tokens:
                self.unaligned.add((path, name))
            if (path, name) not in self.unaligned:
                values = np.concatenate(parts)[: self.tokens]
                if np.issubdtype(values.dtype, np.integer):  # choices: 1 for each that was taken
                    choices = np.arange(values.max() + 1)
                    values = (values[..., None] == choices).any(1).astype(np.float32)
                found.append(Positions(name, labels[path], values))
        return found

    def left_out(self) -> list[str]:
        """One line for each kind of record that is not shown; after `positions`."""
        told = [
            f"{name}: not once for each token, as where a memory's own tokens are read between them"
            for name in sorted({name for _, name in self.unaligned})
        ]
        return told + [f"{name}: no name of everlong.records" for name in sorted(self.unknown)]

    def writes(self) -> list[Writes]:
        labels = _labels([path for path, _ in self.by_write])
        for (path, layer), part in self.by_write.items():
            part.label = labels[path] if layer is None else f"layer {layer + 1}"
        return list(self.by_write.values())


def _numbers(value: Tensor) -> Array:
    return value[0].float().cpu().numpy()


def _hooks(path: str, speaking: list[str]) -> tuple[Any, Any]:
    def enter(*_: Any) -> None:
        speaking.append(path)

    def leave(*_: Any) -> None:
        speaking.pop()

    return enter, leave


def _labels(paths: list[str]) -> dict[str, str]:
    """Names for a reader: the number of the layer, and the parts that tell equal ones apart."""
    number = {path: re.findall(r"\.(\d+)(?=\.|$)", f".{path}") for path in paths}
    labels = {
        path: f"layer {int(found[0]) + 1}" if found else "memory" for path, found in number.items()
    }
    for label in set(labels.values()):
        alike = sorted({path for path in paths if labels[path] == label})
        if len(alike) > 1:
            words = [re.sub(r"\.\d+", "", path).split(".") for path in alike]
            for path, own in zip(alike, words, strict=True):
                others = [set(each) for each in words if each is not own]
                odd = [word for word in own if not all(word in other for other in others)]
                labels[path] = f"{label} ({' '.join(odd)})" if odd else label
    return labels
