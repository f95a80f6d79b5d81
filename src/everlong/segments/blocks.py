"""Memory tokens around a segment: what RMT and HMT put in front of and behind the tokens.

B batch, n positions of a part, D hidden_size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from everlong.ops.ragged import valid_positions
from everlong.state import State
from everlong.stateful import Stateful, Trace

Part = tuple[Tensor, Tensor | None]  # [B, n, D] and which positions are real: Bool [B, n], or all


def token_part(x: Tensor, lengths: Tensor | None) -> Part:
    """The tokens of a call: x [B, n, D], of row b the first `lengths[b]`."""
    return x, None if lengths is None else valid_positions(lengths, x.shape[1])


def block_part(block: Tensor, rows: Tensor | None, x: Tensor) -> Part:
    """A block [B, n, D] that the rows Bool [B] read whole (None: no row), in the dtype of x."""
    if rows is None:
        rows = torch.zeros(block.shape[0], dtype=torch.bool, device=block.device)
    return block.to(x.dtype), rows[:, None].expand(-1, block.shape[1])


def beginning(state: State, period: int, lengths: Tensor | None) -> Tensor:
    """Bool [B]: rows whose segment begins with the first token of this span."""
    begins = state["position"] % period == 0
    return begins if lengths is None else begins & (lengths > 0)


def read_parts(
    core: Stateful, layers: State, parts: Sequence[Part], trace: Trace | None, **inputs: Any
) -> tuple[list[Tensor], State]:
    """Read the parts, in order, in one call of the core: an output [B, n, D] a part, and its state.

    Positions that are not real are removed from their row; their outputs are 0. A part that no row
    reads costs nothing.
    """
    read = [mask is None or bool(mask.any()) for _, mask in parts]
    wanted = [part for part, is_read in zip(parts, read, strict=True) if is_read]
    if not wanted:
        return [torch.zeros_like(x) for x, _ in parts], layers
    x = torch.cat([x for x, _ in wanted], 1)
    mask = None
    if any(mask is not None for _, mask in wanted):
        masks = [x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m for x, m in wanted]
        mask = torch.cat(masks, 1)
    y, layers = core(x, layers, mask, trace, **inputs)
    found = iter(y.split([x.shape[1] for x, _ in wanted], 1))
    return [
        next(found) if is_read else torch.zeros_like(x)
        for (x, _), is_read in zip(parts, read, strict=True)
    ], layers
