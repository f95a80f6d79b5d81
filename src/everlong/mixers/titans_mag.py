"""Titans, memory as a gate: a sliding attention and a neural memory side by side.

B batch, T time, D hidden_size, N num_persistent, W window.
"""

from dataclasses import dataclass

from torch import Tensor

from everlong.mixers.persistent import Gate, WindowConfig, Windowed
from everlong.registry import register
from everlong.state import State
from everlong.stateful import Trace


@dataclass(frozen=True)
class TitansMAGConfig(WindowConfig):
    """window: tokens that a query sees besides the persistent ones, itself included;
    num_persistent: learned tokens at the stream's front, 0: none; memory: options of the titans
    memory (num_heads as above, unless it has its own); dropout on the attention weights."""


@register(
    "titans_mag",
    room="mixers",
    config=TitansMAGConfig,
    paper="Behrouz et al. 2025, arXiv 2501.00663",
    keeps="a memory trained as it reads, gated by attention to the last `window` tokens",
    small={"window": 5, "num_persistent": 3, "memory": {"chunk_size": 4, "expansion": 2}},
)
class TitansMAG(Windowed):
    """Memory as a gate (arXiv 2501.00663, section 4.2). With persistent tokens P and x~ = [P || x],

        y = attention of x to its window and to all of P,  m = M(x~),
        o = Wo (sigma(norm(y)) * norm(m))

    *Written*: every input, into M and into the window. *Kept*: what M keeps (`titans`); the last W
    keys and values; P, which are parameters. *Forgotten*: as M forgets; the oldest of the window.
    M has read P before a stream's first token, so its chunks end where N plus the stream position
    is a multiple of its chunk_size.

    State: memory, that of M; attention, that of `sliding_attention` without P.

    Deviations: the paper leaves the gate open ("normalised by learnable vectors, then a
    non-linearity"): here two RMSNorms and a sigmoid on the attention's branch; rotary positions in
    the window, none for P; the map Wo.
    """

    def __init__(self, config: TitansMAGConfig):
        super().__init__(config)
        self.gate = Gate(config.hidden_size)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        return self.fresh(batch_size, device, dtype)[0]

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        prefix = None if self.tokens is None else self.attention.attention.prefix(self.tokens)
        y, attention = self.attention(
            x, state["attention"], None, trace, lengths=lengths, prefix=prefix
        )
        m, memory = self.memory(x, state["memory"], None, trace, lengths=lengths)
        return self.gate(y, m), {"memory": memory, "attention": attention}
