"""`extend`: a pretrained causal language model is given a segment memory.

B batch, T time, D hidden_size, V vocab_size.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any, ClassVar, Literal, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from everlong import registry
from everlong.models.decoders import Head, cache_shapes, check_decoder
from everlong.models.hub import StreamForCausalLM
from everlong.models.pretrained import PretrainedCore
from everlong.segments.clock import SegmentMemory
from everlong.stack import Stack, StackConfig, Taps
from everlong.state import State
from everlong.stateful import Stateful, Trace


class ExtendedConfig(PreTrainedConfig):
    """base: the pretrained model's config as a dict; attention: its attn_implementation; memory:
    the segment memory's "name" and options; shapes: (heads, width) of keys and of values of each
    layer; ties: further names of weights that have several, and the first. `extend` writes it."""

    model_type = "everlong_extended"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    base: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    memory: dict[str, Any] = field(default_factory=dict)
    shapes: list[list[int]] = field(default_factory=list)
    ties: dict[str, str] = field(default_factory=dict)
    train: str = "all"
    vocab_size: int = 0
    hidden_size: int = 0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: a folder names the package's classes (`models.card`) and copies none."""


_HAS_ONE = ", which has a memory already"


class ExtendedBody(Stateful):
    """Ids [B, T] (or embeddings [B, T, D]) -> hidden states [B, T, D]: the decoder's embedding, and
    the memory around the decoder. The state is the memory's."""

    def __init__(self, memory: SegmentMemory):
        super().__init__()
        self.memory, self.period = memory, memory.period

    @property
    def core(self) -> PretrainedCore:
        core = self.memory.core
        assert isinstance(core, PretrainedCore)
        return core

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        return self.memory.init_state(batch_size, device=device, dtype=dtype)

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        hidden = x if x.is_floating_point() else self.core.decoder.get_input_embeddings()(x)
        return self.memory(hidden, state, trace=trace, lengths=lengths)


class ExtendedForCausalLM(StreamForCausalLM, GenerationMixin):
    """A pretrained causal language model with a segment memory around its decoder.

    Made by `extend`; `from_pretrained` loads what `save_pretrained` wrote, base and memory. Its
    faces are those of `StreamForCausalLM`.
    """

    config_class = ExtendedConfig
    base_model_prefix = "body"
    _built = False
    config: ExtendedConfig
    lm_head: Head

    def __init__(self, config: ExtendedConfig, model: PreTrainedModel | None = None):
        super().__init__(config)
        base = _build_base(config) if model is None else model
        decoder: Any = base.get_decoder()
        self.body = ExtendedBody(build_memory(config, decoder))
        self.lm_head = Head(base, decoder)
        if model is not None:
            config.ties = _shared_names(self)
            config.tie_word_embeddings = bool(config.ties)
        self._tied_weights_keys = config.ties
        self.post_init()
        self._built = True

    @property
    def core(self) -> PretrainedCore:
        return cast(ExtendedBody, self.body).core

    def memory_parameters(self) -> Iterator[nn.Parameter]:
        """What `extend` added: all that is not the pretrained model's."""
        base = set(map(id, self.core.decoder.parameters())) | set(
            map(id, self.lm_head.parameters())
        )
        return (each for each in self.body.parameters() if id(each) not in base)

    def get_input_embeddings(self) -> nn.Module:
        return self.core.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.core.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.embeddings

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.model.set_output_embeddings(new_embeddings)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Of the model as it stands: the parts' own names for it do not hold here."""
        return dict(self.config.ties) if self.config.tie_word_embeddings else {}

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Building a model initialises it; what a checkpoint lacks, each part makes afresh."""
        if not self._built:
            return
        for part in (self.core.decoder, self.lm_head.model):
            part.initialize_weights()
        ours = "body.memory."
        tensors = [*self.named_parameters(), *self.named_non_persistent_buffers()]
        absent = [
            name.removeprefix(ours)
            for name, each in tensors
            if name.startswith(ours) and not getattr(each, "_is_hf_initialized", False)
        ]
        absent = [name for name in absent if not name.startswith("core.decoder.")]
        fresh = build_memory(self.config, self.core.decoder) if absent else self.core
        for name in absent:
            self.get_parameter_or_buffer(ours + name).copy_(_tensor(fresh, name))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it; what `extend` froze is frozen again."""
        found = super().from_pretrained(*args, **kwargs)
        (found[0] if isinstance(found, tuple) else found).freeze()
        return found

    def freeze(self) -> None:
        """Let train what `config.train` says: "memory", or "all"."""
        if self.config.train == "memory":
            self.requires_grad_(False)
            for parameter in self.memory_parameters():
                parameter.requires_grad_(True)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        if any(".base_layer." in name for name, _ in self.named_parameters()):
            raise ValueError(
                "adapters are inside the base model: merge them first (merge_and_unload of the "
                "peft model), or put them on a saved extended model and save them alone"
            )
        super().save_pretrained(*args, **kwargs)


