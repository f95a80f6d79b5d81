"""A State as a cache of transformers: what `generate` carries from token to token.

B batch.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from everlong import state as states
from everlong.state import State


class StreamLayer(CacheLayerMixin):
    """Any State as a transformers cache layer, and the columns of the batch it has read.

    Columns count padding, the clocks inside the state count tokens. A state is never changed in
    place: the layer replaces its reference.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, state: State | None = None):
        super().__init__()
        self.state, self.columns = state, 0
        self.device: torch.device | None = None

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else states.batch_size(self.state)

    def advance(self, state: State, columns: int) -> None:
        self.state, self.columns, self.is_initialized = state, self.columns + columns, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("this cache layer holds a State, not keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        raise ValueError("this cache layer holds a State, not keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1  # a stream has no end

    def reset(self) -> None:
        self.state, self.columns, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state = states.select(self.state, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a state cannot be rolled back: keep the states you want to return to "
                "(copy.copy of the cache is enough), and leave out assisted decoding"
            )

    def offload(self) -> None:
        if self.state is not None:
            self.device = states.leaves(self.state)[0].device
            self.state = states.to(self.state, "cpu")

    def prefetch(self) -> None:
        if self.state is not None and self.device is not None:
            self.state = states.to(self.state, self.device)


class EverlongCache(Cache):
    """What a cache is here: one State, of constant size if the model's memory is bounded.

    `EverlongCache(state)` continues a stream from a state, with only new tokens in `input_ids`.
    """

    def __init__(self, state: State | None = None):
        super().__init__(layers=[StreamLayer(state)])

    def __copy__(self) -> "EverlongCache":
        """A cache that moves on by itself; the state is shared, as nobody changes it in place."""
        twin = EverlongCache()
        twin.layers = [copy.copy(layer) for layer in self.layers]
        return twin

    @property
    def state(self) -> State | None:
        return stream_layer(self).state


def stream_layer(cache: Any) -> StreamLayer:
    """The layer that holds the state; a fresh `DynamicCache` is given one."""
    first = cache.layers[0] if isinstance(cache, Cache) and cache.layers else None
    if isinstance(first, StreamLayer):
        return first
    if type(cache) is DynamicCache and cache.get_seq_length() == 0:
        layer = StreamLayer()
        cache.layers[:] = [layer]
        return layer
    raise ValueError(
        f"the cache must be an EverlongCache or an unused DynamicCache, got "
        f"{type(cache).__name__}: this model keeps a State, not keys and values"
    )
