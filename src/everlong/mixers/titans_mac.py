"""Titans, memory as a context: attention within a segment, beside what a memory says of it.

B batch, T time, D hidden_size, H heads, d = D / H, N num_persistent, S segment_length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from everlong import state as states
from everlong.mixers.attention import SelfAttention
from everlong.mixers.persistent import Gate, Joined, JoinedConfig, rows
from everlong.ops.ragged import write_at
from everlong.ops.spans import Span, spans
from everlong.registry import register
from everlong.state import State, pad_length
from everlong.stateful import Trace


@dataclass(frozen=True)
class TitansMACConfig(JoinedConfig):
    """segment_length: tokens that attention sees at most, a multiple of the memory's chunk_size;
    num_persistent: learned tokens in front of every segment, 0: none; memory: options of the titans
    memory (num_heads as above, unless it has its own); dropout on the attention weights."""

    segment_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment_length < 1:
            raise ValueError(f"segment_length must be at least 1 token, got {self.segment_length}")
        chunk = self.memory_config().chunk_size
        if self.segment_length % chunk:
            raise ValueError(
                f"segment_length {self.segment_length} is no multiple of the memory's chunk_size "
                f"{chunk}: change one of them (memory.chunk_size); where a segment "
                "begins, the memory must have nothing left to write"
            )


@register(
    "titans_mac",
    room="mixers",
    config=TitansMACConfig,
    paper="Behrouz et al. 2025, arXiv 2501.00663",
    keeps="a memory trained on what attention made of each segment, and the segment so far",
    small={
        "segment_length": 8,
        "num_persistent": 2,
        "memory": {"chunk_size": 4, "expansion": 2},
    },
)
class TitansMAC(Joined):
    """Memory as a context (arXiv 2501.00663, section 4.1). Segments end at multiples of S of stream
    positions; M_0 is the memory at the start of a token's segment, M_t at the token itself:

        h_t = M_0(q(s_t)), read alone,
        y_t = attention of s_t to all of P, and to h_j and s_j of its segment with j <= t,
        M_t is M_{t-1} written with y_t,
        o_t = Wo (sigma(norm(y_t)) * norm(M_t(y_t)))

    *Written*: what attention made of every token, into M; h and s, into the segment. *Kept*: what M
    keeps (`titans`); the segment; P, which are parameters. *Forgotten*: as M forgets; at its end
    the whole segment. What is older reaches a token through M alone.

    State: memory, that of M; start, the weights of M at the segment's start; keys and values
    [B, S, 2, H, d] of h and s so far, place p mod S of stream position p, zeros behind it; position
    Int [B].

    Deviations: read as published, h_j for j > t is seen by token t, and o_t is made by M at the
    segment's end: both leak the segment's rest into its beginning. Here h is masked as s is, and
    M_t is the memory at the token (as far as its chunk lets it, `titans`). The form that leaks is
    not built. The paper leaves the product in o open: the gate of `titans_mag`. Rotary positions
    from the segment's start, the same for h_t as for s_t, none for P; the map Wo.
    """

    def __init__(self, config: TitansMACConfig):
        super().__init__(config)
        self.period = config.segment_length
        self.attention = SelfAttention(config.hidden_size, config.num_heads, config.dropout)
        self.gate = Gate(config.hidden_size)
        self.state_shapes = states.shapes(self.init_state(1))

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        memory = self.memory.init_state(1, device=device, dtype=dtype)
        device, dtype = self._defaults(device, dtype)
        cache = self.attention.empty_cache(batch_size, self.period, device, dtype)
        position = cache.pop("position")
        pairs = {name: leaf[:, :, None].expand(-1, -1, 2, -1, -1) for name, leaf in cache.items()}
        learned = {"memory": memory, "start": memory["weights"]}
        return {**rows(learned, batch_size), **pairs, "position": position}

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        outputs = []
        for span in spans(state["position"], x.shape[1], lengths, self.period):
            y, state = self._span(x[:, span.start : span.stop], state, span, trace)
            outputs.append(y)
        y = torch.cat(outputs, 1) if outputs else torch.zeros_like(x)
        return pad_length(y, x.shape[1]), state

    def _span(
        self, x: Tensor, state: State, span: Span, trace: Trace | None
    ) -> tuple[Tensor, State]:
        y, cache = self._attend(x, state, span.lengths)
        m, memory = self.memory(y, state["memory"], None, trace, lengths=span.lengths)
        moved = x.shape[1] if span.lengths is None else span.lengths
        new = {**state, **cache, "memory": memory, "position": state["position"] + moved}
        if span.full is not None:
            ended = {name: torch.zeros_like(leaf) for name, leaf in cache.items()}
            ended = {**new, **ended, "start": memory["weights"]}
            new = ended if bool(span.full.all()) else states.where(span.full, ended, new)
        return self.gate(y, m), new

    def _attend(
        self, x: Tensor, state: State, lengths: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [B, n, D] to P and to the segment so far, itself included: y [B, n, D], and the keys
        and values with those of x."""
        place, length = state["position"] % self.period, x.shape[1]
        prefix = None if self.tokens is None else self.attention.prefix(self.tokens)
        q, *own = self.attention.project(x, place, wide=prefix is not None)
        _, *told = self.attention.project(self.memory.recall(x, state["start"]), place)
        pairs = (torch.stack(pair, 2) for pair in zip(told, own, strict=True))
        keys, values = (
            write_at(state[name], pair, place, lengths)
            for name, pair in zip(("keys", "values"), pairs, strict=True)
        )
        total = min(self.period, int(place.max()) + length)
        places = torch.arange(total, device=x.device).repeat_interleave(2)
        mask = places <= place[:, None, None] + torch.arange(length, device=x.device)[:, None]
        seen = keys[:, :total].flatten(1, 2), values[:, :total].flatten(1, 2)
        return self.attention.attend(q, *seen, mask, prefix=prefix), {
            "keys": keys,
            "values": values,
        }
