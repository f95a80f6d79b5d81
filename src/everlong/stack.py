"""Blocks of mixers: the core every model and every segment memory is built around.

B batch, T time, D hidden_size, N rows of a memory that is read, F intermediate_size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong import registry
from everlong.ops.adapted import weight_of
from everlong.ops.gated import swiglu
from everlong.ops.norm import RMSNorm
from everlong.state import State
from everlong.stateful import Stateful, Trace

Memory = tuple[Tensor, Tensor | None]  # what a block may read: [B, N, D] and its mask Bool [B, N]


@dataclass(frozen=True)
class Taps:
    """What a memory does at each layer of a core: `enter(i, x)` makes the input of layer i from
    what the layer below gave, `leave(i, y)` sees the output of layer i. Both [B, T, D]."""

    enter: Callable[[int, Tensor], Tensor]
    leave: Callable[[int, Tensor], None]


@dataclass(frozen=True)
class StackConfig:
    """layers: the mixer of each layer, by name; mixers: options by mixer name; capacity (tokens):
    bound for unbounded mixers in a stream that ends there, such as a segment."""

    hidden_size: int
    num_heads: int
    layers: tuple[str, ...] = ("attention",)
    mixers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    intermediate_size: int | None = None
    dropout: float = 0.0
    capacity: int | None = None

    @property
    def feed_forward_size(self) -> int:
        """8/3 of the width, in multiples of 32, unless given: SwiGLU with a 4 D network's cost."""
        return self.intermediate_size or -(-8 * self.hidden_size // 96) * 32


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.up(x)))


class Read(nn.Module):
    """Cross attention from tokens to the rows of a memory, without positions.

    Slots are unit vectors; `scale` brings their entries to the size of a normalised token's, which
    is a reparameterisation of the key and value maps. `record`: the name of its weights in a trace.
    """

    record = "read"

    def __init__(self, hidden_size: int, num_heads: int, scale: float = 1.0, dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.scale, self.dropout = num_heads, scale, dropout
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, memory: Memory, trace: Trace | None = None) -> Tensor:
        """x [B, T, D], memory ([B, N, D], Bool [B, N] or None) -> [B, T, D]."""
        rows, mask = memory
        q = self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if x.shape[1] == 1 and not (self.training and self.dropout):
            return self.out(self._one(q, rows.to(x.dtype), mask, trace))
        kv = self.key_value(rows.to(x.dtype) * self.scale).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        if mask is not None:
            mask = mask[:, None, None]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        if trace is not None and trace.recording:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            trace.record(self.record, scores.softmax(-1).mean(1))
        return self.out(y.transpose(1, 2).flatten(2))

    def _one(self, q: Tensor, rows: Tensor, mask: Tensor | None, trace: Trace | None) -> Tensor:
        """What a single query q [B, H, 1, d] reads, [B, 1, D]: it is taken through the key map to
        the rows and what it finds through the value map, so that no keys and values of all rows are
        made for it."""
        keys, values = weight_of(self.key_value).unflatten(0, (2, self.num_heads, -1))
        asked = (q.squeeze(2).transpose(0, 1) @ keys).transpose(0, 1)  # [B, H, D]
        scores = asked @ rows.mT * (self.scale * q.shape[-1] ** -0.5)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        weights = scores.softmax(-1)
        if trace is not None and trace.recording:
            trace.record(self.record, weights.mean(1, keepdim=True))
        found = weights.to(rows.dtype) @ rows * self.scale  # [B, H, D]
        return (found.transpose(0, 1) @ values.mT).transpose(0, 1).flatten(1)[:, None]


