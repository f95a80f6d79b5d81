"""From a recipe to texts, a tokenizer, a model and its memory-less twin."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from everlong import EverlongConfig
from everlong.errors import UserError
from everlong.models.sizing import build, with_parameters
from everlong.recipes import Data, Recipe
from everlong.tasks.text import (
    BOS,
    VOCAB_SIZE,
    Documents,
    in_contexts,
    load_documents,
    split,
    tokenize,
)
from everlong.training.config import TrainConfig, choose_device
from everlong.training.distributed import group_of


@dataclass(frozen=True)
class Texts:
    """tokenizer: None for bytes."""

    train: Documents
    validation: Documents
    tokenizer: Any = None


def load_texts(data: Data) -> Texts:
    """Both sides of the split, as ids of the tokenizer if there is one."""
    train, validation = split(load_documents(data.source), data.validation)
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    if tokenizer is not None:
        train, validation = tokenize(train, tokenizer), tokenize(validation, tokenizer)
    if data.context:
        train, validation = (in_contexts(side, data.context) for side in (train, validation))
    return Texts(train, validation, tokenizer)


def load_tokenizer(path: str | Path) -> Any:
    """A Hugging Face tokenizer: its folder, or its tokenizer.json. Nothing is downloaded."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(path)
    if not path.exists():
        raise UserError(
            f"no tokenizer at {path}: give a folder or a tokenizer.json on this machine"
        )
    try:
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{path} holds no tokenizer that can be read: {error}") from error


def model_config(recipe: Recipe, texts: Texts) -> EverlongConfig:
    """The recipe's model with the vocabulary of its texts."""
    options = dict(recipe.model)
    options["segment"] = (
        options.get("segment") or None
    )  # TOML has no null: an empty section is none
    if texts.tokenizer is not None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        options |= {name: getattr(texts.tokenizer, name) for name in names}
        options |= {"vocab_size": texts.train.vocab_size, "bos_token_id": texts.train.bos}
    try:
        config = EverlongConfig(**options)
    except (ValueError, TypeError) as error:  # of wrong types, transformers raises TypeErrors too
        raise UserError(f"{recipe.origin}: [model] {' '.join(str(error).split())}") from error
    if texts.tokenizer is None and (config.vocab_size, config.bos_token_id) != (VOCAB_SIZE, BOS):
        raise UserError(f"{recipe.origin}: [model] without a tokenizer, vocab_size is {VOCAB_SIZE}")
    return config


def twin_config(config: EverlongConfig, segment_length: int) -> EverlongConfig:
    """A model of as many parameters that sees its own segment alone, and remembers nothing.

    The layers are those inside the segment memory, or attention where the layers are the memory.
    Parameters are matched by `intermediate_size`, to 1 %; `UserError` where that cannot be.
    """
    options = {name: getattr(config, name) for name in _SHARED}
    if config.segment is not None:
        options |= {"layers": config.layers, "mixers": config.mixers}
    options["segment"] = {"name": "no_memory", "segment_length": segment_length}
    try:
        return with_parameters(EverlongConfig(**options), build(config, 0).num_parameters())
    except UserError as error:
        raise UserError(f"no memory-less twin: {error}; or set twin = false") from error


def device_of(config: TrainConfig) -> torch.device:
    """Where a training would run; `UserError` for a device this machine lacks."""
    return choose_device(config.device, group_of(config.device))


_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
