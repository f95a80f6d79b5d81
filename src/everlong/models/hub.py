"""THE bridge to Hugging Face transformers: the model class, its cache, the Auto registration.

Nothing but this and what `extend` stands on (decoders, pretrained, wrap) touches transformers'
internals, so what changes there ends here. B batch, T time, D hidden_size, V vocab_size.
"""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from everlong import state as states
from everlong.models.config import EverlongConfig
from everlong.models.decoder import build_body
from everlong.models.decoders import CACHE_NAME
from everlong.models.language import StreamModel
from everlong.state import State
from everlong.stateful import Trace

_LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")
_REMEDIES = {
    "position_ids": "positions are counted by the state; mark padding in attention_mask, and give "
    "packed documents a row each",
    "output_hidden_states": "pass trace=everlong.Trace() to see inside",
    "output_attentions": "pass trace=everlong.Trace() to see inside",
}


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


class StreamForCausalLM(StreamModel, PreTrainedModel, GenerationMixin):
    """A language model over a stream, with two faces.

    `stream`, `score` and `advance` are functions (ids, state) -> (result, state), see
    `StreamModel`. `forward` and `generate` are Hugging Face's, with the state inside `cache`, which
    both take under its old name `past_key_values` too. Both faces read the same body and head.
    """

    _is_stateful = True  # transformers then refuses assisted decoding

    @can_return_tuple
    def forward(  # noqa: PLR0913 (two of them are one: old names stay)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        trace: Trace | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], or of the last `logits_to_keep` columns; the loss of `labels` [B, T],
        which are shifted here; the cache, moved on by this call's columns unless `use_cache=False`.

        attention_mask [B, columns]: 1 = a real token. It may cover the columns read before: only
        this call's are used. Masked positions leave the state alone and have logits 0.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds: exactly one of them")
        for key, value in kwargs.items():
            if key not in _LOSS_OPTIONS and value is not None and value is not False:
                remedy = _REMEDIES.get(key, "leave it out")
                raise ValueError(f"{type(self).__name__} does not take {key}: {remedy}")
        x = input_ids if inputs_embeds is None else inputs_embeds
        assert x is not None
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = _one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = EverlongCache()
        layer = None if cache is None else stream_layer(cache)
        state = None if layer is None else layer.state
        hidden, state = self.body(x, state, _columns(attention_mask, x.shape[1]), trace)
        if use_cache and layer is not None:
            layer.advance(state, x.shape[1])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            options = {key: kwargs[key] for key in _LOSS_OPTIONS if key in kwargs}
            loss = self.loss_function(logits, labels, self.config.vocab_size, **options)
        held: Any = {CACHE_NAME: cache if use_cache else None}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **held)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} does not apply to {type(self).__name__}: its state "
                "is already as small as its memory makes it; leave the option out"
            )
        if getattr(generation_config, "is_assistant", False):
            raise ValueError("a state cannot be rolled back, so this model cannot be an assistant")
        cache = _one_cache(
            model_kwargs.pop("cache", None), model_kwargs.pop("past_key_values", None)
        )
        if generation_config.use_cache is False:
            if cache is not None:
                raise ValueError("use_cache=False re-reads everything: leave out the cache")
            return
        if cache is None:
            model_kwargs[CACHE_NAME] = EverlongCache()
            return
        model_kwargs[CACHE_NAME] = cache
        super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if copies > 1 and stream_layer(cache).batch_size == batch_size:
            cache.batch_repeat_interleave(copies)

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, **kwargs
    ):
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError(
                "the cache has already read as many tokens as you gave: give the whole "
                "sequence with its new tokens, or EverlongCache(cache.state) and the new ones alone"
            )
        return super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class EverlongForCausalLM(StreamForCausalLM):
    """A model of our own, built from an `EverlongConfig`: see `StreamForCausalLM`."""

    config_class = EverlongConfig
    base_model_prefix = "body"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "body.embed.weight"}
    _built = False
    config: EverlongConfig

    def __init__(self, config: EverlongConfig):
        config.check()
        super().__init__(config)
        self.body = build_body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._built = True

    def get_input_embeddings(self) -> nn.Module:
        return self.body.get_submodule("embed")

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.body.embed = value

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Building a model initialises it; what a checkpoint lacks comes from one built afresh."""
        if not self._built:
            return
        tensors = [*self.named_parameters(), *self.named_non_persistent_buffers()]
        absent = [name for name, each in tensors if not getattr(each, "_is_hf_initialized", False)]
        if absent:
            fresh = type(self)(copy.deepcopy(self.config))
            for name in absent:
                self.get_parameter_or_buffer(name).copy_(fresh.get_parameter_or_buffer(name))


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """A cache under its name or its old one."""
    if cache is not None and past_key_values is not None:
        raise ValueError("past_key_values is the old name of cache: give one of them")
    return past_key_values if cache is None else cache


def _columns(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """This call's part of a mask [B, columns] that may cover the columns of earlier calls."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must be [B, columns] with the {length} columns of this call last, "
            f"got {list(attention_mask.shape)}"
        )
    return attention_mask[:, -length:].bool()


AutoConfig.register("everlong", EverlongConfig, exist_ok=True)
AutoModelForCausalLM.register(EverlongConfig, EverlongForCausalLM, exist_ok=True)
