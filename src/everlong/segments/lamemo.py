"""LaMemo: a Transformer-XL whose remembered positions go on attending to what came after them.

B batch, T time, D hidden_size, H heads, d = D / H, N segment length, M memory length, L layers.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from everlong import state as states
from everlong.ops.adapted import weight_of
from everlong.ops.lookahead import Sum, look_ahead, look_back, merge
from everlong.ops.ragged import common_value, expand_like, write_at
from everlong.ops.relative import sinusoid
from everlong.registry import register
from everlong.segments.clock import SegmentMemory, choose_rows
from everlong.stack import Block, StackConfig
from everlong.state import State
from everlong.stateful import Stateful, Trace


@dataclass(frozen=True)
class LaMemoConfig:
    """segment_length N: how often the memory looks ahead; memory_length M (tokens)."""

    hidden_size: int
    num_heads: int
    segment_length: int = 256
    memory_length: int = 256

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.hidden_size < 1 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}"
            )
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size must be even for sinusoids, got {self.hidden_size}")
        for name in ("segment_length", "memory_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class View:
    """Where the rows of a call stand; the same for every layer.

    start Int [B]: the place of the call's first token in its segment. held: the most memory places
    that a row fills. valid Bool [B, held]: those this row fills, None if all do. opens Bool [B]:
    rows whose segment begins with this call, None if no row has a memory to bring up to date. end:
    the places of the segment that are read. table [held + end, D]: sinusoids of the distances
    held + end - 1 to 0.
    """

    start: Tensor
    held: int
    valid: Tensor | None
    opens: Tensor | None
    end: int
    table: Tensor

    @property
    def reread(self) -> int:
        """Memory positions that pass through the layers before the tokens in this call."""
        return 0 if self.opens is None else self.held


class LookAheadAttention(Stateful):
    """Attention of the tokens to the left and, once a segment, of the memory to the right.

    Scores are [(q + u) k + (q + v) R(distance) W_r] / sqrt(d), with v = v_c where the key is at or
    before the query and v_f where it comes after.

    State: memory [B, M, 2, H, d] and tokens [B, N, 2, H, d], the keys and values that the rest of
    the segment reads; past, the attention results (context [B, M, H, d], log_sum [B, M, H]) of the
    memory positions, the last at place M - 1; present, those of the unfinished segment's tokens (N
    places). The `last` layer has no past, no present and no v_f: what its memory positions would
    find, nothing reads.
    """

    def __init__(self, config: LaMemoConfig, last: bool):
        super().__init__()
        self.config, self.last = config, last
        width, heads = config.hidden_size, config.num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.distance = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

        def bias() -> nn.Parameter:
            return nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, width // heads)))

        self.content, self.causal = bias(), bias()  # u and v_c
        if not last:
            self.ahead = bias()  # v_f

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        config = self.config
        head = (config.num_heads, config.hidden_size // config.num_heads)
        exact = torch.promote_types(dtype, torch.float32)

        def empty(kind: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((), device=device, dtype=kind).expand(batch_size, *shape)

        def results(places: int) -> State:
            return {
                "context": empty(exact, places, *head),
                "log_sum": empty(exact, places, config.num_heads),
            }

        state = {
            "memory": empty(dtype, config.memory_length, 2, *head),
            "tokens": empty(dtype, config.segment_length, 2, *head),
        }
        if not self.last:
            state["past"] = results(config.memory_length)
            state["present"] = results(config.segment_length)
        return state

    def run(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        trace: Trace | None,
        *,
        view: View,
    ) -> tuple[Tensor, State]:
        """x [B, reread + T, D]: the memory positions to bring up to date, then T tokens, of which
        `lengths` are real. Returned without the memory positions by the last layer."""
        heads, reread = self.config.num_heads, view.reread
        q, *kv = self.qkv(x).unflatten(-1, (3, heads, -1)).unbind(-3)
        kv = torch.stack(kv, -3)
        few = x.shape[0] * (x.shape[1] - reread) * heads < self.config.hidden_size
        memory = state["memory"]
        if view.opens is not None:
            memory = self._place(kv[:, :reread], memory, view)
        tokens = write_at(state["tokens"], kv[:, reread:], view.start, lengths)
        state = {**state, "memory": memory, "tokens": tokens}

        held = memory[:, self.config.memory_length - view.held :]
        read = torch.cat([held, tokens[:, : view.end]], 1).to(q.dtype)
        table = None if few else self._table(view)
        found = self._look_back(q[:, reread:], read, view, table)
        context = found[0]
        if not self.last:
            present = {
                name: write_at(state["present"][name], part, view.start, lengths)
                for name, part in zip(("context", "log_sum"), found, strict=True)
            }
            state = {**state, "present": present}
            if view.opens is not None:
                read = read[:, : view.held + 1]
                table = self._table(view) if table is None else table
                merged, past = self._look_ahead(q[:, :reread], read, state, view, table, trace)
                context, state = torch.cat([merged, context], 1), {**state, "past": past}
        return self.out(context.flatten(2).to(x.dtype)), state

    def turn(self, state: State, full: Tensor) -> State:
        """Rows `full` end their segment: its results enter the memory, its keys are dropped."""
        turned = self.reset(state, full)
        if self.last:
            return turned
        past = states.tree_map(_newest, state["past"], state["present"])
        return {**turned, "past": choose_rows(full, past, state["past"])}

    def _place(self, new: Tensor, old: Tensor, view: View) -> Tensor:
        """`new` [B, held, ...] at the last of the M places of rows that open their segment."""
        assert view.opens is not None
        if view.valid is not None:
            new = torch.where(expand_like(view.valid, new), new, new.new_zeros(()))
        missing = old.shape[1] - new.shape[1]
        empty = new.new_zeros(()).expand(new.shape[0], missing, *new.shape[2:])
        new = torch.cat([empty, new], 1)  # a copy also where none is missing: no view is kept
        return choose_rows(view.opens, new.to(old.dtype), old)

    def _table(self, view: View) -> Tensor:
        """W_r of every distance [H, d, R]."""
        table = self.distance(view.table).unflatten(-1, (self.config.num_heads, -1))
        return table.permute(1, 2, 0)

    def _scores(
        self, q: Tensor, keys: Tensor, bias: Tensor, table: Tensor, maps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scaled scores by content [B, H, T, K] and by distance [B, H, T, R]; table [H, d, R], or
        [D, R] behind `maps` [H, d, D]."""
        scale = q.shape[-1] ** -0.5
        content = ((q + self.content) * scale).transpose(1, 2) @ keys.permute(0, 2, 3, 1)
        q = ((q + bias) * scale).transpose(1, 2)
        return content, (q if maps is None else q @ maps) @ table

    def _look_ahead(
        self,
        q: Tensor,
        read: Tensor,
        state: State,
        view: View,
        table: Tensor,
        trace: Trace | None,
    ) -> tuple[Tensor, State]:
        """The held positions' results after equation 4, and the past with them in it.

        q [B, held, H, d]; read [B, held + 1, 2, H, d]: the memory's and the first token's keys and
        values, of which the last N are looked at.
        """
        held, past = view.held, state["past"]
        window = min(self.config.segment_length, held)
        keys, values = read[:, -window:].unbind(2)
        content, distance = self._scores(q, keys, self.ahead, table[..., -held - 1 :])
        before = (past["context"][:, -held:], past["log_sum"][:, -held:])
        context, log_sum = merge(before, look_ahead(content, distance, values))
        if trace is not None:
            kept = (before[1] - log_sum).exp().mean(-1)
            trace.record("kept", kept if view.valid is None else kept * view.valid)
        past = {
            "context": self._place(context, past["context"], view),
            "log_sum": self._place(log_sum, past["log_sum"], view),
        }
        return context, past

    def _look_back(self, q: Tensor, read: Tensor, view: View, table: Tensor | None) -> Sum:
        """`table` None, for few queries: W_r is applied to them instead of to every distance."""
        keys, values = read.unbind(2)
        maps = None
        if table is None:
            maps, table = weight_of(self.distance).unflatten(0, q.shape[-2:]), view.table.T
        content, distance = self._scores(q, keys, self.causal, table, maps)
        filled = None
        if view.valid is not None:
            filled = torch.cat([view.valid, view.valid.new_ones(q.shape[0], view.end)], 1)
        return look_back(content, distance, values, view.held + view.start, filled)


