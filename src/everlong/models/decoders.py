"""What must be known of a pretrained decoder to call it as a core, found by asking it.

B batch, T time, D hidden_size, V vocab_size.
"""

import copy
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

FULL, SLIDING = "full_attention", "sliding_attention"
# as a keyword of models and a field of their outputs; transformers 5.24 renamed it
CACHE_NAME = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"


def decoder_layers(decoder: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers: its outermost list of num_hidden_layers modules."""
    number = decoder.config.num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ValueError(f"{type(decoder).__name__} has no ModuleList of its {number} layers")


def checkpoints_gradients(decoder: PreTrainedModel) -> bool:
    return any(getattr(each, "gradient_checkpointing", False) for each in decoder.modules())


def sliding_window(config: Any) -> int | None:
    """The window (tokens) of the layers that have one."""
    return getattr(config, "sliding_window", None)


def attention_kinds(config: Any) -> str | tuple[str, ...]:
    """The kind of all layers' masks, or the kinds that the decoder chooses from, by name."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if SLIDING in kinds:
        return (FULL, SLIDING)
    if kinds or sliding_window(config) is None:
        return FULL
    return SLIDING


def max_positions(config: Any) -> int | None:
    """Positions at which the decoder's embeddings of positions do not depend on how many follow."""
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        limit = rope.get("original_max_position_embeddings") or limit
    return limit


def check_decoder(decoder: PreTrainedModel, capacity: int) -> None:
    """`ValueError` with the remedy for a decoder that cannot be a core."""
    config, name = decoder.config, type(decoder).__name__
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise ValueError(f"{name} reads an encoder: give a decoder-only model")
    takes = signature(decoder.forward).parameters
    for needed in ("inputs_embeds", "attention_mask", "position_ids", CACHE_NAME):
        if needed not in takes:
            raise ValueError(f"{name} takes no {needed}: give an attention decoder that does")
    others = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if others:
        raise ValueError(
            f"{name} has {', '.join(sorted(others))} layers: only full and sliding attention can "
            "be wrapped"
        )
    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation {config._attn_implementation!r} takes no mask of ours: load the "
            'model with attn_implementation="sdpa" (or "eager")'
        )
    limit = max_positions(config)
    if limit is not None and capacity > limit:
        raise ValueError(
            f"a segment and its memory tokens are {capacity} positions and {name} has {limit}: "
            "lower segment_length (or the number of memory tokens)"
        )


@torch.no_grad()
def cache_shapes(decoder: PreTrainedModel) -> list[list[int]]:
    """(heads, width) of the keys and of the values of each layer, found by reading two tokens."""
    cache = DynamicCache()
    weight: Any = decoder.get_input_embeddings().weight
    decoder(inputs_embeds=weight[None, :2], use_cache=True, **{CACHE_NAME: cache})
    shapes = []
    for layer in cache.layers:
        k, v = getattr(layer, "keys", None), getattr(layer, "values", None)
        if k is None or v is None or k.dim() != 4 or v.dim() != 4 or k.shape[2] != 2:
            raise ValueError(f"{type(decoder).__name__} caches other things than keys and values")
        shapes.append([k.shape[1], k.shape[3], v.shape[1], v.shape[3]])
    if len(shapes) != decoder.config.num_hidden_layers:
        raise ValueError(
            f"{type(decoder).__name__} caches {len(shapes)} of its "
            f"{decoder.config.num_hidden_layers} layers: layers that share keys cannot be wrapped"
        )
    return shapes


class _Output(BaseModelOutputWithPast):
    """What a decoder returns; what it returns besides (a router's logits) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Given(nn.Module):
    """Stands in a decoder's place and returns what it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        return _Output(last_hidden_state=inputs_embeds)  # pyright: ignore[reportArgumentType]


class Head(nn.Module):
    """Hidden states [B, T, D] -> logits [B, T, V], as the pretrained model does it.

    `model` is that model with `Given` in its decoder's place, so that whatever it does to hidden
    states and logits (biases, transforms, soft caps, scales) is done by its own code.
    """

    def __init__(self, model: PreTrainedModel, decoder: nn.Module):
        super().__init__()
        output = model.get_output_embeddings()
        self.output = next(name for name, each in model.named_modules() if each is output)
        self.model = _without(model, decoder)

    @property
    def embeddings(self) -> nn.Module:
        return self.model.get_submodule(self.output)

    @property
    def weight(self) -> Tensor:
        return self.embeddings.get_parameter("weight")

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model(inputs_embeds=hidden, use_cache=False).logits


def _without(module: Any, part: nn.Module) -> Any:
    """A copy of `module` that shares everything with it but has `Given` in the place of `part`."""
    if module is part:
        return Given()
    if not any(each is part for each in module.modules()):
        return module
    twin = copy.copy(module)
    twin._modules = {name: _without(each, part) for name, each in module._modules.items()}
    return twin
