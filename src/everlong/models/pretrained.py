"""A pretrained Hugging Face decoder as a core: [B, T, D] -> [B, T, D], its state explicit.

Here, in `decoders` and in `hub` is what is known of transformers' internals. B batch, T time, D
hidden_size, C places of a cache, N slots in front of a segment, L layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from everlong.models.decoders import (
    CACHE_NAME,
    FULL,
    SLIDING,
    attention_kinds,
    check_decoder,
    checkpoints_gradients,
    decoder_layers,
    sliding_window,
)
from everlong.ops.ragged import common_value, write_at
from everlong.stack import Memory, Taps
from everlong.state import State
from everlong.stateful import Stateful, Trace

_CLOSED = 1e-24  # the weight of a closed gate: lost in rounding, and its gradient is not


@dataclass(frozen=True)
class View:
    """Where the rows of a call stand in the cache: the same for every layer.

    place Int [B] of the call's first position; lengths Int [B] or None; first: the first place that
    is read; end: the place behind the last one; aligned: the place of every row, where the plain
    causal mask of the model is the right one.
    """

    place: Tensor
    lengths: Tensor | None
    first: int
    end: int
    aligned: int | None


class CallLayer(CacheLayerMixin):
    """One layer's cache for one call: what it held, then also what the call wrote, functionally."""

    def __init__(self, held: State, view: View):
        super().__init__()
        self.held, self.view, self.written = held, view, None
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """[B, H, T, d] of the call -> [B, H, K, d] of all places that are read."""
        new = {"keys": key_states, "values": value_states}
        view = self.view
        self.written = {
            name: write_at(self.held[name], each.transpose(1, 2), view.place, view.lengths)
            for name, each in new.items()
        }
        if view.aligned == view.first:
            return key_states, value_states
        keys, values = (
            self.written[name][:, view.first : view.end].transpose(1, 2).to(each.dtype)
            for name, each in new.items()
        )
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.view.aligned is None else self.view.aligned - self.view.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("a layer of one call is made with what it holds")


class Prefix(nn.Module):
    """What turns the rows of a memory into embeddings in front of a segment, behind a gate.

    The gate g (at least 0) multiplies the attention weights that tokens give to the rows, as log g
    added to their scores. It starts closed: the decoder is as it was pretrained. At g = 0 the
    weight is 1e-24, lost in rounding, so that g has the exact derivative there; below 0, where the
    gate is closed too, it has that of 0.
    """

    def __init__(self, hidden_size: int, num_slots: int):
        super().__init__()
        self.num_slots = num_slots
        self.scale = hidden_size**0.5  # slots are unit rows
        self.project = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def resemble(self, embeddings: Tensor) -> None:
        """Fresh rows of the size of these embeddings [..., D]: what the decoder is used to."""
        size = embeddings.float().square().mean().sqrt()
        self.project.weight.normal_(std=float(size) / self.scale)

    @property
    def opened(self) -> bool:
        return bool(self.gate > 0)

    @property
    def wanted(self) -> bool:
        """Whether the rows are read at all."""
        return self.opened or self.gate.requires_grad

    def bias(self) -> Tensor:
        """log g, [1], float32 at least."""
        gate = self.gate.to(torch.promote_types(self.gate.dtype, torch.float32))
        gate = gate + (gate.clamp(min=0) - gate).detach()
        return (gate + _CLOSED).log()

    def forward(self, rows: Tensor) -> Tensor:
        """rows [B, N, D] -> embeddings [B, N, D]."""
        return self.project((rows * self.scale).to(self.project.weight.dtype))


