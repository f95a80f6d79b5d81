"""Hierarchical Memory Transformer: one embedding a past segment, and the one that is needed now.

B batch, T time, D hidden_size, S segment length, N embeddings kept, k sensory tokens, j tokens
summarised.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from everlong.mixers.attention import check_heads
from everlong.registry import register
from everlong.segments.blocks import beginning, block_part, read_parts, token_part
from everlong.segments.clock import SegmentMemory, choose_rows
from everlong.segments.recall import Recall, push
from everlong.stack import Stack, StackConfig
from everlong.state import State
from everlong.stateful import Stateful, Trace

_PROTOCOLS = ("causal", "published")


@dataclass(frozen=True)
class HMTConfig:
    """segment_length S (tokens); recall_size N: segments remembered; recall_width: of queries and
    keys (None: hidden_size); sensory k: tokens of the last segment that are read again; summary:
    the fraction of a segment that picks what is recalled; protocol: "causal", or "published", which
    looks ahead inside a segment; recall=False: the last segment's embedding is handed over as it
    is, the paper's first training stage."""

    hidden_size: int
    num_heads: int
    segment_length: int = 256
    recall_size: int = 64
    recall_width: int | None = None
    sensory: int = 0
    summary: float = 0.5
    protocol: str = "causal"
    recall: bool = True

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_heads)
        for name in ("segment_length", "recall_size", "recall_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.sensory <= self.segment_length:
            raise ValueError(
                f"sensory is {self.sensory}: give a number of tokens from 0 to segment_length "
                f"{self.segment_length}"
            )
        if not 0 < self.summary <= 1:
            raise ValueError(
                f"summary is {self.summary}: give a fraction of a segment, at most 1 (for no "
                "recall, recall=False)"
            )
        if self.protocol not in _PROTOCOLS:
            raise ValueError(f"protocol is {self.protocol!r}: use one of {', '.join(_PROTOCOLS)}")

    @property
    def looks_ahead(self) -> bool:
        """Whether a prediction may depend, through what is recalled, on later tokens."""
        return self.recall and self.protocol == "published"

    @property
    def summary_length(self) -> int:
        """j: tokens that are summarised to pick what is recalled."""
        return max(1, round(self.summary * self.segment_length))

    @property
    def tail_length(self) -> int:
        """Last tokens of a segment that are kept: for its summary, and to be read again."""
        summarised = self.summary_length if self.recall and not self.looks_ahead else 0
        return max(summarised, self.sensory)


@register(
    "hmt",
    room="segments",
    config=HMTConfig,
    paper="He et al. 2025, arXiv 2405.06067",
    keeps="writes one embedding a finished segment, keeps the last N of them unchanged, forgets "
    "the oldest; a segment reads the mix of them that a summary picks",
    small={"segment_length": 4, "recall_size": 3, "sensory": 1},
)
class HMT(SegmentMemory):
    """The Hierarchical Memory Transformer of arXiv 2405.06067 (section 3), around any causal core.

    A segment X is read as [P ; sensory ; X ; P]: P what is recalled, sensory the last k tokens of
    the segment before. The core's final hidden state at the last P is the segment's embedding; the
    last N are kept as they are (long-term memory). P of the next segment is a convex mix of them
    (`Recall`), picked by the summary s = the core's last output on [T ; j tokens ; T], T learned,
    read by a fresh core state. The first segment reads a learned embedding as P, and no sensory
    tokens.

    protocol="causal", ours: s is of the last j tokens of the segment that has just ended. No
    prediction depends on a later token. protocol="published": s is of the first j tokens of the
    segment that begins, as far as the call that begins it brings them. P then depends on tokens
    that are still to be predicted, if only in which past segments it mixes; the answer depends on
    where calls begin, and generation, which brings one token a call, is not what was trained.
    Perplexities of the two do not compare: `config.looks_ahead` says which one is at hand.

    recall=False hands the embedding over as the next P: RMT with one memory token, and sensory.

    State: layers (the core's, wiped at boundaries), position Int [B], segment: recalled P [B, D]
    and cache [B, N, D] (float32 at least; segment n at place n mod N; none without recall), tail
    [B, max(j, k), D]: the last inputs of the segment, at their places in it (none where nobody
    needs one). Trace: "recall" [B, N], the weights by place, zero in rows that recalled nothing.

    Deviations: scores are divided by sqrt(recall_width) always (the official code sometimes by its
    square); segment_length counts stream tokens alone; no detach, no retrieval loss, no dynamic
    reading. The summary's core call is not traced.

    `core` is any Stateful [B, T, D] -> [B, T, D] that can read S + k + 2 positions between two
    wipes; without one, a single causal attention block.
    """

    def __init__(self, config: HMTConfig, core: Stateful | None = None):
        super().__init__()
        if core is None:
            core = self.make_core(config, StackConfig(config.hidden_size, config.num_heads))
        self.config, self.hidden_size = config, config.hidden_size
        self.period, self.core = config.segment_length, core
        width = config.hidden_size
        self.memory = nn.Parameter(torch.randn(1, width) * width**-0.5)
        if config.recall:
            self.prompt = nn.Parameter(torch.randn(1, width) * width**-0.5)
            self.recall = Recall(width, config.recall_width or width)

    @classmethod
    def make_core(cls, config: HMTConfig, stack: StackConfig) -> Stack:
        return Stack(replace(stack, capacity=config.segment_length + config.sensory + 2))

    def learned_tokens(self) -> list[Tensor]:
        return [self.memory, self.prompt] if self.config.recall else [self.memory]

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        memory = self.memory.to(device, torch.promote_types(dtype, torch.float32))
        width, tail = self.config.hidden_size, self.config.tail_length
        segment = {"recalled": memory.repeat(batch_size, 1)}
        if self.config.recall:
            shape = (batch_size, self.config.recall_size, width)
            segment["cache"] = memory.new_zeros(()).expand(shape)
        if tail:
            empty = torch.zeros((), device=device, dtype=dtype)
            segment["tail"] = empty.expand(batch_size, tail, width)
        return {
            "layers": self.core.init_state(batch_size, device=device, dtype=dtype),
            "position": torch.zeros(batch_size, device=device, dtype=torch.long),
            "segment": segment,
        }

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        if not self.config.looks_ahead:
            return super().run(x, state, lengths, trace)
        # a span sees no further than the next boundary of any row, a summary as far as the call
        call = {"inputs": x, "began": state["position"], "lengths": lengths}
        y, state = super().run(x, {**state, "call": call}, lengths, trace)
        return y, {name: value for name, value in state.items() if name != "call"}

    def span(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        full: Tensor | None,
        trace: Trace | None,
    ) -> tuple[Tensor, State]:
        begins = beginning(state, self.period, lengths)
        again = begins & (state["position"] >= self.period)  # rows with a segment behind them
        segment = state["segment"]
        if self.config.looks_ahead and bool(again.any()):
            segment = self._recall_ahead(segment, state, again, trace)
        recalled = segment["recalled"][:, None]
        parts = [block_part(recalled, begins, x)]
        if self.config.sensory:
            parts.append(block_part(segment["tail"][:, -self.config.sensory :], again, x))
        parts += [token_part(x, lengths), block_part(recalled, full, x)]
        (*_, y, written), layers = read_parts(self.core, state["layers"], parts, trace)
        if "tail" in segment:
            segment = {**segment, "tail": self._add_tail(segment["tail"], x, state, lengths)}
        if full is not None:
            written = written[:, 0].to(recalled.dtype)
            segment = choose_rows(full, self._close(segment, written, state, full, trace), segment)
            layers = self.core.reset(layers, full)
        return y, {**state, "layers": layers, "segment": segment}

    def _close(
        self, segment: State, written: Tensor, state: State, full: Tensor, trace: Trace | None
    ) -> State:
        """The segment part of the state behind a boundary, for the rows that are full."""
        new = {"recalled": written}
        if self.config.recall:
            count = state["position"] // self.period
            cache = push(segment["cache"], written, count)
            if trace is not None and trace.recording:
                places = torch.arange(cache.shape[1], device=cache.device)
                trace.record("kept", (places != count[:, None] % len(places)).to(cache.dtype))
            found = torch.zeros_like(written)  # not known before the next segment's tokens are
            if not self.config.looks_ahead:
                tokens = segment["tail"][:, -self.config.summary_length :]
                found = self._recall(tokens, None, full, cache, count + 1, trace)
            new = {"recalled": found, "cache": cache}
        if "tail" in segment:
            tail, sensory = segment["tail"], self.config.sensory
            empty = tail.new_zeros(()).expand_as(tail)
            kept = [empty[:, sensory:], tail[:, tail.shape[1] - sensory :]]
            new["tail"] = torch.cat(kept, 1) if sensory else empty
        return new

    def _recall(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        rows: Tensor,
        cache: Tensor,
        count: Tensor,
        trace: Trace | None,
    ) -> Tensor:
        """P [B, D] by a summary of tokens [B, j, D] (mask Bool [B, j]), meant for `rows` alone."""
        prompt = self.prompt.expand(tokens.shape[0], 1, -1)
        read = rows[:, None].expand(tokens.shape[:2])
        parts = [
            block_part(prompt, rows, tokens),
            (tokens, read if mask is None else read & mask),
            block_part(prompt, rows, tokens),
        ]
        layers = self.core.init_state(tokens.shape[0], device=tokens.device)
        (*_, summary), _ = read_parts(self.core, layers, parts, None)
        found, weights = self.recall(summary[:, 0], cache, count)
        if trace is not None:
            trace.record("recall", weights * rows[:, None])
        return found

    def _recall_ahead(
        self, segment: State, state: State, again: Tensor, trace: Trace | None
    ) -> State:
        """Published protocol: P by the first j tokens that this call brings of a new segment."""
        call, position = state["call"], state["position"]
        x, lengths = call["inputs"], call["lengths"]
        start = (position - call["began"])[:, None]  # of the segment, in the call
        places = start + torch.arange(self.config.summary_length, device=x.device)
        inside = places < (x.shape[1] if lengths is None else lengths[:, None])
        index = places.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2])
        count = (position // self.period).clamp(min=1)
        found = self._recall(x.gather(1, index), inside, again, segment["cache"], count, trace)
        return {**segment, "recalled": torch.where(again[:, None], found, segment["recalled"])}

    def _add_tail(self, tail: Tensor, x: Tensor, state: State, lengths: Tensor | None) -> Tensor:
        """The tokens of x that stand among the last of their segment, put at their places there.

        A row that begins a segment has read its old tail, which goes.
        """
        inside = state["position"][:, None] % self.period
        begins = beginning(state, self.period, lengths)
        tail = torch.where(begins[:, None, None], tail.new_zeros(()), tail)
        places = torch.arange(tail.shape[1], device=x.device) + self.period - tail.shape[1]
        source = places - inside  # where in x the token of a place of the tail is
        length = x.shape[1] if lengths is None else lengths[:, None]
        index = source.clamp(0, x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2])
        fresh = ((source >= 0) & (source < length))[..., None]
        return torch.where(fresh, x.gather(1, index).to(tail.dtype), tail)
