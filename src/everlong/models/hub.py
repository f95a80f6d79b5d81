"""THE bridge to Hugging Face transformers: the model class, its files, the Auto registration.

Nothing but this, its `cache` and what `extend` stands on (decoders, pretrained, wrap) touches
transformers' internals, so what changes there ends here.
B batch, T time, D hidden_size, V vocab_size.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from everlong.models import card
from everlong.models.cache import EverlongCache, StreamLayer, stream_layer
from everlong.models.config import EverlongConfig
from everlong.models.decoder import build_body
from everlong.models.decoders import CACHE_NAME
from everlong.models.language import StreamModel
from everlong.stateful import Trace

__all__ = ["EverlongCache", "EverlongForCausalLM", "StreamForCausalLM", "StreamLayer"]

_LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")
_IGNORED = -100  # transformers' label of what is not scored
_FOR_GENERATE = ("tokenizer", "assistant_tokenizer")
_REMEDIES = {
    "position_ids": "positions are counted by the state; mark padding in attention_mask, and give "
    "packed documents a row each",
    "output_hidden_states": "pass trace=everlong.Trace() to see inside",
    "output_attentions": "pass trace=everlong.Trace() to see inside",
}


class StreamForCausalLM(StreamModel, PreTrainedModel, GenerationMixin):
    """A language model over a stream, with two faces.

    `stream`, `score` and `advance` are functions (ids, state) -> (result, state), see
    `StreamModel`. `forward` and `generate` are Hugging Face's, with the state inside `cache`, which
    both take under its old name `past_key_values` too. Both faces read the same body and head.
    """

    _is_stateful = True  # transformers then refuses assisted decoding
    _no_split_modules: ClassVar[Any] = ["Decoder", "MemformerEncoderDecoder", "ExtendedBody"]
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

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
        which are shifted here and not counted right behind padding; the cache, moved on by this
        call's columns unless `use_cache=False`.

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
        mask = _columns(attention_mask, x.shape[1])
        hidden, state = self.body(x, state, mask, trace)
        if use_cache and layer is not None:
            layer.advance(state, x.shape[1])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            options = {key: kwargs[key] for key in _LOSS_OPTIONS if key in kwargs}
            share, ignored = 1.0, options.get("ignore_index", _IGNORED)
            if mask is not None:
                asked, labels = labels, foretold(labels, mask, ignored)
                if options.get("num_items_in_batch") is not None:  # which counts all labels
                    share = share_foretold(asked, labels, ignored)
            loss = self.loss_function(logits, labels, self.config.vocab_size, **options) / share
        held: Any = {CACHE_NAME: cache if use_cache else None}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **held)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        given = model_kwargs.get("attention_mask")
        if given is not None and given.dim() == 2 and not given[:, -1].all():
            raise ValueError("a row ends in padding: pad prompts on the left, padding_side='left'")
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
        for each in _FOR_GENERATE:  # transformers hands them on to every model
            kwargs.pop(each, None)
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

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "continuous batching pages keys and values, and this model keeps a State: give "
            'generate a left-padded batch, without cache_implementation="paged"'
        )

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """What `gradient_checkpointing_enable` and its newer name set: whatever can be recomputed
        (a `recompute` of its own) is, in training; of the layers every n-th."""
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant"):
            raise ValueError(
                "a reentrant checkpoint loses the gradients of the state: give "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        parts: list[Any] = [each for each in self.modules() if hasattr(each, "recompute")]
        for index, part in enumerate(parts):
            chosen = enable and index % every_n_layers == 0
            part.recompute = gradient_checkpointing_func if chosen else None
        self.gradient_checkpointing = enable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether it is switched on. peft asks by this name, of which transformers' own warns."""
        return self.gradient_checkpointing

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it. `ValueError` for a device map that puts weights on the disk, or
        on the CPU of a model that runs elsewhere: states are made of them."""
        found = super().from_pretrained(*args, **kwargs)
        model: Any = found[0] if isinstance(found, tuple) else found
        if any(each.is_meta for each in model.parameters()):
            raise ValueError(
                "the device map offloads weights, and a state is made of them: give a device that "
                'holds the whole model, such as device_map="cpu"'
            )
        return found

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As transformers does it. The folder also gets a model card, unless it has a README.md,
        and the file by which `trust_remote_code=True` finds the installed package."""
        folder = Path(save_directory)
        if is_main_process and not folder.is_file():  # a file is refused by transformers
            folder.mkdir(parents=True, exist_ok=True)
            card.write(self, folder)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: folders hold a file that names the package, not a copy of this one."""


class EverlongForCausalLM(StreamForCausalLM, GenerationMixin):
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


def foretold(labels: Tensor, mask: Tensor, ignored: int = _IGNORED) -> Tensor:
    """Labels [B, T] without those right behind a masked position, which foretells nothing."""
    behind = F.pad(~mask.bool()[:, :-1], (1, 0), value=False)
    return labels.masked_fill(behind, ignored)


def share_foretold(labels: Tensor, kept: Tensor, ignored: int = _IGNORED) -> Tensor:
    """Of the labels that have a position before them, those that are kept; 1 where none is."""
    every, found = ((each[:, 1:] != ignored).sum() for each in (labels, kept))
    return torch.where(found > 0, found / every.clamp(min=1), 1.0)


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
