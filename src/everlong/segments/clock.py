"""The segment clock: one loop that every segment-level memory shares, so that any cut is one cut.

B batch, T time, S segment length.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from everlong import state as states
from everlong.ops.spans import spans
from everlong.stack import Stack, StackConfig
from everlong.state import State, pad_length
from everlong.stateful import Stateful, Trace


class SegmentMemory(Stateful):
    """A memory that is written when a row has delivered a whole segment.

    The state holds `position`, the stream position Int [B]. Segments end at its multiples of
    `period`, whatever the calls are. A call is cut into spans that end at the next boundary of any
    row. A memory reads one in `span`, and does there the work of the rows that fill a segment with
    it (eager: in the call that delivers the segment's last token).
    """

    @classmethod
    def make_core(cls, config: Any, stack: StackConfig) -> Stateful:
        """The core of this memory for a model whose layers are those of `stack`.

        A memory overrides it to say how many positions its core reads between two wipes
        (`capacity`), or what its layers are besides.
        """
        return Stack(replace(stack, capacity=config.segment_length))

    def learned_tokens(self) -> list[Tensor]:
        """Parameters [n, D] that the core reads as it reads embeddings.

        They start normal with the standard deviation of our decoder's embeddings, 1 / sqrt(D);
        around a pretrained decoder, with that of its own.
        """
        return []

    def span(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        full: Tensor | None,
        trace: Trace | None,
    ) -> tuple[Tensor, State]:
        """Read x [B, n, ...], which crosses no boundary of any row, before the clock moves.

        Rows `full` (Bool [B]; None: no row) fill their segment with x[:, -1]: write them.
        """
        raise NotImplementedError

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        outputs = []
        for start, stop, inside, full in spans(state["position"], x.shape[1], lengths, self.period):
            position, moved = state["position"], stop - start if inside is None else inside
            y, state = self.span(x[:, start:stop], state, inside, full, trace)
            state = {**state, "position": position + moved}
            outputs.append(y)
        if not outputs:  # every row is masked throughout
            y, _ = self.span(x[:, :1], state, torch.zeros_like(state["position"]), None, None)
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return pad_length(y, x.shape[1]), state


def choose_rows(rows: Tensor, a: State, b: State) -> State:
    """`state.where`, without the copy when every row is chosen."""
    return a if bool(rows.all()) else states.where(rows, a, b)