def extend(
    model: PreTrainedModel,
    name: str,
    *,
    train: Literal["memory", "all"] = "memory",
    **options: Any,
) -> ExtendedForCausalLM:
    """Give a pretrained causal language model the segment memory `name`.

    `options` are those of the memory (`segment_length`, ...); its width and heads are the model's
    unless given. train: "memory" freezes the pretrained weights, "all" trains everything; the
    choices of a peft model that is given stand. The modules of `model` are used, not copied.

    Raises `ValueError` for memories that bring their own layers, segments longer than the model's
    positions, and models whose logits this way of calling them does not reproduce: that is tried
    on a few tokens.
    """
    if train not in ("memory", "all"):
        raise ValueError(f"train is {train!r}: use 'memory' or 'all'")
    adapted = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    base: Any = model.get_base_model() if adapted else model  # pyright: ignore
    if not isinstance(base, PreTrainedModel) or isinstance(base, StreamForCausalLM):
        raise ValueError(
            f"extend takes a pretrained causal language model of transformers, not "
            f"{type(base).__name__}{_HAS_ONE if isinstance(base, StreamForCausalLM) else ''}"
        )
    if base.get_output_embeddings() is None:
        raise ValueError(f"{type(base).__name__} has no language model head: load it for causal LM")
    training = base.training
    base.eval()
    extended = ExtendedForCausalLM(_config(base, name, options), base)
    weight = cast(nn.Embedding, base.get_input_embeddings()).weight
    extended.to(device=weight.device, dtype=weight.dtype)  # pyright: ignore
    _resemble(extended)
    _check(extended, base)
    if adapted:  # what is trained of the base is peft's choice
        for parameter in extended.memory_parameters():
            parameter.requires_grad_(True)
    else:
        extended.config.train = train
        extended.requires_grad_(True)
        extended.freeze()
    extended.generation_config = copy.deepcopy(base.generation_config)
    extended.generation_config.cache_implementation = None
    return extended.train(training)


