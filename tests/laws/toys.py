"""One honest memory, and one liar a law: each breaks it in a way that memories in the wild do.

B batch, T time, D width.
"""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong import state as states
from everlong.stateful import Stateful
from laws.cases import Case

WIDTH = 6


class SegmentMean(Stateful):
    """Honest: keeps a decaying mean of finished segments and the sum of the unfinished one.

    State: mean and part [B, D] (float32 at least), last [B, 1, D] (a cache: the input before), and
    position Int [B]. At every fourth stream position the part goes into the mean.
    """

    period = 4

    def __init__(self, width: int = WIDTH, dropout: float = 0.0):
        super().__init__()
        if width < 1:
            raise ValueError(f"hidden_size must be at least 1, got {width}")
        self.width = width
        self.start = nn.Parameter(torch.zeros(width))
        self.inward = nn.Linear(width, width)
        self.outward = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def init_state(self, batch_size, *, device=None, dtype=None):
        device, dtype = self._defaults(device, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        return {
            "mean": self.start.to(exact).repeat(batch_size, 1),
            "part": torch.zeros(batch_size, self.width, device=device, dtype=exact),
            "last": torch.zeros(batch_size, 1, self.width, device=device, dtype=dtype),
            "position": torch.zeros(batch_size, device=device, dtype=torch.long),
        }

    def run(self, x, state, lengths, trace):
        if x.shape[-1] != self.width:
            raise ValueError(f"x must end in hidden_size {self.width}, got {list(x.shape)}")
        return self.read(x, state, lengths)

    def read(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        outputs = []
        for t in range(x.shape[1]):
            y, new = self.step(x[:, t], state)
            state = new if lengths is None else states.where(t < lengths, new, state)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x [B, D] -> [B, D]."""
        part = state["part"] + self.dropout(self.inward(x)).to(state["part"].dtype)
        seen = torch.tanh(part + state["mean"]).to(x.dtype)
        y = self.outward(self.dropout(seen) + state["last"][:, 0].to(x.dtype))
        mean, part, position = self.finish(state["mean"], part, state["position"] + 1)
        last = x[:, None].to(state["last"].dtype, copy=True)
        return y, {"mean": mean, "part": part, "last": last, "position": position}

    def finish(self, mean: Tensor, part: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        full = (position % self.period == 0)[:, None]
        mean = torch.where(full, 0.5 * mean + part / self.period, mean)
        return mean, torch.where(full, torch.zeros_like(part), part), position

    def reference(self, x, state=None, mask=None):
        """Row by row and position by position: the definition (law 2)."""
        state = self.init_state(x.shape[0]) if state is None else state
        mask = torch.ones(x.shape[:2]).bool() if mask is None else mask
        outputs, ends = [], []
        for row, row_state in enumerate(states.split(state)):
            for t in range(x.shape[1]):
                y = x.new_zeros(1, self.width)
                if mask[row, t]:
                    y, row_state = self.step(x[row : row + 1, t], row_state)
                outputs.append(y)
            ends.append(row_state)
        return torch.cat(outputs).view(x.shape), states.cat(ends)


def toy_case(cls: type = SegmentMean, bounded: bool = True) -> Case:
    def create(hidden_size=WIDTH, num_heads=1, dropout=0.0, **unknown):
        if unknown and cls is not SwallowsOptions:
            raise ValueError(f"no option {list(unknown)}: did you mean 'hidden_size'?")
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        return cls(hidden_size, dropout)

    return Case(cls.__name__, lambda dropout: cls(dropout=dropout), WIDTH, False, bounded, create)


# Law 1


class ForgetsPartialSegment(SegmentMean):
    """The unfinished segment is a local variable: each call begins a new one."""

    def read(self, x, state, lengths):
        return super().read(x, {**state, "part": torch.zeros_like(state["part"])}, lengths)


class CountsCalls(SegmentMean):
    """Boundaries lie at multiples of four within the call."""

    def read(self, x, state, lengths):
        y, end = super().read(x, {**state, "position": state["position"] * 0}, lengths)
        return y, {**end, "position": end["position"] + state["position"]}


class DetachesAtCalls(SegmentMean):
    """The same values; gradients stop where a call begins (the state is not differentiated)."""

    def read(self, x, state, lengths):
        return super().read(x, states.detach(state), lengths)


class DetachesAtBoundaries(SegmentMean):
    """Consistent under every cut, and still no gradient crosses a segment."""

    def finish(self, mean, part, position):
        mean, part, position = super().finish(mean, part, position)
        full = (position % self.period == 0)[:, None]
        return torch.where(full, mean.detach(), mean), part, position


# Law 2


class FastFormDiffers(SegmentMean):
    """The definition and the code that runs disagree in one gradient."""

    def reference(self, x, state=None, mask=None):
        y, end = super().reference(x, state, mask)
        return y, {**end, "mean": end["mean"].detach()}


# Law 3


class LeaksTheSegment(SegmentMean):
    """Every token of a call sees the mean of its whole segment, the rest of it included."""

    def read(self, x, state, lengths):
        y, end = super().read(x, state, lengths)
        return y + F.pad(x.diff(dim=1), (0, 0, 0, 1)), end


class LeaksInTraining(SegmentMean):
    """Statistics over time, taken in train mode only."""

    def read(self, x, state, lengths):
        y, end = super().read(x, state, lengths)
        return (y - y.mean(1, keepdim=True) if self.training else y), end


# Law 4


class MixesRows(SegmentMean):
    def read(self, x, state, lengths):
        y, end = super().read(x, state, lengths)
        return y + 0.01 * y.mean(0), end


class LetsPaddingIn(SegmentMean):
    """Packs nothing: masked outputs are hidden, masked inputs are read."""

    def forward(self, x, state=None, mask=None, trace=None, *, lengths=None):
        y, state = super().forward(x, state)
        return y if mask is None else torch.where(mask[..., None] != 0, y, 0.0), state


class MultipliesByMask(LetsPaddingIn):
    """Padding is multiplied away, and NaN times zero is NaN."""

    def forward(self, x, state=None, mask=None, trace=None, *, lengths=None):
        return super().forward(x if mask is None else x * mask[..., None], state, mask)


class ReadsPaddingAsZeros(LetsPaddingIn):
    """Padding is zero, and a zero still has a position."""

    def forward(self, x, state=None, mask=None, trace=None, *, lengths=None):
        x = x if mask is None else torch.where(mask[..., None] != 0, x, 0.0)
        return super().forward(x, state, mask)


class DecaysWhileMasked(SegmentMean):
    """Inputs are gated by the mask, the decay is not."""

    def read(self, x, state, lengths):
        y, end = super().read(x, state, lengths)
        idle = 0 if lengths is None else (x.shape[1] - lengths)[:, None]
        return y, {**end, "mean": end["mean"] * 0.99**idle}


class CountsMaskedPositions(SegmentMean):
    def read(self, x, state, lengths):
        y, end = super().read(x, state, lengths)
        return y, {**end, "position": state["position"] + x.shape[1]}


class ReadsMaskDtype(SegmentMean):
    """Understands Bool masks only: `~mask` of 0/1 integers is -1/-2."""

    def forward(self, x, state=None, mask=None, trace=None, *, lengths=None):
        if mask is not None and mask.dtype == torch.long:
            mask = ~mask != -1
            mask[:, 0] = True
        return super().forward(x, state, mask)


class IgnoresReset(SegmentMean):
    def reset(self, state, rows):
        return state


class ResetsEveryRow(SegmentMean):
    def reset(self, state, rows):
        return self.init_state(rows.shape[0])


class ResetsToZero(SegmentMean):
    """A fresh row has a learned start; a reset one gets zeros."""

    def reset(self, state, rows):
        return states.where(rows, states.tree_map(torch.zeros_like, state), state)


class NotBatchFirst(SegmentMean):
    """One clock for all rows, of shape [1]: rows cannot stand at different places."""

    def init_state(self, batch_size, *, device=None, dtype=None):
        state = super().init_state(batch_size, device=device, dtype=dtype)
        return {**state, "position": state["position"][:1]}


class SharesClock(SegmentMean):
    """A clock a row, of which the first is used for all."""

    def step(self, x, state):
        clock = state["position"]
        y, end = super().step(x, {**state, "position": clock[:1].expand_as(clock)})
        return y, {**end, "position": clock + 1}


# Law 5 and purity


class Grows(SegmentMean):
    """Keeps every input."""

    def init_state(self, batch_size, *, device=None, dtype=None):
        state = super().init_state(batch_size, device=device, dtype=dtype)
        return {**state, "all": state["last"]}

    def read(self, x, state, lengths):
        kept = state["all"]
        y, end = super().read(x, {k: v for k, v in state.items() if k != "all"}, lengths)
        return y, {**end, "all": torch.cat([kept, x.to(kept.dtype)], 1)}


class GrowsOnce(Grows):
    """Allocates when first used: fresh and used rows cannot be joined."""

    def read(self, x, state, lengths):
        y, end = super().read(x, state, lengths)
        return y, {**end, "all": F.pad(end["all"][:, -7:], (0, 0, 7, 0))[:, -7:]}


class HoldsNone(SegmentMean):
    """A placeholder until there is something."""

    def init_state(self, batch_size, *, device=None, dtype=None):
        return {**super().init_state(batch_size, device=device, dtype=dtype), "later": None}


class HoldsNothing(SegmentMean):
    """An empty cache is a leaf of size zero."""

    def init_state(self, batch_size, *, device=None, dtype=None):
        state = super().init_state(batch_size, device=device, dtype=dtype)
        return {**state, "cache": state["last"][:, :0]}


class HidesState(SegmentMean):
    """The last output lives in an attribute, and is used again."""

    hidden = 0.0

    def read(self, x, state, lengths):
        y, end = super().read(x, state, lengths)
        y = y + 0.1 * self.hidden
        self.hidden = y.mean().detach()
        return y, end


class KeepsGraph(SegmentMean):
    """The same, with its graph: detaching the state does not cut it."""

    hidden = 0.0

    def read(self, x, state, lengths):
        y, end = super().read(x, state, lengths)
        y = y + 0.1 * self.hidden
        self.hidden = y.mean()
        return y, end


class EditsInPlace(SegmentMean):
    """The caller's state is used up by the call."""

    def read(self, x, state, lengths):
        y, end = super().read(x, state, lengths)
        with torch.no_grad():
            state["position"].copy_(end["position"])
        return y, end


class KeepsViews(SegmentMean):
    """The cache is a view of all that the call read."""

    def read(self, x, state, lengths):
        y, end = super().read(x, state, lengths)
        return y, {**end, "last": x.clone()[:, -1:].to(end["last"].dtype)}


class KeepsTheInput(SegmentMean):
    """The same, of the caller's own tensor, whole."""

    def read(self, x, state, lengths):
        y, end = super().read(x, state, lengths)
        return y, {**end, "last": x[:, -1:].to(end["last"].dtype)}


class SharesParameter(SegmentMean):
    """A fresh state is the parameter itself: the next step of an optimiser edits it."""

    def init_state(self, batch_size, *, device=None, dtype=None):
        state = super().init_state(batch_size, device=device, dtype=dtype)
        return {**state, "mean": self.start.to(state["mean"].dtype).expand(batch_size, -1)}


class CountsInBuffer(SegmentMean):
    """Running statistics, as batch normalisation keeps them."""

    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__(width, dropout)
        self.register_buffer("seen", torch.zeros(()))

    def read(self, x, state, lengths):
        if self.training:
            self.seen = self.seen + x.shape[1]
        return super().read(x, state, lengths)


class TraceRounds(SegmentMean):
    """What is recorded is computed on the way, and taken."""

    def run(self, x, state, lengths, trace):
        y, end = super().run(x, state, lengths, trace)
        return (y if trace is None else y.float().to(y.dtype)), end


class DrawsInEval(SegmentMean):
    """A fresh stream starts at random."""

    def init_state(self, batch_size, *, device=None, dtype=None):
        state = super().init_state(batch_size, device=device, dtype=dtype)
        return {**state, "last": state["last"] + 0 * torch.randn(())}


# Law 6


class DropsTheGenerator(SegmentMean):
    """Its dropout is drawn by Python's generator, which replay does not restore."""

    def step(self, x, state):
        if self.training:
            x = x * (random.random() > 0.3)
        return super().step(x, state)


class AdvancesOtherwise(SegmentMean):
    """Skips the outputs, and with them the dropout that is drawn between two writes."""

    def advance(self, x, state=None, mask=None):
        self.eval()
        try:
            return super().advance(x, state, mask)
        finally:
            self.train()


# Law 7


class KeepsMapOutside(SegmentMean):
    """A random map that is neither parameter nor buffer: a loaded memory has another."""

    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__(width, dropout)
        self.map = torch.randn(width).double()

    def step(self, x, state):
        return super().step(x * self.map.to(x.dtype), state)


class Overflows(SegmentMean):
    """Sound in float64: exp of a hundred does not fit into float32."""

    def step(self, x, state):
        y, end = super().step(x, state)
        return y * torch.exp(100 + 0 * x) / torch.exp(100 + 0 * x), end


class LowAccumulator(SegmentMean):
    """Adds up in the parameters' dtype."""

    def init_state(self, batch_size, *, device=None, dtype=None):
        state = super().init_state(batch_size, device=device, dtype=dtype)
        return {**state, "part": state["part"].to(state["last"].dtype)}


class LowDecay(SegmentMean):
    """Decays in the parameters' dtype."""

    def init_state(self, batch_size, *, device=None, dtype=None):
        state = super().init_state(batch_size, device=device, dtype=dtype)
        return {**state, "mean": state["mean"].to(state["last"].dtype)}


class ChangesDtype(SegmentMean):
    """What the fresh state holds in float32 comes back in the dtype of the input."""

    def read(self, x, state, lengths):
        y, end = super().read(x, state, lengths)
        return y, {**end, "part": end["part"].to(y.dtype)}


class RoundsFarPositions(SegmentMean):
    """Angles of absolute positions in float32: at ten million they are off by one radian."""

    def step(self, x, state):
        turn = (state["position"].to(x.dtype) * 0.7)[:, None]
        y, end = super().step(x, state)
        position = state["position"].double()[:, None] * 0.7
        return y + (turn.double() - position).sin().to(x.dtype), end


# Law 9


class SwallowsOptions(SegmentMean):
    """`**kwargs`, for convenience."""

    def __init__(self, width=WIDTH, dropout=0.0, **unused):
        super().__init__(width, dropout)


class AcceptsAnyWidth(SegmentMean):
    """Pads or cuts the input until it fits."""

    def run(self, x, state, lengths, trace):
        return self.read(F.pad(x, (0, self.width - x.shape[-1])), state, lengths)


class BroadcastsMask(SegmentMean):
    def forward(self, x, state=None, mask=None, trace=None, *, lengths=None):
        mask = None if mask is None else mask.reshape(-1)[:1].expand(x.shape[:2])
        return super().forward(x, state, mask)
