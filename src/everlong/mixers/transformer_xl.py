"""Transformer-XL: attention to a cache of past inputs, with relative positions.

B batch, T time, D hidden_size, H heads, d = D / H, S segment length, M memory length, K keys.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong.mixers.attention import check_rate
from everlong.ops.adapted import weight_of
from everlong.ops.ragged import expand_like
from everlong.ops.relative import nearest, shift, sinusoid
from everlong.registry import register
from everlong.state import State
from everlong.stateful import Stateful, Trace

_LEAST_BLOCK = 64  # queries read in one go where segments are shorter: a question of speed only


@dataclass(frozen=True)
class TransformerXLConfig:
    """segment_length S and memory_length M (tokens); dropout on the attention weights.

    same_length: every query sees the last M tokens, itself included, and segments do not exist.
    """

    hidden_size: int
    num_heads: int
    segment_length: int = 256
    memory_length: int = 256
    same_length: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_widths(self.hidden_size, self.num_heads)
        check_rate(self.dropout)
        for name in ("segment_length", "memory_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 token, got {getattr(self, name)}")


def check_widths(hidden_size: int, num_heads: int) -> None:
    """`ValueError` unless hidden_size splits into heads, and into the halves of a sinusoid."""
    if num_heads < 1 or hidden_size < 1 or hidden_size % num_heads or hidden_size % 2:
        raise ValueError(
            f"hidden_size {hidden_size} must be even and a multiple of num_heads {num_heads}"
        )


class RelativeAttention(nn.Module):
    """Attention by content and distance (arXiv 1901.02860, section 3.3).

    The score of query i and key j is [(q_i + u) k_j + (q_i + v) W_r R_(i - j)] / sqrt(d), with R
    the sinusoid of a distance, u and v learned vectors a head. No biases in the maps.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self._scale = (hidden_size // num_heads) ** -0.5
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.distance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        u, v = (torch.empty(num_heads, 1, hidden_size // num_heads) for _ in range(2))
        self.content_bias = nn.Parameter(nn.init.normal_(u, std=0.02))
        self.distance_bias = nn.Parameter(nn.init.normal_(v, std=0.02))

    def forward(
        self, x: Tensor, before: Tensor, reach: Tensor, pieces: list[int] | None = None
    ) -> Tensor:
        """x [B, T, D] after `before` [B, P, D], place by place -> [B, T, D].

        Query i sees itself and the reach[b, i] (Int [B, T], of those there are) places before it.
        They are read in `pieces` (lengths; None: one); no query of a piece sees what its first does
        not, but for what lies between.
        """
        if x.shape[1] == 1 and not (self.training and self.dropout):
            return self._one(x, before, reach)
        pieces = pieces or [x.shape[1]]
        q = self._heads(self.query(x)).split(pieces, 2)
        kv = self.key_value(torch.cat([before.to(x.dtype), x], 1))
        kv = kv.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # rolled along, not sliced from the whole, whose gradient would cost its length each time
        window, *parts = kv.split([before.shape[1], *pieces], 3)
        reaches = reach.split(pieces, 1)
        furthest = torch.stack([part[:, 0].max() for part in reaches]).tolist()
        table = self._table(max(map(sum, zip(furthest, pieces, strict=True))), x.device)
        outputs = []
        for queries, part, far, seen in zip(q, parts, furthest, reaches, strict=True):
            window = torch.cat([window[..., max(0, window.shape[3] - far) :, :], part], 3)
            outputs.append(self._attend(queries, window[0], window[1], table, seen))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        return self.out(y.transpose(1, 2).flatten(2))

    def _one(self, x: Tensor, before: Tensor, reach: Tensor) -> Tensor:
        """`forward` of one query, [B, 1, D]: q (W x) is (q W) x, so that no place before it is
        projected, which would cost D / H times as much."""
        places = torch.cat([before.to(x.dtype), x], 1)
        count, width = places.shape[1:]
        q = self._heads(self.query(x)).transpose(0, 1).squeeze(2) * self._scale  # [H, B, d]
        keys, values = weight_of(self.key_value).unflatten(0, (2, self.num_heads, -1))
        distance = weight_of(self.distance).unflatten(0, (self.num_heads, -1))
        u, v = (b.to(q.dtype) * self._scale for b in (self.content_bias, self.distance_bias))
        by_content = ((q + u) @ keys).transpose(0, 1)  # [B, H, D]
        by_distance = ((q + v) @ distance).transpose(0, 1)
        table = nearest(count, width, x.dtype, x.device)
        scores = by_content @ places.mT + by_distance @ table.mT  # [B, H, K]
        seen = torch.arange(count - 1, -1, -1, device=x.device) <= reach[:, :1]
        weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        y = (weights.to(x.dtype) @ places).transpose(0, 1) @ values.mT  # [H, B, d]
        return self.out(y.transpose(0, 1).flatten(1)[:, None])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, reach: Tensor) -> Tensor:
        """q [B, H, T, d] at the last T of the K places of k and v [B, H, K, d]; table [1, H, d, at
        least K] ends at distance 0."""
        length, keys = q.shape[2], k.shape[2]
        by_distance = (q + self.distance_bias.to(q.dtype)) * self._scale
        scores = shift(by_distance @ table[..., table.shape[-1] - keys :])
        places = torch.arange(keys, device=q.device)
        distance = places[keys - length :, None] - places
        visible = (distance >= 0) & (distance <= reach[..., None])
        return F.scaled_dot_product_attention(
            q + self.content_bias.to(q.dtype),
            k,
            v,
            attn_mask=scores.masked_fill(~visible[:, None], float("-inf")),
            dropout_p=self.dropout if self.training else 0.0,
        )

    def _table(self, count: int, device: torch.device) -> Tensor:
        """W_r R of the distances count - 1 to 0: [1, H, d, count]."""
        weight = self.distance.weight
        distances = torch.arange(count - 1, -1, -1, device=device)
        table = self.distance(sinusoid(distances, weight.shape[1], weight.dtype))
        return self._heads(table[None]).transpose(-1, -2)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, d]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def push(fifo: Tensor, x: Tensor, lengths: Tensor | None) -> Tensor:
    """The last places of what `fifo` [B, R, D] and then x [B, T, D] hold; of x, row b has
    `lengths[b]` (None: all)."""
    size, length = fifo.shape[1], x.shape[1]
    x = x.to(fifo.dtype)
    if lengths is None:
        return torch.cat([fifo[:, length:], x[:, -size:]], 1)
    return rows_from(torch.cat([fifo, x], 1), lengths, size)


def rows_from(x: Tensor, start: Tensor, count: int) -> Tensor:
    """x[b, start[b] : start[b] + count] of x [B, T, D], start Int [B] -> [B, count, D]."""
    index = start[:, None] + torch.arange(count, device=x.device)
    return x.gather(1, expand_like(index, x).expand(-1, -1, x.shape[2]))


def cut(length: int, first: int, size: int) -> list[int]:
    """`length` in pieces: `first`, then `size` each, then what is left."""
    first = min(first, length)
    whole, rest = divmod(length - first, size)
    return [first, *[size] * whole, *[rest] * (rest > 0)]


@register(
    "transformer_xl",
    room="mixers",
    config=TransformerXLConfig,
    paper="Dai et al. 2019, arXiv 1901.02860",
    keeps="writes every input, keeps the last M before the segment, forgets the oldest",
    small={"segment_length": 4, "memory_length": 6},
)
class TransformerXL(Stateful):
    """Attention to the segment so far and to the M inputs before it (arXiv 1901.02860, section 3).

    With segments ending at multiples of S of stream positions, the query at position p sees the
    positions from S floor(p / S) - M (0 at least) to p. same_length: the last M positions, itself
    included (not M + 1), whatever the segment; `period` is then 1.

    *Written*: each position's input. *Kept*: the last M before the segment, as inputs: keys and
    values are made anew with every call, which trains their maps through old positions too.
    *Forgotten*: the oldest, first in, first out. Through L layers the first output of a segment
    that starts at s depends on the positions from s - L M, where S divides M, and on none before.

    State: past [B, M + S - 1, D] (same_length: M - 1, at least 1), the last inputs, the latest at
    the last place; position Int [B]. Time is linear in T: long calls are read in blocks.

    Deviations: nothing is detached (the published stop-gradient at the cache is `truncated` at 1
    segment); what is cached is the layer's input as the block normalised it, where the official
    pre-norm code normalises behind the cache: the same function, for norms are position by
    position; u and v per layer, not shared; no dropout on R, no clamp of distances. The model
    around it (norms, feed-forward, embedding) is ours.
    """

    def __init__(self, config: TransformerXLConfig):
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        self.period = 1 if config.same_length else config.segment_length
        self.attention = RelativeAttention(config.hidden_size, config.num_heads, config.dropout)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        places = max(1, self.config.memory_length + self.period - 1 - self.config.same_length)
        past = torch.zeros((), device=device, dtype=dtype)
        return {
            "past": past.expand(batch_size, places, self.config.hidden_size),
            "position": torch.zeros(batch_size, device=device, dtype=torch.long),
        }

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        past, position, length = state["past"], state["position"], x.shape[1]
        reach = self._reach(position[:, None] + torch.arange(length, device=x.device))
        held = int(reach[:, 0].max())  # no later query sees further back than the first
        y = self.attention(x, past[:, past.shape[1] - held :], reach, self._pieces(state, length))
        moved = length if lengths is None else lengths
        return y, {"past": push(past, x, lengths), "position": position + moved}

    def _pieces(self, state: State, length: int) -> list[int]:
        """The blocks a call is read in; they end where the first row's segments do."""
        size = self.config.memory_length if self.config.same_length else self.period
        size *= -(-_LEAST_BLOCK // size)
        return cut(length, size - int(state["position"][0]) % self.period, size)

    def _reach(self, steps: Tensor) -> Tensor:
        """How many positions before its own the query at each stream position sees."""
        memory = self.config.memory_length
        if self.config.same_length:
            return steps.clamp(max=memory - 1)
        return torch.minimum(steps, steps % self.period + memory)