class PretrainedCore(Stateful):
    """A pretrained decoder whose keys and values are the state.

    State: layers, a tuple of L of keys and values [B, C, H, d], and position Int [B], the tokens
    read since the last wipe; a position has the number it has in the decoder. With `num_slots` the
    first N places hold the rows of a memory (`Prefix`), read where a row's first token is; they
    take no position of the tokens'.

    `shapes`: heads and width of each layer's keys and values (`cache_shapes`). `run` takes `memory`
    (with slots), `mutual` (the positions of the call see each other) and `taps`. A longer read than
    `capacity` positions raises `ValueError`. `recompute`: torch's checkpoint, where the decoder is
    run again in the backward pass and its activations are not held.
    """

    bounded = False  # it must be wiped
    recompute: Callable[..., Any] | None = None

    def __init__(
        self,
        decoder: PreTrainedModel,
        capacity: int,
        shapes: Sequence[Sequence[int]],
        num_slots: int = 0,
    ):
        super().__init__()
        check_decoder(decoder, capacity)
        self.decoder, self.capacity, self.shapes = decoder, capacity, tuple(map(tuple, shapes))
        self.hidden_size: int = decoder.config.hidden_size
        self.prefix = Prefix(self.hidden_size, num_slots) if num_slots else None

    @property
    def num_layers(self) -> int:
        return self.decoder.config.num_hidden_layers

    @property
    def num_slots(self) -> int:
        return 0 if self.prefix is None else self.prefix.num_slots

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        empty = torch.zeros((), device=device, dtype=dtype)
        places = self.num_slots + self.capacity
        layers = tuple(
            {
                "keys": empty.expand(batch_size, places, heads, width),
                "values": empty.expand(batch_size, places, value_heads, value_width),
            }
            for heads, width, value_heads, value_width in self.shapes
        )
        position = torch.zeros(batch_size, device=device, dtype=torch.long)
        return {"layers": layers, "position": position}

    def run(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        trace: Trace | None,
        memory: Memory | None = None,
        mutual: bool = False,
        taps: Taps | None = None,
    ) -> tuple[Tensor, State]:
        if taps is not None and self.recompute is not None and self.training:
            raise ValueError(
                "a memory that takes part at every layer cannot be run again: turn gradient "
                "checkpointing off, and save activations with everlong.replay"
            )
        layers, position = state["layers"], state["position"]
        after = position + (x.shape[1] if lengths is None else lengths)
        if int(after.max()) > self.capacity:
            raise ValueError(
                f"{int(after.max())} positions since the last wipe, and this core holds "
                f"{self.capacity}"
            )
        shown, bias = None, None
        if memory is not None:
            shown = memory[1]
            layers = self._read_memory(memory, layers, position, lengths)
            assert self.prefix is not None
            if self.prefix.opened or (torch.is_grad_enabled() and self.prefix.wanted):
                bias = self.prefix.bias()
        steps = position[:, None] + torch.arange(x.shape[1], device=x.device)
        view = self._view(position + self.num_slots, x, lengths, bias is None, mutual)
        mask = None if view.aligned is not None else self._masks(view, x, mutual, bias, shown)
        with self._tapped(taps):
            y, layers = self._decode(x, layers, view, steps.clamp(max=self.capacity - 1), mask)
        return y, {"layers": layers, "position": after}

    def _read_memory(
        self, memory: Memory, layers: State, position: Tensor, lengths: Tensor | None
    ) -> State:
        """Put a memory's rows in front of the rows that begin with this call."""
        if self.prefix is None or memory[0].shape[1] != self.num_slots:
            raise ValueError(
                f"this core was made for {self.num_slots} slots in front of a segment and is given "
                f"{memory[0].shape[1]}: make it with num_slots={memory[0].shape[1]}"
            )
        begins = position == 0 if lengths is None else (position == 0) & (lengths > 0)
        if not self.prefix.wanted or not bool(begins.any()):
            return layers
        rows = self.prefix(memory[0])
        read = None if bool(begins.all()) else begins * self.num_slots
        place = torch.zeros_like(position)
        view = View(place, read, 0, self.num_slots, None)
        mask = self._masks(view, rows, True, None, memory[1])
        steps = place[:, None].expand(-1, self.num_slots)
        return self._decode(rows, layers, view, steps, mask)[1]

    def _view(
        self, place: Tensor, x: Tensor, lengths: Tensor | None, hide: bool, mutual: bool
    ) -> View:
        """`hide` the slots: then rows at one place need no mask of ours."""
        first, length = self.num_slots if hide else 0, x.shape[1]
        aligned = common_value(place) if hide and not mutual else None
        if aligned is not None and aligned + length <= self.num_slots + self.capacity:
            return View(place, lengths, first, aligned + length, aligned)
        end = int((place + (length if lengths is None else lengths)).max())
        return View(place, lengths, first, max(end, first + 1), None)

    def _masks(
        self, view: View, x: Tensor, mutual: bool, bias: Tensor | None, shown: Tensor | None
    ) -> Any:
        """Masks [B, 1, T, K] over the places that are read, in the form the decoder takes.

        bias: what is added at the slots; shown Bool [B, N]: the slots that there are.
        """
        length, device = x.shape[1], x.device
        query = view.place[:, None] + torch.arange(length, device=device)
        query = query.clamp(max=view.end - 1)[..., None]  # behind a row's length: anything finite
        key = torch.arange(view.first, view.end, device=device)
        after = view.place + (length if view.lengths is None else view.lengths)
        full = key < after[:, None, None] if mutual else key <= query
        full = full.expand(-1, length, -1)
        near = key > query - (sliding_window(self.decoder.config) or view.end)
        slot = key < (self.num_slots if bias is not None else 0)
        if shown is not None and view.first == 0:
            unseen = nn.functional.pad(~shown, (0, view.end - shown.shape[1]))
            full = full & ~unseen[:, None]
        forms = {FULL: full, SLIDING: full & (near | slot)}
        own = key == query.clamp(min=view.first)  # no row of a softmax is empty

        def form(visible: Tensor) -> Tensor:
            empty = ~visible.any(-1, keepdim=True)
            visible = (visible | (empty & own))[:, None]
            if bias is None and self.decoder.config._attn_implementation == "sdpa":
                return visible
            added = torch.zeros((), dtype=x.dtype, device=device)
            if bias is not None:
                added = torch.where(slot, bias, 0.0).to(x.dtype)
            return torch.where(visible, added, torch.finfo(x.dtype).min)

        kinds = attention_kinds(self.decoder.config)
        if isinstance(kinds, str):
            return form(forms[kinds])
        return {kind: form(forms[kind]) for kind in kinds}

    def _decode(
        self, x: Tensor, layers: State, view: View, steps: Tensor, mask: Any
    ) -> tuple[Tensor, State]:
        """The decoder once over x, its keys and values written."""
        if self.training and checkpoints_gradients(self.decoder):
            raise ValueError(
                "gradient checkpointing inside the decoder drops the keys and values that are this "
                "core's state: turn it off there, and on for the extended model, or save "
                "activations with everlong.replay"
            )
        if self.recompute is None or not self.training or not torch.is_grad_enabled():
            return self._call(x, layers, view, steps, mask)
        return self.recompute(self._call, x, layers, view, steps, mask)

    def _call(
        self, x: Tensor, layers: State, view: View, steps: Tensor, mask: Any
    ) -> tuple[Tensor, State]:
        cache = Cache(layers=[CallLayer(layer, view) for layer in layers])
        out = self.decoder(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=steps,
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        written = tuple(layer.written for layer in cache.layers)  # pyright: ignore
        if any(each is None for each in written):
            raise ValueError(f"{type(self.decoder).__name__} did not write every layer's cache")
        return out.last_hidden_state, written

    @contextmanager
    def _tapped(self, taps: Taps | None) -> Iterator[None]:
        """`taps` take part at the decoder's layers, inside the context."""
        handles = []
        try:
            for i, layer in enumerate(decoder_layers(self.decoder) if taps is not None else []):
                handles.append(layer.register_forward_pre_hook(_enter(taps, i), with_kwargs=True))
                handles.append(layer.register_forward_hook(_leave(taps, i)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _enter(taps: Taps | None, index: int) -> Callable:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        assert taps is not None
        if args:
            return (taps.enter(index, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": taps.enter(index, kwargs["hidden_states"])}

    return hook


def _leave(taps: Taps | None, index: int) -> Callable:
    def hook(_: nn.Module, __: tuple, output: Any) -> None:
        assert taps is not None
        taps.leave(index, output if isinstance(output, Tensor) else output[0])

    return hook
