"""Sliding-window attention: the bounded control that remembers the last `window` tokens.

B batch, T time, D hidden_size, H heads, d = D / H, W window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from everlong import state as states
from everlong.mixers.attention import Prefix, SelfAttention, check_heads, check_rate
from everlong.ops.ragged import common_value, write_ring
from everlong.registry import register
from everlong.state import State
from everlong.stateful import Stateful, Trace

_LEAST_BLOCK = 64  # queries read in one go when the window is smaller: a question of speed only


@dataclass(frozen=True)
class SlidingAttentionConfig:
    """window: tokens a query sees, itself included; dropout on the attention weights."""

    hidden_size: int
    num_heads: int
    window: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_heads)
        check_rate(self.dropout)
        if self.window < 1:
            raise ValueError(f"window must be at least 1 token, got {self.window}")


@register(
    "sliding_attention",
    room="mixers",
    config=SlidingAttentionConfig,
    paper="Beltagy et al. 2020, arXiv 2004.05150",
    keeps="writes every key and value, keeps the last `window` of them, forgets the oldest",
    small={"window": 5},
)
class SlidingAttention(Stateful):
    """Causal softmax attention of each query to the last `window` tokens (arXiv 2004.05150, 3.1).

    State: rings keys and values [B, W, H, d] with stream position p at place p mod W, and the
    clock position [B]. Time is linear in T: long calls are read in blocks.
    """

    def __init__(self, config: SlidingAttentionConfig):
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        self.attention = SelfAttention(config.hidden_size, config.num_heads, config.dropout)
        self.state_shapes = states.shapes(self.init_state(1))

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        return self.attention.empty_cache(batch_size, self.config.window, device, dtype)

    def run(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        trace: Trace | None,
        prefix: Prefix | None = None,
    ) -> tuple[Tensor, State]:
        """`prefix`: keys and values that every query sees besides its window
        (`SelfAttention.prefix`)."""
        block, outputs = max(self.config.window, _LEAST_BLOCK), []
        for start in range(0, x.shape[1], block):
            piece = x[:, start : start + block]
            inside = None
            if lengths is not None:
                inside = (lengths - start).clamp(0, piece.shape[1])
            y, state = self._read(piece, state, inside, prefix)
            outputs.append(y)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state

    def _read(
        self, x: Tensor, state: State, lengths: Tensor | None, prefix: Prefix | None
    ) -> tuple[Tensor, State]:
        position, length, window = state["position"], x.shape[1], self.config.window
        q, k, v = self.attention.project(x, position, wide=prefix is not None)
        new_state = {
            "keys": write_ring(state["keys"], k, position, lengths),
            "values": write_ring(state["values"], v, position, lengths),
            "position": position + (length if lengths is None else lengths),
        }
        if length == 1 and (first := common_value(position)) is not None:
            held = min(first + 1, window)  # the ring holds what a single token sees, and no more
            keys, values = (new_state[name][:, :held] for name in ("keys", "values"))
            return self.attention.attend(q, keys, values, None, prefix=prefix), new_state
        if not bool(position.any()) and length <= window:
            return self.attention.attend(q, k, v, None, True, prefix), new_state
        clock = position[:1] if bool((position == position[0]).all()) else position
        index = torch.arange(length, device=x.device)
        near = (index <= index[:, None]) & (index > index[:, None] - window)
        # place j of the ring holds the last position before the call that is j modulo W
        place = torch.arange(window, device=x.device)
        held = clock[:, None] - 1 - (clock[:, None] - 1 - place) % window
        steps = clock[:, None] + index
        far = (held >= 0)[:, None] & (held[:, None] > steps[..., None] - window)
        mask = torch.cat([far, near.expand(far.shape[0], -1, -1)], 2)
        keys, values = torch.cat([state["keys"], k], 1), torch.cat([state["values"], v], 1)
        return self.attention.attend(q, keys, values, mask, prefix=prefix), new_state
