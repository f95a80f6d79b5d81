"""Recurrent Memory Transformer: memory tokens in front of a segment, and again behind it.

B batch, T time, D hidden_size, S segment length, m memory tokens, R past memories kept.
"""

from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong.mixers.attention import check_heads
from everlong.registry import memory_entry, register
from everlong.segments.blocks import beginning, block_part, read_parts, token_part
from everlong.segments.clock import SegmentMemory, choose_rows
from everlong.segments.recall import Retrieval, push
from everlong.stack import Stack, StackConfig
from everlong.state import State
from everlong.stateful import Stateful, Trace

_MASKS = ("causal", "paper")


@dataclass(frozen=True)
class RMTConfig:
    """segment_length S (tokens) and num_slots m; mask: "causal" for every position, or "paper":
    memory tokens of one block see each other; retrieval (RMT-R): how many past memories are kept
    for the memory tokens to look up, 0 for none."""

    hidden_size: int
    num_heads: int
    segment_length: int = 256
    num_slots: int = 16
    mask: str = "causal"
    retrieval: int = 0

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_heads)
        for name in ("segment_length", "num_slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mask not in _MASKS:
            raise ValueError(f"mask is {self.mask!r}: use one of {', '.join(_MASKS)}")
        if self.retrieval < 0:
            raise ValueError(f"retrieval must be 0 or more past memories, got {self.retrieval}")

    @property
    def capacity(self) -> int:
        """Positions the core reads in a segment: the read block, the tokens, the write block."""
        return self.segment_length + (3 if self.retrieval else 2) * self.num_slots


@register(
    "rmt",
    room="segments",
    config=RMTConfig,
    paper="Bulatov et al. 2022, arXiv 2207.06881",
    keeps="writes each finished segment into m memory tokens, keeps what the core copies from "
    "token to token, forgets what it does not",
    small={"segment_length": 4, "num_slots": 2},
)
class RMT(SegmentMemory):
    """The decoder form of arXiv 2207.06881 (section 3, equations 1 to 3), around any causal core.

    A segment X is read as [mem ; X ; mem]: a read block that the tokens see and a write block that
    sees them. The core's final hidden states at the write block are the next segment's mem; its own
    state is wiped at the boundary. Nothing is forgotten on purpose: what the core does not carry
    over at the write block is gone.

    Lazily: the read block is read with a segment's first token, the write block with its last, and
    a state at a boundary is mem alone. mask="paper": memory tokens of a block see each other, for
    cores whose run takes `mutual` (attention layers); with "causal" only those before them.

    retrieval=R is RMT-R (arXiv 2402.10790): the read block is [mem ; r], r looked up by `Retrieval`
    in mem and the R memories before it.

    State: layers (the core's), position Int [B], segment: memory [B, m, D] (float32 at least), with
    retrieval also past [B, R, m, D], the memory that segment n read at place n mod R. Deviations:
    rotary relative positions, RMS norms; fresh memory tokens are normal with the decoder's standard
    deviation of embeddings, 1 / sqrt(D); the past of RMT-R is bounded.

    `core` is any Stateful [B, T, D] -> [B, T, D] that can read config.capacity positions between
    two wipes; without one, a single causal attention block.
    """

    def __init__(self, config: RMTConfig, core: Stateful | None = None):
        super().__init__()
        if core is None:
            core = self.make_core(config, StackConfig(config.hidden_size, config.num_heads))
        if config.mask == "paper" and not _takes_mutual(core):
            raise ValueError(
                'mask="paper" lets memory tokens see each other, which only attention layers can: '
                'give the core "attention" layers or use mask="causal"'
            )
        self.config, self.hidden_size = config, config.hidden_size
        self.period, self.core = config.segment_length, core
        start = torch.randn(config.num_slots, config.hidden_size) * config.hidden_size**-0.5
        self.memory = nn.Parameter(start)
        self.retrieval = Retrieval(config.hidden_size) if config.retrieval else None

    @classmethod
    def make_core(cls, config: RMTConfig, stack: StackConfig) -> Stack:
        return Stack(replace(stack, capacity=config.capacity))

    def learned_tokens(self) -> list[Tensor]:
        return [self.memory]

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        memory = self.memory.to(device, torch.promote_types(dtype, torch.float32))
        segment = {"memory": memory.repeat(batch_size, 1, 1)}
        if self.config.retrieval:
            shape = (batch_size, self.config.retrieval, *memory.shape)
            segment["past"] = memory.new_zeros(()).expand(shape)
        return {
            "layers": self.core.init_state(batch_size, device=device, dtype=dtype),
            "position": torch.zeros(batch_size, device=device, dtype=torch.long),
            "segment": segment,
        }

    def span(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        full: Tensor | None,
        trace: Trace | None,
    ) -> tuple[Tensor, State]:
        if full is None and all(place % self.period for place in state["position"].tolist()):
            y, layers = self.core(x, state["layers"], trace=trace, lengths=lengths)
            return y, {**state, "layers": layers}  # tokens alone
        segment, count = state["segment"], state["position"] // self.period
        memory, begins = segment["memory"], beginning(state, self.period, lengths)
        read = memory
        if self.retrieval is not None and bool(begins.any()):
            found = self.retrieval(memory, segment["past"], count, trace)
            read = torch.cat([memory, found.to(memory.dtype)], 1)
        parts = [
            block_part(read, begins, x),
            token_part(x, lengths),
            block_part(memory, full, x),
        ]
        (_, y, written), layers = self._read(parts, state["layers"], trace)
        if full is not None:
            new = {"memory": written.to(memory.dtype, copy=True)}
            if trace is not None and trace.recording:
                # no gate says it: the share of the new token that lies along the old one
                alike = F.cosine_similarity(new["memory"], memory, dim=-1)
                trace.record("kept", alike.square())
            if self.retrieval is not None:
                new["past"] = push(segment["past"], memory, count)
            segment = choose_rows(full, new, segment)
            layers = self.core.reset(layers, full)
        return y, {**state, "layers": layers, "segment": segment}

    def _read(self, parts: Any, layers: State, trace: Trace | None) -> tuple[list[Tensor], State]:
        if self.config.mask == "causal":
            return read_parts(self.core, layers, parts, trace)
        outputs = []
        for part, inputs in zip(parts, ({"mutual": True}, {}, {"mutual": True}), strict=True):
            y, layers = read_parts(self.core, layers, [part], trace, **inputs)
            outputs += y
        return outputs, layers


def _takes_mutual(core: Stateful) -> bool:
    """Whether positions of one call of the core may see each other."""
    if isinstance(core, Stack):
        runs = [memory_entry(name).cls.run for name in core.config.layers]
    else:
        runs = [core.run]
    return all("mutual" in signature(run).parameters for run in runs)
