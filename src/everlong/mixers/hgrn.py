"""HGRN: one gated number a channel, whose forget gate has a floor that rises with depth.

B batch, T time, D hidden_size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong.mixers.linear import EPS, check_sizes, normed, reference
from everlong.ops.scan import scan
from everlong.registry import register
from everlong.state import State
from everlong.stateful import Stateful, Trace


@dataclass(frozen=True)
class HGRNConfig:
    """layer_index of num_layers: where the floor of the forget gate starts, and whether there is
    one (not in the first layer); a model fills both in. num_heads has no use: there are no
    matrices."""

    hidden_size: int
    num_heads: int
    layer_index: int = 0
    num_layers: int = 1

    def __post_init__(self) -> None:
        check_sizes(self)
        check_layer(self.layer_index, self.num_layers)


def check_layer(layer_index: int, num_layers: int) -> None:
    """`ValueError` unless there is such a layer."""
    if not 0 <= layer_index < num_layers:
        raise ValueError(
            f"layer_index {layer_index} of num_layers {num_layers}: count layers from 0"
        )


class ForgetGate(nn.Module):
    """Log forget gates log(b + (1 - b) sigmoid(f)), whose floor b is learned, one a channel.

    b starts at layer_index / num_layers: the published curve, a running sum of softmax over layers,
    at its start. The first layer has none.
    """

    def __init__(self, width: int, layer_index: int, num_layers: int):
        super().__init__()
        share = layer_index / num_layers
        start = torch.full((width,), math.log(share / (1 - share))) if layer_index else None
        self.floor = nn.Parameter(start) if start is not None else None

    def forward(self, f: Tensor) -> Tensor:
        """f [..., D] -> [..., D], float32 at least."""
        g = F.logsigmoid(f.to(torch.promote_types(f.dtype, torch.float32)))
        if self.floor is None:
            return g
        floor = self.floor.to(g.dtype)
        return torch.logaddexp(F.logsigmoid(floor), F.logsigmoid(-floor) + g)


@register(
    "hgrn",
    room="mixers",
    config=HGRNConfig,
    paper="Qin et al. 2023, arXiv 2311.04823",
    keeps="writes one gated number a channel; each channel fades as far as its forget gate opens",
)
class HGRN(Stateful):
    """The hierarchically gated recurrent network (arXiv 2311.04823, section 3). A channel:

        f = b + (1 - b) sigmoid(Wf x),  h = f h + (1 - f) silu(Wi x),
        y = Wo (RMSNorm(h) * silu(Wg x))

    *Written*: at every position, what its forget gate leaves room for. *Kept*: channels with f near
    1; the floor b, higher in higher layers, keeps those long. *Forgotten*: the rest, channel by
    channel: there is no key.

    State: memory [B, D] (float32 at least, 0 in a fresh row).

    Deviations: real, not complex numbers, and the output gate behind a norm, as in later codes;
    each layer learns its floor for itself, from the start of the published curve over layers,
    which shares one table among them.
    """

    def __init__(self, config: HGRNConfig):
        super().__init__()
        width = config.hidden_size
        self.config, self.hidden_size = config, width
        self.input, self.rate, self.gate, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.forget = ForgetGate(width, config.layer_index, config.num_layers)
        self.norm = nn.RMSNorm(width, eps=EPS)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        zero = torch.zeros((), device=device, dtype=exact)
        return {"memory": zero.expand(batch_size, self.config.hidden_size)}

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        g = self.forget(self.rate(x))
        if trace is not None and trace.recording:
            trace.record("decay", g.exp()[:, :, None])
        written = -torch.expm1(g) * F.silu(self.input(x))
        h, memory = scan(g.exp(), written, state["memory"], lengths)
        y = normed(self.norm, h, x) * F.silu(self.gate(x))
        return self.out(y), {"memory": memory}

    def reference(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """What `forward` equals: position by position."""
        return reference(self, x, state, mask)
