"""Full causal attention: the unbounded control every bounded memory is measured against.

B batch, T time, D hidden_size, H heads, d = D / H, C places of the cache, N tokens of a prefix.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong.ops import rotary
from everlong.ops.ragged import common_value, write_at
from everlong.registry import register
from everlong.state import State, pad_length
from everlong.stateful import Stateful, Trace

Prefix = tuple[Tensor, Tensor]  # keys and values [B or 1, N, H, d] that every query sees


@dataclass(frozen=True)
class AttentionConfig:
    """hidden_size and num_heads; dropout on the attention weights; capacity (tokens): a cache of
    fixed size for streams known to end, such as a segment. None lets the cache grow."""

    hidden_size: int
    num_heads: int
    dropout: float = 0.0
    capacity: int | None = None

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_heads)
        check_rate(self.dropout)
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"capacity must be at least 1 token, got {self.capacity}")


def check_heads(hidden_size: int, num_heads: int) -> None:
    """`ValueError` unless hidden_size splits into heads of even width (rotary pairs)."""
    if num_heads < 1 or hidden_size < 1 or hidden_size % (2 * num_heads):
        raise ValueError(
            f"hidden_size {hidden_size} must be a multiple of 2 * num_heads = {2 * num_heads}: "
            "rotary positions turn pairs inside each head"
        )


def check_rate(dropout: float) -> None:
    """`ValueError` unless dropout is a probability below 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")


class SelfAttention(nn.Module):
    """The projections attention mixers share, with rotary positions and scaled dot products."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def empty_cache(
        self, batch_size: int, places: int, device: torch.device, dtype: torch.dtype
    ) -> State:
        """Keys and values [B, places, H, d] and the clock of fresh streams.

        The places share one zero in memory: empty caches cost a replay buffer nothing.
        """
        shape = (batch_size, places, self.num_heads, self.out.in_features // self.num_heads)
        empty = torch.zeros((), device=device, dtype=dtype).expand(shape)
        position = torch.zeros(batch_size, device=device, dtype=torch.long)
        return {"keys": empty, "values": empty, "position": position}

    def project(
        self, x: Tensor, position: Tensor, wide: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> queries, keys (both turned by their positions) and values [B, T, H, d].

        `wide` queries [B, T, H, 2 d] are followed by themselves as they were before the turn: what
        a prefix is met with.
        """
        heads = self.num_heads
        qkv = self.qkv(x).unflatten(-1, (3 * heads, -1))
        cos, sin = rotary.angles(position, x.shape[1], qkv.shape[-1], 10_000.0, qkv.dtype)
        q, k, v = rotary.turn(qkv, heads, cos, sin)
        return torch.cat([q, qkv[:, :, :heads]], -1) if wide else q, k, v

    def prefix(self, tokens: Tensor) -> Prefix:
        """Keys and values of tokens [B or 1, N, D] that have no position: they are as near to every
        query as the query itself."""
        _, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return k, v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool = False,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """q [B, T, H, d], k and v [B, K, H, d], mask Bool [B or 1, T, K] -> [B, T, D].

        With a `prefix` queries are `wide`, and see all of it beside what the mask shows them.
        """
        scale = None
        if prefix is not None:
            scale = k.shape[-1] ** -0.5
            if mask is None:
                mask = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
                mask = mask.tril() if causal else mask
            k, v, mask, causal = *_behind(prefix, k, v, mask), False
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2).to(q.dtype),
            v.transpose(1, 2).to(q.dtype),
            attn_mask=None if mask is None else mask[:, None],
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            scale=scale,
        )
        return self.out(y.transpose(1, 2).flatten(2))


def _behind(prefix: Prefix, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [B, N + K, H, 2 d], values and mask with the prefix before them: keys meet the first
    half of a wide query, those of the prefix the second."""
    keys, values = (part.to(k.dtype).expand(k.shape[0], -1, -1, -1) for part in prefix)
    width = k.shape[-1]
    k = torch.cat([F.pad(keys, (width, 0)), F.pad(k, (0, width))], 1)
    return k, torch.cat([values, v], 1), F.pad(mask, (keys.shape[1], 0), value=True)


@register(
    "attention",
    room="mixers",
    config=AttentionConfig,
    paper="Vaswani et al. 2017, arXiv 1706.03762",
    keeps="writes every key and value, keeps all of them, forgets nothing: the state grows",
    bounded=False,
)
class Attention(Stateful):
    """Softmax attention over everything read so far (arXiv 1706.03762, eq. 1), rotary positions.

    State: keys and values [B, C, H, d], key of stream position p at place p, and the clock
    position [B]. C is the longest row so far (at least 1), or `capacity`; a stream longer than
    `capacity` raises `ValueError`. Deviation from the paper: rotary instead of added positions, no
    biases.
    """

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        self.attention = SelfAttention(config.hidden_size, config.num_heads, config.dropout)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        return self.attention.empty_cache(batch_size, self.config.capacity or 1, device, dtype)

    def run(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        trace: Trace | None,
        mutual: bool = False,
    ) -> tuple[Tensor, State]:
        """`mutual=True`: the positions of this call also see those of it that come later."""
        position, length = state["position"], x.shape[1]
        after = position + (length if lengths is None else lengths)
        place = common_value(position)
        ragged = lengths is not None or place is None
        total = int(after.max()) if ragged else int(place or 0) + length
        if self.config.capacity is not None and total > self.config.capacity:
            raise ValueError(
                f"the stream is {total} tokens long and this attention holds "
                f"{self.config.capacity}: raise capacity, or use sliding_attention"
            )
        q, k, v = self.attention.project(x, position)
        keys, values = state["keys"], state["values"]
        if ragged:  # else the new ones are put behind them as they are
            keys, values = pad_length(keys, total), pad_length(values, total)
        keys = write_at(keys, k, position, lengths)
        values = write_at(values, v, position, lengths)
        if mutual:
            mask = torch.arange(total, device=x.device) < after[:, None]
            mask = mask[:, None].expand(-1, length, -1)
            y = self.attention.attend(q, keys[:, :total], values[:, :total], mask)
        elif place == 0:
            y = self.attention.attend(q, k, v, None, causal=True)
        else:
            mask = None
            if length > 1 or place is None:
                clock = position if place is None else position[:1]
                steps = clock[:, None] + torch.arange(length, device=x.device)
                mask = torch.arange(total, device=x.device) <= steps[..., None]
            y = self.attention.attend(q, keys[:, :total], values[:, :total], mask)
        return y, {"keys": keys, "values": values, "position": after}
