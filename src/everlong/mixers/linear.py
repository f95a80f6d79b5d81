"""What the linear-attention layers share: one matrix a head, written by outer products.

B batch, T time, D hidden_size, H heads, K key_size and V value_size (of a head), W conv_size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong import state as states
from everlong.ops import norm
from everlong.ops.delta import delta_rule, linear_attention
from everlong.ops.gated import gated
from everlong.ops.shortconv import short_convolution
from everlong.state import State
from everlong.stateful import Stateful, Trace

EPS = 1e-6  # inside every norm
READ = 1 << 19  # numbers that a layer reads at once on a CPU


def check_sizes(config: Any, **least: int) -> None:
    """`ValueError` unless every size is at least 1 (or what `least` says of it); None is a size
    that is left to the memory."""
    sizes = {"hidden_size": 1, "num_heads": 1, "key_size": 1, "value_size": 1, **least}
    for name, bound in sizes.items():
        value = getattr(config, name, None)
        if value is not None and value < bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")
    if config.hidden_size < config.num_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is too small for num_heads {config.num_heads}: "
            "each head is at least 1 wide"
        )
    if getattr(config, "conv_size", 0) == 1:
        raise ValueError("conv_size is 1: give 0 for no convolution, or at least 2 positions")


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1, float32 at least; a small eps keeps those near 0 finite."""
    return norm.unit(x.to(torch.promote_types(x.dtype, torch.float32)), EPS)


def normed(layer: nn.RMSNorm, o: Tensor, x: Tensor) -> Tensor:
    """What was read, float32 at least, through its norm in that precision, in the dtype of x."""
    assert layer.eps is not None
    return norm.rms_norm(o, layer.weight.to(o.dtype), layer.eps).to(x.dtype)


def reference(
    memory: Stateful,
    x: Tensor,
    state: State | None = None,
    mask: Tensor | None = None,
    read: Callable[[Tensor, State], tuple[Tensor, State]] | None = None,
) -> tuple[Tensor, State]:
    """The step form: one position a call, which the operators read by their definition (or `read`
    does); a masked position leaves its row as it was."""
    state = memory.init_state(x.shape[0]) if state is None else state
    real = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    outputs = []
    for here, x_t in zip(real.unbind(1), x.split(1, 1), strict=True):
        x_t = torch.where(here[:, None, None], x_t, 0)
        y, after = memory.run(x_t, state, None, None) if read is None else read(x_t, state)
        state = states.where(here, after, state)
        outputs.append(torch.where(here[:, None, None], y, 0))
    return torch.cat(outputs, 1), state


