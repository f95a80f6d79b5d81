"""What is kept of past segments, one entry each, and cross attention into it: HMT and RMT-R.

B batch, R entries kept, m rows of an entry, D width, Q queries, K keys, d their width.
"""

import torch
from torch import Tensor, nn

from everlong.ops.ragged import valid_positions, write_ring
from everlong.stack import FeedForward
from everlong.stateful import Trace


def push(past: Tensor, entry: Tensor, count: Tensor) -> Tensor:
    """The entry [B, ...] of segment `count` Int [B] into a ring [B, R, ...]: the oldest gives way.

    Segment n stands at place n mod R.
    """
    return write_ring(past, entry[:, None], count, None)


def held(count: Tensor, size: int) -> Tensor:
    """Bool [B, size]: places of a ring that hold something after `count` Int [B] entries."""
    return valid_positions(count.clamp(max=size), size)


def attend(q: Tensor, k: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention with one head, in float32 at least: mixed values [B, Q, D] and weights.

    q [B, Q, d], k [B, K, d], values [B, K, D]; mask Bool [B, K] says which keys there are, at least
    one a row; weights [B, Q, K].
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(exact) @ k.to(exact).transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return weights @ values.to(exact), weights


class Retrieval(nn.Module):
    """RMT-R (arXiv 2402.10790): memory tokens look up those of past segments.

    q = Wq LN(mem_t); K, V from LN of all; r = Wo softmax(q K^T / sqrt(D)) V + mem_t;
    r + MLP(LN(r)). Deviation: the MLP is SwiGLU, as everywhere here.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.feed_norm = nn.LayerNorm(hidden_size)
        self.feed_forward = FeedForward(hidden_size, -(-8 * hidden_size // 96) * 32)

    def forward(
        self, memory: Tensor, past: Tensor, count: Tensor, trace: Trace | None = None
    ) -> Tensor:
        """memory [B, m, D] and the ring past [B, R, m, D], of whose segments `count` Int [B] are
        over -> r [B, m, D]; independent of autocast."""
        size, slots = past.shape[1:3]
        mask = held(count, size).repeat_interleave(slots, 1)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], slots)], 1)
        with torch.autocast(memory.device.type, enabled=False):
            rows = torch.cat([past.flatten(1, 2), memory], 1).to(self.out.weight.dtype)
            rows = self.norm(rows)
            k, v = self.key_value(rows).chunk(2, -1)
            mixed, weights = attend(self.query(rows[:, -slots:]), k, v, mask)
            if trace is not None:
                trace.record("recall", weights)
            found = self.out(mixed.to(v.dtype)) + memory.to(v.dtype)
            return found + self.feed_forward(self.feed_norm(found))


class Recall(nn.Module):
    """HMT's memory recall (arXiv 2405.06067): a mix of past memory embeddings, picked by a summary.

    P = softmax((s Wq)(M Wk)^T / sqrt(d)) M over the entries M there are: no value projection, so P
    lies between them.
    """

    def __init__(self, hidden_size: int, recall_width: int):
        super().__init__()
        self.query = nn.Linear(hidden_size, recall_width, bias=False)
        self.key = nn.Linear(hidden_size, recall_width, bias=False)

    def forward(self, summary: Tensor, past: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """summary [B, D], the ring past [B, R, D] after `count` Int [B] segments (at least 1) -> P
        [B, D] and the weights [B, R]; independent of autocast."""
        with torch.autocast(past.device.type, enabled=False):
            dtype = self.query.weight.dtype
            q, k = self.query(summary.to(dtype)[:, None]), self.key(past.to(dtype))
            found, weights = attend(q, k, past, held(count, past.shape[1]))
        return found[:, 0].to(past.dtype), weights[:, 0]
