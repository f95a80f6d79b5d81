"""Memformer: slots that read each finished segment, around any stack of mixers.

B batch, T time, D hidden_size, H heads, N slots, S segment length.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature

import torch
from torch import Tensor, nn

from everlong.mixers.attention import check_heads
from everlong.ops import slots as slot_ops
from everlong.ops.ragged import write_at
from everlong.registry import register
from everlong.segments.clock import SegmentMemory, choose_rows
from everlong.stack import Read, Stack, StackConfig
from everlong.state import State
from everlong.stateful import Stateful, Trace


@dataclass(frozen=True)
class MemformerConfig:
    """segment_length S and num_slots N; temperature tau of writing (below 1 sharpens); forgetting:
    |v| of a new slot's bias, the speed at which unused slots fade; gate: MemBART's gate behind the
    writer; carry_core: keep the core's own state across segments (the core must be bounded);
    encoder_layers > 0: the encoder-decoder, for language models only."""

    hidden_size: int
    num_heads: int
    segment_length: int = 256
    num_slots: int = 64
    temperature: float = 0.25
    forgetting: float = 0.5
    gate: bool = False
    carry_core: bool = False
    encoder_layers: int = 0

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_heads)
        for name in ("segment_length", "num_slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "forgetting"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} must be positive, got {getattr(self, name)}"
                    + (": a fresh slot is v / |v|" if name == "forgetting" else "")
                )
        if self.encoder_layers < 0:
            raise ValueError(f"encoder_layers must be 0 or more, got {self.encoder_layers}")
        if self.encoder_layers and self.carry_core:
            raise ValueError("the encoder-decoder clears its cache at each segment: no carry_core")


class SlotWriter(nn.Module):
    """Equations 4 to 7: attend from each slot to itself and the segment, mix, forget, normalise.

    Slots and their arithmetic are float32 at least, whatever autocast says. Slots are unit rows:
    the query and key maps see sqrt(D) times them and token values are divided by sqrt(D), so that
    fresh maps write rows of about unit length (a reparameterisation of the maps, not a change).
    """

    def __init__(self, config: MemformerConfig):
        super().__init__()
        width = config.hidden_size
        self.config, self.scale = config, width**0.5
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        bias = torch.randn(config.num_slots, width) * config.forgetting / self.scale
        self.bias = nn.Parameter(bias)
        self.gate = (
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
            if config.gate
            else None
        )

    def fresh(self, batch_size: int) -> Tensor:
        """M_0 = v / |v| for each stream: [B, N, D], differentiable in v."""
        bias = self._exact(self.bias)
        start = slot_ops.normalise(torch.zeros_like(bias), bias)
        return start.expand(batch_size, -1, -1)

    def forward(
        self, slots: Tensor, hidden: Tensor, mask: Tensor | None = None, trace: Trace | None = None
    ) -> Tensor:
        """slots [B, N, D], the segment's final hidden states [B, S, D] -> M of the next segment.

        mask Bool [B, S], True = a real token; a segment of padding only moves slots by v alone.
        """
        with torch.autocast(slots.device.type, enabled=False):
            hidden = hidden.to(self.key.weight.dtype)
            raised = (slots * self.scale).to(self.key.weight.dtype)
            written, weights = slot_ops.write(
                slots,
                self.query(raised).to(slots.dtype),
                self.key(raised).to(slots.dtype),
                self.key(hidden).to(slots.dtype),
                self.value(hidden).to(slots.dtype) / self.scale,
                heads=self.config.num_heads,
                tau=self.config.temperature,
                mask=mask,
            )
            opened = None
            if self.gate is not None:
                opened = self.gate((written * self.scale).to(self.key.weight.dtype))
                opened = opened.to(slots.dtype).sigmoid()
                written = opened * written + (1 - opened) * slots
            if trace is not None and trace.recording:
                self._tell(trace, written, weights, opened)
            return slot_ops.normalise(written, self._exact(self.bias))

    @torch.no_grad()
    def _tell(self, trace: Trace, written: Tensor, weights: Tensor, opened: Tensor | None) -> None:
        """What a slot kept, took of each token, and has of v; means over heads."""
        own, tokens = weights.mean(2).split([1, weights.shape[-1] - 1], -1)
        if opened is not None:
            own, tokens = opened * own + 1 - opened, opened * tokens
        bias = self._exact(self.bias).norm(dim=-1)
        trace.record("kept", own.squeeze(-1))
        trace.record("took", tokens)
        trace.record("faded", bias / (bias + written.norm(dim=-1) + 1e-16))

    @staticmethod
    def _exact(parameter: Tensor) -> Tensor:
        return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


@register(
    "memformer",
    room="segments",
    config=MemformerConfig,
    paper="Wu et al. 2022, arXiv 2010.06891",
    keeps="each finished segment is written into N unit slots; a slot keeps itself by its own "
    "attention weight; what is not rewritten fades towards v",
    small={"segment_length": 4, "num_slots": 3},
)
class Memformer(SegmentMemory):
    """The Memformer of arXiv 2010.06891 v2 in its decoder-only form (v1, Figure 1b).

    Read: every block of the core attends to the slots (eq. 2 of section 2.2, own maps per layer).
    Write, once a segment, from the core's final hidden states: `SlotWriter`. Forget: biased memory
    normalisation. The core's own state is wiped at each boundary, so any mixer may stand in it;
    positions are relative inside the segment.

    State: layers (the core's), position Int [B], segment: slots [B, N, D] (float32 at least) and
    hidden [B, S, D], the unfinished segment's states. Deviations from the paper: causal blocks, so
    the writer's features are causal too; rotary relative positions; RMS norms.

    `core` is any Stateful [B, T, D] -> [B, T, D] whose run takes `memory=`; without one, a single
    causal attention block.
    """

    def __init__(self, config: MemformerConfig, core: Stateful | None = None):
        super().__init__()
        if config.encoder_layers:
            raise ValueError(
                "encoder_layers makes an encoder-decoder language model: put it in a model's "
                "`segment`; as a memory use encoder_layers=0"
            )
        if core is None:
            layers = ("sliding_attention",) if config.carry_core else ("attention",)
            core = self.make_core(config, StackConfig(config.hidden_size, config.num_heads, layers))
        if "memory" not in signature(core.run).parameters:
            raise ValueError(
                "the core of a memformer reads slots: its run takes memory=, as that of a Stack "
                "with Memformer.reader(config) does"
            )
        if config.carry_core and not getattr(core, "bounded", True):
            raise ValueError("carry_core needs a core of bounded mixers, such as sliding_attention")
        self.config, self.hidden_size = config, config.hidden_size
        self.period = config.segment_length
        self.core, self.writer = core, SlotWriter(config)

    @classmethod
    def make_core(cls, config: MemformerConfig, stack: StackConfig) -> Stack:
        capacity = None if config.carry_core else config.segment_length
        return Stack(replace(stack, capacity=capacity), cls.reader(config, stack.dropout))

    @staticmethod
    def reader(config: MemformerConfig, dropout: float = 0.0) -> Callable[[], Read]:
        """What makes the read sub-layer of each block of the core."""
        width, heads = config.hidden_size, config.num_heads
        return partial(Read, width, heads, scale=width**0.5, dropout=dropout)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        shape = (batch_size, self.period, self.config.hidden_size)
        return {
            "layers": self.core.init_state(batch_size, device=device, dtype=dtype),
            "position": torch.zeros(batch_size, device=device, dtype=torch.long),
            "segment": {
                "slots": self.writer.fresh(batch_size).to(device),
                "hidden": torch.zeros((), device=device, dtype=dtype).expand(shape),
            },
        }

    def span(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        full: Tensor | None,
        trace: Trace | None,
    ) -> tuple[Tensor, State]:
        segment, layers = state["segment"], state["layers"]
        memory = (segment["slots"], None)
        y, layers = self.core(x, layers, trace=trace, lengths=lengths, memory=memory)
        start = state["position"] % self.period
        segment = {**segment, "hidden": write_at(segment["hidden"], y, start, lengths)}
        if full is not None:
            written = {
                "slots": self.writer(segment["slots"], segment["hidden"], trace=trace),
                "hidden": segment["hidden"].new_zeros(()).expand_as(segment["hidden"]),
            }
            if not self.config.carry_core:
                layers = self.core.reset(layers, full)
            segment = choose_rows(full, written, segment)
        return y, {**state, "layers": layers, "segment": segment}
