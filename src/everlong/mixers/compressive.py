"""Compressive Transformer: what leaves the cache is squeezed into a coarser one behind it.

B batch, T time, D hidden_size, S segment length, M memory length, C compressed length, c rate.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong.mixers.attention import check_rate
from everlong.mixers.transformer_xl import RelativeAttention, check_widths, cut, push, rows_from
from everlong.ops.adapted import weight_of
from everlong.ops.ragged import common_value, write_at
from everlong.registry import register, suggest
from everlong.state import State
from everlong.stateful import Stateful, Trace

_COMPRESSORS = ("conv", "mean", "max")


@dataclass(frozen=True)
class CompressiveConfig:
    """segment_length S and memory_length M (tokens, multiples of rate), compressed_length C (rows,
    each of `rate` tokens; 0: none); compressor "conv", "mean" or "max"; dropout on the weights."""

    hidden_size: int
    num_heads: int
    segment_length: int = 256
    memory_length: int = 256
    compressed_length: int = 128
    rate: int = 4
    compressor: str = "conv"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_widths(self.hidden_size, self.num_heads)
        check_rate(self.dropout)
        if self.rate < 1:
            raise ValueError(f"rate must be at least 1 token a row, got {self.rate}")
        for name in ("segment_length", "memory_length"):
            length = getattr(self, name)
            if length < 1 or length % self.rate:
                raise ValueError(
                    f"{name} must be a positive multiple of rate {self.rate}, got {length}: "
                    "compressed rows begin and end where segments and the memory do"
                )
        if self.compressed_length < 0:
            raise ValueError(f"compressed_length must be at least 0, got {self.compressed_length}")
        if self.compressor not in _COMPRESSORS:
            hint = suggest(str(self.compressor), _COMPRESSORS)
            raise ValueError(
                f"compressor is {self.compressor!r}: use one of {', '.join(_COMPRESSORS)}{hint}"
            )


@register(
    "compressive",
    room="mixers",
    config=CompressiveConfig,
    paper="Rae et al. 2020, arXiv 1911.05507",
    keeps="writes every input, keeps the last M before the segment and older ones squeezed c to 1, "
    "forgets the oldest",
    small={"segment_length": 4, "memory_length": 6, "compressed_length": 3, "rate": 2},
)
class Compressive(Stateful):
    """Transformer-XL with a second, compressed memory (arXiv 1911.05507, sections 3.1 and 3.2).

    In the segment [P, P + S), P a multiple of S, a query sees the compressed rows, the inputs of
    the positions [P - M, P), and its own segment up to itself. Row a stands for the positions
    [a c, (a + 1) c); there is one for each such window that ends at P - M or before, and the last C
    of them are kept. Distances count places in [compressed; memory; segment]: a row is one place.

    *Written*: each position's input. *Kept*: the last M before the segment, and of what came before
    C rows, f_c of c inputs each, made at the boundary at which all of these have left the memory.
    f_c is a convolution with kernel and stride c, without bias, or mean or max pooling.
    *Forgotten*: the oldest row. Through L layers the first output of a segment that starts at s
    depends on the positions from s - L (M + c C), where S divides M and c C, and on none before.

    **What trains f_c.** The convolution learns to keep what attention finds: where rows cross a
    boundary a trace is told the loss "compression", the mean squared difference between the content
    attention of the segment just read (the layer's own maps, no positions, before W_o) to what
    leaves the memory and to its compression. A row's share is 1 / B. Its gradient reaches f_c only;
    the task's reaches everything else, through the compressed rows to the old inputs too.

    State: past [B, M + S - 1, D], the last inputs, and compressed [B, C (at least 1), D], the
    latest at the last place; position Int [B]. Time is linear in T.

    Deviations: those of `TransformerXL` (nothing but f_c is cut off from the task's gradient; the
    published stop-gradient at the memories is `truncated` at 1 segment). "Most used", dilated
    convolution and the auto-encoding loss, all worse in the paper, are not built.
    """

    stop_gradient = "the task never trains the compressor (arXiv 1911.05507, section 3.1)"

    def __init__(self, config: CompressiveConfig):
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        self.period, width = config.segment_length, config.hidden_size
        self.attention = RelativeAttention(width, config.num_heads, config.dropout)
        # a convolution with kernel = stride = c is a linear map of c rows at once; without a bias,
        # unused places stay 0
        if config.compressor == "conv":
            self.compressor = nn.Linear(config.rate * width, width, bias=False)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        config, empty = self.config, torch.zeros((), device=device, dtype=dtype)
        past, rows = config.memory_length + self.period - 1, max(1, config.compressed_length)
        return {
            "past": empty.expand(batch_size, past, config.hidden_size),
            "compressed": empty.expand(batch_size, rows, config.hidden_size),
            "position": torch.zeros(batch_size, device=device, dtype=torch.long),
        }

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        room = self.period - state["position"] % self.period
        if lengths is None and (first := common_value(room)) is not None:
            outputs = []
            for piece in x.split(cut(x.shape[1], first, self.period), 1):
                y, state = self._read(piece, state, None, trace)
                outputs.append(y)
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state
        # each row goes to its own next boundary, so that rows apart cost no more pieces
        if lengths is None:
            lengths = torch.full_like(room, x.shape[1])
        y, start = torch.zeros_like(x), torch.zeros_like(room)
        padded = torch.cat([x, x.new_zeros(x.shape[0], self.period, x.shape[2])], 1)
        while bool((start < lengths).any()):
            inside = torch.minimum(lengths - start, room)
            piece = rows_from(padded, start, int(inside.max()))
            part, state = self._read(piece, state, inside, trace)
            y = write_at(y, part, start, inside)
            start, room = start + inside, torch.full_like(room, self.period)
        return y, state

    def _read(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        """x crosses no boundary of any row, but may end at one."""
        position, length = state["position"], x.shape[1]
        before, count = self._before(state)
        y = self.attention(x, before, count[:, None] + torch.arange(length, device=x.device))
        moved = torch.full_like(position, length) if lengths is None else lengths
        after = position + moved
        new_state = {
            "past": push(state["past"], x, lengths),
            "compressed": state["compressed"],
            "position": after,
        }
        # of what leaves the memory at this boundary: the last `leaving` of S places
        leaving = (after - self.config.memory_length).clamp(0, self.period)
        leaving = torch.where((after % self.period == 0) & (moved > 0), leaving, 0)
        if self.config.compressed_length and bool(leaving.any()):
            inputs = torch.cat([state["past"], x.to(state["past"].dtype)], 1)
            old = rows_from(inputs, (moved - 1).clamp(min=0), self.period)
            rows = push(state["compressed"], self._compress(old, learn=False), None)
            new_state["compressed"] = torch.where(
                (leaving > 0)[:, None, None], rows, state["compressed"]
            )
            if trace is not None and self.config.compressor == "conv":
                recent = new_state["past"][:, -self.period :]
                trace.loss("compression", self._loss(recent, old, leaving))
        return y, new_state

    def _before(self, state: State) -> tuple[Tensor, Tensor]:
        """[compressed; memory; segment so far] [B, P, D] of every row, the latest at place P - 1,
        and how many of these places are in use, Int [B]."""
        past, compressed, position = state["past"], state["compressed"], state["position"]
        config, offset = self.config, position % self.period
        inputs = config.memory_length + offset  # places of `past` that are not forgotten
        made = (position - offset - config.memory_length).clamp(min=0) // config.rate
        count = torch.minimum(position, inputs) + made.clamp(max=config.compressed_length)
        held = int(count.max())
        gap = past.shape[1] - inputs  # forgotten places of `past`, behind the compressed rows
        if (same := common_value(gap)) is not None:
            kept = torch.cat([compressed, past[:, same:]], 1)
            return kept[:, kept.shape[1] - held :], count
        joined = torch.cat([compressed, past], 1)
        age = torch.arange(held - 1, -1, -1, device=past.device)
        places = joined.shape[1] - 1 - age - torch.where(age < inputs[:, None], 0, gap[:, None])
        places = places.clamp(min=0)[..., None].expand(-1, -1, past.shape[2])
        return joined.gather(1, places), count

    def _compress(self, old: Tensor, learn: bool) -> Tensor:
        """f_c: [B, R c, D] -> [B, R, D]; without `learn` its parameters get no gradient."""
        windows = old.unflatten(1, (-1, self.config.rate))
        if self.config.compressor == "mean":
            return windows.mean(2)
        if self.config.compressor == "max":
            return windows.amax(2)
        weight = weight_of(self.compressor)
        return F.linear(windows.flatten(2), weight if learn else weight.detach()).to(old.dtype)

    def _loss(self, recent: Tensor, old: Tensor, leaving: Tensor) -> Tensor:
        """How far attention to f_c(old) is from attention to old, whose last `leaving` count."""
        chosen = leaving > 0
        recent, old = recent.detach()[chosen], old.detach()[chosen]
        missing = self.period - leaving[chosen, None]
        index = torch.arange(self.period, device=old.device)
        compressed = self._compress(old, learn=True)
        wanted = self._find(recent, old, index >= missing)
        used = index[: compressed.shape[1]] >= missing // self.config.rate
        found = self._find(recent, compressed, used)
        return (found - wanted).square().mean() * chosen.to(found.dtype).mean()

    def _find(self, recent: Tensor, rows: Tensor, used: Tensor) -> Tensor:
        """Content attention [R, H, S, d] to the `used` (Bool [R, N]) of `rows` [R, N, D]."""
        heads, attention = self.config.num_heads, self.attention
        q = F.linear(recent, weight_of(attention.query).detach())
        k, v = F.linear(rows, weight_of(attention.key_value).detach()).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=used[:, None, None])
