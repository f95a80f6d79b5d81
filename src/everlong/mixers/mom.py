"""Mixture-of-Memories: a router sends each token to a few of several matrices; one sees them all.

B batch, T time, D hidden_size, H heads, K key_size and V value_size (of a head), W conv_size,
E num_memories, k top_k, O what a token writes: keys, values, and what its rule needs besides."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong import state as states
from everlong.mixers.linear import (
    EPS,
    DecayGate,
    ShortConvolution,
    by_spans,
    check_sizes,
    normed,
    unit,
)
from everlong.ops.adapted import weight_of
from everlong.ops.delta import delta_rule, linear_attention
from everlong.ops.groups import groups, pieces, take
from everlong.ops.ragged import expand_like, valid_positions
from everlong.registry import check_choice, register
from everlong.state import State
from everlong.stateful import Stateful, Trace

_RANK = 16  # of the map to one decay a key channel
_TEMPERATURE = 16  # of GLA's decays


@dataclass(frozen=True)
class Rule:
    """How a memory is written: with a correction or not, and what fades ("fixed": at RetNet's
    rates; "head", "sigmoid" and "channel": at rates the input sets, the last two one a channel)."""

    corrects: bool
    decay: str | None = None


RULES = {
    "linear_attention": Rule(False),
    "retnet": Rule(False, "fixed"),
    "gla": Rule(False, "sigmoid"),
    "deltanet": Rule(True),
    "gated_deltanet": Rule(True, "head"),
    "kda": Rule(True, "channel"),
}


@dataclass(frozen=True)
class MoMConfig:
    """key_size, value_size: of a head; None: hidden_size // num_heads. num_memories: to choose
    from; top_k: that a token is written to and read from; shared: one more for all tokens.
    conv_size: positions that the convolutions before queries, keys and values see; 0: none. rule:
    how memories are written. balance: weight of the loss that keeps all memories in use."""

    hidden_size: int
    num_heads: int
    key_size: int | None = None
    value_size: int | None = None
    num_memories: int = 4
    top_k: int = 2
    shared: bool = True
    conv_size: int = 4
    rule: str = "gated_deltanet"
    balance: float = 0.01

    def __post_init__(self) -> None:
        check_sizes(self, num_memories=1, top_k=1, conv_size=0)
        if self.top_k > self.num_memories:
            raise ValueError(
                f"top_k {self.top_k} is more than num_memories {self.num_memories}: a token goes "
                "to each memory at most once"
            )
        check_choice("rule", self.rule, RULES)
        if self.balance < 0:
            raise ValueError(f"balance is {self.balance}: give 0 (no such loss) or more")


@register(
    "mom",
    room="mixers",
    config=MoMConfig,
    paper="Du et al. 2026, arXiv 2502.13685",
    keeps="sends each token to 2 of 4 matrices and to a shared one; the others wait unchanged",
    small={"key_size": 5, "value_size": 7, "num_memories": 3},
)
class MoM(Stateful):
    """Mixture-of-Memories (arXiv 2502.13685, section 3). For each position,

        p = softmax(Wr x), the k memories of the largest p (ties: the lowest index), w = p / sum p,
        k_e, v_e = silu(conv(We x)),  q = silu(conv(Wq x)),
        M_e written with (k_e, v_e) by the rule, for these memories and the shared one alone,
        o = sum_e w_e q M_e + q M_shared,  y = Wo (RMSNorm(o) * silu(Wg x)), the norm of each head

    *Written*: at every position k of E matrices, by the rule (docs: that layer), and the shared
    one. *Kept*: the matrices that a token is not sent to, bit for bit: time, convolutions and
    decays of a memory advance on its own tokens only. *Forgotten*: what the rule forgets, within
    one memory. Tokens that the router keeps apart do not interfere.

    Own to each memory are the maps of keys and values and those of beta and the decay; the
    convolutions, A_log and dt_bias are shared by all. `rule`: "gated_deltanet" as published;
    "deltanet" and "kda" with queries and keys of length 1 too; "gla", "retnet" and
    "linear_attention" with queries and keys as they are, without a sum to divide by (the norm
    undoes scales). "retnet" has its fixed decays and no rotary positions, which would need a clock
    in each memory. Decays one a channel pass rank 16: the first map is the memory's own.

    State: memory [B, E, H, K, V] and shared [B, H, K, V] (float32 at least); the last inputs of
    the convolutions: query_tail [B, W - 1, H K], tail [B, E, W - 1, H (K + V)], shared_tail.

    A trace is told the choices, `routed` Int [B, T, k] (-1: not a real position), and the loss
    `balance`: E sum_{j,e} F_je P_e times its weight, F_je the share of tokens whose j-th choice is
    e, P_e the mean of p. It is k where memories are used alike, and weighs as nats a token, for
    each layer. It is a product of means over the real positions of one call, so unlike outputs and
    state it depends on how a stream is cut; what is compared must be cut alike.
    With k = 1 the weight w is 1 whatever p is: the router then learns from this loss alone.

    Deviations: the convolution of queries runs along the row (in the released code along each
    memory's tokens, so that queries differ by memory); those of keys and values begin with each
    memory's own past (in the released training code with the end of another row or of later
    tokens); the balance is a layer's (there over all layers together). There is no capacity.
    """

    def __init__(self, config: MoMConfig):
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        each = width // heads
        keys, values = config.key_size or each, config.value_size or each
        self.config, self.hidden_size, self.num_heads = config, width, heads
        self.sizes, self.rule = (keys, values), RULES[config.rule]
        narrow = {"head": heads, "sigmoid": _RANK, "channel": _RANK}.get(self.rule.decay or "", 0)
        self.parts = heads * (keys + values), heads * self.rule.corrects, narrow
        total = sum(self.parts)
        self.router = nn.Linear(width, config.num_memories, bias=False)
        self.query = nn.Linear(width, heads * keys, bias=False)
        own = torch.empty(config.num_memories, width, total).uniform_(-1, 1) / math.sqrt(width)
        self.write = nn.Parameter(own)
        self.shared = nn.Linear(width, total, bias=False) if config.shared else None
        size = config.conv_size
        self.query_convolution = ShortConvolution(heads * keys, size) if size else None
        self.convolution = ShortConvolution(self.parts[0], size) if size else None
        self.forget = _forget(self.rule, heads, keys)
        self.norm = nn.RMSNorm(values, eps=EPS)
        self.gate = nn.Linear(width, heads * values, bias=False)
        self.out = nn.Linear(heads * values, width, bias=False)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        zero, count = torch.zeros((), device=device, dtype=exact), self.config.num_memories
        one = self.num_heads, *self.sizes
        state = {"memory": zero.expand(batch_size, count, *one)}
        if self.shared is not None:
            state["shared"] = zero.expand(batch_size, *one)
        if self.convolution is not None and self.query_convolution is not None:
            tail = self.convolution.tail(batch_size, device, dtype)
            state["query_tail"] = self.query_convolution.tail(batch_size, device, dtype)
            state["tail"] = tail[:, None].expand(-1, count, -1, -1)
            if self.shared is not None:
                state["shared_tail"] = tail
        return state

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        p, weights, chosen = self.route(x)
        if trace is not None:
            real = None if lengths is None else valid_positions(lengths, x.shape[1])
            self._tell(trace, p, chosen, real)
        return by_spans(self._span, (x, weights, chosen), state, lengths)

    def _span(
        self, x: Tensor, weights: Tensor, chosen: Tensor, state: State, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        real = None if lengths is None else valid_positions(lengths, x.shape[1])
        q, after_q = self._queries(x, state, lengths)
        o, after = self._routed(x, q, chosen, real, state)
        more, after_shared = self._common(x, q, state, lengths)
        o = (o * expand_like(weights, o)).sum(2) + more
        return self.finish(o, x), {**state, **after, **after_q, **after_shared}

    def _queries(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        """Scaled queries [B, T, H, K], and what of the state is theirs."""
        q, after = self.query(x), {}
        if self.query_convolution is not None:
            q, after["query_tail"] = self.query_convolution(q, state["query_tail"], lengths)
        q = q.unflatten(-1, (self.num_heads, -1))
        q = unit(q) if self.rule.corrects else q
        return q * self.sizes[0] ** -0.5, after

    def _common(
        self, x: Tensor, q: Tensor, state: State, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        """What the shared memory gives, [B, T, H, V] (0 without one), and its new state."""
        if self.shared is None:
            return x.new_zeros(()), {}
        names = [name for name in ("shared", "shared_tail") if name in state]
        held = [state[name] for name in names]
        o, held = self.remember(q, self.shared(x), held, lengths)
        return o, dict(zip(names, held, strict=True))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] -> p [..., E], the weights of the chosen memories and their indices [..., k],
        the likeliest first; float32 at least."""
        exact = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.to(exact), weight_of(self.router).to(exact)).softmax(-1)
        order = p.detach().sort(dim=-1, descending=True, stable=True).indices  # ties: lowest index
        chosen = order[..., : self.config.top_k]
        picked = p.gather(-1, chosen)
        return p, picked / picked.sum(-1, keepdim=True), chosen

    def _tell(self, trace: Trace, p: Tensor, chosen: Tensor, real: Tensor | None) -> None:
        real = torch.ones_like(chosen[..., 0], dtype=torch.bool) if real is None else real
        trace.record("routed", torch.where(real[..., None], chosen, -1))
        if self.config.balance:
            memories, count = self.config.num_memories, real.sum().clamp(min=1)
            used = torch.bincount(chosen[real].flatten(), minlength=memories).to(p.dtype) / count
            mean = torch.where(real[..., None], p, 0).sum((0, 1)) / count
            trace.loss("balance", self.config.balance * memories * (used * mean).sum())

    def remember(
        self, q: Tensor, written: Tensor, held: list[Tensor], lengths: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Rows of one memory each write it and read it: q [R, T, H, K], written [R, T, O], held
        [R, H, K, V] and, where there is a convolution, its tail -> o [R, T, H, V], held."""
        memory, *tail = held
        kv, beta, narrow = written.split(self.parts, -1)
        if self.convolution is not None:
            kv, tail[0] = self.convolution(kv, tail[0], lengths)
        split = kv.split([self.num_heads * size for size in self.sizes], -1)
        k, v = (part.to(memory.dtype).unflatten(-1, (self.num_heads, -1)) for part in split)
        g = self._decay(narrow)
        if self.rule.corrects:
            k, beta = unit(k), beta.sigmoid()
            o, memory = delta_rule(q, k, v, g, beta, memory, lengths=lengths)
        else:
            o, memory = linear_attention(q, k, v, g, memory, lengths=lengths)
        return o, [memory, *tail]

    def _decay(self, narrow: Tensor) -> Tensor:
        """The log decays g [R, T, H] or [R, T, H, K]."""
        if self.forget is not None:
            return self.forget(narrow)
        exact = torch.promote_types(narrow.dtype, torch.float32)
        heads = torch.arange(self.num_heads, device=narrow.device, dtype=exact)
        g = torch.log1p(-(2.0 ** (-5 - heads))) if self.rule.decay else torch.zeros_like(heads)
        return g.expand(*narrow.shape[:2], -1)

    def _routed(
        self, x: Tensor, q: Tensor, chosen: Tensor, real: Tensor | None, state: State
    ) -> tuple[Tensor, State]:
        """What each position reads from its memories, o [B, T, k, H, V], and their new state."""
        order, counts = groups(chosen, real, self.config.num_memories)
        token, (memories, rows) = order // chosen.shape[-1], counts.shape
        by_memory = x.flatten(0, 1).index_select(0, token).split(counts.sum(1).tolist())
        written = torch.cat([part @ own for part, own in zip(by_memory, self.write, strict=True)])
        names = [name for name in ("memory", "tail") if name in state]
        held = [state[name].flatten(0, 1) for name in names]
        q, found, places = q.flatten(0, 1), [], []
        for group, index, left in pieces(counts.flatten()):
            at, here = (
                group % rows * memories + group // rows,
                valid_positions(left, index.shape[1]),
            )
            o, new = self.remember(
                take(q, token[index]),
                take(written, index),
                [leaf.index_select(0, at) for leaf in held],
                None if index.shape[1] == 1 else left,
            )
            held = [leaf.index_copy(0, at, moved) for leaf, moved in zip(held, new, strict=True)]
            found.append(o[here])
            places.append(order[index[here]])
        shape = *chosen.shape, self.num_heads, self.sizes[1]
        if not found:
            return x.new_zeros(shape), {}
        o = torch.cat(found)
        o = o.new_zeros(chosen.numel(), *shape[3:]).index_copy(0, torch.cat(places), o)
        after = (leaf.unflatten(0, (rows, memories)) for leaf in held)
        return o.view(shape), dict(zip(names, after, strict=True))

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """o [B, T, H, V] -> [B, T, D]."""
        y = normed(self.norm, o, x).flatten(2)
        return self.out(y * F.silu(self.gate(x)))

    def reference(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """What `forward` equals: position by position, every memory is written and read, and those
        that were not chosen are put back."""
        state = self.init_state(x.shape[0]) if state is None else state
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        outputs = []
        for here, x_t in zip(real.unbind(1), x.split(1, 1), strict=True):
            x_t = torch.where(here[:, None, None], x_t, 0)
            y, after = self._step(x_t, state)
            state = states.where(here, after, state)
            outputs.append(torch.where(here[:, None, None], y, 0))
        return torch.cat(outputs, 1), state

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One position, x [B, 1, D]."""
        rows, memories = state["memory"].shape[:2]
        _, weights, chosen = self.route(x)
        sent = F.one_hot(chosen[:, 0], memories)  # [B, k, E]
        weights, sent = (weights.mT * sent).sum(1), sent.any(1)
        q, after_q = self._queries(x, state, None)
        written = torch.einsum("btd,edo->beto", x, self.write)
        names = [name for name in ("memory", "tail") if name in state]
        held = [state[name].flatten(0, 1) for name in names]
        every = q.repeat_interleave(memories, 0), written.flatten(0, 1)
        found = self.remember(*every, held, None)
        o, *new = (part.unflatten(0, (rows, memories)) for part in (found[0], *found[1]))
        after = {
            name: torch.where(expand_like(sent, leaf), leaf, state[name])
            for name, leaf in zip(names, new, strict=True)
        }
        more, after_shared = self._common(x, q, state, None)
        o = (o * expand_like(weights, o)).sum(1) + more
        return self.finish(o, x), {**state, **after, **after_q, **after_shared}


def _forget(rule: Rule, heads: int, keys: int) -> nn.Module | None:
    """From what a token writes to log decays, where they depend on it."""
    if rule.decay == "head":
        return DecayGate(heads)
    if rule.decay == "channel":
        maps = nn.Linear(_RANK, heads * keys, bias=False)
        return nn.Sequential(maps, DecayGate(heads, keys, least=1.0))
    return SigmoidDecay(heads, keys) if rule.decay == "sigmoid" else None


class SigmoidDecay(nn.Module):
    """GLA's log decays, one a key channel: [..., R] -> [..., H, K], float32 at least."""

    def __init__(self, heads: int, keys: int):
        super().__init__()
        self.heads, self.map = heads, nn.Linear(_RANK, heads * keys)

    def forward(self, narrow: Tensor) -> Tensor:
        a = self.map(narrow)
        g = F.logsigmoid(a.to(torch.promote_types(a.dtype, torch.float32))) / _TEMPERATURE
        return g.unflatten(-1, (self.heads, -1))