def by_spans(
    read: Callable[..., tuple[Tensor, State]],
    rows: Sequence[Tensor],
    state: State,
    lengths: Tensor | None,
) -> tuple[Tensor, State]:
    """`read(*rows, state, lengths)` for rows [B, T, ...], of which the first is x [B, T, D]; on a
    CPU READ numbers of x at a time, but 64 positions at least.

    The same result: larger buffers are taken from the system and given back every time there, page
    by page, which costs up to two thirds of what is computed in them.
    """
    batch, length, width = rows[0].shape
    span = max(1, READ // max(1, 64 * batch * width)) * 64
    if length <= span or rows[0].device.type != "cpu":
        return read(*rows, state, lengths)
    outputs, start = [], 0
    for part in zip(*(row.split(span, 1) for row in rows), strict=True):
        length = part[0].shape[1]
        left = None if lengths is None else (lengths - start).clamp(0, length)
        y, state = read(*part, state, left)
        outputs.append(y)
        start += length
    return torch.cat(outputs, 1), state


class ShortConvolution(nn.Module):
    """`ops.shortconv` with its weights [D, W], initialised as torch's convolutions; then SiLU."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, size).uniform_(-1, 1) / math.sqrt(size))

    def tail(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The inputs before a fresh stream: zeros [B, W - 1, D]."""
        width, size = self.weight.shape
        return torch.zeros((), device=device, dtype=dtype).expand(batch_size, size - 1, width)

    def forward(self, x: Tensor, tail: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        y, after = short_convolution(x, self.weight, tail, lengths=lengths)
        return F.silu(y), after.to(tail.dtype)


class DecayGate(nn.Module):
    """Log decays g = -exp(A_log) softplus(a + dt_bias), of Mamba2 (arXiv 2405.21060), one a head or
    a channel: near 0 at the start. Neither parameter has weight decay."""

    def __init__(self, num_heads: int, channels: int | None = None, least: float = 1e-3):
        super().__init__()
        self.channels = channels  # of a head; None: one decay a head
        dt = torch.empty(num_heads, channels or 1).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(least, 16).log())
        self.dt_bias = nn.Parameter((dt + torch.log(-torch.expm1(-dt))).flatten())  # softplus^-1

    def forward(self, a: Tensor) -> Tensor:
        """a [..., H * channels] -> g [..., H] or [..., H, channels], float32 at least."""
        exact = torch.promote_types(self.A_log.dtype, torch.float32)
        rate = F.softplus(a.to(exact) + self.dt_bias.to(exact))
        if self.channels is None:
            return -self.A_log.to(exact).exp() * rate
        return -self.A_log.to(exact).exp()[:, None] * rate.unflatten(-1, (-1, self.channels))


class LinearMixer(Stateful):
    """One matrix S [K, V] a head, decayed and written at every position, read by a query.

    A subclass says what its queries, keys and values are (`vectors`), its log decay (`decay`) and
    the strength of its delta rule (`strength`; None: plain sums). Outputs o = q S / sqrt(K) pass a
    norm of each head, a gate where there is one, and the output map.

    State: memory [B, H, K, V] (float32 at least, 0 in a fresh row); with a convolution its last
    inputs, tail [B, W - 1, H (2 K + V)].
    """

    def __init__(
        self, config: Any, key_size: int, value_size: int, *, conv_size: int = 0, gate: bool = True
    ):
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self.config, self.hidden_size, self.num_heads = config, width, heads
        self.sizes = key_size, value_size
        total = heads * (2 * key_size + value_size)
        self.qkv = nn.Linear(width, total, bias=False)
        self.convolution = ShortConvolution(total, conv_size) if conv_size else None
        self.norm = nn.RMSNorm(value_size, eps=EPS)
        self.gate = nn.Linear(width, heads * value_size, bias=False) if gate else None
        self.out = nn.Linear(heads * value_size, width, bias=False)

    def vectors(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, ...]:
        """What is read with and written, from the projections [B, T, H, K or V]."""
        return q, k, v

    def decay(self, x: Tensor) -> Tensor:
        """The log decay g <= 0, [B, T, H] or [B, T, H, K]; none by default."""
        return x.new_zeros(*x.shape[:2], self.num_heads)

    def strength(self, x: Tensor) -> Tensor | None:
        """beta [B, T, H] of the delta rule, or None."""
        return None

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """o [B, T, H, V], float32 at least -> [B, T, D]."""
        y = normed(self.norm, o, x).flatten(2)
        return self.out(y if self.gate is None else gated(self.gate(x), y))

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        memory = torch.zeros((), device=device, dtype=exact)
        state = {"memory": memory.expand(batch_size, self.num_heads, *self.sizes)}
        if self.convolution is not None:
            state["tail"] = self.convolution.tail(batch_size, device, dtype)
        return state

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        if trace is not None and trace.recording:
            self._tell(trace, x)
        return by_spans(self._span, (x,), state, lengths)

    @torch.no_grad()
    def _tell(self, trace: Trace, x: Tensor) -> None:
        trace.record("decay", self.decay(x).exp())
        strength = self.strength(x)
        if strength is not None:
            trace.record("strength", strength)

    def _span(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        qkv, after = self.qkv(x), dict(state)
        if self.convolution is not None:
            qkv, after["tail"] = self.convolution(qkv, state["tail"], lengths)
        key, value = (self.num_heads * size for size in self.sizes)
        parts = (
            part.unflatten(-1, (self.num_heads, -1)) for part in qkv.split([key, key, value], -1)
        )
        q, k, v = (part.to(state["memory"].dtype) for part in parts)
        q, k, v = self.vectors(q, k, v, state)
        q, g, beta = q * self.sizes[0] ** -0.5, self.decay(x), self.strength(x)
        if beta is None:
            o, after["memory"] = linear_attention(q, k, v, g, state["memory"], lengths=lengths)
        else:
            o, after["memory"] = delta_rule(q, k, v, g, beta, state["memory"], lengths=lengths)
        if "position" in after:
            after["position"] = state["position"] + (x.shape[1] if lengths is None else lengths)
        return self.finish(o, x), after

    def reference(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """What `forward` equals: position by position, by the operator's definition."""
        return reference(self, x, state, mask)


@dataclass(frozen=True)
class DeltaConfig:
    """key_size, value_size: of a head, None: the memory's own. conv_size: positions that the
    convolution before queries, keys and values sees; 0: none. negative_eigenvalues: a correction
    may go beyond the new value, which counting and state tracking need."""

    hidden_size: int
    num_heads: int
    key_size: int | None = None
    value_size: int | None = None
    conv_size: int = 4
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, conv_size=0)


class DeltaMixer(LinearMixer):
    """Written by the delta rule: queries and keys of length 1, and beta = sigmoid(Wb x), twice that
    with `negative_eigenvalues` (arXiv 2411.12537)."""

    config: DeltaConfig

    def __init__(self, config: DeltaConfig, key_size: int, value_size: int, *, gate: bool = True):
        super().__init__(config, key_size, value_size, conv_size=config.conv_size, gate=gate)
        self.beta = nn.Linear(config.hidden_size, config.num_heads, bias=False)

    def vectors(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, ...]:
        return unit(q), unit(k), v

    def strength(self, x: Tensor) -> Tensor | None:
        return self.beta(x).sigmoid() * (2 if self.config.negative_eigenvalues else 1)
