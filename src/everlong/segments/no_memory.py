"""No memory: each segment is read alone. The control that says what a segment memory is worth.

B batch, T time, D hidden_size, S segment length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from everlong.mixers.attention import check_heads
from everlong.registry import register
from everlong.segments.clock import SegmentMemory
from everlong.stack import StackConfig
from everlong.state import State
from everlong.stateful import Stateful, Trace


@dataclass(frozen=True)
class NoMemoryConfig:
    """segment_length S: the core's state is wiped every S tokens."""

    hidden_size: int
    num_heads: int
    segment_length: int = 256

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_heads)
        if self.segment_length < 1:
            raise ValueError(f"segment_length must be at least 1, got {self.segment_length}")


@register(
    "no_memory",
    room="segments",
    config=NoMemoryConfig,
    paper="the vanilla model of Dai et al. 2019, arXiv 1901.02860, section 3.1",
    keeps="writes nothing; keeps the unfinished segment in the core's state; forgets it whole at "
    "its end",
    small={"segment_length": 4},
)
class NoMemory(SegmentMemory):
    """A stack that starts anew at every segment boundary: the memory-less control.

    State: layers (the core's, wiped at boundaries) and position Int [B]. `core` is any Stateful
    [B, T, D] -> [B, T, D] whose state keeps its size for S tokens (attention: with a capacity);
    without one, a single causal attention block.
    """

    def __init__(self, config: NoMemoryConfig, core: Stateful | None = None):
        super().__init__()
        if core is None:
            core = self.make_core(config, StackConfig(config.hidden_size, config.num_heads))
        self.config, self.hidden_size = config, config.hidden_size
        self.period, self.core = config.segment_length, core

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        return {
            "layers": self.core.init_state(batch_size, device=device, dtype=dtype),
            "position": torch.zeros(batch_size, device=device, dtype=torch.long),
        }

    def span(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        full: Tensor | None,
        trace: Trace | None,
    ) -> tuple[Tensor, State]:
        y, layers = self.core(x, state["layers"], trace=trace, lengths=lengths)
        if full is not None:
            layers = self.core.reset(layers, full)
        return y, {**state, "layers": layers}
