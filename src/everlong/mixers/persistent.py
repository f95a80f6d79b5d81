"""What the three architectures that join a neural memory to attention share: the memory itself,
persistent tokens, and the gate between two branches.

B batch, T time, D hidden_size, N num_persistent, W window.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from everlong import registry
from everlong import state as states
from everlong.mixers.attention import check_heads, check_rate
from everlong.mixers.linear import EPS, normed
from everlong.mixers.sliding_attention import SlidingAttention, SlidingAttentionConfig
from everlong.state import State
from everlong.stateful import Stateful

MEMORY = "titans"  # the memory that is joined; `memory` holds its options


@dataclass(frozen=True)
class JoinedConfig:
    """num_persistent: learned tokens at the stream's front, 0: none; memory: options of the titans
    memory (num_heads as above, unless it has its own); dropout on the attention weights."""

    hidden_size: int
    num_heads: int
    num_persistent: int = 4
    memory: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_heads)
        check_rate(self.dropout)
        if self.num_persistent < 0:
            raise ValueError(
                f"num_persistent is {self.num_persistent}: give tokens, or 0 for none of them"
            )
        if not isinstance(self.memory, Mapping) or not all(isinstance(k, str) for k in self.memory):
            raise ValueError(
                f"memory must be a table of options of {MEMORY}, such as "
                f"chunk_size = 16, got {self.memory!r}"
            )
        if self.memory.get("hidden_size", self.hidden_size) != self.hidden_size:
            raise ValueError("memory: hidden_size is that of the layer, leave it out")
        self.memory_config()

    def memory_config(self) -> Any:
        """The memory's own, with the sizes of the layer."""
        sizes = {"hidden_size": self.hidden_size, "num_heads": self.num_heads}
        return registry.build_config(registry.memory_entry(MEMORY), {**sizes, **self.memory})


@dataclass(frozen=True)
class WindowConfig(JoinedConfig):
    """window: tokens that a query sees besides the persistent ones, itself included."""

    window: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.attention_config()

    def attention_config(self) -> SlidingAttentionConfig:
        return SlidingAttentionConfig(self.hidden_size, self.num_heads, self.window, self.dropout)


class Joined(Stateful):
    """A neural memory beside, before or behind an attention, and learned tokens P that a stream
    begins with: `persistent` [N, D], or None."""

    def __init__(self, config: JoinedConfig):
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        self.memory = registry.memory_entry(MEMORY).cls(config.memory_config())
        tokens = torch.randn(config.num_persistent, config.hidden_size) * config.hidden_size**-0.5
        self.persistent = nn.Parameter(tokens) if config.num_persistent else None

    @property
    def tokens(self) -> Tensor | None:
        """P as a row of a batch, [1, N, D]."""
        return None if self.persistent is None else self.persistent[None]


class Windowed(Joined):
    """Whose attention slides and whose memory reads P once, before the stream."""

    def __init__(self, config: WindowConfig):
        super().__init__(config)
        self.attention = SlidingAttention(config.attention_config())
        self.period = self.memory.period  # its chunks end where N_p + position is a multiple

    def fresh(
        self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> tuple[State, Tensor | None]:
        """The state of rows that have read P, and what the memory gave there, [1, N, D]. The rows
        share it in memory."""
        memory, read = self.memory.init_state(1, device=device, dtype=dtype), None
        if self.tokens is not None:
            read, memory = self.memory(self.tokens, memory)
        attention = self.attention.init_state(batch_size, device=device, dtype=dtype)
        return {"memory": rows(memory, batch_size), "attention": attention}, read


def rows(state: State, batch_size: int) -> State:
    """A state of one row as that of `batch_size` rows, which share it in memory."""
    return states.tree_map(lambda leaf: leaf.expand(batch_size, *leaf.shape[1:]), state)


class Gate(nn.Module):
    """sigma(norm(a)) * norm(b) of two branches [B, T, D], and a map of the result: both norms have
    learned weights (arXiv 2501.00663, section 4.2)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.gate = nn.RMSNorm(hidden_size, eps=EPS)
        self.value = nn.RMSNorm(hidden_size, eps=EPS)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(normed(self.gate, a, a).sigmoid() * normed(self.value, b, b))
