"""Miras: a memory that learns its stream while it reads it, put together from four choices.

B batch, T time, D hidden_size, H heads, K key_size, V value_size, F features of a key, C
chunk_size, W window, P = W + C - 2 places of an unfinished chunk.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong import state as states
from everlong.mixers.linear import (
    EPS,
    ShortConvolution,
    by_spans,
    check_sizes,
    normed,
    reference,
    unit,
)
from everlong.ops.adapted import weight_of
from everlong.ops.biases import BIASES, LEVELLED
from everlong.ops.block import Inner
from everlong.ops.dual import Call, Pairs, dual, dual_reference, network
from everlong.ops.explicit import explicit, one, orthogonal, scaled
from everlong.ops.features import polynomial, polynomial_size
from everlong.ops.gated import gated
from everlong.ops.grid import Grid
from everlong.ops.retention import RETENTIONS, Retention
from everlong.ops.schedule import Gates, lags
from everlong.registry import check_choice, register
from everlong.state import State
from everlong.stateful import Stateful, Trace

ALGORITHMS = ("gd", "momentum", "muon")
_KEPT = 7.0  # bias of the gate that keeps, .999 a position: at .99 two layers fade to 0 for good
_SPREAD = 0.01  # under the root of LayerNorm: without it small outputs are steered ever faster
_MOST_FEATURES = 20_000  # of a key
_RANK = 32  # of the map to one step size a channel


@dataclass(frozen=True)
class MirasConfig:
    """Architecture: depth matrices (1: a linear map) with hidden layers of expansion * key_size;
    residual adds the key to the output, through a learned map where values are wider or narrower;
    norm puts a LayerNorm on what is added. degree: of the
    polynomial features of keys and queries, of key_size each. key_size, value_size: of a head,
    None: hidden_size // num_heads.

    bias: what is learned from an error (docs: the list), with exponent p for "lp". retention: how
    the old is kept: "none", "l2" (a decay the input sets), "softmax", "lq" and "lq_dual" (of norm
    power q), "elastic" (threshold). algorithm: "gd", "momentum", or "muon" every `every` positions.
    window: pairs that each step learns from. chunk_size: positions whose gradients are taken at the
    same weights; part of the function, not a question of speed. step_size: the most a pair's gate
    gives; channel_steps: one a channel of values, not one a head. decay_first: the error of a pair
    is that of the memory as it has faded by then. max_surprise: longer gradients of a pair, with
    its channels' steps in them, are shortened to this length. conv_size: positions the convolutions
    see; 0: none. gate: of the output. unit_keys: keys and queries have length 1."""

    hidden_size: int
    num_heads: int
    key_size: int | None = None
    value_size: int | None = None
    depth: int = 2
    expansion: int = 4
    residual: bool = True
    norm: bool = False
    degree: int = 1
    bias: str = "l2"
    exponent: float = 3.0
    retention: str = "l2"
    power: float = 4.0
    threshold: float = 0.01
    algorithm: str = "gd"
    every: int | None = None
    window: int = 1
    chunk_size: int = 16
    step_size: float = 0.1
    channel_steps: bool = False
    decay_first: bool = False
    max_surprise: float | None = None
    conv_size: int = 4
    gate: bool = True
    unit_keys: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, conv_size=0, depth=1, expansion=1, degree=1, window=1, chunk_size=1)
        check_choice("bias", self.bias, [*BIASES, "dot"])
        check_choice("retention", self.retention, RETENTIONS)
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        for name in ("step_size", "exponent", "power", "max_surprise"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: give a number above 0")
        linear = self.depth == 1 and self.window == 1
        if self.decay_first and not (linear and self.retention == "l2" and self.bias != "dot"):
            raise ValueError(
                "decay_first is for a linear memory that fades and sees an error: give depth=1, "
                'window=1, retention="l2" and a bias that is not "dot"'
            )
        if self.every is not None and self.algorithm != "muon":
            raise ValueError('every is for algorithm="muon": leave it out')
        if self.every is not None and (self.every < 1 or self.chunk_size % self.every):
            raise ValueError(
                f"every is {self.every}: give a divisor of chunk_size = {self.chunk_size}"
            )
        if self.retention not in ("none", "l2") and self.algorithm != "gd":
            raise ValueError(f'retention "{self.retention}" goes with algorithm="gd" alone')
        if (size := polynomial_size(self.key_width, self.degree)) > _MOST_FEATURES:
            raise ValueError(
                f"degree {self.degree} of keys of width {self.key_width} makes {size:,} features, "
                f"more than {_MOST_FEATURES:,}: give a smaller key_size or degree"
            )
        self.kept.check()

    @property
    def key_width(self) -> int:
        return self.key_size or self.hidden_size // self.num_heads

    @property
    def value_width(self) -> int:
        return self.value_size or self.hidden_size // self.num_heads

    @property
    def kept(self) -> Retention:
        return Retention(self.retention, self.power, self.threshold)


@register(
    "miras",
    room="mixers",
    config=MirasConfig,
    paper="Behrouz et al. 2025, arXiv 2504.13173",
    keeps="trains a small network on its pairs while it reads; what fades, and how, is chosen",
    small={"chunk_size": 4, "expansion": 2},
)
class Miras(Stateful):
    """A network M a head whose weights are the memory (arXiv 2504.13173, section 3). With q, k, v
    behind a short convolution and SiLU, q and k of length 1, every position takes a step against
    the gradient of an inner loss, the attentional bias, of M(k) against v, and M(q) is read:

        u_t = grad loss(M; k_t, v_t),  M_t = keep_t M_{t-1} - step_t u_t,  o_t = M_t(q_t),
        y = Wo (RMSNorm(o) * silu(Wg x)), the norm of each head

    ("gd" with "l2" retention; with momentum S_t = slow_t S_{t-1} + step_t u_t is what is taken
    away). Within a chunk of C positions all gradients are taken at the weights it starts from; the
    recurrence is exact (eq. 9, and Titans, arXiv 2501.00663, section 3.2). A window's step learns
    from the last W pairs, each with a gate of its own (arXiv 2505.23735, eq. 9). Other retentions
    accumulate A_t like M_t above and read weights W(A_t): see `everlong.ops.retention`.

    *Written*: what M does not yet say of each pair. *Kept*: the rest of M, as far as keep is near
    1. *Forgotten*: what like keys held; all, at the rate the input sets.

    Gates are sigmoids of Wx + b, one a head: keep starts near .999, momentum at .5, steps at half
    of step_size / W. Weights of M at a stream's start are learned, one a head. **Weights of two
    layers that have faded to 0 never learn again** (each layer's gradient needs the other's).

    State: weights and, with momentum, momenta, a tuple of [B, H, I, O] a layer, as they were at
    the last boundary of chunks; what the unfinished chunk learns from, keys [B, P, H, K], values
    [B, P, H, V], gates [B, P, H, ...]; the convolution's last inputs, tail; position Int [B]. All
    float32 at least but the tail.

    Deviations: decay and momentum are one a head, and steps a channel (channel_steps) weigh the
    coordinates of the error, so that all layers keep the dual form (the paper has them a channel of
    every matrix, which is not defined for two); the Huber level is one a head.
    """

    def __init__(self, config: MirasConfig):
        super().__init__()
        self.config, self.hidden_size, self.period = config, config.hidden_size, config.chunk_size
        width, heads = config.hidden_size, config.num_heads
        keys, values = config.key_width, config.value_width
        self.sizes = heads * keys, heads * keys, heads * values
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        size = config.conv_size
        self.convolution = ShortConvolution(sum(self.sizes), size) if size else None
        self.gates = _HeadGates(width, heads, self._gate_starts())
        self.steps = None
        if config.channel_steps:
            rank = min(_RANK, width)
            down, up = nn.Linear(width, rank, bias=False), nn.Linear(rank, heads * values)
            self.steps = nn.Sequential(down, up)
        if config.degree > 1:
            order = torch.arange(config.degree + 1) + 1.0
            self.log_coefficients = nn.Parameter(-torch.lgamma(order))  # 1 / i!
        features = keys if config.degree == 1 else polynomial_size(keys, config.degree)
        inside = [config.expansion * keys] * (config.depth - 1)
        layers = zip([features, *inside], [*inside, values], strict=True)
        self.start = nn.ParameterList(config.kept.start(heads, *layer) for layer in layers)
        self.bridge = None
        if config.residual and keys != values:
            bridge = torch.empty(heads, keys, values)
            self.bridge = nn.Parameter(bridge.normal_(std=max(keys, values) ** -0.5))
        if config.norm:
            self.gain = nn.Parameter(torch.full((heads, values), values**-0.5))  # length 1
            self.shift = nn.Parameter(torch.zeros(heads, values))
        self.every = (config.every or config.chunk_size) if config.algorithm == "muon" else 0
        self.norm = nn.RMSNorm(values, eps=EPS)
        self.gate = nn.Linear(width, heads * values, bias=False) if config.gate else None
        self.out = nn.Linear(heads * values, width, bias=False)
        self.state_shapes = states.shapes(self.init_state(1))

    def _gate_starts(self) -> dict[str, list[float]]:
        """The gates of a head, and the biases they start with."""
        config, starts = self.config, {}
        if config.retention != "none":
            starts["keep"] = [_KEPT]
        if not config.channel_steps or config.window > 1:
            starts["write"] = [0.0] * config.window
        if config.algorithm != "gd":
            starts["momentum"] = [0.0]
        if config.algorithm == "muon":
            starts["step"] = [0.0]
        if config.bias in LEVELLED:
            starts["level"] = [math.log(math.e - 1)]  # softplus of it is 1
        return starts

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        exact, config, heads = (
            torch.promote_types(dtype, torch.float32),
            self.config,
            self.config.num_heads,
        )
        weights = tuple(w.to(device, exact).repeat(batch_size, *[1] * w.dim()) for w in self.start)
        zero = torch.zeros((), device=device, dtype=exact)
        state: dict[str, Any] = {"weights": weights}
        if config.algorithm != "gd":
            state["momenta"] = tuple(zero.expand_as(w) for w in weights)
        if places := config.window + config.chunk_size - 2:
            widths = {"keys": config.key_width, "values": config.value_width, **self.gates.widths}
            if self.steps is not None:
                widths["steps"] = config.value_width
            state["pending"] = {
                name: zero.expand(batch_size, places, heads, width)
                for name, width in widths.items()
            }
        if self.convolution is not None:
            state["tail"] = self.convolution.tail(batch_size, device, dtype)
        state["position"] = torch.zeros(batch_size, device=device, dtype=torch.long)
        return state

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        return by_spans(self._span, (x,), state, lengths)

    def reference(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """What `forward` equals: position by position, weights made explicit and gradients taken by
        automatic differentiation; a masked position leaves its row as it was."""
        return reference(self, x, state, mask, lambda x, s: self._span(x, s, None, dense=True))

    def _span(
        self, x: Tensor, state: State, lengths: Tensor | None, dense: bool = False
    ) -> tuple[Tensor, State]:
        config, exact = self.config, state["weights"][0].dtype
        grid = Grid(
            state["position"],
            x.shape[1],
            lengths,
            chunk_size=config.chunk_size,
            window=config.window,
            heads=config.num_heads,
            dense=dense,
            cut=self._form() is dual,
        )
        q, written, after = self._written(x, state, lengths, exact)
        held = state.get("pending", {})
        joined = {name: grid.join(held.get(name), part) for name, part in written.items()}
        if held:
            after["pending"] = {name: grid.left(held[name], joined[name]) for name in held}
        with torch.autocast(x.device.type, enabled=False):
            y, weights, momenta = self._learn(grid, q, joined, state, dense)
        rows = len(x), config.num_heads
        if grid.live:  # else they are what they were
            after["weights"] = tuple(w.unflatten(0, rows) for w in weights)
            if momenta:
                after["momenta"] = tuple(s.unflatten(0, rows) for s in momenta)
        after["position"] = state["position"] + (x.shape[1] if lengths is None else lengths)
        return self._finish(grid.outputs(y), q, x), {**state, **after}

    def recall(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """What `weights` of a state say to each position alone, [B, T, D]: queries without their
        convolution, nothing written, no clock."""
        exact, heads = weights[0].dtype, self.config.num_heads
        q = F.linear(x, weight_of(self.qkv)[: self.sizes[0]])
        q = (q if self.convolution is None else F.silu(q)).unflatten(-1, (heads, -1))
        q = unit(q) if self.config.unit_keys else q.to(exact)
        with torch.autocast(x.device.type, enabled=False):
            layers = self.config.kept.read(list(weights), list(weights))
            o = network(layers, self._features(q.to(exact)).transpose(1, 2)).transpose(1, 2)
        return self._finish(o, q, x)

    def _finish(self, o: Tensor, q: Tensor, x: Tensor) -> Tensor:
        """From the network's outputs and its queries, [B, T, H, ...], to [B, T, D]."""
        if self.config.norm:
            gain, shift = self.gain.to(o.dtype), self.shift.to(o.dtype)
            o = F.layer_norm(o, o.shape[-1:], eps=_SPREAD) * gain + shift
        if self.config.residual:
            o = o + self._residual(q.transpose(1, 2)).transpose(1, 2)
        y = normed(self.norm, o, x).flatten(2)
        return self.out(y if self.gate is None else gated(self.gate(x), y))

    def _written(
        self, x: Tensor, state: State, lengths: Tensor | None, exact: torch.dtype
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        """Queries, what is learned from, each [B, T, H, ...], and the convolution's new tail."""
        qkv, after = self.qkv(x), {}
        if self.convolution is not None:
            qkv, after["tail"] = self.convolution(qkv, state["tail"], lengths)
        heads = self.config.num_heads
        q, k, v = (part.unflatten(-1, (heads, -1)).to(exact) for part in qkv.split(self.sizes, -1))
        if self.config.unit_keys:
            q, k = unit(q), unit(k)
        written = {"keys": k, "values": v, **self.gates(x, exact)}
        if self.steps is not None:
            written["steps"] = self.steps(x).unflatten(-1, (heads, -1)).to(exact).sigmoid()
        return q, written, after

    def _learn(
        self, grid: Grid, q: Tensor, joined: dict[str, Tensor], state: State, dense: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The network's outputs [N, X, Q, V] and its new weights and momenta."""
        config = self.config
        parts = {name: grid.chunks(part) for name, part in joined.items()}
        gates = self._gates(grid, parts)
        weights, momenta = (
            [w.flatten(0, 1) for w in state.get(name, ())] for name in ("weights", "momenta")
        )
        pairs = Pairs(self._features(grid.queries(q)), *self._targets(parts))
        inner, kept = self._inner(), config.kept
        if config.decay_first:
            faded = gates.keep.cumprod(-1)[..., None]
            pairs = replace(pairs, probe=faded * pairs.key)
        if grid.last:
            return one(pairs, gates, weights, momenta, inner, bool(grid.live))
        call = Call(pairs, gates, grid.full(), grid.index)
        if dense:
            return dual_reference(call, weights, momenta, inner, kept.read, self.every)
        return self._form()(call, weights, momenta, inner)

    def _form(self) -> Callable[..., Any]:
        """The operator of the chosen algorithm and retention."""
        config, kept = self.config, self.config.kept
        if self.every:
            return partial(orthogonal, every=self.every)
        if config.retention == "lq":
            return partial(scaled, scale=kept.scale)
        return dual if kept.linear else partial(explicit, read=kept.read)

    def _gates(self, grid: Grid, parts: dict[str, Tensor]) -> Gates:
        config = self.config
        own = {name: part[:, :, grid.before :] for name, part in parts.items()}
        one = torch.ones_like(own["keys"][..., 0])
        keep = own["keep"][..., 0].sigmoid() if "keep" in own else one
        write = own["write"].sigmoid() if "write" in own else one[..., None]
        write = lags(write * (config.step_size / config.window), grid.real())
        if config.algorithm == "gd":
            return Gates(keep, None, write)
        momentum = own["momentum"][..., 0].sigmoid()
        step = own["step"][..., 0].sigmoid() * config.step_size if "step" in own else None
        return Gates(keep, momentum, write, step)

    def _residual(self, x: Tensor) -> Tensor:
        """Keys or queries [..., H or B * H, T, K] as values [..., V]."""
        if self.bridge is None:
            return x
        bridge = self.bridge.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return x @ bridge.repeat(x.shape[-3] // len(bridge), 1, 1)

    def _features(self, x: Tensor) -> Tensor:
        if self.config.degree == 1:
            return x
        return unit(polynomial(x, self.log_coefficients.exp().to(x.dtype)))

    def _targets(self, parts: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What is written under, [N, X, K, F], and what `_inner`'s cotangent takes of the pairs."""
        config, keys, values = self.config, parts["keys"], parts["values"]
        residual = config.residual and config.bias != "dot"
        extras = [values - self._residual(keys) if residual else values]
        if config.bias in LEVELLED:
            extras.append(F.softplus(parts["level"]))
        if self.steps is not None:
            extras.append(parts["steps"])
        if config.norm:
            rows = len(keys), keys.shape[1] // config.num_heads
            for part in (self.gain, self.shift):
                whole = part.to(keys.dtype)[:, None].expand(*rows, -1, -1, -1)
                extras.append(whole.flatten(1, 2))
        return self._features(keys), tuple(extras)

    def _inner(self) -> Inner:
        config = self.config
        plain = config.bias == "l2" and not (config.norm or config.channel_steps)
        return Inner(None if plain else self._cotangent, config.max_surprise)

    def _cotangent(self, o: Tensor, target: Tensor, *extras: Tensor) -> Tensor:
        """The gradient of the inner loss by the network's output."""
        config, others = self.config, list(extras)
        level = others.pop(0) if config.bias in LEVELLED else o
        steps = others.pop(0) if config.channel_steps else None
        gain = shift = spread = flat = o
        if config.norm:
            gain, shift = others
            spread = (o.var(-1, keepdim=True, correction=0) + _SPREAD).sqrt()
            flat = (o - o.mean(-1, keepdim=True)) / spread
            seen = flat * gain + shift
        else:
            seen = o
        g = (
            -target
            if config.bias == "dot"
            else BIASES[config.bias](seen - target, level, config.exponent)
        )
        g = g if steps is None else g * steps
        if not config.norm:
            return g
        g = g * gain
        across = (g * flat).mean(-1, keepdim=True)
        return (g - g.mean(-1, keepdim=True) - flat * across) / spread


class _HeadGates(nn.Module):
    """Several gates a head, before their sigmoids, each with the biases it starts with."""

    def __init__(self, width: int, heads: int, starts: dict[str, list[float]]):
        super().__init__()
        self.widths = {name: len(biases) for name, biases in starts.items()}
        flat = [bias for biases in starts.values() for bias in biases]
        self.heads, self.map = heads, nn.Linear(width, heads * len(flat))
        with torch.no_grad():
            self.map.bias.copy_(torch.tensor(flat).repeat(heads))
            self.map.weight.mul_(0.1)

    def forward(self, x: Tensor, exact: torch.dtype) -> dict[str, Tensor]:
        """x [B, T, D] -> {name: [B, T, H, its width]}."""
        found = self.map(x).unflatten(-1, (self.heads, -1)).to(exact)
        return dict(zip(self.widths, found.split(list(self.widths.values()), -1), strict=True))
