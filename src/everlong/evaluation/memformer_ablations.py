"""Ablations of the Memformer's writer that the paper (arXiv 2010.06891 v2) names and does not
define, and what puts them in a trained or a fresh model.

B batch, N slots, S segment length, D hidden_size.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from everlong.ops import slots as slot_ops
from everlong.segments.memformer import SlotWriter
from everlong.stateful import Trace


class Discarding(nn.Module):
    """No slots: what is written is thrown away, and the slots are M_0 for ever."""

    def __init__(self, writer: SlotWriter):
        super().__init__()
        self.writer = writer

    def fresh(self, batch_size: int) -> Tensor:
        return self.writer.fresh(batch_size)

    def forward(
        self, slots: Tensor, hidden: Tensor, mask: Tensor | None = None, trace: Trace | None = None
    ) -> Tensor:
        return self.fresh(len(slots)).to(slots.dtype)


class Unforgetting(SlotWriter):
    """No forgetting: v = 0 in every write. M_0, which `writer` makes of v, is a parameter."""

    def __init__(self, writer: SlotWriter):
        with torch.random.fork_rng(devices=[]):
            super().__init__(writer.config)
        self.load_state_dict(writer.state_dict())
        self.start = self.bias
        del self.bias
        self.register_buffer("bias", torch.zeros_like(self.start))

    def fresh(self, batch_size: int) -> Tensor:
        start = self._exact(self.start)
        return slot_ops.normalise(torch.zeros_like(start), start).expand(batch_size, -1, -1)


def one_head(writer: SlotWriter) -> SlotWriter:
    """The slots are written by one head as wide as the model; the encoder's readers keep theirs."""
    writer.config = replace(writer.config, num_heads=1)
    return writer


def rewrite(model: Any, change: Callable[[SlotWriter], nn.Module]) -> None:
    """Puts another writer, made of the model's own, in its place."""
    body = cast(Any, model.body)
    body.writer = change(body.writer)