def _newest(old: Tensor, new: Tensor) -> Tensor:
    """Of [B, M, ...] and [B, N, ...] behind it the last M, and no view of more."""
    places = old.shape[1]
    kept = [old[:, new.shape[1] :]] if new.shape[1] < places else []
    return torch.cat([*kept, new[:, -places:]], 1)


class LookAheadStack(Stateful):
    """LaMemo's layers and a final norm: the core of a `LaMemo`, one entry of state a layer.

    The shape (number of layers, feed-forward, dropout) is the stack's; dropout is that of the
    residual branches, as published: none on the attention weights.
    """

    def __init__(self, config: LaMemoConfig, stack: StackConfig):
        super().__init__()
        if set(stack.layers) != {"attention"} or stack.mixers:
            raise ValueError(
                "lamemo brings its own layers: leave the model's layers (attention) and mixers out"
            )
        self.config, self.hidden_size = config, config.hidden_size
        lasts = [*[False] * (len(stack.layers) - 1), True]
        blocks = [Block(LookAheadAttention(config, last), None, stack) for last in lasts]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        with torch.no_grad():  # as in Stack: the sum of the branches starts at unit scale
            for block in blocks:
                block.feed_forward.down.weight.div_((2 * len(blocks)) ** 0.5)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        return tuple(m.init_state(batch_size, device=device, dtype=dtype) for m in self._mixers())

    def run(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        trace: Trace | None,
        *,
        embeddings: Tensor,
        position: Tensor,
    ) -> tuple[Tensor, State]:
        """x [B, T, D] of one segment; embeddings [B, M, D], the inputs of the memory positions;
        position Int [B], the stream position of x[:, 0]."""
        view = self._view(x, lengths, position)
        if view.opens is not None:
            x = torch.cat([embeddings[:, -view.held :].to(x.dtype), x], 1)
        after = []
        for block, layer in zip(self.blocks, state, strict=True):
            x, layer = block(x, layer, lengths, trace, None, view=view)
            after.append(layer)
        return self.norm(x), tuple(after)

    def turn(self, state: State, full: Tensor) -> State:
        """Rows `full` (Bool [B]) end their segment: the memory moves on by N positions."""
        pairs = zip(self._mixers(), state, strict=True)
        return tuple(mixer.turn(layer, full) for mixer, layer in pairs)

    def _mixers(self) -> list[LookAheadAttention]:
        return [cast(LookAheadAttention, cast(Block, block).mixer) for block in self.blocks]

    def _view(self, x: Tensor, lengths: Tensor | None, position: Tensor) -> View:
        start = position % self.config.segment_length
        count = (position - start).clamp(max=self.config.memory_length)
        held = int(count.max())
        opens = (start == 0) if lengths is None else (start == 0) & (lengths > 0)
        index = torch.arange(held, device=x.device)
        place = common_value(start)
        end = self.config.segment_length if place is None else place + x.shape[1]
        distances = torch.arange(held + end - 1, -1, -1, device=x.device)
        return View(
            start=start,
            held=held,
            valid=None if int(count.min()) == held else index >= held - count[:, None],
            opens=opens if held and bool(opens.any()) else None,
            end=end,
            table=sinusoid(distances, self.config.hidden_size, self.norm.weight.dtype),
        )