class Block(nn.Module):
    """Pre-norm block: mixer, then (where something is to be read) a read, then feed-forward.

    `recompute`: torch's checkpoint, where activations are recomputed in training and not held.
    """

    recompute: Callable[..., Any] | None = None

    def __init__(self, mixer: Stateful, reader: Read | None, config: StackConfig):
        super().__init__()
        width = config.hidden_size
        self.mixer_norm = RMSNorm(width, eps=1e-6)
        self.mixer = mixer
        self.read_norm = None if reader is None else RMSNorm(width, eps=1e-6)
        self.reader = reader
        self.feed_norm = RMSNorm(width, eps=1e-6)
        self.feed_forward = FeedForward(width, config.feed_forward_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        trace: Trace | None,
        memory: Memory | None,
        **inputs: Any,
    ) -> tuple[Tensor, State]:
        if self.recompute is None or not self.training or not torch.is_grad_enabled():
            return self._read(x, state, lengths, trace, memory, **inputs)
        if trace is not None:
            raise ValueError(
                "a trace would record recomputed layers twice: turn gradient checkpointing off, "
                "and save activations with everlong.replay"
            )
        return self.recompute(self._read, x, state, lengths, None, memory, **inputs)

    def _read(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        trace: Trace | None,
        memory: Memory | None,
        **inputs: Any,
    ) -> tuple[Tensor, State]:
        y, state = self.mixer(self.mixer_norm(x), state, trace=trace, lengths=lengths, **inputs)
        x = x[:, -y.shape[1] :] + self._dropped(y)  # a mixer may need more than it answers
        if self.reader is not None and self.read_norm is not None:
            assert memory is not None, "a block with a reader is called with a memory"
            x = x + self._dropped(self.reader(self.read_norm(x), memory, trace))
        return x + self._dropped(self.feed_forward(self.feed_norm(x))), state

    def advance(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None, **inputs: Any
    ) -> State:
        """The new state alone: it is the mixer's, and nothing behind the mixer is computed."""
        _, state = self.mixer(self.mixer_norm(x), state, trace=trace, lengths=lengths, **inputs)
        return state

    def _dropped(self, y: Tensor) -> Tensor:
        return self.dropout(y) if self.training else y


class Stack(Stateful):
    """Blocks in a row and a final norm: [B, T, D] -> [B, T, D]; the state is one entry a layer.

    `reader` makes the read sub-layer of each block; `run` is then given `memory`. `run` with
    `mutual=True`: the positions of the call see each other, not only those before (attention
    layers only). `run` with `taps`: a memory takes part at every layer.
    """

    def __init__(self, config: StackConfig, reader: Callable[[], Read] | None = None):
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        blocks = [
            Block(self._mixer(i, name), reader() if reader else None, config)
            for i, name in enumerate(config.layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, eps=1e-6)
        with torch.no_grad():  # each layer adds several branches: their sum starts at unit scale
            for block in blocks:
                block.feed_forward.down.weight.div_((2 * len(blocks)) ** 0.5)

    def _mixer(self, index: int, name: str) -> Stateful:
        entry = registry.memory_entry(name)
        if entry.room != "mixers":
            raise ValueError(f"{name} lives in {entry.room}/ and cannot be a layer")
        options: dict[str, Any] = {"num_heads": self.config.num_heads}
        if "dropout" in entry.fields:
            options["dropout"] = self.config.dropout
        if not entry.bounded and self.config.capacity is not None:
            options["capacity"] = self.config.capacity
        options |= self.config.mixers.get(name, {})
        if "layer_index" in entry.fields:
            options |= {"layer_index": index, "num_layers": len(self.config.layers)}
        return registry.create_memory(name, hidden_size=self.config.hidden_size, **options)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def bounded(self) -> bool:
        """Whether the state keeps its size for ever (with a capacity it does until it is full)."""
        return all(registry.memory_entry(name).bounded for name in self.config.layers)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        mixers = [cast(Block, block).mixer for block in self.blocks]
        return tuple(m.init_state(batch_size, device=device, dtype=dtype) for m in mixers)

    def run(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        trace: Trace | None,
        memory: Memory | None = None,
        mutual: bool = False,
        taps: Taps | None = None,
        outputs: bool = True,
    ) -> tuple[Tensor, State]:
        """`outputs=False`: y is meaningless, and what only y needs is left out."""
        states = []
        inputs = {"mutual": True} if mutual else {}
        for i, (block, layer_state) in enumerate(zip(self.blocks, state, strict=True)):
            x = x if taps is None else taps.enter(i, x)
            if not outputs and i == self.num_layers - 1:
                states.append(cast(Block, block).advance(x, layer_state, lengths, trace, **inputs))
                return x, tuple(states)
            x, layer_state = block(x, layer_state, lengths, trace, memory, **inputs)
            if taps is not None:
                taps.leave(i, x)
            states.append(layer_state)
        return self.norm(x), tuple(states)
