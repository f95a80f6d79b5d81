"""Memformer as published: an encoder that reads and writes slots, a decoder that speaks.

B batch, T time, D hidden_size, N slots, S segment length.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from everlong.mixers.attention import SelfAttention
from everlong.models.decoder import segment_memory, stack_config
from everlong.ops.norm import RMSNorm
from everlong.ops.ragged import write_at
from everlong.segments.clock import SegmentMemory, choose_rows
from everlong.segments.memformer import Memformer, MemformerConfig, SlotWriter
from everlong.stack import FeedForward, Memory, Read, Stack
from everlong.state import State, pad_length
from everlong.stateful import Trace

if TYPE_CHECKING:
    from everlong.models.config import EverlongConfig


class EncoderBlock(nn.Module):
    """Equations 1 to 3: bidirectional attention in the segment, memory reading, feed-forward."""

    def __init__(self, config: "EverlongConfig", options: MemformerConfig):
        super().__init__()
        width = config.hidden_size
        self.attention_norm = RMSNorm(width, eps=1e-6)
        self.attention = SelfAttention(width, config.num_heads, config.dropout)
        self.read_norm = RMSNorm(width, eps=1e-6)
        self.reader = Memformer.reader(options, config.dropout)()
        self.reader.record = "encoded"
        self.feed_norm = RMSNorm(width, eps=1e-6)
        feed_forward_size = stack_config(config, None).feed_forward_size
        self.feed_forward = FeedForward(width, feed_forward_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Memory, trace: Trace | None) -> Tensor:
        start = torch.zeros(1, device=x.device, dtype=torch.long)
        q, k, v = self.attention.project(self.attention_norm(x), start)
        x = x + self.dropout(self.attention.attend(q, k, v, None))
        x = x + self.dropout(self.reader(self.read_norm(x), memory, trace))
        return x + self.dropout(self.feed_forward(self.feed_norm(x)))


class _ReadEncoding(Read):
    """Of the decoder: what it reads are the places of an encoded segment, no slots."""

    record = "looked"


class MemformerEncoderDecoder(SegmentMemory):
    """The encoder-decoder of arXiv 2010.06891 v2 as a causal language model over a stream.

    P(segment t+1) is decoded token by token from Z = Encoder(segment t, M_t); then segment t+1 is
    encoded, M is written once from its Z, and the next segment begins. Token i < S-1 of a segment
    runs one decoder step. Token S-1 encodes the finished segment, writes M, clears the decoder's
    cache, and its output is the decoder's step on bos with the new encoding. A fresh state has
    encoded bos with M_0, without a write.

    Reads ids Int [B, T], returns the decoder's final-normed hidden states [B, T, D]. State: layers
    (the decoder's caches, bos and at most S-1 tokens), position Int [B], segment: slots [B, N, D]
    (float32 at least), encoding [B, S, D] and its mask Bool [B, S], tokens Int [B, S]. The decoder
    attends to Z only, never to M. Deviations from the paper: rotary relative positions, RMS norms,
    SwiGLU.
    """

    def __init__(self, config: "EverlongConfig"):
        super().__init__()
        assert config.bos_token_id is not None, "the decoder begins each segment with bos"
        _, options = segment_memory(config)
        self.options, self.period = options, options.segment_length
        self.bos_token_id = config.bos_token_id
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed.weight, std=config.hidden_size**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(
            EncoderBlock(config, options) for _ in range(options.encoder_layers)
        )
        self.encoder_norm = RMSNorm(config.hidden_size, eps=1e-6)
        self.writer = SlotWriter(options)
        self.decoder = Stack(
            stack_config(config, capacity=self.period),
            lambda: _ReadEncoding(config.hidden_size, config.num_heads, dropout=config.dropout),
        )

    def encode(self, tokens: Tensor, slots: Tensor, trace: Trace | None = None) -> Tensor:
        """Z of a segment: tokens Int [B, S], slots [B, N, D] -> [B, S, D]."""
        x = self.dropout(self.embed(tokens))
        for block in self.encoder:
            x = block(x, (slots, None), trace)
        return self.encoder_norm(x)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        tokens = torch.zeros(batch_size, self.period, device=device, dtype=torch.long)
        slots = self.writer.fresh(batch_size).to(device)
        encoding = self.encode(torch.full_like(tokens[:, :1], self.bos_token_id), slots)
        mask = torch.arange(self.period, device=device).expand(batch_size, -1) == 0
        segment = {
            "slots": slots,
            "encoding": pad_length(encoding.to(dtype), self.period),
            "mask": mask,
            "tokens": tokens,
        }
        _, layers = self._begin(segment, None, dtype)
        position = torch.zeros(batch_size, device=device, dtype=torch.long)
        return {"layers": layers, "position": position, "segment": segment}

    def _begin(
        self, segment: State, trace: Trace | None, dtype: torch.dtype
    ) -> tuple[Tensor, State]:
        """The decoder's step on bos with a new encoding: hidden [B, 1, D] and its first cache."""
        rows, device = segment["mask"].shape[0], segment["mask"].device
        bos = torch.full((rows, 1), self.bos_token_id, device=device)
        fresh = self.decoder.init_state(rows, device=device, dtype=dtype)
        return self._decode(bos, fresh, segment, None, trace)

    def _decode(
        self,
        ids: Tensor,
        layers: State,
        segment: State,
        lengths: Tensor | None,
        trace: Trace | None,
    ) -> tuple[Tensor, State]:
        x = self.dropout(self.embed(ids))
        memory = (segment["encoding"], segment["mask"])
        return self.decoder(x, layers, trace=trace, lengths=lengths, memory=memory)

    def run(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        trace: Trace | None,
        outputs: bool = True,
    ) -> tuple[Tensor, State]:
        """`outputs=False`: y is meaningless, and what only y needs may be left out."""
        if x.is_floating_point():
            raise ValueError(
                "the encoder-decoder keeps its segment's tokens: give ids, not embeddings"
            )
        place = state["position"] % self.period
        ends = lengths is None and bool((place + x.shape[1] == self.period).all())
        if outputs or not ends:
            return super().run(x, state, lengths, trace)
        tokens = write_at(state["segment"]["tokens"], x, place, None)
        segment = {**state["segment"], "tokens": tokens}
        y, layers, segment = self._write(segment, torch.ones_like(place, dtype=torch.bool), trace)
        position = state["position"] + x.shape[1]
        return y, {"layers": layers, "position": position, "segment": segment}

    def advance(self, x: Tensor, state: State = None, mask: Tensor | None = None) -> State:
        """The new state alone: where the call ends a segment of every row, it is not decoded.

        The encoder runs before the decoder does, so its dropout is that of a call with outputs.
        """
        return self(x, state, mask, outputs=False)[1]

    def span(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        full: Tensor | None,
        trace: Trace | None,
    ) -> tuple[Tensor, State]:
        old, layers, place = state["segment"], state["layers"], state["position"] % self.period
        segment = {**old, "tokens": write_at(old["tokens"], x, place, lengths)}
        first = written = None
        if full is not None:
            first, written, segment = self._write(segment, full, trace)
        real = torch.full_like(place, x.shape[1]) if lengths is None else lengths
        decoded = torch.minimum(real, self.period - 1 - place)  # the last token is encoded only
        y = old["encoding"].new_zeros(x.shape[0], 1, old["encoding"].shape[2])
        if width := int(decoded.max()):
            inside = None if bool((decoded == width).all()) else decoded
            y, layers = self._decode(x[:, :width], layers, old, inside, trace)
        y = pad_length(y, x.shape[1])
        if full is not None and first is not None:
            layers = choose_rows(full, written, layers)
            y = torch.cat([y[:, :-1], torch.where(full[:, None, None], first, y[:, -1:])], 1)
        return y, {**state, "layers": layers, "segment": segment}

    def _write(self, old: State, full: Tensor, trace: Trace | None) -> tuple[Tensor, State, State]:
        """Rows `full` encode their segment and write M; what the decoder says on bos, its cache,
        and the new segment state."""
        dtype = old["encoding"].dtype
        encoding = self.encode(old["tokens"], old["slots"], trace)
        segment = {
            "slots": self.writer(old["slots"], encoding, trace=trace),
            "encoding": encoding.to(dtype),
            "mask": torch.ones_like(old["mask"]),
            "tokens": torch.zeros_like(old["tokens"]),
        }
        first, written = self._begin(segment, trace, dtype)
        return first, written, choose_rows(full, segment, old)
