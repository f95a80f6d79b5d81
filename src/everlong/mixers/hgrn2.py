"""HGRN2: HGRN's gates over a matrix: what a key channel forgets is what is written to it.

B batch, T time, D hidden_size, H heads, K key_size, V value_size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong.mixers.hgrn import ForgetGate, check_layer
from everlong.mixers.linear import EPS, by_spans, check_sizes, normed, reference
from everlong.ops.delta import linear_attention
from everlong.registry import register
from everlong.state import State
from everlong.stateful import Stateful, Trace


@dataclass(frozen=True)
class HGRN2Config:
    """key_size, value_size: of a head; None: hidden_size // num_heads. layer_index of num_layers:
    where the floor of the forget gate starts, and whether there is one (not in the first layer); a
    model fills both in."""

    hidden_size: int
    num_heads: int
    key_size: int | None = None
    value_size: int | None = None
    layer_index: int = 0
    num_layers: int = 1

    def __post_init__(self) -> None:
        check_sizes(self)
        check_layer(self.layer_index, self.num_layers)


@register(
    "hgrn2",
    room="mixers",
    config=HGRN2Config,
    paper="Qin et al. 2024, arXiv 2404.07904",
    keeps="writes a value into each key channel as far as that channel forgets what it held",
    small={"key_size": 5, "value_size": 7},
)
class HGRN2(Stateful):
    """HGRN with a state expanded by outer products (arXiv 2404.07904, section 3). For each head,
    with f = b + (1 - b) sigmoid(Wf x), one a key channel:

        S = diag(f) S + (1 - f)^T v,  o = silu(Wq x) S / sqrt(K),  y = Wo RMSNorm(o)

    Keys are what the gates leave: k = 1 - f. *Written*: the value, into channels that forget.
    *Kept*: channels with f near 1; the floor b, higher in higher layers, keeps those long.
    *Forgotten*: a channel's row, exactly as far as it is written.

    State: memory [B, H, K, V] (float32 at least). The norm is over all heads.

    Deviation: each layer learns its floor for itself, from the start of the published curve over
    layers, which shares one table among them.
    """

    def __init__(self, config: HGRN2Config):
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self.config, self.hidden_size, self.num_heads = config, width, heads
        each = width // heads
        self.sizes = keys, values = config.key_size or each, config.value_size or each
        self.query, self.rate = (nn.Linear(width, heads * keys, bias=False) for _ in range(2))
        self.value = nn.Linear(width, heads * values, bias=False)
        self.forget = ForgetGate(heads * keys, config.layer_index, config.num_layers)
        self.norm = nn.RMSNorm(heads * values, eps=EPS)
        self.out = nn.Linear(heads * values, width, bias=False)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        zero = torch.zeros((), device=device, dtype=exact)
        return {"memory": zero.expand(batch_size, self.num_heads, *self.sizes)}

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        if trace is not None and trace.recording:
            with torch.no_grad():
                decay = self.forget(self.rate(x)).exp()
            trace.record("decay", decay.unflatten(-1, (self.num_heads, -1)))
        return by_spans(self._span, (x,), state, lengths)

    def _span(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        parts = F.silu(self.query(x)), self.forget(self.rate(x)), self.value(x)
        exact = state["memory"].dtype
        q, g, v = (part.to(exact).unflatten(-1, (self.num_heads, -1)) for part in parts)
        q, k = q * self.sizes[0] ** -0.5, -torch.expm1(g)
        o, memory = linear_attention(q, k, v, g, state["memory"], lengths=lengths)
        y = normed(self.norm, o.flatten(2), x)
        return self.out(y), {"memory": memory}

    def reference(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """What `forward` equals: position by position, by the operator's definition."""
        return reference(self, x, state, mask)
