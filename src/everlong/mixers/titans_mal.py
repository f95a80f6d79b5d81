"""Titans, memory as a layer: a sliding attention reads what a neural memory gives.

B batch, T time, D hidden_size, H heads, d = D / H, N num_persistent, W window.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from everlong.mixers.linear import EPS, normed
from everlong.mixers.persistent import WindowConfig, Windowed, rows
from everlong.registry import register
from everlong.state import State
from everlong.stateful import Trace


@dataclass(frozen=True)
class TitansMALConfig(WindowConfig):
    """window: tokens that a query sees besides the persistent ones, itself included;
    num_persistent: learned tokens at the stream's front, 0: none; memory: options of the titans
    memory (num_heads as above, unless it has its own); dropout on the attention weights."""


@register(
    "titans_mal",
    room="mixers",
    config=TitansMALConfig,
    paper="Behrouz et al. 2025, arXiv 2501.00663",
    keeps="a memory trained as it reads, and attention to what it gave at the last `window` tokens",
    small={
        "window": 5,
        "num_persistent": 3,
        "memory": {"chunk_size": 4, "expansion": 2, "max_surprise": 0.5},
    },
)
class TitansMAL(Windowed):
    """Memory as a layer (arXiv 2501.00663, section 4.3). With persistent tokens P,

        m = norm(M([P || x])),  o = attention of m to its window and to m at all of P

    *Written*: every input, into M; what M gives there, into the window. *Kept*: what M keeps
    (`titans`); the last W keys and values; those of P. *Forgotten*: as M forgets; the oldest of the
    window; P never. M has read P before a stream's first token, so its chunks end where N plus the
    stream position is a multiple of its chunk_size.

    State: memory, that of M; attention, that of `sliding_attention`; prefix, the keys and values
    at P, [B, N, H, d] both, the same in every row (none where N is 0).

    Deviations: the norm between the two layers (an RMSNorm, as a block has before any layer);
    rotary positions in the window, none for P.
    """

    def __init__(self, config: TitansMALConfig):
        super().__init__(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=EPS)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        state, read = self.fresh(batch_size, device, dtype)
        if read is not None:
            prefix = self.attention.attention.prefix(normed(self.norm, read, read))
            cache = state["attention"]["keys"].dtype
            state["prefix"] = rows(tuple(part.to(cache) for part in prefix), batch_size)
        return state

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        m, memory = self.memory(x, state["memory"], None, trace, lengths=lengths)
        y, attention = self.attention(
            normed(self.norm, m, m),
            state["attention"],
            None,
            trace,
            lengths=lengths,
            prefix=state.get("prefix"),
        )
        return y, {**state, "memory": memory, "attention": attention}