def _config(model: PreTrainedModel, name: str, options: Mapping[str, Any]) -> ExtendedConfig:
    """The config of `model` extended by the memory `name`."""
    decoder: Any = model.get_decoder()
    config = decoder.config
    entry = registry.memory_entry(name)
    if entry.room != "segments":
        raise ValueError(
            f"{name} lives in {entry.room}/ and is no segment memory: choose from "
            f"{', '.join(_around_decoders())}"
        )
    width, heads = config.hidden_size, config.num_attention_heads
    heads = next(each for each in range(heads, 0, -1) if width % (2 * each) == 0)
    memory = {"hidden_size": width, "num_heads": heads, **options}
    needs = _needs(entry, registry.build_config(entry, memory))
    check_decoder(decoder, needs[0])
    base = {k: v for k, v in model.config.to_dict().items() if k not in ("dtype", "torch_dtype")}
    tokens: dict[str, Any] = {
        name: getattr(config, name, None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return ExtendedConfig(
        base=base | {"architectures": [type(model).__name__]},
        attention=config._attn_implementation,
        memory={"name": name, **memory},
        shapes=cache_shapes(decoder),
        vocab_size=config.vocab_size,
        hidden_size=width,
        **tokens,
    )


def _around_decoders() -> list[str]:
    """The segment memories whose core may be any stack."""
    entries = map(registry.memory_entry, registry.list_memories(room="segments"))
    plain = StackConfig(8, 1)
    return [
        each.name
        for each in entries
        if type(each.cls.make_core(each.config(8, 1, **each.small), plain)) is Stack
    ]


def _needs(entry: registry.Entry, config: Any) -> tuple[int, int]:
    """Positions that this memory's core reads between two wipes, and slots that its blocks read.

    Both are what the memory says of a stack of our own."""
    with torch.device("meta"):
        core = entry.cls.make_core(config, StackConfig(config.hidden_size, config.num_heads))
    if type(core) is not Stack:
        raise ValueError(
            f"{entry.name} brings its own layers and cannot go around a decoder: choose from "
            f"{', '.join(_around_decoders())}"
        )
    if core.config.capacity is None:
        raise ValueError(f"{entry.name} as configured never wipes its core: a decoder is wiped")
    reads = any(block.reader is not None for block in core.blocks)
    return core.config.capacity, config.num_slots if reads else 0


def build_memory(config: ExtendedConfig, decoder: PreTrainedModel) -> SegmentMemory:
    """The memory of a config, around this decoder."""
    options = {key: value for key, value in config.memory.items() if key != "name"}
    entry = registry.memory_entry(config.memory["name"])
    memory = registry.build_config(entry, options)
    capacity, num_slots = _needs(entry, memory)
    return entry.cls(memory, PretrainedCore(decoder, capacity, config.shapes, num_slots))


def _build_base(config: ExtendedConfig) -> PreTrainedModel:
    """A model of the base's class and shape, without its weights."""
    options = dict(config.base)
    kind, (architecture,) = options.pop("model_type"), options["architectures"]
    base = AutoConfig.for_model(kind, **options)
    base._attn_implementation = config.attention
    base.get_text_config().vocab_size = config.vocab_size
    cls = getattr(transformers, architecture, None)
    return AutoModelForCausalLM.from_config(base) if cls is None else cls(base)


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def _shared_names(module: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several: {name: first name}."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    return found


@torch.no_grad()
def _resemble(extended: ExtendedForCausalLM) -> None:
    """What the memory lets the decoder read starts at the size of the decoder's embeddings."""
    embed = cast(nn.Embedding, extended.get_input_embeddings())
    ids = torch.arange(min(len(embed.weight), 4096), device=embed.weight.device)
    embeddings = embed(ids).float()  # some decoders scale them here
    if extended.core.prefix is not None:
        extended.core.prefix.resemble(embeddings)
    for tokens in cast(ExtendedBody, extended.body).memory.learned_tokens():
        tokens.normal_(std=float(embeddings.std()))


@torch.no_grad()
def _check(extended: ExtendedForCausalLM, base: PreTrainedModel) -> None:
    """`ValueError` unless head, cache, masks and taps do on a few tokens what the model does."""
    core, name = extended.core, type(base).__name__
    length = min(core.capacity, 6)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(extended.config.vocab_size, (2, length), generator=generator)
    ids = ids.to(next(core.parameters()).device)
    try:
        wanted = base(input_ids=ids, use_cache=False).logits
        hidden = core.decoder(input_ids=ids, use_cache=False).last_hidden_state
        x = extended.get_input_embeddings()(ids)
        lengths = torch.tensor([1, length // 2], device=ids.device)
        seen: list[int] = []
        taps = Taps(lambda i, x: (seen.append(i), x)[1], lambda i, y: seen.append(i))
        whole, _ = core(x, taps=taps)
        _, state = core(x[:, : max(lengths)], lengths=lengths)
        rest = [torch.cat([row[n:], row[:n]]) for row, n in zip(x, lengths, strict=True)]
        late, _ = core(torch.stack(rest), state, lengths=length - lengths)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{name} cannot be wrapped: {error}") from error
    rows = zip(whole, late, lengths, strict=True)
    late = [torch.cat([row[:n], later[: length - n]]) for row, later, n in rows]
    found = {
        "logits from its hidden states": (extended.lm_head(hidden), wanted),
        "hidden states from embeddings and a cache": (whole, hidden),
        "hidden states of rows at different places": (torch.stack(late), hidden),
    }
    tolerance = 0.05 if hidden.dtype in (torch.bfloat16, torch.float16) else 1e-3
    for what, (got, value) in found.items():
        size = value.float().abs().max()
        if got.shape != value.shape or not (got - value).abs().max() <= tolerance * size:
            raise ValueError(f"{name} cannot be wrapped: its {what} are not its own")
    if seen != [i for i in range(core.num_layers) for _ in range(2)]:
        raise ValueError(f"{name} cannot be wrapped: its layers do not run once each, in order")


AutoConfig.register("everlong_extended", ExtendedConfig, exist_ok=True)
AutoModelForCausalLM.register(ExtendedConfig, ExtendedForCausalLM, exist_ok=True)