@register(
    "lamemo",
    room="segments",
    config=LaMemoConfig,
    paper="Ji et al. 2022, arXiv 2204.07341",
    keeps="keeps the last M inputs and their attention results; each result looks at every later "
    "token once, a segment at a time; forgets the oldest",
    small={"segment_length": 4, "memory_length": 6},
)
class LaMemo(SegmentMemory):
    """Look-ahead memory (arXiv 2204.07341): memory positions attend to what came after them.

    Written: a finished segment's inputs, and per layer but the last its attention results with the
    log of their softmax denominators. Kept: the last M of them. At the first token of a segment the
    memory positions pass through the layers again; there each attends to the N keys that end at
    this token and lie on its right, and the denominators weigh what it finds against what it held
    (equation 4). The tokens then attend to the memory's new keys and to each other. Forgotten: the
    oldest.

    State: layers (`LookAheadAttention`), position Int [B], segment: embeddings [B, M, D], the
    memory's inputs, and tokens [B, N, D], those of the unfinished segment. Between two segments
    M D + (L - 1) M (D + H) numbers are in use; keys and values, 2 L (M + N) D, live inside one.

    Deviations: nothing is detached (the published stop-gradients on E and, in equation 4, on the
    old result are truncation at one segment); denominators are merged exactly, without the added
    1e-6; pre-norm blocks with RMS norms and SwiGLU instead of post-norm; u, v_c and v_f per layer,
    not shared; no dropout on the attention weights; the last layer keeps no results, for nothing
    reads what its memory positions find (the outputs are the same).

    `core` is a `LookAheadStack`; without one, two layers: a single one, by the last point, reads
    the memory but does not look ahead.
    """

    def __init__(self, config: LaMemoConfig, core: Stateful | None = None):
        super().__init__()
        if core is None:
            layers = ("attention",) * 2  # one alone has nobody to look ahead for
            core = self.make_core(config, StackConfig(config.hidden_size, config.num_heads, layers))
        if not isinstance(core, LookAheadStack) or core.config != config:
            raise ValueError(
                "lamemo brings its own layers: its core is LaMemo.make_core(config, stack) of the "
                "same config"
            )
        self.config, self.hidden_size = config, config.hidden_size
        self.period, self.core = config.segment_length, core

    @classmethod
    def make_core(cls, config: LaMemoConfig, stack: StackConfig) -> LookAheadStack:
        return LookAheadStack(config, stack)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        config, empty = self.config, torch.zeros((), device=device, dtype=dtype)
        return {
            "layers": self.core.init_state(batch_size, device=device, dtype=dtype),
            "position": torch.zeros(batch_size, device=device, dtype=torch.long),
            "segment": {
                "embeddings": empty.expand(batch_size, config.memory_length, config.hidden_size),
                "tokens": empty.expand(batch_size, config.segment_length, config.hidden_size),
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
        segment, position = state["segment"], state["position"]
        embeddings = segment["embeddings"]
        y, layers = self.core(
            x,
            state["layers"],
            trace=trace,
            lengths=lengths,
            embeddings=embeddings,
            position=position,
        )
        tokens = write_at(segment["tokens"], x, position % self.period, lengths)
        segment = {"embeddings": embeddings, "tokens": tokens}
        if full is not None:
            written = {
                "embeddings": _newest(embeddings, tokens),
                "tokens": tokens.new_zeros(()).expand_as(tokens),
            }
            layers = self.core.turn(layers, full)
            segment = choose_rows(full, written, segment)
        return y, {**state, "layers": layers, "segment": segment}
