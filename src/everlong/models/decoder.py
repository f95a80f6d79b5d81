"""The one decoder: token ids to hidden states, over any stack of mixers and any segment memory.

B batch, T time, D hidden_size.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from everlong import registry
from everlong.stack import Stack, StackConfig
from everlong.state import State
from everlong.stateful import Stateful, Trace

if TYPE_CHECKING:
    from everlong.models.config import EverlongConfig


def stack_config(config: "EverlongConfig", capacity: int | None) -> StackConfig:
    """The part of a model's configuration that its stack of mixers needs."""
    return StackConfig(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        layers=tuple(config.layer_names),
        mixers=config.mixers,
        intermediate_size=config.intermediate_size,
        dropout=config.dropout,
        capacity=capacity,
    )


def segment_memory(config: "EverlongConfig") -> tuple[registry.Entry, Any]:
    """`segment` as a memory's entry and config: with the model's width and heads unless it names
    its own."""
    assert config.segment is not None
    options = {"hidden_size": config.hidden_size, "num_heads": config.num_heads}
    options |= {k: v for k, v in config.segment.items() if k != "name"}
    entry = registry.memory_entry(config.segment["name"])
    return entry, registry.build_config(entry, options)


def looks_ahead(model: nn.Module) -> bool:
    """Whether predictions of a model, ours or extended, depend on later tokens, as under a
    published protocol: its scores are no causal model's, and are marked wherever shown."""
    configs = (getattr(part, "config", None) for part in model.modules())
    return any(getattr(config, "looks_ahead", False) for config in configs)


class Decoder(Stateful):
    """Embedding, then the stack of mixers, with the segment memory around it where there is one.

    Reads ids Int [B, T] (or embeddings [B, T, D]), returns final-normed hidden states [B, T, D].
    State: layers (one entry a layer), position Int [B], and with a segment memory its `segment`.
    """

    def __init__(self, config: "EverlongConfig"):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed.weight, std=config.hidden_size**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        if config.segment is None:
            self.core = Stack(stack_config(config, capacity=None))
            return
        entry, options = segment_memory(config)
        self.core = entry.cls(options, entry.cls.make_core(options, stack_config(config, None)))
        self.period = self.core.period

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        state = self.core.init_state(batch_size, device=device, dtype=dtype)
        if not isinstance(self.core, Stack):
            return state
        device, _ = self._defaults(device, dtype)
        return {"layers": state, "position": torch.zeros(batch_size, device=device).long()}

    def run(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        trace: Trace | None,
        outputs: bool = True,
    ) -> tuple[Tensor, State]:
        """`outputs=False`: hidden states are meaningless, and what only they need is left out."""
        hidden = x if x.is_floating_point() else self.embed(x)
        hidden = self.dropout(hidden) if self.training else hidden
        if not isinstance(self.core, Stack):
            return self.core(hidden, state, trace=trace, lengths=lengths)
        hidden, layers = self.core(
            hidden, state["layers"], trace=trace, lengths=lengths, outputs=outputs
        )
        moved = x.shape[1] if lengths is None else lengths
        return hidden, {"layers": layers, "position": state["position"] + moved}

    def advance(self, x: Tensor, state: State = None, mask: Tensor | None = None) -> State:
        """The new state alone: without a segment memory, which may write what the last layer says,
        the last layer is read by its mixer and no further."""
        return self(x, state, mask, outputs=False)[1]


def build_body(config: "EverlongConfig") -> Stateful:
    """What stands between token ids and the head: `Decoder`, or Memformer's encoder-decoder."""
    if config.segment is not None and config.segment.get("encoder_layers"):
        from everlong.models.memformer import MemformerEncoderDecoder

        return MemformerEncoderDecoder(config)
    return Decoder(config)
