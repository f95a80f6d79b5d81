"""Dot and DeepTransformers: memories under the exponential kernel, which forget nothing.

B batch, T time, D hidden_size, H heads, K key_size, V value_size, W conv_size, C places of the
cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from everlong.mixers.linear import LinearMixer, check_sizes, unit
from everlong.ops.exponential import exponential_memory
from everlong.ops.ragged import write_at
from everlong.registry import check_choice, register
from everlong.state import State, pad_length
from everlong.stateful import Trace

RULES = ("delta", "hebbian")


@dataclass(frozen=True)
class DotConfig:
    """key_size, value_size: of a head, None: hidden_size // num_heads. conv_size: positions that
    the convolution before queries, keys and values sees; 0: none. rule: "delta" (Dot) writes what a
    value differs by from what its key holds, "hebbian" (DeepTransformers) the value. max_step: of
    the delta rule, 1: a value stored whole. sharpness: c of the kernel exp(c (q.k - 1)). capacity
    (tokens): a cache of fixed size for streams known to end, such as a segment; None lets it
    grow."""

    hidden_size: int
    num_heads: int
    key_size: int | None = None
    value_size: int | None = None
    conv_size: int = 4
    rule: str = "delta"
    max_step: float = 1.0
    sharpness: float = 1.0
    capacity: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, conv_size=0)
        check_choice("rule", self.rule, RULES)
        if not 0 < self.max_step <= 2:
            raise ValueError(
                f"max_step is {self.max_step}: give a number above 0 and at most 2, beyond which "
                "what is stored would grow by itself"
            )
        if self.rule == "hebbian" and self.max_step != 1:
            raise ValueError("max_step is the delta rule's: leave it out for rule 'hebbian'")
        if not self.sharpness > 0:
            raise ValueError(f"sharpness is {self.sharpness}: give a number above 0; 1 is exp(q.k)")
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"capacity must be at least 1 token, got {self.capacity}")


@register(
    "dot",
    room="mixers",
    config=DotConfig,
    paper="Behrouz et al. 2025, arXiv 2505.23735",
    keeps="writes each value over what like keys hold, keeps every pair: the state grows",
    bounded=False,
    small={"key_size": 5, "value_size": 7},
)
class Dot(LinearMixer):
    """A linear memory M = sum_i z_i phi(k_i)^T under the kernel of attention, phi(x).phi(y) =
    exp(c (x.y - 1)) with c = sharpness: DeepTransformers and Dot of ATLAS (arXiv 2505.23735). For
    each head, with q, k and v behind a short convolution and SiLU, q and k of length 1, and beta =
    max_step sigmoid(Wb x):

        z_t = beta (v_t - sum_{i<t} z_i exp(c (k_i.k_t - 1)))    rule "delta": Dot
        z_t = v_t                                                rule "hebbian": DeepTransformers
        o_t = sum_{i<=t} z_i exp(c (q_t.k_i - 1)),   y = Wo (RMSNorm(o) * SiLU(Wg x))

    so that Dot is the delta rule M -= beta (M phi(k) - v) phi(k)^T (the Omega rule over a window of
    1), and DeepTransformers is attention without its denominator (equations 25 and 26).

    *Written*: at every position its key, with its value or what that differs by from what the key
    holds. *Kept*: every pair. *Forgotten*: nothing leaves the state; under the delta rule a like
    key's new value takes the old one's place in what is read, as far as beta goes.

    State: keys [B, C, H, K] and values [B, C, H, V] (the z), of stream position p at place p; the
    clock position [B]; tail [B, W - 1, H (2 K + V)], the convolution's last inputs. C is the
    longest row so far (at least 1), or `capacity`; a stream longer than `capacity` raises
    `ValueError`. The delta rule's values are float32 at least: later ones are made of them.

    **Step.** The paper's kernel is exp(k.k) = e for a key of length 1, under which a step eta is
    stable below 2 / e. Ours is 1 there, whatever c: at c = 1 beta is e eta, and o is the paper's.
    With beta <= 2 what is stored never grows by itself.

    Deviations: the published memories are networks, to which phi (of infinite width) cannot be
    given as written; this is the linear form. The window is 1, nothing decays. `sharpness` is ours,
    1 in the paper. Hebbian o is the paper's divided by e, in front of its norm. One step a head;
    norm, gate and convolution are those of the linear layers here. No rotary positions.
    """

    config: DotConfig

    def __init__(self, config: DotConfig):
        each = config.hidden_size // config.num_heads
        sizes = config.key_size or each, config.value_size or each
        super().__init__(config, *sizes, conv_size=config.conv_size)
        if config.rule == "delta":
            self.beta = nn.Linear(config.hidden_size, config.num_heads, bias=False)

    def strength(self, x: Tensor) -> Tensor | None:
        if self.config.rule == "hebbian":
            return None
        return self.config.max_step * self.beta(x).sigmoid()

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        kinds = dtype, exact if self.config.rule == "delta" else dtype
        state = {}
        for name, size, kind in zip(("keys", "values"), self.sizes, kinds, strict=True):
            empty = torch.zeros((), device=device, dtype=kind)  # which all places share
            places = self.config.capacity or 1
            state[name] = empty.expand(batch_size, places, self.num_heads, size)
        state["position"] = torch.zeros(batch_size, device=device, dtype=torch.long)
        if self.convolution is not None:
            state["tail"] = self.convolution.tail(batch_size, device, dtype)
        return state

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        position, after = state["position"], dict(state)
        after["position"] = position + (x.shape[1] if lengths is None else lengths)
        seen, total = int(position.max()), int(after["position"].max())
        if self.config.capacity is not None and total > self.config.capacity:
            raise ValueError(
                f"the stream is {total} tokens long and this memory holds "
                f"{self.config.capacity}: raise capacity, or use gated_deltanet"
            )
        qkv = self.qkv(x)
        if self.convolution is not None:
            qkv, after["tail"] = self.convolution(qkv, state["tail"], lengths)
        key, value = (self.num_heads * size for size in self.sizes)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)) for part in qkv.split([key, key, value], -1)
        )
        # rounded as they are kept, so that this call reads what later ones will
        k, v = unit(k).to(state["keys"].dtype), v.to(state["values"].dtype)
        before = state["keys"][:, :seen], state["values"][:, :seen]
        c = self.config.sharpness
        o, z = exponential_memory(
            unit(q), k, v, self.strength(x), *before, sharpness=c, lengths=lengths
        )
        for name, new in (("keys", k), ("values", z)):
            after[name] = write_at(pad_length(state[name], total), new, position, lengths)
        return self.finish(o, x), after
