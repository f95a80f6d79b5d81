"""Stateful: the one door behind which every memory lives.

B batch, T time, D hidden_size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from everlong import state as states
from everlong.ops.ragged import pack, unpack
from everlong.state import State


class Trace:
    """What a caller wants to see besides the result. Memories append to it and keep nothing.

    `losses[name]` are scalars to add to the training loss a token (nats or what weighs like them),
    with their graph; `records[name]` are detached tensors for inspection, in the order they were
    made; their names and shapes are in `everlong.records`. With `recording=False` only losses are
    wanted: what costs more than a record is skipped.
    """

    def __init__(self, recording: bool = True) -> None:
        self.recording = recording
        self.losses: dict[str, list[Tensor]] = {}
        self.records: dict[str, list[Tensor]] = {}

    def loss(self, name: str, value: Tensor) -> None:
        self.losses.setdefault(name, []).append(value)

    def total(self) -> Tensor | None:
        """The sum of all losses, float32 at least; None where there is none."""
        values = [value for found in self.losses.values() for value in found]
        if not values:
            return None
        return torch.stack(
            [v.to(torch.promote_types(v.dtype, torch.float32)) for v in values]
        ).sum()

    def record(self, name: str, value: Tensor) -> None:
        if not self.recording:
            return
        self.records.setdefault(name, []).append(value.detach())


def checked_mask(x: Tensor, mask: Tensor) -> Tensor | None:
    """The mask as Bool [B, T], or None where every position of x [B, T, ...] is real."""
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mask must be {list(x.shape[:2])} like x, got {list(mask.shape)}")
    mask = mask.bool()
    return None if bool(mask.all()) else mask


class Stateful(nn.Module):
    """A function (input, state) -> (output, state) over a stream.

    A subclass writes `init_state` and `run`. It then obeys, for every user (tests/laws checks all
    of it over the registry):

    1. Any cut. However a stream is cut into calls, outputs and final state are those of one call.
    2. Reference. The fast form equals the step-by-step form, values and gradients.
    3. Causal. Output t does not depend on input > t.
    4. Rows. A row alone equals the row in a batch; a masked position is removed from its row's
       stream, whatever it holds; a row masked for a whole call keeps its state bit for bit.
    5. Bounded. A bounded state has its shapes from `init_state` on, for ever; it holds its bytes
       and no more, and shares memory with no parameter, input or output.
    6. Replay. Gradients under memory replay equal back-propagation through time.
    7. Round trip. State and model save, load and continue identically.
    8. Generate. Generation with the state equals generation without it.
    9. Honest. No work at import, no warnings; unknown options raise `ValueError`.
    """

    period: int = 1  # segment or chunk length: boundaries lie at its multiples of stream positions
    hidden_size: int | None = None  # width D of the inputs, checked at the door where it is set
    state_shapes: Any = None  # of a state's leaves without rows (`state.shapes`), likewise

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state of `batch_size` fresh streams; differentiable in whatever of it is learned.

        `device` and `dtype` (of activation caches) default to the parameters'.
        """
        raise NotImplementedError

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None, **inputs: Any
    ) -> tuple[Tensor, State]:
        """One call on rows without holes: the first `lengths[b]` positions of row b are real.

        x [B, T, ...]; lengths Int [B], or None where every position is real. Outputs behind a row's
        length may be anything finite; its state must not move there.
        """
        raise NotImplementedError

    def reset(self, state: State, rows: Tensor) -> State:
        """Rows (Bool [B]) start a new stream; the others keep their state."""
        if rows.dtype != torch.bool or rows.shape != (states.batch_size(state),):
            raise ValueError(
                f"rows must be Bool [{states.batch_size(state)}], one a row of the state; got "
                f"{rows.dtype} {list(rows.shape)}"
            )
        if not bool(rows.any()):
            return state
        fresh = self.init_state(rows.shape[0], device=rows.device)
        fresh = states.tree_map(lambda new, old: new.to(old.dtype), fresh, state)
        return fresh if bool(rows.all()) else states.where(rows, fresh, state)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        trace: Trace | None = None,
        *,
        lengths: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, State]:
        """Read x [B, T, ...] after `state` (None: fresh streams); return outputs and the new state.

        mask Bool or 0/1 [B, T], True = a real position: the others are removed from their row's
        stream, and their outputs are 0. `lengths` says the same of rows that are already packed to
        the left; parts of a memory are called with it.
        """
        if x.dim() < 2 or x.shape[1] == 0:
            raise ValueError(f"x must be [B, T, ...] with T >= 1, got {list(x.shape)}")
        if self.hidden_size is not None and x.shape[2:] != (self.hidden_size,):
            raise ValueError(
                f"x must be [B, T, hidden_size = {self.hidden_size}], got {list(x.shape)}"
            )
        if state is None:
            state = self.init_state(x.shape[0], device=x.device)
        elif (rows := states.batch_size(state)) != x.shape[0]:
            raise ValueError(
                f"the state holds {rows} rows and x {x.shape[0]}: use state.select or state.cat"
            )
        if self.state_shapes is not None and states.shapes(state) != self.state_shapes:
            raise ValueError(
                "the state is of a memory with other options (chunk_size, window, depth ...): give "
                "it to that one"
            )
        if mask is None:
            return self.run(x, state, lengths, trace, **inputs)
        if lengths is not None:
            raise ValueError("give mask or lengths: rows that have lengths are packed already")
        holes = checked_mask(x, mask)
        if holes is None:
            return self.run(x, state, None, trace, **inputs)
        packed, lengths, order = pack(x, holes)
        y, state = self.run(packed, state, lengths, trace, **inputs)
        return unpack(y, lengths, order, x.shape[1]), state

    def advance(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> State:
        """The new state alone; a memory overrides it where that costs less than the outputs."""
        return self(x, state, mask)[1]

    def _defaults(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the parameters where the caller names none."""
        parameter = next(self.parameters(), None)
        if parameter is None:
            return torch.device(device or "cpu"), dtype or torch.get_default_dtype()
        return torch.device(device or parameter.device), dtype or parameter.dtype
