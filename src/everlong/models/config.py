"""EverlongConfig: one JSON that names a model's layers, their options and its segment memory."""

from collections.abc import Mapping
from dataclasses import field, fields
from itertools import cycle, islice
from typing import Any, ClassVar

from transformers import GenerationConfig, PreTrainedConfig

from everlong import registry

# transformers' own keywords that resemble fields of ours
_THEIRS = {"num_labels", "attn_implementation", "experts_implementation", "output_attentions"}
_MOST_LAYERS = 1 << 16
_BYTE_IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


class EverlongConfig(PreTrainedConfig):
    """The shape of an everlong language model.

    `layers` names the mixer of each layer, in order; "name*3" stands for three, and the pattern
    repeats up to `num_layers`. `mixers` holds options by mixer name, `segment` the options of the
    memory around the whole stack under its "name", or None: in both, whatever `create_memory`
    takes, with the model's width and heads as defaults. `intermediate_size` None is 8/3 of
    `hidden_size` in multiples of 32. The default vocabulary is bytes: 0-255, then bos, eos, pad; in
    a smaller vocabulary those three default to None.

    `num_hidden_layers` and `num_attention_heads` are other spellings of `num_layers` and
    `num_heads`. Raises `ValueError` for both spellings at once, for a keyword close to one of
    these, for unknown memories and options and for impossible sizes. Fields may be edited before a
    model is built: the model calls `check` again.
    """

    model_type = "everlong"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    vocab_size: int = 259
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    layers: list[str] = field(default_factory=lambda: ["attention"])
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    segment: dict[str, Any] | None = None
    intermediate_size: int | None = None
    dropout: float = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 256
    eos_token_id: int | list[int] | None = 257
    pad_token_id: int | None = 258

    def __new__(cls, *_: Any, **options: Any) -> "EverlongConfig":
        # here, because behind it a field that was given looks like one left to its default
        for alias, name in cls.attribute_map.items():
            if alias in options and name in options:
                raise ValueError(f"{alias} is another spelling of {name}: give one of them")
        return super().__new__(cls)

    def __post_init__(self, **others: Any) -> None:
        for key in others:
            self._refuse_near_miss(key)
        self.layers = [self.layers] if isinstance(self.layers, str) else self.layers
        self.mixers = {} if self.mixers is None else self.mixers
        self._check_types()
        self.layers = list(self.layers)
        super().__post_init__(**others)
        for name, value in _BYTE_IDS.items():
            if getattr(self, name) == value >= self.vocab_size:
                setattr(self, name, None)
        self.check()

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: a folder names the package's classes (`models.card`) and copies none."""

    def _refuse_near_miss(self, key: str) -> None:
        known = key in _THEIRS or key in self.attribute_map or hasattr(type(self), key)
        if known or key.startswith("_"):
            return
        inherited = {each.name for each in fields(PreTrainedConfig)}
        ours = [each.name for each in fields(self) if each.name not in inherited]
        meant = registry.suggest(key, [*ours, *self.attribute_map])
        if meant and key not in GenerationConfig().to_dict():  # popped by transformers
            raise ValueError(f"EverlongConfig has no field {key!r}{meant}")

    @property
    def layer_names(self) -> list[str]:
        """The mixer of each of the `num_layers` layers."""
        pattern = [name for item in self.layers for name in _expand(item)]
        if len(pattern) > self.num_layers:
            raise ValueError(
                f"layers names {len(pattern)} mixers and num_layers is {self.num_layers}: "
                "raise num_layers or shorten the pattern"
            )
        return list(islice(cycle(pattern), self.num_layers))

    def check(self) -> None:
        """`ValueError` with the remedy for what no model could be built from."""
        self._check_types()
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size"):
            value = getattr(self, name)
            if name == "intermediate_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
            most = _MOST_LAYERS if name == "num_layers" else registry.LARGEST
            if value > most:
                raise ValueError(f"{name} is {value}: give at most {most}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into num_heads {self.num_heads}"
            )
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        for name in ("tie_word_embeddings", "use_cache"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        self._check_special_tokens()
        if not self.layers:
            raise ValueError('layers is empty: name at least one mixer, such as ["attention"]')
        for name in dict.fromkeys([*self.layer_names, *self.mixers]):
            self._check_memory(name, self.mixers.get(name, {}), "mixers", f"mixers[{name!r}]")
        if self.segment is not None:
            self._check_segment(self.segment)

    def _check_types(self) -> None:
        """What is computed with before or during `check`."""
        if not isinstance(self.layers, list | tuple):
            raise ValueError(
                f'layers must be a list of names, such as ["attention"], got {self.layers!r}'
            )
        if not isinstance(self.mixers, Mapping):
            raise ValueError(
                "mixers must be a table of options by mixer, such as "
                f'{{"sliding_attention": {{"window": 64}}}}, got {self.mixers!r}'
            )
        if type(self.vocab_size) is not int or self.vocab_size < 1:
            raise ValueError(
                f"vocab_size must be a whole number of at least 1, got {self.vocab_size!r}"
            )
        for name in _BYTE_IDS:
            value = getattr(self, name)
            many = name == "eos_token_id" and isinstance(value, list | tuple)
            if any(type(token) not in (int, type(None)) for token in (value if many else [value])):
                raise ValueError(f"{name} must be a token id (a whole number), got {value!r}")

    def _check_special_tokens(self) -> None:
        for name in _BYTE_IDS:
            value = getattr(self, name)
            for token in value if isinstance(value, list | tuple) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"{name} {token} is not in a vocabulary of {self.vocab_size}: "
                        "give an id below vocab_size, or None"
                    )

    def _check_segment(self, segment: Any) -> None:
        if not isinstance(segment, Mapping) or "name" not in segment:
            raise ValueError(
                'segment must be None or a table with a "name" and options, such as '
                f'{{"name": "memformer", "segment_length": 256}}; got {segment!r}'
            )
        if not isinstance(segment["name"], str):
            raise ValueError(f"the segment's name must be a string, got {segment['name']!r}")
        options = {key: value for key, value in segment.items() if key != "name"}
        self._check_memory(segment["name"], options, "segments", "segment")
        if options.get("encoder_layers") and self.bos_token_id is None:
            raise ValueError("the encoder-decoder starts every segment with bos: give bos_token_id")

    def _check_memory(self, name: str, options: Any, room: str, where: str) -> None:
        entry = registry.memory_entry(name)
        if entry.room != room:
            role = "a layer" if room == "mixers" else "the segment memory"
            raise ValueError(
                f"{name} cannot be {role}: choose from "
                f"{', '.join(registry.list_memories(room=room))}"
            )
        if not isinstance(options, Mapping):
            raise ValueError(f"{where} must be a table of options, got {options!r}")
        sizes = {"hidden_size": self.hidden_size, "num_heads": self.num_heads}
        if "layer_index" in entry.fields and (options.keys() & {"layer_index", "num_layers"}):
            raise ValueError(
                f"{where}: a model fills in layer_index and num_layers, leave them out"
            )
        registry.build_config(entry, {**sizes, **options})


def _expand(item: Any) -> list[str]:
    """`"name*3"` -> three times the name."""
    if not isinstance(item, str):
        raise ValueError(f'layers holds names such as "attention" or "attention*3", got {item!r}')
    name, star, times = item.partition("*")
    if not star:
        return [item]
    if not times.strip().isdecimal() or not 1 <= int(times) <= _MOST_LAYERS:
        raise ValueError(f"{item!r} in layers: behind the star stands a number, such as {name}*3")
    return [name.strip()] * int(times)
