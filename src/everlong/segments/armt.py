"""ARMT: memory tokens write one associative matrix a layer, which every position reads.

B batch, T time, D hidden_size, S segment length, M memory tokens, L layers, K key size, P features.
"""

from dataclasses import dataclass, replace
from inspect import signature

import torch
from torch import Tensor, nn

from everlong.mixers.attention import check_heads
from everlong.ops import associative
from everlong.registry import register
from everlong.segments.clock import SegmentMemory, choose_rows
from everlong.stack import Stack, StackConfig, Taps
from everlong.state import State
from everlong.stateful import Stateful, Trace


@dataclass(frozen=True)
class ARMTConfig:
    """segment_length S; num_slots M: memory tokens behind each segment; key_size K and nu: keys
    have P = 2 nu K features, so that a layer holds P (D + 1) numbers a stream."""

    hidden_size: int
    num_heads: int
    segment_length: int = 256
    num_slots: int = 16
    key_size: int = 64
    nu: int = 3

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_heads)
        for name in ("segment_length", "num_slots", "nu"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.key_size <= self.nu:
            raise ValueError(
                f"key_size {self.key_size} must be above nu = {self.nu}: a feature is a product of "
                "two entries of a key at distances 1 to nu"
            )

    @property
    def num_features(self) -> int:
        return 2 * self.nu * self.key_size


class AssociativeLayer(nn.Module):
    """The maps of one layer's matrix: queries, keys, values and how much of a value to replace.

    Features, matrix and norm are float32 at least, whatever autocast says.
    """

    def __init__(self, config: ARMTConfig):
        super().__init__()
        width = config.hidden_size
        self.nu = config.nu
        self.query = nn.Linear(width, config.key_size, bias=False)
        self.key = nn.Linear(width, config.key_size, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.strength = nn.Linear(width, 1)
        nn.init.zeros_(self.value.weight)  # the core is untouched until a value is learned

    def read(self, x: Tensor, layer: State) -> Tensor:
        """x [B, T, D] with what the matrix holds at its keys added."""
        with torch.autocast(x.device.type, enabled=False):
            query = self._features(self.query, x, layer)
            return x + associative.read(layer["matrix"], layer["norm"], query).to(x.dtype)

    def write(self, hidden: Tensor, layer: State) -> tuple[State, Tensor]:
        """The layer's outputs at the memory tokens [B, M, D] -> its new state and b [B, M]."""
        with torch.autocast(hidden.device.type, enabled=False):
            exact = layer["matrix"].dtype
            key = self._features(self.key, hidden, layer)
            hidden = hidden.to(self.value.weight.dtype)
            value = self.value(hidden).to(exact)
            strength = self.strength(hidden).to(exact).sigmoid().squeeze(-1)
            matrix, norm = associative.write(layer["matrix"], layer["norm"], key, value, strength)
        return {"matrix": matrix, "norm": norm}, strength

    def _features(self, projection: nn.Linear, x: Tensor, layer: State) -> Tensor:
        small = projection(x.to(projection.weight.dtype))
        return associative.features(small.to(layer["matrix"].dtype), self.nu)


@register(
    "armt",
    room="segments",
    config=ARMTConfig,
    paper="Rodkin et al. 2024, arXiv 2407.04841",
    keeps="at each segment's end M memory tokens write key-value pairs into one matrix a layer; "
    "a pair stays until a like key is written, which replaces it",
    small={"segment_length": 4, "num_slots": 2, "key_size": 4, "nu": 2},
)
class ARMT(SegmentMemory):
    """The Associative Recurrent Memory Transformer of arXiv 2407.04841.

    Read: before every layer, every position (the memory tokens too) adds
    A^T phi(Wq h) / (z . phi(Wq h) + 1e-5) to its hidden state h; with A = 0 that is exactly h.
    Write, when a segment is full: M learned tokens are read behind its S tokens, and in each layer
    their outputs u make keys phi(Wk u), values Wv u and strengths b = sigmoid(w . u + c):
    A += sum b k (v - old)^T, where old is what A held at k before any of the M was written; z is
    the sum of the keys, where new to it. Forget: a written key replaces, by its b, what stood
    there; nothing else fades. phi is DPFP (`ops.associative.features`). The core's own state is
    wiped at each boundary.

    State: layers (the core's), position Int [B], segment: layers, a tuple of L of matrix A
    [B, P, D] and norm z [B, P], float32 at least, 0 at the start. The trace records "kept"
    [B, L, M] at each write, 1 - b: how much of the old value stays at a written key.

    `core` is any Stateful [B, T, D] -> [B, T, D] with `num_layers` whose run takes `taps=`, and
    which reads S + M positions between two wipes; without one, a single causal attention block.
    Deviations: relative positions, so the memory tokens need no position rows of their own; the
    mixers' own losses and records are those of the segment's tokens alone.
    """

    stop_gradient = (
        "g, how much of a new key enters z, has no gradient, as published: z is a count of keys, "
        "not something to learn through"
    )

    def __init__(self, config: ARMTConfig, core: Stateful | None = None):
        super().__init__()
        if core is None:
            core = self.make_core(config, StackConfig(config.hidden_size, config.num_heads))
        num_layers = getattr(core, "num_layers", None)
        if num_layers is None or "taps" not in signature(core.run).parameters:
            raise ValueError(
                "armt takes part at every layer of its core: the core has num_layers and its run "
                "takes taps=, as those of a Stack"
            )
        self.config, self.hidden_size = config, config.hidden_size
        self.period, self.core = config.segment_length, core
        tokens = torch.randn(config.num_slots, config.hidden_size) * config.hidden_size**-0.5
        self.tokens = nn.Parameter(tokens)
        self.associations = nn.ModuleList(AssociativeLayer(config) for _ in range(num_layers))

    @classmethod
    def make_core(cls, config: ARMTConfig, stack: StackConfig) -> Stack:
        return Stack(replace(stack, capacity=config.segment_length + config.num_slots))

    def learned_tokens(self) -> list[Tensor]:
        return [self.tokens]

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        features, width = self.config.num_features, self.config.hidden_size
        empty = torch.zeros((), device=device, dtype=exact)
        layer = {
            "matrix": empty.expand(batch_size, features, width),
            "norm": empty.expand(batch_size, features),
        }
        return {
            "layers": self.core.init_state(batch_size, device=device, dtype=dtype),
            "position": torch.zeros(batch_size, device=device, dtype=torch.long),
            "segment": {"layers": tuple(dict(layer) for _ in self.associations)},
        }

    def span(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        full: Tensor | None,
        trace: Trace | None,
    ) -> tuple[Tensor, State]:
        held, layers = state["segment"]["layers"], state["layers"]
        taps = Taps(lambda i, x: self._layer(i).read(x, held[i]), lambda i, y: None)
        y, layers = self.core(x, layers, trace=trace, lengths=lengths, taps=taps)
        if full is None:
            return y, {**state, "layers": layers}
        written = self._write(held, layers, full, trace)
        return y, {
            **state,
            "layers": self.core.reset(layers, full),
            "segment": {"layers": choose_rows(full, written, held)},
        }

    def _write(self, held: State, layers: State, full: Tensor, trace: Trace | None) -> State:
        """Read the memory tokens behind full segments; the matrices of all layers, written."""
        found: dict[int, Tensor] = {}
        taps = Taps(lambda i, x: self._layer(i).read(x, held[i]), found.__setitem__)
        tokens = self.tokens.expand(full.shape[0], -1, -1)
        lengths = None if bool(full.all()) else full * self.config.num_slots
        self.core(tokens, layers, lengths=lengths, taps=taps)
        parts = [self._layer(i).write(found[i], layer) for i, layer in enumerate(held)]
        if trace is not None:
            trace.record("kept", 1 - torch.stack([strength for _, strength in parts], 1))
        return tuple(layer for layer, _ in parts)

    def _layer(self, index: int) -> AssociativeLayer:
        layer = self.associations[index]
        assert isinstance(layer, AssociativeLayer)
        return layer
